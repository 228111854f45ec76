"""`run_tasks` hands out work: in this process, to several of this machine (also ranks of one training), or to Ray.

Where torchrun or SLURM has started the processes, each takes its share by `worker_from_environment`.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from puma.devices import PROCESSES_PER_GPU, VISIBLE_GPUS, visible_gpus
from puma.errors import PumaError, StorageError, UsageError, first_line
from puma.progress import LOG_EVERY_ENV, configure_logging

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
_LAUNCHERS = (  # in a batch script outside srun there is SLURM_NTASKS too, but only one process
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def worker_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """``(worker, num_workers, local)`` as torchrun or srun name them, else ``(0, 1, 0)``.

    >>> worker_from_environment({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"})
    (3, 8, 1)
    """
    for rank, size, local in _LAUNCHERS:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size]), int(environment.get(local, "0"))
    return 0, 1, 0


class Engine(NamedTuple):
    """What runs tasks: up to ``slots`` submitted items at a time, which come back with their results."""

    slots: int
    submit: Callable[[Any], object]
    next: Callable[[], tuple[Any, Any]]


class WorkerLost(PumaError):
    """A worker process that ended before its task did (exit code 1)."""


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Args:
        count: processes of this machine; 1 runs the tasks in this process.
        threads: CPU threads of each process; None: ``OMP_NUM_THREADS`` if it is set, else an equal share of the cores.
        gpus, cpus: of each Ray task, also fractions. With ``gpus`` local processes take the visible GPUs in turn.
        ray: address of a Ray cluster (``"auto"``, ``"host:6379"``), or ``"local"`` to start one; then not ``count``.
        ranks: the processes train together: each gets torchrun's variables and exactly one task.
        on_line: called with (number of the process, line) for what local processes write to stderr, from other threads;
            then even a single task gets a process. None passes the lines on.
    """

    count: int = 1
    threads: int | None = None
    gpus: float = 0
    ray: str | None = None
    cpus: float = 1
    ranks: bool = False
    on_line: Callable[[int, str], None] | None = None

    def __post_init__(self) -> None:
        if self.ray is not None and importlib.util.find_spec("ray") is None:  # before anything is made
            raise UsageError("Ray is not installed", fix='pip install "puma-robust[ray]"')


def run_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: Workers | None = None,
    *,
    needs: Mapping[Item, Sequence[Item]] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Yield every item with ``function(item)``, as they are done, from ``workers`` (None: this process).

    ``function`` has to be importable in another process, items and results picklable. ``needs`` are the items that have
    to be done before an item starts; those not among ``items`` count as done. Where a task fails, or the caller stops,
    the other processes get SIGTERM and some seconds to end; they end when their parent is gone, however it was killed.
    Raises the first error of a task, `WorkerLost` where its process was killed (Ray runs the task again).
    """
    workers, waiting = workers or Workers(), list(items)
    unfinished, busy = set(waiting), 0
    if workers.ray is not None:
        context: AbstractContextManager[Engine] = _ray(function, workers)
    elif waiting and (workers.ranks or workers.on_line is not None or (workers.count > 1 and len(waiting) > 1)):
        context = _processes(function, min(workers.count, len(waiting)), workers)
    else:
        here: list[Any] = []
        context = nullcontext(Engine(1, here.append, lambda: (here[-1], function(here.pop()))))
    with context as engine:
        while waiting or busy:
            ready = [item for item in waiting if unfinished.isdisjoint((needs or {}).get(item, ()))]
            for item in ready[: engine.slots - busy]:
                engine.submit(item)
                waiting.remove(item)
                busy += 1
            if not busy:
                raise ValueError(f"{waiting} wait for each other")
            item, result = engine.next()
            unfinished.discard(item)
            busy -= 1
            yield item, result


_GRACE_S, _GRACE_OF_RANKS_S, _POLL_S = 30.0, 5.0, 0.2
_RETRIES = 5  # of a Ray task whose worker was lost
_CHECKOUT = [str(folder) for folder in [Path(__file__).parents[1]] if not folder.name.endswith("-packages")]
_SERVE = "import sys; sys.path[:0] = sys.argv[3:]; from puma.tasks import serve; serve(*map(int, sys.argv[1:3]))"


class _Process:
    """A Python process that calls a function: items go to it, and results come back, through a socket."""

    def __init__(self, number: int, function: Any, workers: Workers, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        # -P: the working folder is not searched for modules, where a `json.py` would be run in place of Python's
        command = [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno()), str(os.getpid()), *_CHECKOUT]
        self.number = number
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=None if workers.on_line is None else subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C reaches this process only, which then ends the others
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.send([entry for entry in sys.path if entry])
        self.send(function)
        threading.Thread(target=self._read, args=(workers.on_line,), daemon=True).start()

    def _read(self, on_line: Any) -> None:
        for line in self.process.stderr or ():
            on_line(self.number, line.decode(errors="replace").rstrip())

    def send(self, message: Any) -> None:
        data = pickle.dumps(message)
        with suppress(OSError):  # it is dead: `receive` says so
            self.connection.send_bytes(data)

    def receive(self) -> Any:
        try:
            if not self.connection.poll():
                raise EOFError
            result, error, text = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code} before its task"
            why = "out of memory?" if code == -signal.SIGKILL else ""
            fix = "run the same command again: it goes on from what is kept"
            raise WorkerLost(f"process {self.number} {how}", why=why, fix=fix) from None
        if error is not None:
            raise error from (None if isinstance(error, PumaError) else RuntimeError(f"in another process:\n{text}"))
        return result


@contextmanager
def _processes(function: Callable[[Any], Any], count: int, workers: Workers) -> Iterator[Engine]:
    started: list[_Process] = []
    busy: dict[Any, tuple[_Process, Any]] = {}
    grace = _GRACE_S

    def submit(item: Any) -> None:
        process = idle.pop()
        process.send(item)
        busy[process.connection] = process, item

    def next_result() -> tuple[Any, Any]:
        ready: list[Any] = []
        while not ready:
            ready = cast("list[Any]", wait(list(busy), _POLL_S))
            # a killed process before those that report that they miss it; a child of it may hold its socket open
            ready = [key for key, (one, _) in busy.items() if one.process.poll() is not None] or ready
        process, item = busy.pop(ready[0])
        try:
            result = process.receive()
        except PumaError:
            raise
        except Exception:  # a rank may miss another that is being killed before the system says that it is gone
            deadline = time.monotonic() + (1.0 if workers.ranks else 0.0)
            while time.monotonic() < deadline:
                for other, _ in busy.values():
                    if other.process.poll():
                        other.receive()
                time.sleep(_POLL_S / 10)
            raise
        idle.append(process)
        return item, result

    try:
        for number, environment in enumerate(_environments(count, workers)):
            started.append(_Process(number, function, workers, environment))
        idle = started[::-1]
        yield Engine(count, submit, next_result)
    except Exception:
        grace = _GRACE_OF_RANKS_S if workers.ranks else _GRACE_S  # ranks that wait for a dead one do so for minutes
        raise
    finally:
        for one in started:
            one.process.terminate()
        deadline = time.monotonic() + grace
        try:
            for one in started:
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(max(deadline - time.monotonic(), 0))
        finally:  # at once at a second Ctrl-C
            for one in started:
                one.process.kill()
                one.process.wait()
                one.connection.close()


def _environments(count: int, workers: Workers) -> Iterator[dict[str, str]]:
    """The environment of each process: threads, its GPU, its rank."""
    common = dict(os.environ)
    if workers.threads or "OMP_NUM_THREADS" not in common:
        common["OMP_NUM_THREADS"] = str(workers.threads or max(1, len(os.sched_getaffinity(0)) // count))
    if workers.on_line is not None:
        common[LOG_EVERY_ENV] = "1"
    if workers.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    gpus = visible_gpus() if workers.gpus and not workers.ranks else []
    for number in range(count):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)} if workers.ranks else {}
        if len(gpus) > 1:
            own[VISIBLE_GPUS] = gpus[number % len(gpus)]
        if gpus and count > len(gpus):  # they share the memory of one
            own[PROCESSES_PER_GPU] = str(-(-count // len(gpus)))
        yield common | own


def end_once(number: int, _: object) -> NoReturn:
    """End this process in order, as the handler of SIGTERM: SLURM sends it several times, which changes nothing."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def serve(descriptor: int, parent: int) -> None:
    """The program of a process of `run_tasks`: call the function with each item, and send back what it gives."""
    connection = Connection(descriptor)  # from our parent, through a socket of its own
    os.set_inheritable(descriptor, False)
    configure_logging()
    signal.signal(signal.SIGTERM, end_once)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with suppress(EOFError, OSError):
        sys.path.extend(entry for entry in connection.recv() if entry not in sys.path)
        function = connection.recv()
        while True:
            item = connection.recv()
            reply: tuple[Any, Any, str]
            try:
                reply = function(item), None, ""
            except KeyboardInterrupt:  # somebody interrupted this process alone
                sys.exit(130)
            except Exception as error:
                reply = None, error, traceback.format_exc()
            try:
                data = pickle.dumps(reply)
                pickle.loads(data)
            except Exception:  # an error that cannot be sent
                data = pickle.dumps((None, RuntimeError(str(reply[1])), reply[2]))
            connection.send_bytes(data)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, however it was killed: nobody would read its results."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_OF_RANKS_S)
    os._exit(1)


def _ray_task(function: Callable[[Any], Any], item: Any, threads: int, folder: str) -> Any:
    import torch

    torch.set_num_threads(threads)
    with suppress(OSError):  # another machine may lack it; only paths that were given relative to it would miss it
        os.chdir(folder)
    return function(item)


@contextmanager
def _ray(function: Callable[[Any], Any], workers: Workers) -> Iterator[Engine]:
    """A Ray cluster runs tasks again whose worker was lost, and lets machines join or leave."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        path = os.pathsep.join([*_CHECKOUT, *filter(None, [os.environ.get("PYTHONPATH")])])
        dashboard = False if workers.ray == "local" else None
        options: dict[str, Any] = {"include_dashboard": dashboard, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
        try:  # not None for a cluster of our own: that joins one that happens to run here, and dies with it
            ray.init(address=workers.ray, log_to_driver=False, **options)
        except (ConnectionError, ValueError) as error:
            fix = "`ray start --head` starts one"
            raise UsageError(f"no Ray cluster at {workers.ray!r}", why=first_line(error), fix=fix) from error
    task: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus, max_retries=_RETRIES)(_ray_task)
    threads, busy = workers.threads or max(1, int(workers.cpus)), dict[Any, Any]()

    def submit(item: Any) -> None:
        busy[task.remote(function, item, threads, str(Path.cwd()))] = item

    def next_result() -> tuple[Any, Any]:
        (reference,), _ = ray.wait(list(busy), num_returns=1)
        item = busy.pop(reference)
        try:
            return item, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, PumaError) else error) from error

    try:
        yield Engine(sys.maxsize, submit, next_result)
    finally:
        for reference in busy:
            ray.cancel(reference)
        if ours:
            ray.shutdown()


def require_shared(mark: Path, folder: Path | str) -> None:
    """Raise a `StorageError` on a machine that does not see the ``mark`` which was left in ``folder`` at the start."""
    if not mark.exists():
        what = f"{folder} on {os.uname().nodename} is not the folder where the work was started"
        raise StorageError(what, fix="choose --out on storage that every machine mounts at the same path")
