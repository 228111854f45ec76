"""``puma plan``: from margins to a plan."""

from __future__ import annotations

import inspect
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

import puma
from puma.cli.options import Config, Seed, Strategy, Threat
from puma.cli.output import echo, print_facts, print_table
from puma.errors import UsageError
from puma.io import prepare_folder
from puma.threat import format_eps

_FROM_FILE = "Your own selection instead of a rule: indices (and eps), .npy, .csv, text."
_EXPLAIN = "Print counts, shares, and tenths by margin."


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from puma.strategies import STRATEGIES, names

    for name in names():
        strategy = STRATEGIES[name]
        values = {key: "REQUIRED" if v is inspect.Parameter.empty else v for key, v in strategy.parameters.items()}
        settings = ", ".join(f"{key}={value}" for key, value in values.items()) or "none"
        echo(f"{name:20} {strategy.summary}")
        echo(f"{'':20} removes: {strategy.prunes or 'nothing'}; settings: {settings}; {strategy.source}")
    raise typer.Exit()


def plan(
    table: Annotated[list[Path], Option("--table", help="Margin table; again for tables of other scores.")],
    threat: Threat,
    out: Annotated[Path | None, Option("--out", help="Plan to write, a .parquet file; none: only look.")] = None,
    strategy: Strategy = "puma",
    prune_fraction: Annotated[float, Option(help="Share of the prunable images to remove, in [0, 1).")] = 0.3,
    param: Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="The rule's own setting, as c=1.0.")] = None,
    from_file: Annotated[Path | None, Option(help=_FROM_FILE)] = None,
    protect_real: Annotated[bool, Option(help="Remove synthetic images only, if there are any.")] = True,
    class_balanced: Annotated[bool, Option(help="Equal quotas for each source and class.")] = True,
    seed: Seed = 0,
    explain: Annotated[bool, Option("--explain", help=_EXPLAIN)] = False,
    list_rules: Annotated[bool, Option("--list", is_eager=True, callback=_list, help="List all rules.")] = False,
    config: Config = None,
) -> None:
    """Decide which images are trained on, and how hard each is attacked.

    Takes seconds and no GPU. `puma` removes the highest margins and attacks image i with min(eps, c * margin_i);
    `none` keeps everything at full eps; `easy`, `difficult` and `random` are what PUMA is compared with.

    Example: puma plan --table margins --threat Linf:8/255 --prune-fraction 0.3 --explain --out plan.parquet
    """
    from puma.plan import read_selection
    from puma.strategies import get_strategy
    from puma.training.recipe import parse_changes

    params = {name.replace("-", "_"): value for name, value in parse_changes(param or [], "--param", "c=1.0").items()}
    get_strategy(strategy).resolve(params)  # a misspelt name is refused before a large table is read
    if out is not None and out.suffix != ".parquet":
        what, fix = f"--out {out} does not end in .parquet", f"--out {out.with_suffix('.parquet')}"
        raise UsageError(what, why="a plan is one Parquet file", fix=fix)
    if out is not None:
        prepare_folder(out.parent)
    margins = reduce(puma.MarginTable.join, map(puma.MarginTable.read, table))
    if from_file is not None:
        made, explain = puma.Plan.from_indices(margins, *read_selection(from_file), threat=threat), False
    else:
        rules: dict[str, Any] = {"seed": seed, "protect_real": protect_real, "class_balanced": class_balanced}
        made = puma.make_plan(margins, strategy, prune_fraction, threat=threat, **rules, **params)
    echo(_summary(made))
    if explain:
        _explain(made, margins)
    if out is not None:
        made.write(out)
        echo(f"written to {out}")


def _summary(plan: puma.Plan) -> str:
    """What is kept, at which eps it is attacked, and the regime: one line each."""
    counts, threat = plan.meta["counts"], plan.threat
    eps = f"mean eps {format_eps(plan.mean_eps, threat.norm)}"
    if threat.eps:
        eps += f" = {plan.mean_eps / threat.eps:.1%} of {threat}"
    if "reach" in counts:
        lowered, c = f"{counts['reach']:.1%}", f"{plan.meta['derived']['c']:.4g}"
        eps += f"; eps is lowered on {lowered} of the kept images, those of lowest margin (c = {c})"
    beta = "" if plan.beta is None else f"; TRADES beta {plan.beta:g}"
    removed = f"{counts['removed']:,} of {counts['prunable']:,} prunable removed"
    lines = [f"{plan.strategy}: {plan.kept:,} of {len(plan):,} images kept ({removed})", f"{eps}{beta}"]
    if facts := counts.get("regime"):
        wrong, below = f"{facts['misclassified']:.1%}", f"{facts['below_eps']:.1%}"
        lines.append(f"regime: the margin model misclassifies {wrong} of all images, {below} have 0 < margin < eps")
    return "\n".join(lines)


_MOST_CLASSES = 20


def _explain(plan: puma.Plan, table: puma.MarginTable) -> None:
    """Print counts by source and class, shares before and after, and tenths by margin."""
    import numpy as np
    import pandas as pd

    counts = plan.meta["counts"]
    rows, kept, norm = counts["rows"], max(counts["kept"], 1), plan.threat.norm
    sources = [(f"{s['name']} ({s['role']})", s["rows"], s["kept"]) for s in counts["by_source"]]
    classes = [(str(label), row["rows"], row["kept"]) for label, row in enumerate(counts["by_class"]) if row["rows"]]
    if len(classes) > _MOST_CLASSES:  # the two extremes say whether classes are treated alike
        classes = sorted(classes, key=lambda group: group[2] / group[1])[:: len(classes) - 1]
    for name, groups in (("source", sources), ("class", classes)):
        lines = [(group, f"{part:,}", f"{total:,}", f"{part / total:.1%}") for group, total, part in groups if total]
        print_table((f"kept by {name}", "kept", "of", "share"), lines)
    shares = {
        "misclassified by the margin model": (counts["misclassified"] / rows, counts["misclassified_kept"] / kept),
        "without a margin": (counts["without_margin"] / rows, None),
        "kept, but not attacked": (None, counts["unattacked"] / kept),
    }
    if "mislabelled_before" in counts:
        beyond = counts["mislabelled_before"], counts["mislabelled_after"]
        shares = {"attack reaches beyond the margin (may mislabel)": beyond} | shares
    text = [(name, *("" if share is None else f"{share:.1%}" for share in pair)) for name, pair in shares.items()]
    print_table(("share of", "all images", "kept images"), text)
    images = pd.DataFrame({"margin": table.margin, "kept": plan.keep, "eps": np.where(plan.keep, plan.eps, np.nan)})
    if len(images := images[np.isfinite(table.margin)]):
        bins = images.groupby(pd.qcut(images.margin, 10, precision=9, duplicates="drop"), observed=True)
        found = bins.agg(images=("kept", "size"), kept=("kept", "sum"), eps=("eps", "mean"))
        tenths = []
        for span, size, part, eps in found.itertuples(name=None):
            ends = " to ".join(format_eps(end, table.norm) for end in (span.left, span.right))
            tenths.append((ends, f"{size:,}", f"{part:,}", format_eps(eps, norm) if part else "-"))
        print_table((f"tenths by margin in {table.norm}", "images", "kept", "mean eps"), tenths)
    facts = {"settings": plan.meta["params"], "warnings": plan.warnings}
    print_facts(facts)
