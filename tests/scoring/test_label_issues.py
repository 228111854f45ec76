"""From a model's view of the labels to a plan without the doubtful ones, in Python and as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from puma.cli.data import data_app
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import DataError, UsageError
from puma.margins import MarginTable
from puma.models.networks import build_model
from puma.models.weights import save_model
from puma.plan import Plan
from puma.scoring.labels import score_labels
from puma.strategies import drop_label_issues, label_issues, make_plan
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
        source=pool.source.codes,
        meta={**labels.meta, "mode": "refined"},
    )
    return margins.join(labels)


def test_wrong_labels_of_generated_images_are_found(scored: MarginTable, mislabelled: tuple[Path, np.ndarray]) -> None:
    wrong = np.concatenate([np.zeros(898, bool), mislabelled[1]])
    flagged, disagree = label_issues(scored), label_issues(scored, below=0.5)
    assert flagged[wrong].mean() > 0.6
    assert wrong[flagged].mean() > 0.9
    assert disagree[wrong].mean() > 0.95  # more are found, and more that were right are accused
    assert wrong[disagree].mean() < wrong[flagged].mean()
    assert not (flagged | disagree)[:898].any()  # real images are never marked
    assert flagged[898:].mean() == pytest.approx(0.1, abs=0.04)  # the share of wrong labels


@pytest.mark.parametrize("below", [None, 0.5, 0.25])
def test_a_plan_without_label_issues_is_the_same_plan_less_those_rows(scored: MarginTable, below: float | None) -> None:
    plan = make_plan(scored, "puma", 0.2, threat="Linf:0.1")
    cleaned = drop_label_issues(plan, scored, below)
    gone = label_issues(scored, below)
    np.testing.assert_array_equal(cleaned.keep, plan.keep & ~gone)
    np.testing.assert_array_equal(cleaned.eps, np.where(cleaned.keep, plan.eps, 0))
    assert cleaned.meta["label_issues"]["removed"] == (plan.keep & gone).sum() > 10
    counts = cleaned.meta["counts"]
    assert (counts["kept"], counts["to_remove"]) == (cleaned.kept, plan.meta["counts"]["to_remove"])
    assert counts["by_source"][1]["kept"] == cleaned.keep[898:].sum()
    assert cleaned.fingerprint != plan.fingerprint
    assert drop_label_issues(cleaned, scored, below).kept == cleaned.kept


def test_a_selection_of_ones_own_is_cleaned_too(scored: MarginTable) -> None:
    own = Plan.from_indices(scored, np.arange(len(scored)), threat="Linf:0.1")
    assert np.array_equal(drop_label_issues(own, scored).keep, ~label_issues(scored))


def test_what_cannot_be_dropped_is_refused(scored: MarginTable) -> None:
    plan = make_plan(scored, "puma", 0.2, threat="Linf:0.1")
    bare = MarginTable(**{name: getattr(scored, name) for name in scored.__dataclass_fields__ if name != "scores"})
    with pytest.raises(DataError, match="no scores 'label_issue'") as caught:
        drop_label_issues(plan, bare)
    assert "puma data labels" in caught.value.fix
    with pytest.raises(UsageError, match=r"below = 2 is not a number in \[0, 1\]"):
        drop_label_issues(plan, scored, 2)
    other = Plan(plan.keep, plan.eps, {**plan.meta, "pool": {**plan.meta["pool"], "fingerprint": "0" * 64}})
    with pytest.raises(DataError, match="different pools"):
        drop_label_issues(other, scored)
    keep = plan.keep & ((scored.label != 4) | label_issues(scored))
    only = Plan(keep, np.where(keep, plan.eps, 0), plan.meta)
    with pytest.raises(DataError, match="keeps of class 4 is a label issue"):
        drop_label_issues(only, scored)


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
    scored.write(tmp_path / "margins")
    make_plan(scored, "none", 0, threat="Linf:0.1").write(tmp_path / "plan.parquet")
    tables = ["--table", tmp_path / "margins", "--table", tmp_path / "labels"]
    told = _puma(
        "drop-label-issues", tmp_path / "plan.parquet", *tables, "--below", 0.4995, "--out", tmp_path / "p.parquet"
    )
    doubtful = table.synthetic & (table.scores["label_quality"] < np.float32(0.4995))
    assert f"{doubtful.sum():,} of 1,797 kept images removed" in told
    assert Plan.read(tmp_path / "p.parquet").kept == 1797 - doubtful.sum()
    assert isinstance(
        CliRunner().invoke(data_app, ["drop-label-issues", "p", "--table", "t", "--out", "p.npz"]).exception, UsageError
    )


def test_a_dry_run_says_what_it_will_cost_and_writes_nothing(
    mislabelled: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    save_model(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=0), tmp_path / "model.safetensors")
    command = ["labels", tmp_path / "model.safetensors", "digits", mislabelled[0], "--part-rows", 700, "--quiet"]
    said = _puma(*command, "--out", tmp_path / "labels", "--dry-run")
    assert "1,797 to score, 0 finished" in said
    assert re.search(r"time +0 h 0 min \d+ s\nmemory .* GB a worker\ndisk +0\.[1-9] MB of", said)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    _puma(*command, "--out", tmp_path / "labels")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / "labels" / "part-000001.parquet").unlink()  # of a finished table, the other parts count
    assert "700 to score, 1,097 finished" in _puma(*command, "--out", tmp_path / "labels", "--dry-run")
    assert {path for path in before if not path.exists()} == {tmp_path / "labels" / "part-000001.parquet"}
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.is_file())
    assert set(tmp_path.rglob("*")) <= set(before)


def test_a_model_that_knows_these_labels_by_heart_is_named(
    mislabelled: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    sources = ["digits", str(mislabelled[0])]
    for name, pool in {"all": sources, "real": sources[:1]}.items():
        recipe = load_recipe("digits", steps=1, batch_size=20)
        run = tmp_path / name
        train(
            "small-cnn", Pool([load_dataset(one) for one in pool]), threat=THREAT, recipe=recipe, out=run, validation=0
        )
        told = _puma("labels", run, *sources, "--out", tmp_path / f"{name}-labels", "--quiet")
        assert ("trained on these very labels" in told) == (name == "all")
