"""A time budget: when it is spent, a process is asked to stop as by SIGTERM, which leaves a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Time until which work may go on.

    Args:
        until: seconds since the epoch, a clock that all machines share; None for ever.

    >>> Budget(0.0).spent, Budget().spent
    (True, False)
    """

    def __init__(self, until: float | None = None) -> None:
        self.until = until
        self._told = False

    @classmethod
    def of(cls, seconds: float | None) -> Budget:
        """A budget of so many seconds from now; None for no end."""
        return cls(None if seconds is None else time.time() + seconds)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self._told or (self.until is not None and time.time() >= self.until)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stop what is done inside when the time is over, and go on behind it.

        Training answers SIGTERM with a checkpoint, the other engines keep what they have finished; both then end the
        process with SystemExit, which ends here if the budget was the reason. Only for the main thread.
        """
        if self.until is None:
            yield
            return
        before = signal.signal(signal.SIGTERM, _terminated)
        timer = threading.Timer(max(self.until - time.time(), 0), self._tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        except SystemExit:
            if not self._told:  # somebody else's SIGTERM
                raise
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)

    def _tell(self) -> None:
        self._told = True
        os.kill(os.getpid(), signal.SIGTERM)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
