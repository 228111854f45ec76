"""Check the paper's claims against committed results: writes docs/claims.md and its pictures.

    python studies/claims.py [--out docs/claims.md] [RESULTS_FOLDER ...]

Every figure of the page comes from the small files of studies (by default all below results/) and, for the linear task,
from the theory of `puma.perceptron`. The rules of the verdicts are `Condition.answer`, `verdict` and the functions
`claim_1` to `claim_6`; they were written before the results were complete.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from puma.io import read_json, write_text
from puma.perceptron.theory import Prediction, predict
from puma.plots import INK, figure_style, mark, svg_text
from puma.report import make_report
from puma.study.spec import StudySpec
from puma.tradeoff import BASELINE, Comparison, Estimate, Flags, compare, mean_interval
from puma.tradeoff.results import FLAGS_FILE, MISLABELLED_FILE, RESULTS_FILE, read_flags, read_mislabelled, read_results

ROOT = Path(__file__).parents[1]
SIMILAR = 0.02  # accuracies less than two points apart are called similar
SELECTORS = ("difficult", "easy", "random", "ccs", "dedup", "el2n-adv", "dynamic-uncertainty", "input-gradient")
ATTACKS = {"robust_accuracy": "AutoAttack", "pgd_accuracy": "CE + CW PGD-20"}
SAYS = {
    "C1": "Pruning low margins does not raise robustness once there is much synthetic data.",
    "C2": "A perceptron learning task explains it.",
    "C3": "Pruning high margins increases the harm of mislabelled perturbed data, hurting robustness and accuracy.",
    "C4": "Lowering the training eps on the lowest margins undoes that harm.",
    "C5": "PUMA: similar robustness and significantly higher accuracy with less data.",
    "C6": "It works on top of the state-of-the-art recipe, where the existing selectors do not.",
}


@dataclass(frozen=True)
class Condition:
    """A statement about a number, and whether it holds: True, False, or None where it stays open."""

    text: str
    figure: str
    answer: bool | None

    @classmethod
    def above(cls, text: str, change: Estimate | None, limit: float = 0.0) -> Condition:
        """It holds where the whole interval lies above ``limit``, and is refuted where the whole lies below."""
        if change is None or change.low is None or change.high is None:
            return cls(text, points(change), None)
        return cls(text, points(change), True if change.low > limit else False if change.high < limit else None)

    @classmethod
    def below(cls, text: str, change: Estimate | None, limit: float = 0.0) -> Condition:
        """It holds where the whole interval lies below ``limit``, and is refuted where the whole lies above."""
        if change is None or change.low is None or change.high is None:
            return cls(text, points(change), None)
        return cls(text, points(change), True if change.high < limit else False if change.low > limit else None)


def verdict(conditions: Sequence[Condition]) -> str:
    """All hold: reproduced; all are refuted: not here; none is decided: open; otherwise in part."""
    answers = {condition.answer for condition in conditions}
    if answers <= {True}:
        return "reproduced"
    if True in answers:
        return "in part"
    return "not here" if False in answers else "open"


def points(change: Estimate | None) -> str:
    """A difference in percentage points with its interval."""
    if change is None:
        return "not measured"
    ends = "" if change.low is None or change.high is None else f" [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    return f"{100 * change.value:+.1f}{ends}"


@dataclass
class Pool:
    """The runs of one study on one pool, at the last checkpoint; ``column`` is the attack that most runs have."""

    folder: Path
    name: str
    column: str
    rows: list[dict[str, Any]]
    flags: dict[Any, Flags]
    runs: str
    regime: dict[str, float]
    quality: dict[str, float] = field(default_factory=dict)
    by_attack: dict[tuple[str, str, float], dict[int, float]] = field(default_factory=dict)
    compared: dict[str, list[Comparison]] = field(default_factory=dict)

    label: str = ""

    @property
    def fraction(self) -> float:
        """The prune fraction that most strategies were run with."""
        fractions = [row["prune_fraction"] for row in self.rows if row["prune_fraction"]]
        return max(sorted(set(fractions)), key=fractions.count, default=0.0)

    def entries(self, baseline: str = BASELINE) -> list[Comparison]:
        """Every setting, compared with ``baseline``: with `none`, or with a strategy at the main prune fraction."""
        if baseline not in self.compared:
            rows = self.rows if baseline == BASELINE else [r for r in self.rows if r["prune_fraction"] == self.fraction]
            self.compared[baseline] = compare(rows, self.flags, robust=self.column, baseline=baseline)
        return self.compared[baseline]

    @property
    def main_entries(self) -> list[Comparison]:
        """The strategies with their default parameters at the main prune fraction."""
        entries = [e for e in self.entries() if e.setting.params == "{}"]
        return [e for e in entries if e.setting.prune_fraction == self.fraction]

    def find(self, strategy: str, baseline: str = BASELINE) -> Comparison | None:
        """A strategy with its default parameters, at the main prune fraction."""
        wanted = strategy, "{}", 0.0 if strategy == BASELINE else self.fraction
        settings = {(e.setting.strategy, e.setting.params, e.setting.prune_fraction): e for e in self.entries(baseline)}
        return settings.get(wanted)

    def change(self, strategy: str, axis: str, baseline: str = BASELINE) -> Estimate | None:
        """Difference in ``"clean"`` or ``"robust"`` accuracy."""
        entry = self.find(strategy, baseline)
        return getattr(entry, f"{axis}_difference") if entry else None

    def more_mislabelled(self, strategy: str, other: str) -> Estimate | None:
        """Difference of the shares of kept images that are mislabelled by the attack, paired by seed."""
        one, two = (self.by_attack.get((s, "{}", self.fraction * (s != BASELINE)), {}) for s in (strategy, other))
        pairs = [one[seed] - two[seed] for seed in sorted(one) if seed in two]
        return mean_interval(pairs) if pairs else None

    def mislabelled(self, strategy: str, params: str, fraction: float) -> str:
        """Share of the kept images that are mislabelled by the attack, mean over the seeds."""
        shares = list(self.by_attack.get((strategy, params, fraction), {}).values())
        return f"{100 * np.mean(shares):.1f} %" if shares else ""

    @property
    def attack(self) -> str:
        """Name of the attack."""
        return ATTACKS[self.column]

    @property
    def ratio(self) -> str:
        """Accuracy under attack over clean accuracy of everything at full eps."""
        none = self.find(BASELINE)
        return f"{none.robust.value / none.clean.value:.2f}" if none and none.robust else ""

    @property
    def labels(self) -> str:
        """Label agreement of the images that the study generated, and of real test images, by the same classifier."""
        if not self.quality:
            return "real images"
        return f"{100 * self.quality['label_agreement']:.1f} % ({100 * self.quality['real_accuracy']:.1f} %)"

    @property
    def table(self) -> str:
        """Every setting as a Markdown table."""
        return pool_table(self)

    @property
    def autoattack(self) -> Pool | None:
        """The runs that AutoAttack was run on, where most only have the screen."""
        rows = [row for row in self.rows if row["robust_accuracy"] is not None]
        if self.column == "robust_accuracy" or not rows:
            return None
        flags = {key: found for key, (found, _) in read_flags(self.folder / FLAGS_FILE, "standard").items()}
        return replace(self, column="robust_accuracy", rows=rows, flags=flags, compared={})


def read_pools(folder: Path) -> list[Pool]:
    """The pools of a study's folder, from its small files."""
    rows = [row for row in read_results(folder / RESULTS_FILE) if row["checkpoint"] == "last"]
    column = max(ATTACKS, key=lambda name: sum(row[name] is not None for row in rows))
    spec = StudySpec.read(folder / "study.toml")
    attack = "standard" if column == "robust_accuracy" else spec.evaluation.screen
    flags = {key: found for key, (found, _) in read_flags(folder / FLAGS_FILE, attack).items()}
    shares = read_mislabelled(folder / MISLABELLED_FILE) if (folder / MISLABELLED_FILE).is_file() else []
    images = folder / "done" / "synthetic.json"
    quality = dict(read_json(images).get("quality") or {}) if images.is_file() else {}
    records = [read_json(path) for path in sorted((folder / "done").glob("margins*.json"))]  # one for each pool
    regimes = {record["images"]: dict(record.get("regime") or {}) for record in records}
    pools: list[Pool] = []
    names = dict.fromkeys(row["pool"] for row in rows)
    for name in names:
        mine = [row for row in rows if row["pool"] == name and row[column] is not None]
        if not mine:
            continue
        regime = regimes.get(sum(map(int, re.findall(r"\((\d+)\)", name))), {})
        pool = Pool(folder, name, column, mine, flags, f"{len(rows)} of {len(spec.runs())}", regime, quality)
        pool.label = folder.name if len(names) == 1 else f"{folder.name}: {name}"
        for row in shares:
            if row["pool"] == name:
                key = row["strategy"], row["params"], row["prune_fraction"]
                pool.by_attack.setdefault(key, {})[row["seed"]] = row["by_attack"]
        pools.append(pool)
    return pools


