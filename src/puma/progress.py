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

# Seconds between lines; a study's workers report every second to the process that draws their progress.
LOG_EVERY_ENV = "PUMA_PROGRESS_SECONDS"


class Progress:
    """Count ``total`` units of work under a label; a context manager.

    Args:
        label: what is being done, a few words.
        total: how many units there are.
        unit: what one unit is called ("images", "steps").
        show: False counts silently.
        done: units that an earlier run finished; they count as done but not towards the rate.
        each: what one unit holds, a number and a name (128, "images"); their rate is shown with the note.

    >>> with Progress("scoring", total=2) as bar:
    ...     bar.advance(2)
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "",
        *,
        show: bool = False,
        done: int = 0,
        each: tuple[int, str] | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.show = label, total, unit, show
        self.done, self._resumed, self._each = done, done, each
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
            self._bar.update(self._task, advance=units, rate=f"{_text(self._rate())}/s", note=self._beside())
        elif time.monotonic() - self._logged >= self._log_every:
            self._log()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show:
            self._log()

    def _rate(self) -> float:
        elapsed = time.monotonic() - self._started
        return (self.done - self._resumed) / elapsed if elapsed > 0 else 0.0

    def _beside(self) -> str:
        """The rate of what the units hold, and the note; by this machine's clock alone, so no device is waited for."""
        if self._each is None:
            return self._note
        count, name = self._each
        return ", ".join(filter(None, (f"{_text(self._rate() * count)} {name}/s", self._note)))

    def _log(self) -> None:
        self._logged = time.monotonic()
        fresh = self.done - self._resumed
        left = (self.total - self.done) * (self._logged - self._started) / fresh if fresh else float("nan")
        eta = f", ETA {left:.0f} s" if self.done < self.total and fresh else ""
        note = f", {beside}" if (beside := self._beside()) else ""
        line = f"{self.label}: {self.done}/{self.total} {self.unit} {_text(self._rate())}/s{eta}{note}"
        print(" ".join(line.split()), file=sys.stderr, flush=True)


def _text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class Lines:
    """One bar for the whole and a line below it for each process at work; in a log file, a line every 30 s.

    Args:
        label: what is being done.
        total: units of the whole.
        show: False draws nothing.
    """

    def __init__(self, label: str, total: int, *, show: bool) -> None:
        self.label, self.total, self.show = label, total, show
        self._live: Any = None
        self._logged = time.monotonic()

    def __enter__(self) -> Lines:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4)
            self._live.start()
        return self

    def update(self, done: int, summary: str, lines: list[str]) -> None:
        """Show ``done`` units of the whole, a summary beside them, and what each process says."""
        if self._live is not None:
            from rich.console import Group
            from rich.progress_bar import ProgressBar
            from rich.table import Table
            from rich.text import Text

            head = Table.grid(padding=(0, 1))
            head.add_row(self.label, ProgressBar(self.total, done, width=40), f"{done} %", summary)
            self._live.update(Group(head, *(Text(f"  {line}", style="dim", overflow="ellipsis") for line in lines)))
        elif self.show and (time.monotonic() - self._logged >= 30 or not lines):
            self._logged = time.monotonic()
            print(f"{self.label}: {done} %, {summary}; " + " | ".join(filter(None, lines)), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
