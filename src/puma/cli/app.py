"""The command ``puma``: which verbs there are, and how their errors reach the user."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from puma._version import __version__
from puma.cli.data import data_app
from puma.cli.demo import demo
from puma.cli.evaluate import evaluate
from puma.cli.export import export
from puma.cli.generate import generate
from puma.cli.perceptron import perceptron
from puma.cli.plan import plan
from puma.cli.report import report
from puma.cli.score import score
from puma.cli.show import show
from puma.cli.study import study_app
from puma.cli.train import recipe_app, train
from puma.cli.verify import verify
from puma.errors import PumaError

app = typer.Typer(
    name="puma",
    help="Adversarial training with less data: margins, pruning, per-image attack norms (arXiv 2405.06298).",
    epilog="Start with `puma demo`: the whole way on real images in minutes. Each verb has its own --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"puma {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


for verb in (demo, generate, score, plan, train, evaluate, report, show, verify, export, perceptron):
    app.command()(verb)
for name, group in {"study": study_app, "data": data_app, "recipe": recipe_app}.items():
    app.add_typer(group, name=name)


_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line; a user's mistake ends in two or three lines and its exit code, a bug in a traceback."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=os.environ.get("PUMA_LOG", "WARNING").upper())
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except PumaError as error:
        if os.environ.get("PUMA_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # Typer has turned Ctrl-C into it
            print("\nstopped; what was finished is kept: run the same command again to go on", file=sys.stderr)
        raise
    sys.exit(0)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)
