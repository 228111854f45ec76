"""Interrupted and resumed equals uninterrupted; settings that differ are refused; workers share the shards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from torch import Tensor, nn

from puma import Pool, score_margins
from puma.errors import DataError, ResumeError
from puma.evaluation import Evaluation, evaluate
from puma.evaluation.attacks import Attacker
from puma.evaluation.result import result_path
from puma.models.networks import build_model
from puma.models.weights import save_model
from puma.threat import ThreatModel

LINF = ThreatModel("Linf", 0.02)

pytestmark = pytest.mark.usefixtures("short_attacks")


def flags(result: Evaluation) -> list[Any]:
    return result.broken_by.tolist()


def test_finished_evaluation_is_not_repeated(
    network: nn.Module, images: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(network, images, LINF, out=tmp_path)
    forward = network.forward  # some images are looked at, to see that it is the same model
    monkeypatch.setattr(network, "forward", lambda x: pytest.fail("evaluated again") if len(x) > 32 else forward(x))
    assert evaluate(network, images, LINF, out=tmp_path).to_json() == first.to_json()


def test_a_wrapper_is_no_other_network(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    first = evaluate(network, images, LINF, out=tmp_path, attack="clean")
    assert evaluate(nn.DataParallel(network), images, LINF, out=tmp_path, attack="clean").meta == first.meta
    pool = Pool([images])
    tables = [score_margins(model, pool, mode="fast") for model in (network, nn.DataParallel(network))]
    assert tables[0].meta["model"] == tables[1].meta["model"]


class Scaled(nn.Module):
    """A network behind a normalisation that no weight shows."""

    def __init__(self, network: nn.Module, mean: float) -> None:
        super().__init__()
        self.network, self.mean = network, mean

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images - self.mean))


@pytest.mark.parametrize("attack", ["clean", "pgd-2"])
def test_other_code_with_the_same_weights_is_another_model(
    network: nn.Module, images: list[Any], tmp_path: Path, attack: str
) -> None:
    for finished in (False, True):
        evaluate(Scaled(network, 0.0), images, LINF, attack=attack, out=tmp_path)
        if not finished:
            result_path(tmp_path, attack, LINF).unlink()
        with pytest.raises(ResumeError, match="same weights that computes something else"):
            evaluate(Scaled(network, 0.5), images, LINF, attack=attack, out=tmp_path)
    rounding = Scaled(network, 1e-7)  # of another machine, say
    assert evaluate(rounding, images, LINF, attack=attack, out=tmp_path).complete


def test_stopped_at_every_point(
    network: nn.Module, images: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the second attack on a shard, again and again; no attack that was finished is repeated."""
    expected = evaluate(network, images, LINF, shard_rows=20)
    perturb = Attacker.perturb
    calls: list[str] = []

    def stop_at_second(self: Attacker, step: str, *batch: Any) -> Any:
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return perturb(self, step, *batch)

    monkeypatch.setattr(Attacker, "perturb", stop_at_second)
    for _ in range(7):  # one batch a shard, four attacks, two shards
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate(network, images, LINF, shard_rows=20, out=tmp_path)
        assert not (tmp_path / "evaluation.json").exists()
    calls.clear()
    result = evaluate(network, images, LINF, shard_rows=20, out=tmp_path)
    assert len(calls) == 1
    assert flags(result) == flags(expected)
    assert result.attack_cost == expected.attack_cost


