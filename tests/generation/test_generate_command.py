"""``puma generate`` as a user types it: results, and mistakes refused before any compute."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from puma.cli.generate import generate
from puma.data.load import load_dataset
from puma.errors import ModelError, PumaError, ResumeError, UsageError

APP = typer.Typer()
APP.command()(generate)
TINY = ["--set", "steps=2", "--set", "width=16", "--set", "blocks=1", "--set", "sampler.steps=2", "--quiet"]


def _puma(*arguments: str | Path) -> str:
    result = CliRunner().invoke(APP, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_train_sample_measure_then_sample_more(tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    told = _puma("digits", "--count", 60, "--out", out, "--eval-data", "digits:test", *TINY)
    assert f"60 images in {out}" in told
    assert "coverage by class" in told
    quality = json.loads((tmp_path / "made.quality.json").read_text())
    assert quality["sources"]["synthetic"]["rows"] == 60
    assert f"{quality['label_agreement']:.4f}" in told
    more = tmp_path / "more.npz"
    _puma("--model", tmp_path / "made.diffusion", "--count", 20, "--seed", 1, "--out", more, "--quiet")
    assert len(load_dataset(more)) == 20


@pytest.mark.shared
def test_real_images_of_32_pixels_with_the_unet(cifar10_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    small = ["width=8", "blocks=1", "steps=3", "batch_size=4", "label_dropout=0.2", "sampler.steps=2"]
    options = [argument for setting in small for argument in ("--set", setting)]
    options += ["--set", "sampler.guidance=2", "--quiet"]
    splits = [f"{cifar10_dir}?split={split}&subset=100" for split in ("train", "test")]
    told = _puma(splits[0], "--eval-data", splits[1], "--count", 20, "--out", out, *options)
    assert "64 principal components of the training images' 3072 pixels" in told
    made = load_dataset(out)
    assert made.image_shape == (32, 32, 3)
    np.testing.assert_array_equal(np.bincount(made.labels), 2)
    settings = json.loads((tmp_path / "made.diffusion" / "generated.json").read_text())
    assert settings["model"]["config"]["network"] == "unet"
    assert settings["model"]["config"]["precision"] == "bf16"
    assert settings["generator"]["sampler"]["guidance"] == 2.0


def test_dry_run_says_what_it_will_cost_and_makes_nothing(tmp_path: Path) -> None:
    text = _puma("digits", "--count", 1000, "--out", tmp_path / "made.npz", "--dry-run", *TINY)
    assert re.search(r"training  2 steps of 256, [\d,]+ parameters: about \d+ s on cpu", text)
    assert re.search(r"sampling  1,000 images: about \d+ s, 0.1 MB", text)
    assert not list(tmp_path.iterdir())
    _puma("digits", "--count", 5, "--out", tmp_path / "made.npz", *TINY)
    model = ["--model", tmp_path / "made.diffusion", "--out", tmp_path / "more.npz"]
    assert "sampling  9 images" in _puma(*model, "--count", 9, "--dry-run")
    assert not (tmp_path / "more.npz").exists()


def test_config_file_and_flags(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'count = 12\nsettings = ["steps=2", "width=16", "sampler.batch_size=6"]\nseed = 5\n'
    )
    out = tmp_path / "made.npz"
    _puma("digits", "--config", tmp_path / "my.toml", "--out", out, "--seed", 6, "--quiet")
    told = json.loads((tmp_path / "made.diffusion" / "generated.json").read_text())
    assert told["count"] == 12
    assert told["model"]["config"]["width"] == 16
    assert told["batch_size"] == 6
    assert told["generator"]["seed"] == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], UsageError, "nothing to sample from"),
        (["digits", "--model", "x"], UsageError, "digits would not be used"),
        (["--model", "x", "--diffusers", "y"], UsageError, "two generators"),
        (["--model", "x", "--eval-data", "digits:test"], UsageError, "compares with the training images"),
        (["--model", "nowhere"], ModelError, "nowhere"),
        (["--model", "x", "--set", "steps=3"], UsageError, "there is one already"),
        (["--diffusers", "y"], UsageError, "needs the class names"),
        (["--diffusers", "y", "--classes", "a,b", "--class-ids", "1,x"], UsageError, "not numbers"),
        (["digits", "--set", "steps"], UsageError, "is not NAME=VALUE"),
        (["digits", "--set", "stepz=3"], UsageError, "stepz"),
        (["digits", "--set", "sampler.stepz=3"], UsageError, "stepz"),
        (["digits", "--set", "sampler.guidance=2"], UsageError, "label_dropout"),
        (["digits", "--device", "tpu9"], UsageError, "device"),
        (["digitz"], PumaError, "digit"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, arguments: list[str], error: type[PumaError], message: str) -> None:
    with pytest.raises(error, match=message):
        _puma(*arguments, "--count", 5, "--out", tmp_path / "made.npz", "--quiet")
    assert not list(tmp_path.iterdir())


def test_other_settings_on_a_finished_file_are_refused(tmp_path: Path) -> None:
    _puma("digits", "--count", 5, "--out", tmp_path / "made.npz", *TINY)
    with pytest.raises(ResumeError, match="seed: 0 there, 1 now"):
        _puma("digits", "--count", 5, "--out", tmp_path / "made.npz", "--seed", 1, *TINY)


def test_pipeline_gets_its_classes_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Pipeline:
        components: ClassVar[dict[str, object]] = {}
        scheduler = SimpleNamespace(config={})

        def __call__(
            self,
            class_labels: list[int],
            generator: list[object],
            output_type: str = "pil",
            num_inference_steps: int = 50,
        ) -> SimpleNamespace:
            asked.append({"class_labels": class_labels, "num_inference_steps": num_inference_steps})
            return SimpleNamespace(images=np.full((len(class_labels), 16, 16, 3), 0.5))

    module = ModuleType("diffusers")
    module.__version__ = "0"
    monkeypatch.setitem(sys.modules, "diffusers", module)
    monkeypatch.setattr("puma.generation.sampling.load_pipeline", lambda place, device: Pipeline())
    out = tmp_path / "pets.npz"
    arguments = ["--classes", "cat,dog", "--class-ids", "281,207", "--size", 8, "--set", "num_inference_steps=7"]
    _puma("--diffusers", "somewhere", *arguments, "--count", 4, "--out", out, "--quiet")
    assert asked[-1] == {"class_labels": [281, 207, 281, 207], "num_inference_steps": 7}
    assert load_dataset(out).image_shape == (8, 8, 3)
