"""Scores over the snapshots of a run: closed forms, slow references, interruption, and the way into a plan."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from puma.cli.app import app
from puma.cli.score import score_run as score_run_command
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import DataError, ModelError, ResumeError, UsageError
from puma.io import read_json, recorded_sha256, sha256_file
from puma.margins import MarginTable, part_path
from puma.models.networks import build_model
from puma.models.weights import load_model, weights_sha256
from puma.scoring.job import ScoringJob
from puma.scoring.snapshots import SCORES, SnapshotSettings, embed, load_snapshots, observe, score_run, threat_of
from puma.strategies import make_plan
from puma.strategies.selectors import RECORD, read_features
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe

THREAT = ThreatModel("Linf", 0.1)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool([load_dataset("digits:train"), load_dataset("digits:test")], roles=["real", "synthetic"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    folder = tmp_path_factory.mktemp("run")
    changes = {"steps": 20, "batch_size": 32, "snapshots": 4, "attack_steps": 2, "synthetic_share": 0.0}
    recipe = load_recipe("digits").model_copy(update=changes)
    model = build_model("small-cnn", pool.num_classes, in_channels=1, image_size=8)
    train(model, Pool([load_dataset("digits:train")]), threat=THREAT, recipe=recipe, out=folder)
    return folder


def test_training_keeps_snapshots_evenly_and_the_last_is_the_model(run: Path) -> None:
    names = sorted(path.name for path in (run / "snapshots").iterdir())
    assert names == [f"step-{step:09d}.safetensors" for step in (5, 10, 15, 20)]
    models = load_snapshots(run)
    assert weights_sha256(models[-1]) == weights_sha256(load_model(run))
    assert len({weights_sha256(model) for model in models}) == 4
    assert threat_of(run) == THREAT


class Linear(nn.Module):
    """Two classes; logit difference ``scale * (sum of pixels - shift)``."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        difference = self.scale * (images.flatten(1).sum(1) - self.shift)
        return torch.stack([torch.zeros_like(difference), difference], dim=1)


def test_observations_of_linear_models_in_closed_form() -> None:
    images = torch.tensor([0.5, 0.5, 0.6, 0.3]).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()  # sums 2, 2, 2.4, 1.2
    labels = torch.tensor([1, 0, 1, 0])
    models = [Linear(1.0, 1.9).eval(), Linear(2.0, 1.5).eval()]
    seen = observe(models, images, labels, THREAT)
    sums = images.flatten(1).sum(1)
    sign = torch.where(labels == 1, 1.0, -1.0)
    for k, model in enumerate(models):
        scale, shift = model.scale.item(), model.shift
        margin = sign * scale * (sums - 4 * 0.1 * sign - shift)  # every pixel moves by eps against the label
        own = torch.sigmoid(margin)
        torch.testing.assert_close(seen.probability[k], own)
        torch.testing.assert_close(seen.error[k], np.sqrt(2) * (1 - own))
        assert seen.failed[k].tolist() == (margin < 0).tolist()
        clean = torch.sigmoid(sign * scale * (sums - shift))
        torch.testing.assert_close(seen.gradient[k], (1 - clean) * scale * 2)  # four equal entries: norm is twice one
        assert seen.predicted[k].tolist() == (sums > shift).long().tolist()
    scores = seen.scores(window=10)
    np.testing.assert_allclose(scores["el2n-adv"], seen.error.mean(0), rtol=1e-6)
    assert scores["robust-failure"].tolist() == [0.5, 1.0, 0.0, 0.5]
    np.testing.assert_allclose(
        scores["dynamic-uncertainty"], np.std(seen.probability.numpy(), axis=0, ddof=1), rtol=1e-5
    )


def test_uncertainty_is_averaged_over_windows() -> None:
    rng = np.random.default_rng(0)
    seen = observe(
        [Linear(float(scale), 1.0).eval() for scale in rng.random(6)],
        torch.rand(3, 1, 2, 2),
        torch.ones(3).long(),
        THREAT,
    )
    own = seen.probability.numpy().astype(np.float64)
    expected = np.mean([own[t : t + 4].std(axis=0, ddof=1) for t in range(3)], axis=0)
    np.testing.assert_allclose(seen.scores(window=4)["dynamic-uncertainty"], expected, rtol=1e-5)