def claim_1(pool: Pool) -> list[Condition]:
    """Low margins pruned: robustness is not raised."""
    change = pool.change("difficult", "robust")
    return [Condition.below("`difficult` raises accuracy under attack by less than 1 point", change, 0.01)]


def claim_3(pool: Pool) -> list[Condition]:
    """High margins pruned: more is mislabelled, and both accuracies fall."""
    return [
        Condition.above(
            "`easy`: more kept images are mislabelled by the attack", pool.more_mislabelled("easy", BASELINE)
        ),
        Condition.below("`easy` lowers clean accuracy", pool.change("easy", "clean")),
        Condition.below("`easy` lowers accuracy under attack", pool.change("easy", "robust")),
    ]


def claim_4(pool: Pool) -> list[Condition]:
    """The cap, among equally pruned images: less is mislabelled, and nothing is lost against pruning alone."""
    return [
        Condition.below("`puma` mislabels fewer kept images than `easy`", pool.more_mislabelled("puma", "easy")),
        Condition.above("`puma` has higher clean accuracy than `easy`", pool.change("puma", "clean", "easy")),
        Condition.above(
            "its accuracy under attack is not 2 points lower", pool.change("puma", "robust", "easy"), -SIMILAR
        ),
    ]


def better_tradeoff(pool: Pool, strategy: str) -> list[Condition]:
    """Higher clean accuracy than everything at full eps, at similar robustness."""
    text = f"`{strategy}` has higher clean accuracy than everything at full eps"
    return [
        Condition.above(text, pool.change(strategy, "clean")),
        Condition.above("its accuracy under attack is not 2 points lower", pool.change(strategy, "robust"), -SIMILAR),
    ]


