"""Spread independent computations over processes, each on one BLAS thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
Item = TypeVar("Item")
Result = TypeVar("Result")


def compute(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Yield every item with its result, as they are done: here if ``workers`` is 1, else in that many processes.

    With more than one worker the function and the items have to be picklable, and a script that calls this needs the
    usual ``if __name__ == "__main__"`` guard.

    >>> sorted(compute(abs, [-2, 1], workers=1))
    [(-2, 2), (1, 1)]
    """
    if workers == 1 or len(items) <= 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, initializer=_follow, initargs=(os.getpid(),))
    with _single_threaded_children(), pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _follow(parent: int) -> None:
    """End this worker when its parent is gone, however it was killed: nobody would read its results."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside compute on one BLAS thread each, whatever this process does."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