def digest(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))]


def test_interrupted_and_shared_scoring_gives_the_same_bytes(
    run: Path, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 1, "part_rows": 500, "batch_size": 128}
    whole = score_run(run, pool, out=tmp_path / "whole", **options)
    assert whole is not None
    assert set(whole.scores) == set(SCORES)
    assert np.isfinite(whole.scores["el2n-adv"]).all()

    calls = 0
    original = observe

    def dies(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the middle of the second part
            raise KeyboardInterrupt
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("puma.scoring.snapshots.observe", dies)
    with pytest.raises(KeyboardInterrupt):
        score_run(run, pool, out=tmp_path / "again", **options)
    assert len(digest(tmp_path / "again")) == 1
    score_run(run, pool, out=tmp_path / "again", **options)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    assert calls == 6 + 11  # parts of 500, 500, 500, 297 rows in batches of 128; the first part is not repeated

    monkeypatch.undo()
    settings = SnapshotSettings(THREAT, **options)
    job = ScoringJob(str(run), ("digits:train", "digits:test"), str(tmp_path / "shared"), settings, device="cpu")
    assert job.make(1, 2) is None
    assert job.make(0, 2) is not None
    assert digest(tmp_path / "shared") == digest(tmp_path / "whole")

    with pytest.raises(ResumeError, match="steps: 1 there, 2 now"):
        score_run(run, pool, out=tmp_path / "whole", **{**options, "steps": 2})


def test_real_rows_only_then_extrapolated_into_a_plan(run: Path, pool: Pool, tmp_path: Path) -> None:
    table = score_run(run, pool, out=tmp_path / "scores", rows="real", steps=1)
    assert table is not None
    uncertainty = table.scores["dynamic-uncertainty"]
    assert np.isfinite(uncertainty[:898]).all()
    assert np.isnan(uncertainty[898:]).all()
    model = load_snapshots(run)[-1]
    folder = embed(model, pool, tmp_path / "features", part_rows=700)
    features = read_features(folder, len(pool))
    with torch.no_grad():
        images = torch.from_numpy(pool.read(np.arange(890, 900))).permute(0, 3, 1, 2).float() / 255
        expected = model.features(model.normalise(images)).flatten(1)  # type: ignore[operator]
    np.testing.assert_allclose(features[890:900], expected, atol=1e-5)
    joined = MarginTable.read(tmp_path / "scores")
    plan = make_plan(joined, "dynamic-uncertainty", 0.5, threat=THREAT, features=str(folder))
    assert plan.kept == 898 + 899 - 450
    assert plan.meta["derived"] == {"extrapolated": 899}
    assert make_plan(joined, "dedup", 0.5, threat=THREAT, features=folder).kept == plan.kept


def test_features_resume_and_refuse_another_network(run: Path, pool: Pool, tmp_path: Path) -> None:
    models = load_snapshots(run)
    folder = embed(models[-1], pool, tmp_path, part_rows=700)
    before = (folder / "part-000001.npy").read_bytes()
    untouched = (folder / "part-000000.npy").stat().st_mtime_ns
    (folder / "part-000001.npy").write_bytes(before[:500])  # half written by something else
    embed(models[-1], pool, tmp_path, part_rows=700)
    assert (folder / "part-000001.npy").read_bytes() == before
    assert (folder / "part-000000.npy").stat().st_mtime_ns == untouched
    with pytest.raises(ResumeError, match="model"):
        embed(models[0], pool, tmp_path, part_rows=700)
    with pytest.raises(ModelError, match="no linear layer"):
        embed(nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)).eval(), pool, tmp_path / "other")


