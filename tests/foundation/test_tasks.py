"""Independent tasks in this process, in several, and as ranks that train together."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from task_functions import fail, gpu, gpu_memory, lost_slowly, place, refuse, square, stubborn, warn, write

from puma.errors import DataError
from puma.tasks import WorkerLost, Workers, run_tasks

HERE = Path(__file__).parent


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("count", [1, 2])
def test_every_item_comes_once_with_its_result(count: int) -> None:
    assert sorted(run_tasks(square, range(5), Workers(count))) == [(x, x * x) for x in range(5)]


@pytest.mark.parametrize("count", [1, 2])
def test_an_item_waits_for_what_it_needs(count: int) -> None:
    needs = {"run": ["margins", "elsewhere"], "margins": ["model"], "report": ["run"]}
    order = [
        item for item, _ in run_tasks(str.upper, ["report", "run", "margins", "model"], Workers(count), needs=needs)
    ]
    assert order == ["model", "margins", "run", "report"]


def test_items_that_wait_for_each_other_are_no_deadlock() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        list(run_tasks(str.upper, ["a", "b"], needs={"a": ["b"], "b": ["a"]}))


def test_processes_share_the_cores_and_do_not_search_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the working folder was searched')")
    (tmp_path / "puma.py").write_text("raise SystemExit('the working folder was searched')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    places = [result for _, result in run_tasks(place, range(4), Workers(2, threads=3))]
    assert os.getpid() not in {pid for pid, *_ in places}
    assert {threads for *_, threads, _ in places} == {"3"}
    assert {first for *_, first in places}.isdisjoint({"", str(tmp_path)})


def test_ranks_get_the_variables_of_torchrun_and_one_task_each() -> None:
    places = dict(run_tasks(place, range(2), Workers(2, ranks=True)))
    assert len({pid for pid, *_ in places.values()}) == 2
    assert sorted(str(rank) for _, rank, *_ in places.values()) == ["0", "1"]


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, [None, None, None]),
        (1, "3", ["3", "3", "3"]),  # as it is
        (2, None, ["0", "1", "0"]),
        (2, "5, GPU-8a7b", ["5", "GPU-8a7b", "5"]),
        (1, "2,-1,3", ["2,-1,3"] * 3),  # CUDA reads no further than the -1
        (0, "", ["", "", ""]),
    ],
)
def test_each_process_gets_one_of_several_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, expected: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert [place for _, place in sorted(run_tasks(gpu, range(3), Workers(3, gpus=1)))] == expected


@pytest.mark.parametrize(("gpus", "share"), [(0, 12), (1, 4), (2, 6), (3, 12)])
def test_processes_of_one_gpu_plan_with_an_equal_share_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, gpus: int, share: int
) -> None:
    """Else the first to start would leave the others less, and they would split their batches otherwise."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = [size for _, size in run_tasks(gpu_memory, range(3), Workers(3, gpus=1))]
    assert found == [share] * 3


def test_a_mistake_of_the_user_keeps_its_text_and_a_bug_its_traceback() -> None:
    with pytest.raises(DataError, match="is broken") as refused:
        list(run_tasks(refuse, range(2), Workers(2)))
    assert (refused.value.why, refused.value.fix) == ("a reason", "a command")
    with pytest.raises(KeyError) as bug:
        list(run_tasks(fail, range(2), Workers(2)))
    assert "in fail" in str(bug.value.__cause__)


def test_lines_of_the_processes_can_be_read() -> None:
    lines: list[tuple[int, str]] = []
    list(run_tasks(write, range(4), Workers(2, on_line=lambda number, line: lines.append((number, line)))))
    assert wait_for(lambda: len(lines) == 4)
    assert {line for _, line in lines} == {f"step {x}" for x in range(4)}
    lines.clear()
    list(run_tasks(warn, range(1), Workers(1, on_line=lambda number, line: lines.append((number, line)))))
    assert wait_for(lambda: lines == [(0, "WARNING class \\x1b[31m0")])


def test_a_killed_rank_ends_the_others_within_ten_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="process 0 was ended by signal 9"):
        list(run_tasks(functools.partial(stubborn, str(tmp_path)), range(2), Workers(2, ranks=True)))
    assert time.monotonic() - began < 10
    (survivor,) = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert not Path(f"/proc/{survivor}").exists()


def test_a_killed_rank_is_named_and_not_the_one_that_misses_it() -> None:
    with pytest.raises(WorkerLost, match="process 0 was ended by signal 9"):
        list(run_tasks(lost_slowly, range(2), Workers(2, ranks=True)))


SCRIPT = """
import functools, sys
sys.path.append({here!r})
from task_functions import sleep
from puma.tasks import Workers, run_tasks
list(run_tasks(functools.partial(sleep, {folder!r}), [1, 2], Workers(2)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_do_not_outlive_their_parent(tmp_path: Path, number: int) -> None:
    script = SCRIPT.format(here=str(HERE), folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        parent.send_signal(number)
        parent.wait(40)
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
