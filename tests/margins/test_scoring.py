"""A pool in, a margin table out: streaming, resuming, refusing."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import puma
from puma.attacks.deepfool import deepfool
from puma.cli.app import main
from puma.data.tensors import read_batch
from puma.errors import ModelError, ResumeError, UsageError
from puma.io import lock
from puma.margins import part_path
from puma.models.weights import save_model
from puma.scoring import score_margins
from puma.scoring.estimate import estimate
from puma.scoring.settings import sized
from puma.scoring.workers import place_from_environment, share


class Small(nn.Module):
    """A linear classifier of 8x8 digits, fitted in closed form: fast, and right about most digits."""

    def __init__(self, pool: puma.Pool) -> None:
        super().__init__()
        images, labels = read_batch(pool, np.arange(len(pool)))
        design = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1)
        target = torch.nn.functional.one_hot(labels, 10).float() * 10
        weight = torch.linalg.solve(design.T @ design + 3 * torch.eye(65), design.T @ target)
        self.linear = nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(weight[:64].T)
            self.linear.bias.copy_(weight[64])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def pool() -> puma.Pool:
    return puma.Pool([puma.load_dataset("digits")])


@pytest.fixture(scope="module")
def model(pool: puma.Pool) -> nn.Module:
    return Small(pool).eval()


def score(model: nn.Module, pool: puma.Pool, out: Path | None, **options) -> puma.MarginTable:
    return score_margins(model, pool, out=out, part_rows=200, batch_size=64, mode="deepfool", **options)


def part_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_table_holds_the_margins_of_the_pool(model, pool) -> None:
    table = score(model, pool, None)
    images, labels = read_batch(pool, np.arange(100))
    hit = deepfool(model, images, labels, mode="deepfool")
    np.testing.assert_allclose(table.margin[:100], hit.margin.numpy(), rtol=2e-3)
    assert (table.label == pool.labels).all()
    assert set(table.to_pandas()["status"].unique()) <= {"crossed", "misclassified"}
    assert ((table.margin < 0) == (table.predicted != table.label)).all()


def test_folder_resumes_and_redoes_only_what_is_missing_or_broken(model, pool, tmp_path, caplog) -> None:
    whole = score(model, pool, tmp_path / "a")
    before = part_bytes(tmp_path / "a")
    assert len(before) == 5
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.parquet")}
    broken = part_path(tmp_path / "a", 2)
    data = bytearray(broken.read_bytes())
    data[100] ^= 0xFF
    broken.write_bytes(data)
    part_path(tmp_path / "a", 4).unlink()
    with caplog.at_level(logging.WARNING, logger="puma"):
        again = score(model, pool, tmp_path / "a")
    assert "is broken" in caplog.text
    assert part_bytes(tmp_path / "a") == before
    assert again.fingerprint == whole.fingerprint
    redone = {n for n, t in stamps.items() if (tmp_path / "a" / n).stat().st_mtime_ns != t}
    assert redone == {"part-000002.parquet", "part-000004.parquet"}


def test_any_number_of_workers_writes_the_same_bytes(model, pool, tmp_path) -> None:
    score(model, pool, tmp_path / "one")
    assert score(model, pool, tmp_path / "three", worker=2, num_workers=3) is None
    assert score(model, pool, tmp_path / "three", worker=0, num_workers=3) is None
    last = score(model, pool, tmp_path / "three", worker=1, num_workers=3)
    assert isinstance(last, puma.MarginTable)
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "three")


def test_other_settings_are_refused_with_both_values(model, pool, tmp_path) -> None:
    score(model, pool, tmp_path)
    with pytest.raises(ResumeError, match=r"settings.steps: 50 and 7"):
        score(model, pool, tmp_path, steps=7)
    with pytest.raises(ResumeError, match=r"norm: 'Linf' and 'L2'"):
        score(model, pool, tmp_path, norm="L2")
    other = Small(pool).eval()
    with torch.no_grad():
        other.linear.bias += 1e-3
    with pytest.raises(ResumeError, match=r"model.sha256"):
        score(other, pool, tmp_path)


def test_a_live_writer_is_named(model, pool, tmp_path) -> None:
    with lock(tmp_path, ".lock-0-of-1"), pytest.raises(ResumeError, match=r"another process \(pid \d+ on "):
        score(model, pool, tmp_path)
    with lock(tmp_path, ".lock-1-of-2"), pytest.raises(ResumeError, match="another process"):
        score(model, pool, tmp_path)


def test_workers_need_a_folder_and_a_place(model, pool) -> None:
    with pytest.raises(UsageError, match="common folder"):
        score(model, pool, None, num_workers=2)
    with pytest.raises(UsageError, match="no worker 3 among 2"):
        score(model, pool, None, worker=3, num_workers=2)


class Batchy(nn.Module):
    """Standardises by the batch, whatever the mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - x.mean(0, keepdim=True))