def test_features_of_another_pool_or_with_a_flipped_byte_are_refused(run: Path, pool: Pool, tmp_path: Path) -> None:
    table = score_run(run, pool, out=tmp_path / "scores", rows="real", steps=1)
    model = load_snapshots(run)[-1]
    folder = embed(model, pool, tmp_path / "features", part_rows=700)
    record = read_json(folder / RECORD)
    assert record["settings"]["pool"] == pool.fingerprint
    for path in folder.glob("*.npy"):
        assert recorded_sha256(path) == [sha256_file(path)]
    plan = make_plan(table, "dedup", 0.5, threat=THREAT, features=folder)
    as_array = make_plan(table, "dedup", 0.5, threat=THREAT, features=read_features(folder, len(pool)))
    assert plan.meta["params"]["features"].startswith("sha256:")
    assert plan.fingerprint == as_array.fingerprint  # the vectors count, not where they lie

    swapped = Pool([load_dataset("digits:all")])  # as many images
    other = embed(model, swapped, tmp_path / "other", part_rows=700)
    for strategy in ("dedup", "dynamic-uncertainty"):
        with pytest.raises(DataError, match=f"features of another pool\n.*{swapped.fingerprint[:12]}"):
            make_plan(table, strategy, 0.5, threat=THREAT, features=str(other))

    part = folder / "part-000001.npy"
    before = part.read_bytes()
    flipped = bytearray(before)
    flipped[-5] ^= 1  # the array still loads, with another number in it
    part.write_bytes(flipped)
    with pytest.raises(DataError, match=r"part-000001\.npy is damaged"):
        make_plan(table, "dedup", 0.5, threat=THREAT, features=folder)
    with pytest.raises(DataError, match=r"part-000001\.npy is damaged"):
        read_features(part, 700)
    embed(model, pool, folder, part_rows=700)  # makes that part again
    assert part.read_bytes() == before
    assert make_plan(table, "dedup", 0.5, threat=THREAT, features=folder).fingerprint == plan.fingerprint


def test_vectors_that_somebody_else_made_are_taken_as_they_are(run: Path, pool: Pool, tmp_path: Path) -> None:
    folder = embed(load_snapshots(run)[-1], pool, tmp_path / "made", part_rows=700)
    with pytest.raises(DataError, match="another pool"):
        read_features(folder, len(pool), "0" * 64)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("part-*.npy"):
        shutil.copy(path, copy)
    assert len(read_features(copy, len(pool), "0" * 64)) == len(pool)


def test_an_embedding_killed_before_a_part_appears_goes_on(
    run: Path, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_snapshots(run)[-1]
    replace = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if Path(target).name == "part-000001.npy":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        embed(model, pool, tmp_path, part_rows=700)
    monkeypatch.undo()
    assert not (tmp_path / "part-000001.npy").exists()
    assert len(read_features(embed(model, pool, tmp_path, part_rows=700), len(pool))) == len(pool)


def test_mistakes(run: Path, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="run"):
        score_run(tmp_path / "empty", pool, out=tmp_path / "out")
    with pytest.raises(ModelError, match="0 snapshots"):
        score_run(tmp_path / "empty", pool, out=tmp_path / "out", threat=THREAT)
    with pytest.raises(UsageError, match="did you mean 'real'"):
        score_run(run, pool, out=tmp_path / "out", rows="reel")  # type: ignore[arg-type]
    for wrong in ({"steps": 0}, {"batch_size": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            score_run(run, pool, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_command(run: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(score_run_command)
    out, features = tmp_path / "scores", tmp_path / "features"
    arguments = [run, "digits:train", "--out", out, "--features", features, "--device", "cpu", "--quiet"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "898 images scored" in result.output
    assert "el2n-adv" in result.output
    assert part_path(out, 0).exists()
    assert len(read_features(features, 898)) == 898
    without = CliRunner().invoke(app, [str(tmp_path), "digits:train", "--out", str(out)])
    assert isinstance(without.exception, DataError)


def test_a_dry_run_measures_a_few_images_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    words = ["score-run", str(run), "digits:train", "digits:test", "--roles", "real,synthetic", "--dry-run"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "scores")])
    assert result.exit_code == 0, result.exception
    assert "1,797 to score, 0 finished" in result.output
    assert not (tmp_path / "scores").exists()
    assert CliRunner().invoke(app, [*words, "--out", str(tmp_path / "scores"), "--rows", "some"]).exit_code != 0
