"""Progress with a rate and an ETA: a bar in a terminal, a line every 30 s in a log file, nothing unless asked for."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

from puma.errors import printable

LOG_EVERY_ENV = "PUMA_PROGRESS_SECONDS"  # between lines of a log file


class Progress:
    """Count ``total`` units of work under a label; a context manager.

    A line of a log file is ``LABEL: DONE/TOTAL UNIT RATE/s, ETA SECONDS s, NOTE``. The unit "%" has neither rate nor
    ETA; ``done`` units of an earlier run count as done but not towards the rate; ``each`` says what one unit holds
    (128, "images"), whose rate is shown with the note; ``show=False`` counts silently.
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
        self.label, self.total, self.unit, self.show, self.done = printable(label), total, unit, show, done
        self._resumed, self._each, self._note, self.lines = done, each, "", list[str]()
        self._log_every = float(os.environ.get(LOG_EVERY_ENV, 30))
        self._started = self._logged = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._started = self._logged = time.monotonic()
        if self.show and sys.stderr.isatty():
            self._bar = _terminal_bar(self)
            self._bar.start()
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units`` more; ``note`` is a short text shown beside the bar (a loss, an accuracy)."""
        self.update(self.done + units, note)

    def update(self, done: int, note: str = "", lines: Sequence[str] = ()) -> None:
        """Set how many units are done; ``lines`` are shown below the bar, one for each process at work."""
        self.done, self._note, self.lines = done, printable(note) or self._note, [*filter(None, map(printable, lines))]
        if self._bar is not None:
            rate = "" if self.unit == "%" else f"{_short(self._rate())}/s"
            self._bar.update(self._bar.task_ids[0], completed=done, rate=rate, note=self.note)
        elif self.show and time.monotonic() - self._logged >= self._log_every:
            self._log()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show:
            self._log()

    @property
    def note(self) -> str:
        """The rate of what the units hold, and the note; by this machine's clock alone, so no device is waited for."""
        held = "" if self._each is None else f"{_short(self._rate() * self._each[0])} {self._each[1]}/s"
        return ", ".join(filter(None, (held, self._note)))

    def _rate(self) -> float:
        elapsed = time.monotonic() - self._started
        return (self.done - self._resumed) / elapsed if elapsed > 0 else 0.0

    def _log(self) -> None:
        self._logged, rate = time.monotonic(), self._rate()
        head, eta = f"{self.label}: {self.done}/{self.total} {self.unit}", ""
        if self.unit != "%":
            head = f"{head} {_short(rate)}/s"
            eta = f"ETA {(self.total - self.done) / rate:.0f} s" if self.done < self.total and rate else ""
        parts = (" ".join(head.split()), eta, self.note, " | ".join(self.lines))
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def _terminal_bar(state: Progress) -> Any:
    """A bar of rich for ``state``; nothing of a label or note is read as markup."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Bar(progress.Progress):
        def get_renderables(self) -> Any:
            yield self.make_tasks_table(self.tasks)
            for line in state.lines:
                yield Text(f"  {line}", style="dim", overflow="ellipsis", no_wrap=True)

    def text(form: str) -> progress.TextColumn:
        return progress.TextColumn(form, markup=False)

    bar = Bar(
        text("{task.description}"),
        progress.BarColumn(),
        text("{task.completed}/{task.total} {task.fields[unit]} {task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        *(() if state.unit == "%" else (text("ETA"), progress.TimeRemainingColumn())),
        text("{task.fields[note]}"),
        console=Console(stderr=True),
    )
    bar.add_task(state.label, total=state.total, completed=state.done, unit=state.unit, rate="", note="")
    return bar


class _Printable(logging.Formatter):
    """Log lines whose names may come from strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def configure_logging() -> None:
    """Send warnings to stderr, one a line, as commands and their processes do; ``PUMA_LOG=info`` shows more."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=os.environ.get("PUMA_LOG", "WARNING").upper())


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
