"""``puma evaluate`` and ``puma export`` as a user types them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from puma.cli.app import app as puma_app
from puma.cli.evaluate import evaluate
from puma.cli.report import export
from puma.data.load import load_dataset
from puma.errors import DataError, ModelError, UsageError
from puma.evaluation import evaluate as evaluate_model
from puma.evaluation.attacks import STANDARD, full_cost
from puma.models.networks import build_model
from puma.models.weights import load_model, save_model, weights_sha256

app = typer.Typer()
app.command()(evaluate)
app.command()(export)
COMMON = ["--data", "digits:test", "--threat", "Linf:0.1", "--attack", "pgd-2", "--subset", "20", "--quiet"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two models."""
    for seed, name in enumerate(("last", "best")):
        model = build_model("small-cnn", 10, in_channels=1, image_size=8, seed=seed)
        save_model(model, tmp_path / "run" / f"{name}.safetensors")
    return tmp_path / "run"


def puma(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_last_and_best_of_a_run(run: Path) -> None:
    text = puma("evaluate", run, *COMMON)
    assert "last:" in text
    assert "best:" in text
    assert "on a stratified subset of 20 of 899 images" in text
    last = json.loads((run / "evaluation-pgd-2.json").read_text())
    best = json.loads((run / "best" / "evaluation-pgd-2.json").read_text())
    assert last["settings"]["model"] != best["settings"]["model"]
    assert puma("evaluate", run, *COMMON) == text


def test_weights_file_keeps_nothing_by_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    before = sorted(run.iterdir())
    assert "accuracy under pgd-2" in puma("evaluate", run / "last.safetensors", *COMMON)
    assert sorted(run.iterdir()) == before


def test_factory_with_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "from puma import build_model",
        "def net():",
        "  return build_model('small-cnn', 10, in_channels=1, image_size=8)",
    ]
    (run / "my_nets.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(run)
    by_file = puma("evaluate", run / "last.safetensors", *COMMON).splitlines()[1:]
    weights = ["--weights", run / "last.safetensors"]
    assert puma("evaluate", "my_nets:net", *weights, *COMMON).splitlines()[1:] == by_file
    assert puma("evaluate", "small-cnn", *weights, *COMMON).splitlines()[1:] == by_file


def test_weights_are_evaluated_beside_a_run_named_after_the_network(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=7), "small-cnn/last.safetensors")
    for weights in (run, run / "best.safetensors"):
        puma("evaluate", "small-cnn", "--weights", weights, *COMMON, "--checkpoint", "best", "--out", "out")
        settings = json.loads(next(Path("out").rglob("evaluation-pgd-2.json")).read_text())["settings"]
        assert settings["model"] == weights_sha256(load_model(run / "best.safetensors"))
        shutil.rmtree("out")


def test_a_network_of_ones_own_is_trained_and_evaluated_as_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    typed = ["train", "--real", "digits:train", "--threat", "Linf:0.1", "--model", "plain:net", "--recipe", "digits"]
    typed += ["--out", "r", "--device", "cpu", "--quiet", "--set", "steps=3", "--set", "attack_steps=1"]
    trained = CliRunner().invoke(puma_app, typed, catch_exceptions=False)
    following = next(line for line in trained.output.splitlines() if line.startswith("next")).split()[2:]
    assert following[:6] == ["evaluate", "plain:net", "--weights", "r", "--data", "TEST"]
    text = puma(*following[:4], *COMMON)
    assert "last:" in text
    assert "best: the same weights as last, evaluated once" in text  # no validation images were held out
    assert Path("r/evaluation-pgd-2.json").is_file()
    with pytest.raises(ModelError, match="that PUMA did not build") as refused:
        puma("evaluate", "r", *COMMON)
    assert "package.module:factory --weights r/last.safetensors" in str(refused.value.fix)


def image_folder(root: Path, split: str, digits: list[int]) -> Path:
    """Digits as PNG files in a folder for each class, by name."""
    names = ["zero", "one", "two", "three", "four"]
    source = load_dataset(f"digits:{split}")
    for row, label in enumerate(source.labels):
        if label in digits:
            place = root / split / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source[row][0][..., 0]).save(place / f"{row}.png")
    return root / split


