"""The page of the paper's claims says what the committed results say; its verdicts follow their rules."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from puma.report import verdict
from puma.tradeoff import Estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "studies" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say(claims: ModuleType) -> None:
    folders = sorted(path.parent for path in (ROOT / "results").glob("*/results.parquet"))
    pools = [pool for folder in folders for pool in claims.read_pools(folder)]
    assert claims.page(pools) == (ROOT / "docs" / "claims.md").read_text(), "run: python studies/claims.py"
    assert (ROOT / "docs" / "images" / "claims.svg").is_file()


@pytest.mark.parametrize(("start", "count"), [("**CIFAR-10**", 8), ("**Over five seeds**", 5)])
def test_the_readme_quotes_the_page(start: str, count: int) -> None:
    page = (ROOT / "docs" / "claims.md").read_text()
    paragraph = (ROOT / "README.md").read_text().split(start)[1].split("\n\n")[0]
    paragraph = " ".join(paragraph.split())
    quoted = re.findall(r"([+-][0-9.]+) (\[[+-][0-9.]+,\s[+-][0-9.]+\])", paragraph)
    assert len(quoted) == count
    clean = re.findall(r"gains ([0-9.]+) points of clean accuracy (\[.*?\])", paragraph)
    assert len(clean) == (start == "**CIFAR-10**")
    for value, interval in [*quoted, *((f"+{value}", interval) for value, interval in clean)]:
        assert f"{value} {interval}" in page


def test_the_verdicts_of_the_reports_are_in_the_page() -> None:
    page = (ROOT / "docs" / "claims.md").read_text()
    for folder in sorted(path.parent for path in (ROOT / "results").glob("*/results.parquet")):
        quoted = re.findall(r"([+-][0-9.]+) points (\[.*?\])", verdict(folder).paper.replace("−", "-"))
        assert len(quoted) == 2
        for value, interval in quoted:
            assert f"{value} {interval}" in page


def test_the_page_of_the_linear_task_quotes_it_too() -> None:
    page = (ROOT / "docs" / "claims.md").read_text()
    rows = re.findall(
        r"^\| `(puma[^`]*)`[^|]*\| (\d) \| (.*) \| (.*) \|$", (ROOT / "docs" / "perceptron.md").read_text(), re.M
    )
    assert len(rows) == 3
    for strategy, seeds, *changes in rows:
        assert re.search(
            rf"^\| `{strategy}` \| 40 % \| {seeds} \| .* \| {re.escape(' | '.join(changes))} \|", page, re.M
        )


@pytest.mark.parametrize(
    ("interval", "limit", "above", "below"),
    [
        ((0.01, 0.03), 0.0, True, False),
        ((-0.03, -0.01), 0.0, False, True),
        ((-0.01, 0.01), 0.0, None, None),
        ((-0.01, 0.01), -0.02, True, False),
        ((-0.05, 0.01), -0.02, None, None),
        ((None, None), 0.0, None, None),
    ],
)
def test_a_condition_is_decided_by_its_interval(
    claims: ModuleType, interval: tuple[float, float], limit: float, above: bool | None, below: bool | None
) -> None:
    change = Estimate(0.0, *interval, 3)
    assert claims.Condition.above("", change, limit).answer is above
    assert claims.Condition.below("", change, limit).answer is below
    assert claims.Condition.above("", None, limit).answer is None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([True, True], "reproduced"),
        ([True, False], "in part"),
        ([True, None], "in part"),
        ([False, None], "not here"),
        ([False], "not here"),
        ([None, None], "open"),
    ],
)
def test_the_verdict_of_a_claim(claims: ModuleType, answers: list[bool | None], expected: str) -> None:
    assert claims.verdict([claims.Condition("", "", answer) for answer in answers]) == expected


def test_the_verdict_over_pools(claims: ModuleType) -> None:
    assert claims.summary(["reproduced", "reproduced"]) == "reproduced"
    assert claims.summary(["reproduced", "not here"]) == "in part"
    assert claims.summary(["open", "not here"]) == "not here"
