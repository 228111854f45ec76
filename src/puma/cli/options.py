"""Options that several verbs share, spelt and explained once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from puma.errors import UsageError, unknown
from puma.threat import ThreatModel


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings of a TOML file the defaults of this verb: flags still win over them."""
    if path is None:
        return None
    try:
        settings = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"--config {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot read --config {path}", why=str(error)) from None
    names = {str(parameter.name) for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in names:
            raise unknown(f"setting in {path}", key, names)
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _parse_threat(text: str) -> ThreatModel:
    try:
        return ThreatModel.parse(text)
    except UsageError as error:
        raise typer.BadParameter("; ".join(filter(None, (error.what, error.why, error.fix)))) from None


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=_load_config, is_eager=True, help="TOML file of this verb's settings; flags win."
    ),
]
Threat = Annotated[
    ThreatModel,
    typer.Option("--threat", parser=_parse_threat, metavar="NORM:EPS", help='Threat model, "Linf:8/255" or "L2:0.5".'),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
