"""Margin tables for the tests of strategies: made by hand, and drawn by hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from puma.margins import MarginTable, Status
from puma.strategies import get_strategy, names

EPS = 8 / 255
SCORES = ("el2n-adv", "robust-failure", "dynamic-uncertainty", "input-gradient")
PRUNING = [name for name in names() if get_strategy(name).prunes]


def make_table(
    margin: object,
    label: object,
    real: int | None = None,
    *,
    classes: int | None = None,
    status: object = None,
    norm: str = "Linf",
    **scores: object,
) -> MarginTable:
    """A table of given margins; the first ``real`` rows are real, the others synthetic (None: all real)."""
    margin = np.asarray(margin, np.float32)
    label = np.asarray(label)
    rows = len(margin)
    real = rows if real is None else real
    sources = [{"name": "real", "role": "real", "rows": real}]
    if real < rows:
        sources.append({"name": "made", "role": "synthetic", "rows": rows - real})
    if status is None:
        status = np.where(np.isnan(margin), Status.UNCONVERGED, Status.CROSSED)
        status[margin < 0] = Status.MISCLASSIFIED
    pool = {"fingerprint": "p", "num_classes": classes or int(label.max()) + 1, "sources": sources}
    return MarginTable(
        label=label,
        predicted=label,
        margin=margin,
        status=status,
        steps=np.ones(rows),
        source=(np.arange(rows) >= real).astype(int),
        meta={"norm": norm, "mode": "refined", "settings": {}, "model": "m", "pool": pool},
        scores={name.replace("_", "-"): np.asarray(column, np.float32) for name, column in scores.items()},
    )


@st.composite
def tables(draw: st.DrawFn, nan: bool = False) -> MarginTable:
    rows = draw(st.integers(12, 80))
    classes = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first = np.repeat(np.arange(classes), 3)  # three real rows of each class: a fair quota never empties one
    margin = rng.normal(EPS, EPS, rows)
    if nan:
        margin[rng.random(rows) < 0.1] = np.nan
        margin[rng.random(rows) < 0.1] = -np.inf
    label = np.concatenate([first, rng.integers(0, classes, rows - len(first))])
    scores = {name.replace("-", "_"): rng.random(rows) for name in SCORES}
    return make_table(margin, label, draw(st.sampled_from([len(first), rows])), classes=classes, **scores)


def needed_params(name: str, table: MarginTable) -> dict[str, object]:
    """Parameters without a default: feature vectors for dedup."""
    if "features" not in get_strategy(name).needs:
        return {}
    return {"features": np.random.default_rng(0).normal(size=(len(table), 3))}