def test_a_folder_of_some_classes_is_matched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sorted by name, class 0 of the test folder is class 1 of the run."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path, "train", [0, 1, 2, 3, 4])
    image_folder(tmp_path, "test", [3, 1])
    typed = ["train", "--real", "train", "--threat", "Linf:0.05", "--recipe", "digits", "--out", "r", "--quiet"]
    typed += ["--model", "small-cnn", "--set", "steps=60", "--set", "attack_steps=1", "--device", "cpu"]
    CliRunner().invoke(puma_app, typed, catch_exceptions=False)
    text = puma("evaluate", "r", "--data", "test", "--threat", "Linf:0.05", "--attack", "clean", "--quiet")
    assert float(re.search(r"clean accuracy ([\d.]+)%", text)[1]) > 80  # type: ignore[index]
    assert "by name" in caplog.text
    (tmp_path / "test" / "one").rename(tmp_path / "test" / "eins")
    with pytest.raises(DataError, match="eins"):
        puma("evaluate", "r", "--data", "test", "--threat", "Linf:0.05", "--attack", "clean", "--quiet")


def test_mistakes_are_told(run: Path) -> None:
    for arguments, error, message in (
        (["evaluate", run, *COMMON, "--worker", "1"], UsageError, "belong together"),
        (["evaluate", run, *COMMON, "--checkpoint", "bst"], UsageError, "unknown checkpoint"),
        (["evaluate", "nothing.safetensors", *COMMON], ModelError, "do not exist"),
        (["evaluate", run / "last.safetensors", *COMMON, "--devices", "2"], UsageError, "needs a folder"),
        (
            ["export", "robustbench", run, "--out", run / "x", "--title", "t", "--name", "A"],
            UsageError,
            "has not been evaluated",
        ),
    ):
        with pytest.raises(error, match=message):
            puma(*arguments)


def test_dry_run_bounds_the_cost(run: Path) -> None:
    before = sorted(run.iterdir())
    text = puma("evaluate", run, "--data", "digits:test", "--threat", "Linf:0.1", "--subset", "20", "--dry-run")
    passes = 899 + 20 * sum(full_cost(step, 9) for step in STANDARD)
    assert "images   899, of which 20 are attacked (standard)" in text
    assert f"passes   at most {passes:,} for each of last and best" in text
    assert "time     at most" in text
    assert sorted(run.iterdir()) == before
    weak = puma("evaluate", run, *COMMON, "--dry-run", "--checkpoint", "last")
    cost = int(re.search(r"at most ([\d,]+);", weak)[1].replace(",", ""))  # type: ignore[index]
    result = evaluate_model(load_model(run), "digits:test", "Linf:0.1", attack="pgd-2", subset=20)
    assert result.attack_cost < cost


def test_help_teaches() -> None:
    text = puma("evaluate", "--help")
    for word in ("robust overfitting", "--subset", "resumes"):
        assert word in " ".join(text.split())


def test_export_of_a_run(run: Path, tmp_path: Path) -> None:
    arguments = ["--data", "digits:test", "--threat", "Linf:0", "--quiet", "--checkpoint", "last"]  # eps 0: no attack
    puma("evaluate", run, *arguments)
    text = puma("export", "hub", run, "--out", tmp_path / "share", "--title", "A test", "--dataset", "digits")
    assert "gives the same logits" in text
    assert " at Linf:0 " in (tmp_path / "share" / "README.md").read_text()


@pytest.mark.dist
def test_two_processes_share_the_shards(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    puma("evaluate", run / "last.safetensors", *COMMON, "--shard-rows", "5", "--out", alone)
    shared = [str(run), *COMMON, "--shard-rows", "5", "--checkpoint", "last", "--device", "cpu", "--devices", "2"]
    assert "on a stratified subset of 20 of 899 images" in puma("evaluate", *shared)
    one, two = (pq.read_table(folder / "evaluation-pgd-2.parquet") for folder in (alone, run))
    assert one.equals(two)
    assert len(list((run / "evaluation-pgd-2-shards").glob(".lock-*-of-2"))) == 2
