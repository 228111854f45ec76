"""``puma plan``: from margins to a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puma.cli.options import Config, Seed, Threat
from puma.errors import UsageError

if TYPE_CHECKING:
    from puma.margins import MarginTable
    from puma.plan import Plan


def _list_strategies(wanted: bool) -> None:
    if not wanted:
        return
    from puma.strategies import STRATEGIES, names

    for name in names():
        strategy = STRATEGIES[name]
        settings = ", ".join(f"{key}={_shown(value)}" for key, value in strategy.parameters.items())
        typer.echo(f"{name:20} {strategy.summary}")
        facts = [f"removes: {strategy.prunes or 'nothing'}", f"settings: {settings or 'none'}", strategy.source]
        typer.echo(f"{'':20} {'; '.join(facts)}")
    raise typer.Exit()


def plan(
    table: Annotated[list[Path], typer.Option("--table", help="Margin table; again for tables of other scores.")],
    threat: Threat,
    out: Annotated[Path | None, typer.Option("--out", help="Plan to write, a .parquet file; none: only look.")] = None,
    strategy: Annotated[str, typer.Option("--strategy", help="A rule; `puma plan --list` names them all.")] = "puma",
    prune_fraction: Annotated[
        float, typer.Option("--prune-fraction", help="Share of the prunable images to remove, in [0, 1).")
    ] = 0.3,
    param: Annotated[
        list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="The rule's own setting, as c=1.0.")
    ] = None,
    c: Annotated[str | None, typer.Option("--c", help="Short for --param c=: share of the margin, or auto.")] = None,
    mean_eps_ratio: Annotated[
        float | None, typer.Option("--mean-eps-ratio", help="Mean eps over the kept images / eps; solves for c (puma).")
    ] = None,
    features: Annotated[Path | None, typer.Option("--features", help="Feature vectors: .npy file or folder.")] = None,
    protect_real: Annotated[
        bool, typer.Option("--protect-real/--no-protect-real", help="Remove synthetic images only, if there are any.")
    ] = True,
    class_balanced: Annotated[
        bool, typer.Option("--class-balanced/--no-class-balanced", help="Equal quotas for each source and class.")
    ] = True,
    seed: Seed = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Print counts, shares, histogram and the theory.")] = False,
    list_rules: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_strategies, help="List all rules.")
    ] = False,
    config: Config = None,
) -> None:
    """Decide which images are trained on, and how hard each is attacked.

    Takes seconds and no GPU. `puma` removes the highest margins and attacks image i with min(eps, c * margin_i);
    `none` keeps everything at full eps; `easy`, `difficult` and `random` are what PUMA is compared with.

    Example: puma plan --table margins --threat Linf:8/255 --prune-fraction 0.3 --explain --out plan.parquet
    """
    from puma.cli.explain import explanation, summary
    from puma.io import prepare_folder
    from puma.strategies import get_strategy, make_plan

    params = _params(param or [], {"c": c, "mean_eps_ratio": mean_eps_ratio, "features": features})
    get_strategy(strategy).resolve(params)  # a misspelt name is told before a large table is read
    if out is not None:
        if out.suffix != ".parquet":
            raise UsageError(f"--out {out} does not end in .parquet", why="a plan is one Parquet file")
        prepare_folder(out.parent)
    margins = _read(table)
    made: Plan = make_plan(
        margins,
        strategy,
        prune_fraction,
        threat=threat,
        seed=seed,
        protect_real=protect_real,
        class_balanced=class_balanced,
        **params,
    )
    typer.echo(summary(made))
    if explain:
        typer.echo(explanation(made, margins))
    if out is not None:
        made.write(out)
        typer.echo(f"written to {out}")


def _read(paths: list[Path]) -> MarginTable:
    """The first table, with the scores of the others joined."""
    from puma.margins import MarginTable

    margins, *others = (MarginTable.read(path) for path in paths)
    for other in others:
        margins = margins.join(other)
    return margins


def _params(texts: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """The strategy's parameters: ``NAME=VALUE`` texts and dedicated flags; numbers are read as numbers."""
    params: dict[str, Any] = {}
    given = [*texts, *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--param {text!r} is not NAME=VALUE", fix="write --param c=1.0")
        if name in params:
            raise UsageError(f"parameter {name!r} is given twice")
        params[name] = _value(value.strip())
    return params


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> Any:
    import inspect

    return "REQUIRED" if value is inspect.Parameter.empty else value
