"""Wrong labels of generated images: found, taken out of a plan, and as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import puma
from puma.cli.data import data_app
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.margins import MarginTable
from puma.models.networks import build_model
from puma.models.weights import save_model
from puma.scoring.labels import score_labels
from puma.strategies import make_plan
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe

THREAT = ThreatModel("Linf", 0.1)


class Logistic(nn.Module):
    """Logistic regression on the pixels, fitted to ``source`` by scikit-learn."""

    def __init__(self, source: Pool) -> None:
        from sklearn.linear_model import LogisticRegression

        super().__init__()
        pixels = source.read(slice(None)).reshape(len(source), -1) / 255
        fitted = LogisticRegression(C=0.3, max_iter=200).fit(pixels, source.labels)
        self.layer = nn.Linear(64, 10)
        self.layer.weight.data = torch.from_numpy(fitted.coef_).float()
        self.layer.bias.data = torch.from_numpy(fitted.intercept_).float()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Unseen digits as "synthetic" images, every tenth with the label of another class."""
    source = load_dataset("digits:test")
    wrong = np.arange(len(source)) % 10 == 3
    path = tmp_path_factory.mktemp("made") / "made.npz"
    np.savez(path, image=source.read(slice(None)), label=np.where(wrong, (source.labels + 1) % 10, source.labels))
    return path, wrong


@pytest.fixture(scope="module")
def scored(mislabelled: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> MarginTable:
    """Label scores under a model of the real images, beside made-up margins."""
    real = load_dataset("digits")
    pool = Pool([real, load_dataset(mislabelled[0])])
    labels = score_labels(Logistic(real).eval(), pool, out=tmp_path_factory.mktemp("scored"), part_rows=700)
    margins = MarginTable(
        label=pool.labels,
        predicted=labels.predicted,
        margin=labels.scores["label_quality"] - 0.5,
        status=np.where(labels.predicted == pool.labels, 0, 1),
        steps=np.ones(len(pool)),
        source=pool.source_number,
        meta={**labels.meta, "mode": "refined"},
    )
    return margins.join(labels)


def test_wrong_labels_of_generated_images_are_found(scored: MarginTable, mislabelled: tuple[Path, np.ndarray]) -> None:
    wrong = mislabelled[1]
    flagged, disagree = (
        rows[898:] for rows in (scored.scores["label_issue"] == 1, scored.scores["label_quality"] < 0.5)
    )
    assert flagged[wrong].mean() > 0.6
    assert wrong[flagged].mean() > 0.9
    assert disagree[wrong].mean() > 0.95  # more are found, and more that were right are accused
    assert wrong[disagree].mean() < wrong[flagged].mean()
    assert flagged.mean() == pytest.approx(0.1, abs=0.04)  # the share of wrong labels


def test_the_documented_lines_take_them_out_of_a_plan(scored: MarginTable) -> None:
    text = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from_indices" in block]
    plan = make_plan(scored, "puma", 0.2, threat="Linf:0.1")
    names = {"puma": puma, "plan": plan, "table": scored}
    exec(code, names)
    cleaned, gone = names["plan"], (scored.scores["label_issue"] == 1) & scored.synthetic
    assert (plan.keep & gone).sum() > 10
    np.testing.assert_array_equal(cleaned.keep, plan.keep & ~gone)
    np.testing.assert_array_equal(cleaned.eps, np.where(cleaned.keep, plan.eps, 0))
    assert cleaned.threat == plan.threat
    assert cleaned.keep[:898].all()  # real images stay


def _puma(*arguments: str | Path) -> str:
    result = CliRunner().invoke(data_app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_as_a_user_types_it(mislabelled: tuple[Path, np.ndarray], scored: MarginTable, tmp_path: Path) -> None:
    save_model(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=0), tmp_path / "model.safetensors")
    command = ["labels", tmp_path / "model.safetensors", "digits", mislabelled[0], "--out", tmp_path / "labels"]
    told = _puma(*command, "--quiet")
    assert "made (synthetic, 899): the model agrees with" in told
    table = MarginTable.read(tmp_path / "labels")
    assert table.meta["pool"] == scored.meta["pool"]
    stamp = (tmp_path / "labels" / "part-000000.parquet").stat().st_mtime_ns
    assert _puma(*command, "--quiet") == told
    assert (tmp_path / "labels" / "part-000000.parquet").stat().st_mtime_ns == stamp


def test_a_dry_run_says_what_it_will_cost_and_writes_nothing(
    mislabelled: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    save_model(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=0), tmp_path / "model.safetensors")
    command = ["labels", tmp_path / "model.safetensors", "digits", mislabelled[0], "--part-rows", 700, "--quiet"]
    said = _puma(*command, "--out", tmp_path / "labels", "--dry-run")
    assert "1,797 to score, 0 finished" in said
    assert re.search(r"time +\d+ s\nmemory .* GB a worker\ndisk +0\.[1-9] MB of", said)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    _puma(*command, "--out", tmp_path / "labels")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "labels" / "part-000001.parquet").unlink()  # of a finished table, the other parts count
    assert "700 to score, 1,097 finished" in _puma(*command, "--out", tmp_path / "labels", "--dry-run")
    assert {path for path in before if not path.exists()} == {tmp_path / "labels" / "part-000001.parquet"}
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.is_file())
    assert set(tmp_path.rglob("*")) <= set(before)


def test_a_model_that_knows_these_labels_by_heart_is_named(
    mislabelled: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    built = "build_model('small-cnn', 10, in_channels=1, image_size=8)"
    (tmp_path / "labelling.py").write_text(f"from puma import build_model\nnet = lambda: {built}\n")
    sources = ["digits", str(mislabelled[0])]
    for name, pool in {"all": sources, "real": sources[:1]}.items():
        recipe = load_recipe("digits", steps=1, batch_size=20)
        run = tmp_path / name
        train(
            "small-cnn", Pool([load_dataset(one) for one in pool]), threat=THREAT, recipe=recipe, out=run, validation=0
        )
        for model in ([run], ["labelling:net", "--weights", run]):
            told = _puma("labels", *model, *sources, "--out", tmp_path / f"{name}-labels", "--quiet")
            assert ("trained on these very labels" in told) == (name == "all")
