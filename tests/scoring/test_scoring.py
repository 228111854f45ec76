"""A pool in, a margin table out: streaming, resuming, refusing."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import puma
from puma.attacks.deepfool import deepfool
from puma.data.pool import read_batch
from puma.errors import DataError, ModelError, ResumeError, UsageError
from puma.io import lock
from puma.margins import part_path
from puma.scoring import score_margins
from puma.scoring.job import ScoringJob, estimate
from puma.scoring.score import ScoringSettings


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
    assert "is damaged" in caplog.text
    assert part_bytes(tmp_path / "a") == before
    assert again.fingerprint == whole.fingerprint
    redone = {n for n, t in stamps.items() if (tmp_path / "a" / n).stat().st_mtime_ns != t}
    assert redone == {"part-000002.parquet", "part-000004.parquet"}


def test_any_number_of_workers_writes_the_same_bytes(weights, tmp_path) -> None:
    settings = ScoringSettings(mode="fast", part_rows=200, batch_size=64)

    def made(name: str, *place: int) -> puma.MarginTable | None:
        job = ScoringJob(str(weights), ("digits",), str(tmp_path / name), settings, device="cpu")
        return job.make(*place)

    made("one")
    assert made("three", 2, 3) is None
    assert made("three", 0, 3) is None
    assert isinstance(made("three", 1, 3), puma.MarginTable)
    assert part_bytes(tmp_path / "one") == part_bytes(tmp_path / "three")


def test_other_settings_are_refused_with_both_values(model, pool, tmp_path) -> None:
    score(model, pool, tmp_path)
    with pytest.raises(ResumeError, match=r"settings.steps: 50 there, 7 now"):
        score(model, pool, tmp_path, steps=7)
    with pytest.raises(ResumeError, match=r"norm: 'Linf' there, 'L2' now"):
        score(model, pool, tmp_path, norm="L2")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.linear.bias += 1e-3
    with pytest.raises(ResumeError, match=r"model.sha256"):
        score(other, pool, tmp_path)


def test_other_code_with_the_same_weights_is_another_model(model, pool, tmp_path, monkeypatch) -> None:
    puma.score_margins(model, pool, mode="fast", out=tmp_path)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: forward((x - 0.5) / 0.25))
    with pytest.raises(ResumeError, match="same weights that computes something else"):
        puma.score_margins(model, pool, mode="fast", out=tmp_path)


def test_a_live_writer_is_named(model, pool, tmp_path) -> None:
    with lock(tmp_path, ".lock-0-of-1"), pytest.raises(ResumeError, match=r"another process \(pid \d+ on "):
        score(model, pool, tmp_path)
    with lock(tmp_path, ".lock-1-of-2"), pytest.raises(ResumeError, match="another process"):
        score(model, pool, tmp_path)


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
    with pytest.raises(ModelError, match="has 3 classes, the data 10"):
        score(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), pool, None)


def test_dry_run_verify_and_redo_on_the_command_line(weights, command, tmp_path, capsys) -> None:
    out = tmp_path / "table"
    words = ["score", weights, "digits?subset=300", "--out", out, "--mode", "fast", "--part-rows", 100, "--batch-size"]
    words += [100, "--device", "cpu", "--quiet"]
    assert command(*words, "--dry-run", "--precision", "bf16") == 0
    said = capsys.readouterr().out
    for line in ("images   300 to score", "speed ", "time ", "memory ", "disk "):
        assert line in said
    assert not out.exists()
    assert command(*words) == 0
    before = part_bytes(out)
    broken = part_path(out, 1)
    data = bytearray(before[broken.name])
    data[60] ^= 0xFF
    broken.write_bytes(data)
    assert command("verify", out, "--quiet") == 3
    said = capsys.readouterr()
    assert broken.name in said.out + said.err
    assert part_path(out, 2).name not in said.out + said.err
    assert command(*words) == 0
    assert part_bytes(out) == before
    assert command(*words, "--precision", "bf16") == 5
    assert "settings.precision: 'float32' there, 'bf16' now" in capsys.readouterr().err


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
    monkeypatch.setattr("puma.scoring.job.perf_counter", lambda: slow.now)
    chosen = ScoringSettings(mode="fast", batch_size=512)
    cost = estimate([slow], pool, chosen)
    assert 16 <= cost.measured <= probed
    assert slow.largest <= 64
    assert not cost.full_batch
    assert slow.now < 10 or cost.measured == 16
    assert cost.images_per_s == pytest.approx(cost.measured / slow.now, rel=0.2)


def test_an_estimate_of_a_fast_model_reaches_whole_batches(model, pool, monkeypatch) -> None:
    chosen = ScoringSettings(mode="fast", batch_size=128)
    quick = Slow(model, 1e-9).eval()
    monkeypatch.setattr("puma.scoring.job.perf_counter", lambda: quick.now)
    cost = estimate([quick], pool, chosen)
    assert cost.full_batch
    assert cost.measured == 8 + 8 + 64 + 5 * 128
    few = puma.Pool([puma.load_dataset("digits?subset=10")])
    assert estimate([quick], few, chosen).measured == 8 * 2 + 6 * 10


def test_an_estimate_counts_what_is_left_and_writes_nothing(model, pool, tmp_path) -> None:

    out = tmp_path / "table"
    chosen = ScoringSettings(mode="deepfool", batch_size=64, part_rows=200)
    before = estimate([model], pool, chosen, out, num_workers=2)
    assert not out.exists()
    assert (before.images, before.finished) == (898, 0)
    assert before.seconds == pytest.approx(898 / before.images_per_s / 2)
    score(model, pool, out)
    for part in (0, 2, 3):
        part_path(out, part).unlink()
    known = sorted(path.name for path in out.iterdir())
    after = estimate([model], pool, chosen, out)
    assert (after.images, after.finished) == (898 - 298, 298)
    assert 0 < after.disk_bytes < before.disk_bytes
    assert after.disk_free is not None
    assert after.memory_bytes > 1e7
    assert sorted(path.name for path in out.iterdir()) == known


def test_options_are_part_of_a_table(model, pool, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    quick = puma.score_margins(model, pool, batch_size=256, precision="bf16", compile=True)
    plain = puma.score_margins(model, pool, batch_size=256)
    assert quick.meta["settings"]["precision"] == "bf16"
    assert quick.meta["settings"]["compile"]
    assert not plain.meta["settings"]["compile"]
    assert (quick.predicted == plain.predicted).all()
    assert (quick.status == plain.status).all()
    with np.errstate(invalid="ignore"):
        ratio = quick.margin / plain.margin
    assert (np.abs(ratio[np.isfinite(ratio)] - 1) < 0.05).mean() > 0.99
    with pytest.raises(UsageError, match="precision"):
        puma.score_margins(model, pool, precision="fp8")


def test_bf16_on_a_cpu_without_bf16_instructions_is_named_before_scoring(model, pool, monkeypatch, caplog) -> None:
    few = puma.Pool([puma.load_dataset("digits?subset=20")])
    for has_bf16 in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="puma"):
            puma.score_margins(model, few, precision="bf16", mode="fast")
        assert ("no bfloat16 instructions" in caplog.text) != has_bf16
    caplog.clear()
    puma.score_margins(model, few, mode="fast")
    assert not caplog.text


def test_what_is_not_logits_is_refused(model, pool) -> None:
    with pytest.raises(ModelError, match="probabilities, not logits"):
        score(nn.Sequential(model, nn.Softmax(1)).eval(), pool, None)
    with pytest.raises(ModelError, match="returns a tuple"):
        score(Tuple(model).eval(), pool, None)


class Tuple(Batchy):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), x


class Cuts(Batchy):
    """Cuts a file short (or writes over it) at its n-th pass."""

    def __init__(self, inner: nn.Module, path: Path, calls: int, size: int) -> None:
        super().__init__(inner)
        self.path, self.calls, self.size = path, calls, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if not self.calls:
            with self.path.open("r+b") as file:
                file.truncate(self.size or self.path.stat().st_size)
                file.write(b"PK")
        return self.inner(x)


@pytest.mark.parametrize("size", [3000, 0], ids=["truncated", "overwritten"])
def test_a_source_that_changes_while_it_is_scored_is_named(model, pool, tmp_path, size) -> None:
    path = tmp_path / "made.npz"
    np.savez(path, image=pool.read(slice(None)), label=pool.labels)
    data = path.read_bytes()

    def scored(name: str, calls: int) -> None:
        found = puma.Pool([puma.load_dataset(path)])
        cuts = Cuts(model, path, calls, size).eval()
        puma.score_margins(cuts, found, mode="fast", out=tmp_path / name, part_rows=300, batch_size=100)

    scored("whole", 0)
    with pytest.raises(DataError, match=r"made\.npz has been changed since it was opened") as caught:
        scored("cut", 20)
    assert caught.value.exit_code == 3
    kept = part_bytes(tmp_path / "cut")
    assert kept
    path.write_bytes(data)
    scored("cut", 0)
    assert part_bytes(tmp_path / "cut") == part_bytes(tmp_path / "whole")
    assert {name: part_bytes(tmp_path / "cut")[name] for name in kept} == kept
