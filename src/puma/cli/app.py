"""The command ``puma``: which commands there are, and how errors and interruptions reach the user."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, NoReturn

import typer
from typer import Option

from puma import __version__
from puma.cli.data import data_app
from puma.cli.demo import demo, perceptron
from puma.cli.evaluate import evaluate
from puma.cli.generate import generate
from puma.cli.plan import plan
from puma.cli.report import export, report
from puma.cli.score import score, score_run
from puma.cli.show import show, verify
from puma.cli.study import study_app
from puma.cli.train import recipe_app, train
from puma.errors import PumaError, StorageError, printable
from puma.progress import configure_logging
from puma.tasks import end_once

app = typer.Typer(
    name="puma",
    help="Adversarial training with less data: margins, pruning, per-image eps (arXiv 2405.06298).",
    epilog="Start with `puma demo`: the whole way on real images in minutes. Each command has its own --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"puma {__version__}")
        raise typer.Exit()


@app.callback()
def _options(version: Annotated[bool, Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


for command in (demo, generate, score, plan, train, evaluate, report, show, verify, export, perceptron):
    app.command()(command)
app.command("score-run")(score_run)
for name, group in {"study": study_app, "data": data_app, "recipe": recipe_app}.items():
    app.add_typer(group, name=name)


_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line; a user's mistake ends in two or three lines and its exit code, a bug in a traceback."""
    configure_logging()
    try:
        with _interruptions():
            app()
    except (PumaError, OSError) as error:
        if os.environ.get("PUMA_DEBUG") or (not isinstance(error, PumaError) and error.errno is None):
            raise
        if not isinstance(error, PumaError):  # one that no module has met
            who = error.filename or "the operating system says"
            fix = "check the path and the disk, then run the same command again"
            error = StorageError(f"{who}: {error.strerror}", why=f"error {error.errno}", fix=fix)
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # Typer has turned Ctrl-C into it
            print("\nstopped; what was finished is kept: run the same command again to go on", file=sys.stderr)
        raise
    sys.exit(0)


@contextmanager
def _interruptions() -> Iterator[None]:
    """While inside: SIGTERM ends in order; the first Ctrl-C is acknowledged at once, and the second ends at once.

    Python delivers signals between two instructions of the main thread, which may be many seconds inside one operation
    of torch; another thread reads them as they come.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    terminate = signal.signal(signal.SIGTERM, end_once)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, terminate)
        os.close(writer)


def _watch(reader: int) -> None:
    seen = 0
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            seen += number[0] == signal.SIGINT
            if number[0] == signal.SIGINT and seen == 1:
                with suppress(OSError, ValueError):
                    print("\nstopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            elif number[0] == signal.SIGINT:
                os._exit(_INTERRUPTED)