def claim_5(pool: Pool) -> list[Condition]:
    """Similar robustness, higher accuracy, less data."""
    random = [change for axis in ("clean", "robust") if (change := pool.change("random", axis)) is not None]
    loss = min(random, key=lambda change: change.high or math.inf, default=None)
    saving = "as many random images lose accuracy, so that fewer images are a saving"
    return [*better_tradeoff(pool, "puma"), Condition.below(saving, loss)]


def improves(pool: Pool, strategy: str) -> bool | None:
    """Whether a strategy has the better trade-off; None where that stays open."""
    answers = {condition.answer for condition in better_tradeoff(pool, strategy)}
    return True if answers == {True} else False if False in answers else None


def claim_6(pool: Pool) -> list[Condition]:
    """TRADES, EMA and 70 % synthetic images in each batch: PUMA improves, the other selectors do not."""
    run = [name for name in SELECTORS if pool.find(name)]
    better = [name for name in run if improves(pool, name)]
    figure = f"{len(better)} of {len(run)} do: {', '.join(better)}" if better else f"none of {len(run)} does"
    own = ", ".join(points(pool.change("puma", axis)) for axis in ("clean", "robust"))
    return [
        Condition("`puma` raises clean accuracy at similar robustness", own, improves(pool, "puma")),
        Condition("no other selector does", figure, not better if run else None),
    ]


CLAIMS = {"C1": claim_1, "C3": claim_3, "C4": claim_4, "C5": claim_5, "C6": claim_6}

EPS, KEEP, ANGLE, DATA = 0.3, 0.6, 20.0, (2.5, 5.0, 10.0, 30.0)
LINEAR = ("none", "random", "difficult", "easy", "puma(1.0)", "puma(0.5)")


def linear_task() -> tuple[dict[tuple[str, float], Prediction], list[Condition]]:
    """The students of the linear task without any fit, and what the claim needs of them."""
    students = {
        (name, data): predict(name, data, EPS, 1.0 if name == "none" else KEEP, angle=math.radians(ANGLE))
        for name in LINEAR
        for data in DATA
    }

    def less(text: str, one: str, two: str, data: float) -> Condition:
        errors = [students[name, data].robust_error for name in (one, two)]
        return Condition(text, " against ".join(f"{100 * error:.1f} %" for error in errors), errors[0] < errors[1])

    scarce, much = DATA[0], DATA[-1]
    return students, [
        less(f"scarce data ({scarce:g} per dimension): `difficult` has a lower robust error than `random`",
             "difficult", "random", scarce),
        less(f"much data ({much:g}): `random` has a lower one than `difficult`", "random", "difficult", much),
        less("much data: pruning high margins costs robustness", "none", "easy", much),
        less(f"lower eps on low margins gives it back ({DATA[2]:g} per dimension)", "puma(1.0)", "easy", DATA[2]),
    ]  # fmt: skip


def summary(verdicts: Sequence[str]) -> str:
    """The verdict over all pools."""
    values = set(verdicts)
    if len(values) == 1:
        return values.pop()
    return "in part" if values & {"reproduced", "in part"} else "not here" if "not here" in values else "open"


