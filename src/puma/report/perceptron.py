"""The page of the perceptron laboratory: what was asked, what was found, and where it stops to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from puma.io import write_text
from puma.perceptron import collapse_fraction
from puma.perceptron.experiments import COLLAPSE, DIALS, ENDS, FRAGILE, LEARNING, TRADEOFF, Experiment, theory
from puma.perceptron.table import Table
from puma.report.cells import Value
from puma.report.page import Page
from puma.report.perceptron_figures import (
    draw_collapse,
    draw_ends,
    draw_learning,
    draw_mislabelling,
    draw_tradeoff,
    measure_gaps,
)
from puma.report.perceptron_geometry import draw_geometry
from puma.report.style import PAPER, house_style
from puma.report.svg import svg_text

ABUNDANT = 20.0
"""Examples per dimension in the figures that show one data amount."""
_AMOUNTS = (2.0, 5.0, ABUNDANT)


@dataclass(frozen=True)
class Laboratory:
    """Everything the page shows: the experiments, their simulated tables, and the theory curves, by name."""

    experiments: Mapping[str, Experiment]
    tables: Mapping[str, Table]
    curves: Mapping[str, Table]


def run_laboratory(
    experiments: Sequence[Experiment], out: Path | str, *, workers: int = 1, progress: bool = False
) -> Laboratory:
    """Simulate the experiments and compute their theory; finished parts in ``out`` are reused.

    Args:
        experiments: `experiments.DEFAULT` or `experiments.FULL`.
        out: folder; one sub-folder per experiment.
        workers: processes.
        progress: show progress on stderr.

    Raises:
        ResumeError: ``out`` holds experiments of another size, or is being written.
        StorageError: ``out`` cannot be written.
    """
    by_name = {experiment.name: experiment for experiment in experiments}
    tables = {
        name: experiment.run(Path(out) / name, workers=workers, progress=progress)
        for name, experiment in by_name.items()
    }
    learning, collapse = by_name[LEARNING.name], by_name[COLLAPSE.name]
    alphas = sorted({1.4, *learning.alphas})
    keeps = sorted({*np.linspace(0.3, 1, 15).round(3).tolist(), *collapse.keeps})
    curves = {
        LEARNING.name: theory(learning, learning.strategies, alphas, learning.keeps, workers=workers),
        COLLAPSE.name: theory(collapse, ("easy",), collapse.alphas, keeps, workers=workers),
        TRADEOFF.name: theory(
            by_name[TRADEOFF.name], ("none", *DIALS, "uniform-eps(0)"), (ABUNDANT,), (1.0,), workers=workers
        ),
    }
    for name, curve in curves.items():
        curve.write(Path(out) / name / "theory.csv")
    return Laboratory(by_name, tables, curves)


def draw_laboratory(laboratory: Laboratory) -> dict[str, Figure]:
    """Every figure of the page, by the name of its picture file."""
    tables, curves = laboratory.tables, laboratory.curves
    with house_style():
        return {
            "perceptron-geometry": draw_geometry(),
            "perceptron-learning": draw_learning(tables["learning"], curves["learning"], LEARNING.strategies),
            "perceptron-mislabelling": draw_mislabelling(),
            "perceptron-collapse": draw_collapse(tables["collapse"], curves["collapse"], tables["ends"], ABUNDANT),
            "perceptron-ends": draw_ends(tables["ends"], tables["tradeoff"], _AMOUNTS),
            "perceptron-tradeoff": draw_tradeoff(tables["tradeoff"].where(alpha=ABUNDANT), curves["tradeoff"]),
        }


def write_laboratory(laboratory: Laboratory, out: Path | str, pictures: Path | str | None = None) -> Path:
    """Write ``report.html`` into ``out``, and the figures as SVG files into ``pictures`` (``out`` if None).

    Returns:
        The page's path.
    """
    figures = draw_laboratory(laboratory)
    for name, figure in figures.items():
        write_text(Path(pictures or out) / f"{name}.svg", _on_paper(svg_text(figure)))
    return _page(laboratory, figures).write(Path(out) / "report.html")


def compare_theory(laboratory: Laboratory) -> list[dict[str, Any]]:
    """Theory minus simulation where both exist on the learning grid, in units of 1.

    Each row holds ``strategy, alpha, reliable``, and of both errors the difference and the simulation's standard error.
    """
    simulated, curve = laboratory.tables[LEARNING.name], laboratory.curves[LEARNING.name]
    rows = []
    for point in curve:
        whole = point["strategy"] == "none"
        part = simulated.where(strategy=point["strategy"], alpha=point["alpha"], eps=point["eps"])
        part = part if whole else part.where(keep=point["keep"])
        if not len(part):
            continue
        row = {name: point[name] for name in ("strategy", "alpha", "reliable")}
        for metric in ("clean_error", "robust_error"):
            row[metric] = point[metric] - float(part[metric].mean())
            row[f"{metric}_se"] = float(part[metric].std(ddof=1) / np.sqrt(len(part)))
        rows.append(row)
    return rows


def compare_collapse(laboratory: Laboratory) -> list[dict[str, Any]]:
    """For each attack norm: the collapse law, and the kept shares where theory and simulation collapse.

    ``found`` and ``predicted`` are the largest kept share at which at least half of the seeds, and the limit at this
    data amount, end at ``w = 0``; 0 where none does. Both are on the experiment's grid of kept shares.
    """
    simulated = laboratory.tables[COLLAPSE.name].where(strategy="easy")
    curve = laboratory.curves[COLLAPSE.name]
    rows = []
    for eps in simulated.values("eps"):
        shares = simulated.values("keep")
        found = [keep for keep in shares if simulated.where(eps=eps, keep=keep)["collapsed"].mean() >= 0.5]
        predicted = [keep for keep in shares if curve.where(eps=eps, keep=keep)["collapsed"].any()]
        law = float(collapse_fraction(eps))
        rows.append({"eps": eps, "law": law, "predicted": max(predicted, default=0), "found": max(found, default=0)})
    return rows


def _page(laboratory: Laboratory, figures: Mapping[str, Figure]) -> Page:
    page = Page("The perceptron laboratory", "Why pruning and gentler attacks work, and when they cannot")
    _task(page, figures)
    _claims(page, laboratory, figures)
    _trade(page, laboratory, figures)
    _theory(page, laboratory, figures)
    page.section("Settings", "Each folder beside this page holds `simulation.csv` and the finished parts.")
    for experiment in laboratory.experiments.values():
        settings = {key: value for key, value in vars(experiment).items() if key not in ("name", "question")}
        page.settings(settings, f"{experiment.name}: {experiment.question}")
    return page


def _task(page: Page, figures: Mapping[str, Figure]) -> None:
    page.section(
        "The task",
        "Gaussian inputs, a linear teacher that gives the labels, a linear student trained against L2 attacks of norm "
        "eps. Everything about a student can be computed exactly, so no test set blurs the result.",
    )
    page.figure(
        figures["perceptron-geometry"],
        "Left: examples closer to the boundary than eps are carried across it by the attack, but keep their label. "
        "Right: PUMA removes what lies far away, and attacks what lies near by at most half of its margin.",
        "Two panels of points around a vertical boundary. Left, a band of width eps on both sides, with arrows that "
        "cross the boundary. Right, a tilted dashed probe; points far from it are crossed out, near ones move little.",
    )
    page.figure(
        figures["perceptron-mislabelling"],
        "Exact formulas. Left: pruning easy examples makes the mislabelled share of the rest larger. Right: when about "
        "half of the kept examples are mislabelled, the best student is `w = 0`.",
        "Left, the mislabelled share over the kept share: rising to one as easy examples are pruned, falling to zero "
        "as difficult ones are. Right, the critical kept share over eps, about twice the mislabelled share.",
    )


def _claims(page: Page, laboratory: Laboratory, figures: Mapping[str, Figure]) -> None:
    page.section("Which end to prune", f"{ENDS.question} Below, the task with a trade-off.")
    page.figure(
        figures["perceptron-ends"],
        "Robust error of a student minus that of the same seed's student on all data (0: nothing lost; bars: two "
        "standard errors). Curves that leave the picture have collapsed.",
        "Excess robust error over the kept share, one panel per task and data amount. Easy pruning stays near zero "
        "until it collapses at small kept shares. Difficult pruning goes below zero only on the anisotropic task with "
        "little data.",
    )
    page.section("Collapse, and what the cap changes", COLLAPSE.question)
    page.figure(
        figures["perceptron-collapse"],
        "Left: simulated points on the line of theory, dotted near the collapse, where theory is unreliable. Dashed "
        "verticals: the law for unlimited data. Right: with margins learned on the same data, easy pruning collapses "
        "and the capped attack of puma does not.",
        "Clean error over the kept share. Left, three attack norms; each curve jumps to one half near its law. Right, "
        "easy pruning jumps to one half at 30 percent kept, puma stays low.",
    )
    rows = [[row["eps"], row["law"], row["predicted"], row["found"]] for row in compare_collapse(laboratory)]
    page.table(
        ["eps", "law, unlimited data", "predicted at this data amount", "found in simulation"],
        rows,
        "Largest kept share at which training on easy-pruned data ends at w = 0 (0: never). Finite data lengthen the "
        "mean of the kept rows, so that exact collapse comes later than the law.",
    )


def _trade(page: Page, laboratory: Laboratory, figures: Mapping[str, Figure]) -> None:
    table = laboratory.tables[TRADEOFF.name]
    page.section("A trade-off, and the free control", TRADEOFF.question)
    page.note(
        "info",
        "The isotropic task has no accuracy-robustness trade-off: whatever lowers one error lowers the other. Only "
        "this one, with few strong and many weak coordinates, can show a gain.",
    )
    page.figure(
        figures["perceptron-tradeoff"],
        f"At {ABUNDANT:g} examples per dimension. Above the line is a gain that no smaller uniform eps gives for free. "
        "Collapsed students lie outside the picture.",
        "Left, clean over robust accuracy with the frontier of smaller uniform eps; puma's points lie close to it, "
        "slightly above. Right, each strategy's gap to that frontier in points.",
    )
    rows = [
        [alpha, point.strategy, point.keep, 100 * point.clean, 100 * point.robust, *_gap(point.mean, point.error)]
        for alpha in table.values("alpha")
        for point in measure_gaps(table.where(alpha=alpha))
    ]
    head = ["alpha", "strategy", "kept", "clean accuracy, %", "robust accuracy, %", "gap, points", "standard error"]
    page.table(head, rows, "Gap: clean accuracy above the uniform-eps frontier at equal robust accuracy, per seed.")
    fragile = laboratory.tables[FRAGILE.name]
    rows = [
        [point.strategy, point.keep, 100 * point.clean, 100 * point.robust, *_gap(point.mean, point.error)]
        for point in measure_gaps(fragile)
    ]
    page.table(head[1:], rows, f"{FRAGILE.question} It was trained without attack, on the same data.")


def _gap(mean: float, error: float) -> tuple[Value | float, float | None]:
    if not np.isfinite(mean):
        return Value(None, "not comparable"), None
    return 100 * mean, 100 * error if np.isfinite(error) else None


def _theory(page: Page, laboratory: Laboratory, figures: Mapping[str, Figure]) -> None:
    page.section("Learning curves and their theory", LEARNING.question)
    page.figure(
        figures["perceptron-learning"],
        "Points: simulation, bars of two standard errors. Lines: the limit of many dimensions by Gordon's theorem, no "
        "parameter fitted; dotted where it is unreliable. The probe is independent and 20 degrees off.",
        "Clean and robust error over examples per dimension for five strategies; simulated points lie on the lines of "
        "theory. With little data difficult pruning is best of the pruned, with much data puma and none are.",
    )
    rows = [
        [
            row["strategy"], row["alpha"], 100 * row["clean_error"], 100 * row["clean_error_se"],
            100 * row["robust_error"], 100 * row["robust_error_se"], "yes" if row["reliable"] else "no",
        ]
        for row in compare_theory(laboratory)
    ]  # fmt: skip
    head = ["strategy", "alpha", "clean, points", "standard error", "robust, points", "standard error", "reliable"]
    page.table(head, rows, "Theory minus simulation.")


def _on_paper(svg: str) -> str:
    """The picture on white: where a page shows it on a dark ground its text stays readable."""
    head, start, rest = svg.partition('<g id="figure_1">')
    return f'{head}<rect width="100%" height="100%" fill="{PAPER}"/>\n {start}{rest}'