class Noisy(Batchy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


def test_unsteady_models_are_caught(model, pool) -> None:
    with pytest.raises(ModelError, match="depends on the other images") as caught:
        score(Batchy(model), pool, None)
    assert caught.value.exit_code == 4
    with pytest.raises(ModelError, match="changes from call to call"):
        score(Noisy(model), pool, None)
    trained = nn.Sequential(nn.BatchNorm2d(1), model)
    with pytest.raises(ModelError, match="training mode"):
        score(trained.train(), pool, None)
    with pytest.raises(ModelError, match="has 3 classes, the pool 10"):
        score(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), pool, None)


def cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_dry_run_verify_and_redo_on_the_command_line(pool, tmp_path, monkeypatch, capsys) -> None:
    torch.manual_seed(0)
    weights, out = tmp_path / "model.safetensors", tmp_path / "table"
    save_model(puma.build_model("small-cnn", 10, in_channels=1, image_size=8).eval(), weights)
    words = ["score", weights, "digits?subset=300", "--out", out, "--mode", "fast", "--part-rows", 100, "--batch-size"]
    words += [100, "--device", "cpu", "--quiet"]
    assert cli(monkeypatch, *words, "--dry-run", "--precision", "bf16") == 0
    said = capsys.readouterr().out
    for line in ("images   300 to score", "speed ", "time ", "memory ", "disk "):
        assert line in said
    assert not out.exists()
    assert cli(monkeypatch, *words) == 0
    before = part_bytes(out)
    broken = part_path(out, 1)
    data = bytearray(before[broken.name])
    data[60] ^= 0xFF
    broken.write_bytes(data)
    assert cli(monkeypatch, "verify", out, "--quiet") == 3
    said = capsys.readouterr()
    assert broken.name in said.out + said.err
    assert part_path(out, 2).name not in said.out + said.err
    assert cli(monkeypatch, *words) == 0
    assert part_bytes(out) == before
    assert cli(monkeypatch, *words, "--precision", "bf16") == 5
    assert "settings.precision: 'float32' and 'bf16'" in capsys.readouterr().err


def test_launchers_say_who_does_which_part() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert place_from_environment(torchrun) == (5, 8, 1)
    assert [list(share(7, worker, 3)) for worker in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(UsageError, match="no numbers"):
        place_from_environment({"RANK": "first", "WORLD_SIZE": "8"})


class Slow(nn.Module):
    """Another model that says it takes its time for every image, on a clock of its own."""

    def __init__(self, inner: nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self.seconds = inner, seconds
        self.now, self.largest = 0.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest = max(self.largest, len(x))
        self.now += self.seconds * len(x)
        return self.inner(x)


@pytest.mark.parametrize(
    ("seconds", "probed"), [(0.01, 264), (0.1, 36), (0.5, 16), (50.0, 16)], ids=["slow", "slower", "glacial", "stuck"]
)
def test_an_estimate_of_a_slow_model_scores_few_images(model, pool, monkeypatch, seconds, probed) -> None:
    """A handful to warm up and one to measure are the least; whatever is more fits into a few seconds."""
    slow = Slow(model, seconds).eval()
    monkeypatch.setattr("puma.scoring.estimate.perf_counter", lambda: slow.now)
    chosen = sized("Linf", "fast", "cpu", batch_size=512)
    cost = estimate(slow, pool, chosen, chosen.meta(slow, pool))
    assert 16 <= cost.probed <= probed
    assert slow.largest <= 64
    assert not cost.whole_batch
    assert slow.now < 10 or cost.probed == 16
    assert cost.images_per_s == pytest.approx(cost.probed / slow.now, rel=0.2)


def test_an_estimate_of_a_fast_model_reaches_whole_batches(model, pool, monkeypatch) -> None:
    chosen = sized("Linf", "fast", "cpu", batch_size=128)
    quick = Slow(model, 1e-9).eval()
    monkeypatch.setattr("puma.scoring.estimate.perf_counter", lambda: quick.now)
    cost = estimate(quick, pool, chosen, chosen.meta(quick, pool))
    assert cost.whole_batch
    assert cost.probed == 8 + 8 + 64 + 5 * 128
    few = puma.Pool([puma.load_dataset("digits?subset=10")])
    assert estimate(quick, few, chosen, chosen.meta(quick, few)).probed == 8 * 2 + 6 * 10


def test_an_estimate_counts_what_is_left_and_writes_nothing(model, pool, tmp_path) -> None:

    out = tmp_path / "table"
    chosen = sized("Linf", "deepfool", "cpu", batch_size=64, part_rows=200)
    before = estimate(model, pool, chosen, chosen.meta(model, pool), out, num_workers=2)
    assert not out.exists()
    assert (before.images, before.finished) == (898, 0)
    assert before.seconds == pytest.approx(898 / before.images_per_s / 2)
    score(model, pool, out, worker=1, num_workers=3)
    known = sorted(path.name for path in out.iterdir())
    after = estimate(model, pool, chosen, chosen.meta(model, pool), out)
    assert (after.images, after.finished) == (898 - 298, 298)
    assert 0 < after.disk_bytes < before.disk_bytes
    assert after.disk_free is not None
    assert after.memory_bytes > 1e7
    assert sorted(path.name for path in out.iterdir()) == known
