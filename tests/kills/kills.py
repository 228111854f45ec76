"""Commands that are killed at random moments: a server that forks them, and the comparison of what they leave.

Run as a program this is the server. It imports everything once and computes nothing; each command is then a process of
its own that begins to work at once, so that no kill is spent on imports.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from puma.io import settings_diff, sha256_file

BUSY = 5  # exit code while a process of the killed command is still ending
_RETRY_S = 60


@dataclass(frozen=True)
class Command:
    """A command that resumes.

    Args:
        name: for messages and as seed.
        arguments: of `puma`; they write below the working folder.
        times: names of fields that hold wall-clock times, which are left out of the comparison: keys of JSON and of
            the metadata of weights and tables, columns of CSV, numbers that stand beside this name in a page.
        processes: it starts processes of its own, whose work is measured by the clock on the wall.
        kills: share of the kills that it gets.
    """

    name: str
    arguments: tuple[str, ...]
    times: tuple[str, ...] = ()
    processes: bool = False
    kills: float = 1.0


@dataclass
class Ended:
    """How a process ended, and how much of its clock it took."""

    code: int
    seconds: float
    killed: bool = False


class Server:
    """Forks commands, one at a time; use it as a context."""

    def __enter__(self) -> Server:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, command: Command, folder: Path, kill_after: float | None = None) -> Ended:
        """Run a command in ``folder``; kill it when it has taken ``kill_after`` seconds of its clock, if it still runs.

        The clock is the processor time of the process, so that other load on the machine does not shift the moments.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answers = self._process.stdout
        request = {"arguments": command.arguments, "folder": str(folder)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid, started, killed, seconds = int(answers.readline()), time.monotonic(), False, 0.0
        while not select.select([answers], [], [], 0.001)[0]:
            with suppress(OSError):
                seconds = time.monotonic() - started if command.processes else time.clock_gettime(~pid << 3 | 2)
            if kill_after is not None and not killed and seconds >= kill_after:
                os.kill(pid, signal.SIGKILL)  # reaped after its answer has come, so the pid is still its own
                killed = True
        code = int(answers.readline())
        return Ended(code, seconds, killed and code == -signal.SIGKILL)


def small_experiments() -> tuple[Any, ...]:
    """The experiments of the linear task in a second."""
    from dataclasses import replace

    from puma.perceptron import experiments

    small = {"dimension": 20, "seeds": 2}
    grids = [(2.0, 20.0), (20.0,), (2.0, 5.0, 20.0), (2.0, 5.0, 20.0)]
    return tuple(
        replace(one, keeps=one.keeps[:2], eps=one.eps[:1], alphas=alphas, **small)  # type: ignore[arg-type]
        for one, alphas in zip(experiments.DEFAULT, grids, strict=True)
    )


def shorten_autoattack() -> None:
    """AutoAttack standard in seconds."""
    from pyautoattack import AutoAttack

    configure = AutoAttack._set_version

    def shorter(self: AutoAttack, version: str = "standard") -> None:
        configure(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 6
        self.fab.n_iter, self.square.n_queries = 3, 40

    AutoAttack._set_version = shorter


def serve() -> None:
    """Read requests from stdin; say the pid of each process, and its exit code when it has ended."""
    import importlib
    import pkgutil

    import cleanlab.filter  # noqa: F401

    import puma
    from puma.cli.app import main

    for module in pkgutil.walk_packages(puma.__path__, "puma."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from puma.perceptron import experiments

    experiments.DEFAULT = small_experiments()  # type: ignore[assignment]
    shorten_autoattack()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(request["folder"])
            descriptor = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["puma", *request["arguments"]]
            main()
        print(pid, flush=True)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
        os.waitpid(pid, 0)


# --- comparison ----------------------------------------------------------------------------------------------------


def content(folder: Path, times: tuple[str, ...]) -> dict[str, Any]:
    """Every file below ``folder`` by its name, without locks and the log.

    With ``times``, JSON, CSV and the metadata of weights and tables are read, and these fields are left out; so is a
    checksum that covers them. A recorded checksum of such a file counts as right or wrong.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and not re.search(r"\.lock(-|$)|^log$", path.name)]
    return {str(path.relative_to(folder)): _read(path, times) for path in paths}


def _read(path: Path, times: tuple[str, ...]) -> Any:
    data = path.read_bytes()
    if not times:
        return data
    if path.suffix == ".json":
        return _plain(json.loads(data), times)
    if path.suffix == ".csv":
        return [_plain(row, times) for row in csv.DictReader(io.StringIO(data.decode()))]
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        return {"header": _plain(json.loads(data[8 : 8 + size]), times), "tensors": data[8 + size :]}
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        described = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        table = table.replace_schema_metadata(None)
        return {"metadata": _plain(described, times), "types": str(table.schema), "columns": table.to_pydict()}
    if path.suffix == ".html":
        named = "|".join(map(re.escape, times))
        return re.sub(rf"({named})((?:<[^>]*>|\s)*)[\d.e-]+", r"\1\2", data.decode())
    if path.suffix == ".sha256":
        return sha256_file(path.with_name(path.stem.removeprefix("."))) in data.decode().split()
    return data


def _plain(value: Any, times: tuple[str, ...]) -> Any:
    """``value`` without the fields in ``times``, also inside texts that are JSON, and without checksums over them."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(ValueError):
            return _plain(json.loads(value), times)
    if isinstance(value, dict):
        left = {key: _plain(inner, times) for key, inner in value.items() if key not in times}
        for checksum in ("checksum", "sha256"):
            if checksum in left and any(f'"{name}' in json.dumps(value).replace("\\", "") for name in times):
                del left[checksum]
        return left
    return [_plain(inner, times) for inner in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of files that one of them lacks, or whose content differs, with the fields in which it does."""
    problems = [f"{name}: {'missing' if name in expected else 'left behind'}" for name in expected.keys() ^ found]
    for name in sorted(expected.keys() & found):
        if expected[name] != found[name]:
            pairs = expected[name], found[name]
            fields = [] if isinstance(pairs[0], (bytes, str)) else [line[:200] for line in settings_diff(*pairs)]
            problems.append(f"{name}: other bytes {fields}")
    return problems


# --- the trial -----------------------------------------------------------------------------------------------------


def finish(server: Server, command: Command, folder: Path) -> Ended:
    """Run a command to its end; while processes of the killed one are ending, again."""
    until = time.monotonic() + _RETRY_S
    while (ended := server.run(command, folder)).code == BUSY and time.monotonic() < until:
        time.sleep(0.2)
    return ended


def trials(server: Server, command: Command, kills: int, work: Path) -> Iterator[tuple[int, list[str]]]:
    """Kill a command ``kills`` times; yield (number of kills, differences) after each run that was let to its end.

    The first kill of a run falls anywhere between its begin and its end, the next ones while it goes on; on average two
    more follow.
    """
    draw = random.Random(command.name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    whole = finish(server, command, work)
    assert whole.code == 0, (work / "log").read_text()
    expected = content(work, command.times)
    done = 0
    while done < kills:
        shutil.rmtree(work)
        work.mkdir()
        in_this_run = 0
        while done + in_this_run < kills and (not in_this_run or draw.random() < 2 / 3):
            ended = server.run(command, work, draw.uniform(0, whole.seconds))
            if ended.killed:
                in_this_run += 1
            elif ended.code != BUSY:
                break
        ended = finish(server, command, work)
        problems = differences(expected, content(work, command.times))
        if ended.code:
            problems.append(f"exit code {ended.code}: {(work / 'log').read_text()[-2000:]}")
        done += in_this_run
        yield in_this_run, problems


if __name__ == "__main__":
    serve()
