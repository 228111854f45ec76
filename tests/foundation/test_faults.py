"""Storage that fails under a command: exit code 6 with fact and remedy, nothing lost, nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from puma.cli.app import main

POOL = ["--real", "digits?subset=60", "--threat", "Linf:0.1", "--model", "small-cnn", "--recipe", "digits"]
SHORT = ["--set", "steps=2", "--set", "attack_steps=1", "--set", "batch_size=8", "--quiet"]
COMMANDS = {
    "train": ["train", *POOL, *SHORT, "--out", "new"],
    "score": ["score", "run", "digits?subset=20", "--mode", "fast", "--out", "new", "--quiet"],
    "labels": ["data", "labels", "run", "digits?subset=20", "--out", "new", "--quiet"],
    "plan": ["plan", "--table", "margins", "--threat", "Linf:0.1", "--out", "new/plan.parquet"],
    "evaluate": ["evaluate", "run", "--data", "digits:test?subset=20", "--threat", "Linf:0.1", "--attack", "pgd-2",
                 "--out", "new", "--quiet"],
    "report": ["report", "run", "--out", "new/report.html"],
    "unpack": ["data", "unpack", "packed.npz", "--out", "new/images.npz", "--quiet"],
    "generate": ["generate", "digits?subset=60", "--count", "4", "--out", "new/images.npz", "--set", "steps=2", "--set",
                 "warmup=1", "--quiet"],
}  # fmt: skip


def puma(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and its margins."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.savez_compressed("packed.npz", image=np.zeros((4, 8, 8, 1), np.uint8), label=np.arange(4))
        for words in (
            [*COMMANDS["train"][:-1], "run"],
            ["score", "run", "digits?subset=60", "--mode", "fast", "--out", "margins", "--quiet"],
        ):
            assert puma(patch, *words) == 0
    return folder


def failing(call: str, number: int, after: int) -> Callable[..., None]:
    """In place of a call of the operating system: works ``after`` times, then fails."""
    real, calls = (Path.replace if call == "rename" else os.fsync), [0]

    def fail(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        return real(*arguments)  # type: ignore[arg-type]

    return fail  # type: ignore[return-value]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("call", "number"), [("rename", errno.EIO), ("fsync", errno.ENOSPC)])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_to_do(
    made: Path,
    command: str,
    call: str,
    number: int,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    shutil.rmtree("new", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((Path, "replace") if call == "rename" else (os, "fsync")), failing(call, number, after))
        code = puma(patch, *COMMANDS[command])
    said = capsys.readouterr().err
    if code == 0:
        assert after, "nothing was written"  # a command with a single file is done before the second call
        return
    assert code == 6, said
    assert "Traceback" not in said
    assert "try:" in said
    assert not list(made.rglob("*.tmp"))
    assert puma(monkeypatch, *COMMANDS[command]) == 0  # goes on where the storage works again


def test_a_file_system_without_locks_is_named(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.chdir(made)
    shutil.rmtree("new", ignore_errors=True)
    monkeypatch.setattr(fcntl, "flock", fail)
    for command in ("train", "score", "evaluate"):
        assert puma(monkeypatch, *COMMANDS[command]) == 6
        assert "file system without locks" in capsys.readouterr().err
