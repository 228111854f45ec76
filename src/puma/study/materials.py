"""What the cells of a study share: pools, test images, networks."""

from __future__ import annotations

import torch
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source
from puma.devices import resolve_device
from puma.generation import diffusion_config, generate, measure
from puma.io import write_json
from puma.models.networks import build_model
from puma.study.folder import StudyFolder


def make_synthetic(study: StudyFolder, show: bool) -> dict[str, object]:
    """Generate the study's synthetic images, if it makes its own, and measure how good they are."""
    pool = study.spec.pool
    if not isinstance(pool.synthetic, int):
        return {}
    real, test = load_dataset(pool.real), load_dataset(pool.test)
    config = diffusion_config(real.image_shape, **pool.diffusion)
    generate(
        real, pool.synthetic, out=study.synthetic_file, config=config, seed=0, device=study_device(), progress=show
    )
    quality = measure(real, test, load_dataset(study.synthetic_file))
    write_json(study.path / "synthetic" / "quality.json", quality)
    return {"quality": quality}


def study_device() -> torch.device:
    """Where a study computes: on a GPU if one is visible, as training does by itself."""
    return resolve_device("auto")


def on_device(model: nn.Module) -> nn.Module:
    """A model moved to where the study computes; training and files leave it on the CPU."""
    return model.to(study_device())


def load_pool(study: StudyFolder, synthetic: int | None) -> Pool:
    """The pool of the study, or one with a stratified subset of ``synthetic`` of its synthetic images."""
    pool = study.spec.pool
    specs = [str(study.synthetic_file)] if isinstance(pool.synthetic, int) else list(pool.synthetic)
    sources = [load_dataset(pool.real)]
    if synthetic is None:
        sources += [load_dataset(spec) for spec in specs]
    elif synthetic:
        sources.append(load_dataset(specs, subset=synthetic, seed=0))
    return Pool(sources)


def load_test(study: StudyFolder) -> Source:
    """The test images."""
    return load_dataset(study.spec.pool.test)


def new_network(study: StudyFolder, pool: Pool, seed: int) -> nn.Module:
    """A fresh network with weights drawn from ``seed``."""
    network = study.spec.network
    height, _, channels = pool.image_shape
    return build_model(
        network.name, pool.num_classes, in_channels=channels, image_size=height, seed=seed, **network.options
    )
