"""What holds for every command: options, interruptions, errors of the operating system, text of strangers."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from puma.cli import app as application
from puma.cli.app import app, main
from puma.cli.options import share_of
from puma.errors import DataError, PumaError, UsageError


def puma(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


INTERRUPTED = """
import sys, time
import puma.cli.app as application
def busy():
    try:
        print("busy", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)  # what is to be written still takes its time
application.app = busy
application.main()
"""


def test_ctrl_c_is_answered_at_once_and_a_second_one_ends_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "busy\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "Ctrl-C again ends at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (130, -signal.SIGINT)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_errors_of_the_operating_system_are_no_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "real.npz")

    monkeypatch.setattr(application, "app", fail)
    assert puma(monkeypatch) == 6
    said = capsys.readouterr().err
    assert "real.npz" in said
    assert os.strerror(number) in said
    assert "try:" in said


def test_control_characters_in_errors_are_shown_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert puma(monkeypatch, "show", "no\x1b]0;owned\x07where\u202e") != 0
    said = capsys.readouterr().err
    assert "no\\x1b]0;owned\\x07where\\u202e" in said
    assert "\x1b" not in said


def test_settings_files_have_the_names_of_the_flags_and_name_no_code(tmp_path: Path) -> None:
    config = tmp_path / "a.toml"

    def run(text: str) -> tuple[int, str]:
        config.write_text(text)
        result = CliRunner().invoke(app, ["train", "--config", str(config)])
        error = result.exception if isinstance(result.exception, PumaError) else ""
        return result.exit_code, f"{error}{result.output}"

    for factory in ("mine:factory", "my-file:factory", "pack.mine:Net.of"):  # a module's file may have any name
        assert "which would run code" in run(f'model = "{factory}"')[1]
    assert "did you mean 'recipe'" in run('recip = "digits"')[1]
    assert "nested" in run("a = " + "[" * 5000)[1]
    for published in ("timm:resnet18", "timm:hf-hub:timm/resnet18.a1_in1k", "hf:owner/name"):
        assert "which would run code" not in run(f'model = "{published}"')[1]
    assert "setting in" not in run('set = ["steps=3"]')[1]  # the flag is --set, whatever the program calls it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"worker": 0}, "belong together"),
        ({"worker": 2, "num_workers": 2}, "from 0"),
        ({"devices": 2, "worker": 0, "num_workers": 2}, "three ways"),
        ({"devices": 2, "engine": "ray"}, "three ways"),
        ({"engine": "rai"}, "did you mean 'ray'"),
        ({"address": "auto"}, "engine ray"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"device": "mps:x"}, "auto, cpu, cuda"),
        ({"device": "cuda:99"}, "GPUs are visible"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        share_of(**options)  # type: ignore[arg-type]


def test_the_share_comes_from_options_or_else_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (share_of("cpu").worker, share_of("cpu").num_workers) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert (share_of("cpu").worker, share_of("cpu").num_workers) == (0, 1)  # in a batch script, outside srun
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert (share_of("cpu").worker, share_of("cpu").num_workers) == (3, 8)
    share = share_of("cpu", worker=1, num_workers=2)
    assert (share.worker, share.num_workers, share.device) == (1, 2, "cpu")
    share = share_of("cpu", devices=4)
    assert (share.worker, share.num_workers, share.workers.count) == (0, 1, 4)
    if importlib.util.find_spec("ray") is not None:
        assert share_of("cpu", engine="ray").workers.ray == "local"


def test_device_is_spelt_alike_in_every_command() -> None:
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        for parameter in getattr(command, "params", []):
            if "--device" in parameter.opts:
                assert parameter.default == "auto", name


def test_nested_settings_are_refused_by_every_command(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.toml"
    bomb.write_text("a = " + "[" * 100_000)
    for words in (["recipe", "show"], ["study", "run"], ["show"], ["train", "--config"], ["demo", "--config"]):
        result = CliRunner().invoke(app, [*words, str(bomb)])
        assert isinstance(result.exception, UsageError), words
        assert "nested" in str(result.exception), words


def test_nested_metadata_of_any_table_is_refused(tmp_path: Path) -> None:
    table = pa.table({"index": [0]}).replace_schema_metadata({b"puma": b'{"schema":' + b"[" * 100_000})
    pq.write_table(table, tmp_path / "bomb.parquet")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "bomb.parquet")])
    assert isinstance(result.exception, DataError), result.exception
    assert "nested" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("puma plan --strategy puma-", ["puma-plus", "puma-shuffled"]),
        ("puma train --recipe trades-", ["trades-edm"]),
        ("puma train --model wrn-2", ["wrn-28-10"]),
        ("puma train --logger w", ["wandb"]),
        ("puma score --mode d", ["deepfool"]),
        ("puma evaluate --attack cw", ["cw-20"]),
        ("puma evaluate --checkpoint l", ["last"]),
        ("puma recipe show trades-", ["trades-edm"]),
    ],
)
def test_names_are_completed_in_the_shell(words: str, expected: list[str]) -> None:
    asked = {"_PUMA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; sys.argv = ['puma']; from puma.cli.app import main; main()"
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert result.stdout.split() == expected, result.stderr