def pool_table(pool: Pool) -> str:
    """Every setting of a pool."""
    attack, strict = ATTACKS[pool.column], pool.autoattack
    heads = [
        "strategy",
        "pruned",
        "seeds",
        "clean",
        attack,
        "clean change",
        f"{attack} change",
        "gap to the free controls",
    ]
    heads += ["mislabelled by the attack"] + (["AutoAttack", "AutoAttack change"] if strict else [])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    stricts = {e.setting: e for e in strict.entries()} if strict else {}
    for entry in pool.entries():
        setting = entry.setting
        name = replace(setting, prune_fraction=0.0).label
        cells = [f"`{name}`", f"{100 * setting.prune_fraction:g} %", str(len(entry.seeds))]
        cells += [f"{100 * e.value:.1f} %" if e else "" for e in (entry.clean, entry.robust)]
        cells += ["" if e is None else points(e) for e in (entry.clean_difference, entry.robust_difference)]
        gap = entry.clean_gap
        some = "" if gap.seeds == gap.of else f" ({gap.seeds} of {gap.of} seeds)"
        cells += ["" if setting.is_control else points(gap.estimate) + some if gap.estimate else "not comparable"]
        cells += [pool.mislabelled(setting.strategy, setting.params, setting.prune_fraction)]
        if strict:
            own = stricts.get(setting)
            cells += [f"{100 * own.robust.value:.1f} %" if own and own.robust else ""]
            change = points(own.robust_difference) if own and own.robust_difference else ""
            if own and change and len(own.seeds) < len(entry.seeds):
                change += f" ({len(own.seeds)} seeds, clean {points(own.clean_difference)})"
            cells += [change]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forest(pools: Sequence[Pool]) -> Figure:
    """Change in clean accuracy and in accuracy under attack against everything at full eps, by pool and strategy."""
    order = ("puma", "puma-plus", *SELECTORS, "uniform-eps")
    rows = []
    for pool in pools:
        near = ('{"scale": 0.5}', '{"scale": 0.75}')
        free = [e for e in pool.entries() if e.setting.strategy == "uniform-eps" and e.setting.params in near]
        entries = [e for e in (*pool.main_entries, *free) if e.setting.strategy in order]
        rows.append((pool, sorted(entries, key=lambda e: order.index(e.setting.strategy), reverse=True)))
    heights = [len(entries) for _, entries in rows]
    figure = Figure(figsize=(7.2, 0.9 + 0.2 * sum(heights) + 0.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights, sharex="col")
    for line, (pool, entries) in zip(grid, rows, strict=True):
        for axes, axis in zip(line, ("clean", "robust"), strict=True):
            for place, entry in enumerate(entries):
                change: Estimate | None = getattr(entry, f"{axis}_difference")
                if change is None:
                    continue
                colour = mark(entry.setting.strategy).colour
                if change.low is not None and change.high is not None:
                    axes.plot([100 * change.low, 100 * change.high], [place, place], color=colour, lw=1.5)
                axes.plot(100 * change.value, place, "o", color=colour, ms=4)
            axes.axvline(0, color=INK, lw=0.8)
            labels = [replace(e.setting, prune_fraction=0.0).label.replace("uniform-eps scale=", "all data, eps × ")
                      for e in entries]  # fmt: skip
            axes.set_yticks(range(len(entries)), labels if axis == "clean" else [])
            axes.set_ylim(-0.6, len(entries) - 0.4)
        line[0].set_title(f"{pool.label}, {100 * pool.fraction:g} % pruned", loc="left", fontsize=8)
    grid[-1][0].set_xlabel("change in clean accuracy, points")
    grid[-1][1].set_xlabel("change in accuracy under attack, points")
    return figure


def page(pools: Sequence[Pool]) -> str:
    """The text of docs/claims.md, from claims.md.j2."""
    students, linear = linear_task()
    rows = {name: [(pool.label, rule(pool)) for pool in pools] for name, rule in CLAIMS.items()}
    verdicts = {name: summary([verdict(found) for _, found in rows[name]]) for name in rows} | {"C2": verdict(linear)}
    template = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    text = template.from_string(Path(__file__).with_suffix(".md.j2").read_text()).render(
        says=SAYS,
        verdicts=verdicts,
        pools=pools,
        rows=rows,
        linear=linear,
        students=students,
        task={"eps": EPS, "angle": f"{ANGLE:g}", "keep": KEEP, "strategies": LINEAR, "data": DATA},
        percent=lambda share: f"{100 * share:.3g} %",
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> None:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="studies; default: all below results/")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "claims.md")
    options = parser.parse_args()
    folders = options.folders or sorted(path.parent for path in (ROOT / "results").glob("*/results.parquet"))
    pools = [pool for folder in folders for pool in read_pools(folder)]
    (options.out.parent / "images").mkdir(parents=True, exist_ok=True)
    write_text(options.out, page(pools))
    with figure_style():
        write_text(options.out.parent / "images" / "claims.svg", svg_text(forest(pools)))
    for folder in folders:
        picture = make_report(folder).pictures["tradeoff"]
        with figure_style():
            write_text(options.out.parent / "images" / f"{folder.name}.svg", svg_text(picture.figure))
    print(f"{options.out}: {len(pools)} pools of {len(folders)} studies")


if __name__ == "__main__":
    main()
