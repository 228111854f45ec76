"""``puma plan``: what it writes, what it explains, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from score_tables import make_table
from typer.testing import CliRunner

from puma.cli.plan import plan
from puma.errors import DataError, PumaError, StorageError, UsageError
from puma.plan import Plan

app = typer.Typer()
app.command()(plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("margins")
    make_table(rng.normal(0.05, 0.05, 300), np.arange(300) % 3, real=60, el2n_adv=rng.random(300)).write(path / "table")
    return path / "table"


def run(folder: Path, *arguments: object) -> str:
    flags = ["--table", str(folder), "--threat", "Linf:8/255", *map(str, arguments)]
    result = CliRunner().invoke(app, flags)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_plan_is_written_with_its_parameters(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.parquet"
    text = run(folder, "--prune-fraction", 0.5, "--param", "c=0.4", "--seed", 3, "--out", out)
    made = Plan.read(out)
    assert made.meta["params"] == {"c": 0.4}
    assert made.kept == 60 + 120
    assert "180 of 300 images kept (120 of 240 prunable removed)" in text
    assert "eps is lowered on" in text
    assert "regime: the margin model misclassifies" in text
    assert Plan.read(out).fingerprint == made.fingerprint


def test_parameters_are_read_as_numbers_and_texts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.parquet"
    run(folder, "--param", "mean_eps_ratio=0.5", "--no-class-balanced", "--no-protect-real", "--out", out)
    made = Plan.read(out)
    assert made.mean_eps == pytest.approx(0.5 * 8 / 255, rel=1e-4)
    assert (made.meta["class_balanced"], made.meta["protect_real"]) == (False, False)
    run(folder, "--strategy", "puma-plus", "--param", "c=auto", "--out", out)
    assert 0.25 <= Plan.read(out).meta["derived"]["c"] <= 0.75


def test_explanation_has_counts_shares_and_tenths(folder: Path) -> None:
    text = run(folder, "--explain", "--prune-fraction", 0.5)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "made (synthetic) 120 240 50.0%" in lines
    assert "may mislabel" in text
    (head,) = [number for number, line in enumerate(lines) if line.startswith("tenths by margin in Linf")]
    tenths = [line.split() for line in lines[head + 2 : head + 12]]  # margins, images, kept, mean eps
    assert sum(int(tenth[3]) for tenth in tenths) == 300
    assert sum(int(tenth[4]) for tenth in tenths) == 180


def test_rules_are_listed_without_a_table() -> None:
    text = CliRunner().invoke(app, ["--list"]).output
    assert "puma-plus" in text
    assert "features=REQUIRED" in text


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["--strategy", "pumma"], UsageError, "did you mean 'puma'"),
        (["--param", "cc=1"], UsageError, "did you mean 'c'"),
        (["--param", "c"], UsageError, "NAME=VALUE"),
        (["--param", "c=0.5", "--param", "c=0.4"], UsageError, "twice"),
        (["--param", "c=many"], UsageError, "'many'"),
        (["--prune-fraction", "1"], UsageError, "0, 1"),
        (["--out", "plan.csv"], UsageError, "parquet"),
        (["--strategy", "dedup"], UsageError, "features"),
        (["--strategy", "dedup", "--param", "features=absent.npy"], DataError, "absent.npy"),
        (["--out", "/dev/null/plan.parquet"], StorageError, "/dev/null"),
        (["--table", "absent"], DataError, "absent"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], kind: type[PumaError], words: str) -> None:
    with pytest.raises(kind) as caught:
        run(folder, *arguments)
    assert words in str(caught.value)
