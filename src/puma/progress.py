"""Progress with a rate and an ETA: a bar where somebody watches, a line every 30 s in a log file.

The library prints nothing by itself: engines take ``progress=True`` or ``False`` (the default) and count through
`Progress`; only the command line turns it on.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

# A study's workers report every second to the process that draws their bars.
LOG_EVERY_ENV = "PUMA_PROGRESS_SECONDS"


class Progress:
    """Count ``total`` units of work under a label; a context manager.

    Args:
        label: what is being done, a few words.
        total: how many units there are.
        unit: what one unit is called ("images", "steps").
        show: False counts silently.
        done: units that an earlier run finished; they count as done but not towards the rate.

    >>> with Progress("scoring", total=2) as bar:
    ...     bar.advance(2)
    """

    def __init__(self, label: str, total: int, unit: str = "", *, show: bool = False, done: int = 0) -> None:
        self.label, self.total, self.unit, self.show = label, total, unit, show
        self.done, self._resumed = done, done
        self._bar: Any = None
        self._note = ""
        self._log_every = float(os.environ.get(LOG_EVERY_ENV, 30))
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> Progress:
        self._started = self._logged = time.monotonic()
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[unit]} {task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self.done, unit=self.unit, rate="", note=""
            )
            self._bar.start()
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units`` more; ``note`` is a short text shown beside the bar (a loss, an accuracy)."""
        self.done += units
        self._note = note or self._note
        if not self.show:
            return
        if self._bar is not None:
            self._bar.update(self._task, advance=units, rate=self._rate(), note=self._note)
        elif time.monotonic() - self._logged >= self._log_every:
            self._log()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show:
            self._log()

    def _rate(self) -> str:
        elapsed = time.monotonic() - self._started
        rate = (self.done - self._resumed) / elapsed if elapsed > 0 else 0.0
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"

    def _log(self) -> None:
        self._logged = time.monotonic()
        fresh = self.done - self._resumed
        left = (self.total - self.done) * (self._logged - self._started) / fresh if fresh else float("nan")
        eta = f", ETA {left:.0f} s" if self.done < self.total and fresh else ""
        note = f", {self._note}" if self._note else ""
        line = f"{self.label}: {self.done}/{self.total} {self.unit} {self._rate()}{eta}{note}"
        print(" ".join(line.split()), file=sys.stderr, flush=True)
