"""What the last bits depend on besides the settings: recorded by everything that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from puma.distribute import Devices, processor
from puma.scoring.settings import environment as of_scoring
from puma.training.recipe import load_recipe
from puma.training.run import environment as of_training
from puma.training.run import open_folder

CPU = torch.device("cpu")


def test_training_and_scoring_record_the_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9000")
    assert processor(CPU) == "AVX9000"
    assert of_training(Devices(accelerator="cpu"))["processor"] == "AVX9000"
    assert of_scoring(CPU)["device"] == "cpu AVX9000"


def test_a_run_names_another_processor_and_says_nothing_of_what_it_does_not_know(tmp_path: Path) -> None:
    settings, now = (load_recipe("digits"), {"seed": 0}), of_training(Devices(accelerator="cpu"))
    assert open_folder(tmp_path, *settings, now) == []
    assert open_folder(tmp_path, *settings, now | {"processor": "AVX9000"}) == [
        f"processor: {now['processor']!r} there, 'AVX9000' now"
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    del record["environment"]["processor"], record["checksum"]  # as earlier versions wrote it
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert open_folder(tmp_path, *settings, now) == []
<<<<<<< HEAD


@pytest.mark.parametrize("before", ["AVX9000", None], ids=["another", "unknown"])
def test_a_diffusion_training_does_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: str | None
) -> None:
    real, config = load_dataset("digits?subset=40"), DiffusionConfig(width=16, blocks=1, steps=4, batch_size=8)
    take_step = diffusion_training._step

    def stopped(state, *arguments):
        if state.step == 3:
            raise KeyboardInterrupt
        return take_step(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion_training, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(real, tmp_path, config=config, checkpoint_every=2)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with safe_open(checkpoint, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    made = json.loads(metadata["wanted"])
    here = made.pop("processor")
    made |= {} if before is None else {"processor": before}
    save_file(tensors, checkpoint, metadata | {"wanted": json.dumps(made)})
    with caplog.at_level(logging.WARNING, "puma"):
        train_diffusion(real, tmp_path, config=config)
    assert (tmp_path / "model.safetensors").is_file()
    assert ("processor is" in caplog.text) == (before is not None)
    assert before is None or f"processor is 'AVX9000', not '{here}'" in caplog.text
=======
>>>>>>> 6eb9a05 (Generation: the UNet of diffusers, one Sampler, shards and settings through puma.io; checksum beside the images; sample, not draw)
