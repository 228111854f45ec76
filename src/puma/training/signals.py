"""SIGTERM and Ctrl-C while training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_PATIENCE_S = 5.0


class StopRequest:
    """While inside, the first SIGTERM or SIGINT only sets `wanted`; a second one acts at once, as it did before.

    Signals reach the main thread only; in another thread this does nothing.

    Args:
        single_process: False where several processes train together: one that waits for a dead one would wait for
            minutes, so a process that finishes no step for some seconds after the signal ends without a checkpoint.
    """

    def __init__(self, *, single_process: bool = True) -> None:
        self.wanted: int | None = None
        self._single_process = single_process
        self._watchdog: threading.Timer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self.cancel_watchdog()

    def heartbeat(self) -> None:
        """Restart the watchdog after a finished step: the other processes still answer."""
        if self._watchdog is not None:
            self.cancel_watchdog()
            self._watch()

    def cancel_watchdog(self) -> None:
        """Stop the watchdog, so that a checkpoint may take any time to write."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    def stop(self) -> None:
        """End the process as the signal asks: KeyboardInterrupt, or exit code 143."""
        if self.wanted == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = number
        self._restore()
        if not self._single_process:
            self._watch()

    def _watch(self) -> None:
        self._watchdog = threading.Timer(_PATIENCE_S, os._exit, (128 + signal.SIGTERM,))
        self._watchdog.daemon = True
        self._watchdog.start()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