@pytest.mark.dist
@pytest.mark.timeout(3600)
def test_killed_and_resumed(labelled: Callable[..., Any], tmp_path: Path) -> None:
    """Killed at a random moment, PUMA_KILLS times in a row (once by default), then run to its end: the same bytes."""
    model = build_model("small-cnn", 2, in_channels=1, image_size=8)
    save_model(model, tmp_path / "model.safetensors")
    pixels, labels = zip(*labelled(model, 40), strict=True)
    np.savez(tmp_path / "test.npz", image=np.stack(pixels), label=np.array(labels))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "puma", "evaluate", "model.safetensors", "--data", "test.npz", "--out", "killed"]
    command += ["--threat", str(LINF), "--attack", "cw-150", "--shard-rows", "4", "--device", "cpu", "--quiet"]
    evaluate(model, tmp_path / "test.npz", LINF, attack="cw-150", shard_rows=4, out=whole)
    rng = random.Random(0)
    shards = killed / "evaluation-cw-150-shards"
    kept: dict[Path, int] = {}
    kills = int(os.environ.get("PUMA_KILLS", "1"))
    for kill in range(kills):
        goal, wait = rng.randint(min(len(kept) + 1, 9), 9), rng.random() * 0.02
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while len(list(shards.glob("part-*.parquet"))) < goal and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(wait)
            process.kill()
        assert process.returncode in (-signal.SIGKILL, 0)  # it may have ended by itself
        after = {path: path.stat().st_mtime_ns for path in shards.glob("part-*.parquet")}
        assert kept.items() <= after.items()  # what was finished is not attacked again
        kept = after
        if len(kept) >= 9 or kill == kills - 1:
            evaluate(model, tmp_path / "test.npz", LINF, attack="cw-150", shard_rows=4, out=killed)
            assert kept.items() <= {path: path.stat().st_mtime_ns for path in shards.glob("part-*.parquet")}.items()
            one, two = (folder / "evaluation-cw-150.parquet" for folder in (whole, killed))
            assert one.read_bytes() == two.read_bytes()
            shutil.rmtree(killed)
            kept = {}


def test_workers_share_and_the_last_writes(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    expected = evaluate(network, images, LINF, shard_rows=16)
    first = evaluate(network, images, LINF, shard_rows=16, out=tmp_path, worker=1, num_workers=2)
    assert not first.complete
    assert first.robust_accuracy is None
    assert first.n_test == 16
    assert "not finished" in first.describe()
    assert not (tmp_path / "evaluation.json").exists()
    last = evaluate(network, images, LINF, shard_rows=16, out=tmp_path, worker=0, num_workers=2)
    assert last.complete
    assert flags(last) == flags(expected)
    assert flags(Evaluation.read(tmp_path)) == flags(expected)


def test_other_settings_are_refused(network: nn.Sequential, images: list[Any], tmp_path: Path) -> None:
    evaluate(network, images, LINF, out=tmp_path, attack="pgd-5")
    with pytest.raises(ResumeError, match="made with other settings") as caught:
        evaluate(network, images, LINF, out=tmp_path, attack="pgd-5", batch_size=20)
    assert caught.value.why == "batch_size: 256 there, 20 now"
    with pytest.raises(ResumeError) as caught:
        evaluate(network, images[:30], LINF, out=tmp_path, attack="pgd-5")
    assert "dataset" in caught.value.why
    network[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ResumeError) as caught:
        evaluate(network, images, LINF, out=tmp_path, attack="pgd-5")
    assert caught.value.why.startswith("model:")


def test_a_flipped_bit_is_never_read(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    """In the result or its flags: put together again from the shards. In a shard: that shard is attacked again."""
    arguments: dict[str, Any] = {"out": tmp_path, "attack": "pgd-5", "shard_rows": 20}
    first = evaluate(network, images, LINF, **arguments)
    result, shard = tmp_path / "evaluation-pgd-5.json", tmp_path / "evaluation-pgd-5-shards" / "part-000001.parquet"
    rng = np.random.default_rng(0)
    for path in (result, result.with_suffix(".parquet"), shard):
        whole = path.read_bytes()
        for _ in range(6):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            if path == shard:
                result.unlink()
            else:
                with pytest.raises(DataError):
                    Evaluation.read(result)
            again = evaluate(network, images, LINF, **arguments)
            assert flags(again) == flags(first)
            assert flags(Evaluation.read(result)) == flags(first)


def test_two_threat_models_in_one_folder(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    """Each keeps its own files, whichever is asked for again, and also once the shards are gone."""
    weak, strong = ThreatModel("Linf", 2 / 255), ThreatModel("Linf", 8 / 255)
    first = evaluate(network, images, weak, out=tmp_path, attack="pgd-5")
    second = evaluate(network, images, strong, out=tmp_path, attack="pgd-5")
    assert first.path == tmp_path / "evaluation-pgd-5.json"
    assert second.path == tmp_path / "evaluation-pgd-5-Linf-8_255.json"
    shutil.rmtree(tmp_path / "evaluation-pgd-5-shards")
    for threat, result in ((weak, first), (strong, second)):
        again = evaluate(network, images, threat, out=tmp_path, attack="pgd-5")
        assert (again.path, again.to_json()) == (result.path, result.to_json())
    l2 = evaluate(network, images, ThreatModel("L2", 0.1), out=tmp_path, attack="pgd-5")
    assert l2.path == tmp_path / "evaluation-pgd-5-L2-0.1.json"
