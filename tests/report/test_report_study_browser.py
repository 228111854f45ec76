"""The report of a study in a real browser, against results.parquet."""

from __future__ import annotations

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_study import ARMS, write_rows, write_study

from puma.report import write_report

pytestmark = pytest.mark.browser
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("browser") / "study", name=HOSTILE, seeds=2)
    write_report(folder)
    return folder


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1200, True)])
def test_hostile_study_opens_without_errors_requests_or_sideways_scroll(open_page, study, width, dark):
    seen = open_page(study / "report.html", width, dark)
    assert HOSTILE in seen.page.title()
    assert HOSTILE in seen.page.locator("h1").inner_text()
    assert seen.errors == []
    assert seen.outside() == []
    assert seen.overflow() == 0
    assert seen.page.locator("img:not([alt]), svg:not([aria-label])").count() == 0
    assert seen.page.locator("script").count() == 1


def test_every_figure_and_number_of_results_parquet_is_on_the_page(open_page, study):
    page = open_page(study / "report.html").page
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    assert page.locator("svg[role=img]").count() == 8
    table = page.locator("table", has_text="clean, best checkpoint")
    heads = [re.sub(r"\s+", " ", text) for text in table.locator("th").all_inner_texts()]
    lines = table.locator("tbody tr")
    assert lines.count() == len(ARMS)
    for number in range(len(ARMS)):
        cells = lines.nth(number).locator("td")
        label = cells.nth(0).inner_text()
        strategy, _, setting = label.partition(" ")
        mine = [row for row in rows if row["strategy"] == strategy and setting.partition("=")[2] in row["params"]]
        for head, column in (
            ("clean accuracy", "clean_accuracy"),
            ("robust accuracy (AutoAttack standard)", "robust_accuracy"),
        ):
            shown = float(cells.nth(heads.index(head)).get_attribute("data-value"))
            assert shown == pytest.approx(np.mean([row[column] for row in mine]), abs=1e-12), label
    alt = page.locator("svg[role=img]").first.get_attribute("aria-label")
    puma = np.mean([row["robust_accuracy"] for row in rows if row["strategy"] == "puma"])
    assert f"puma: robust {puma:.3f}" in alt


def test_points_of_the_picture_lie_where_the_results_say(open_page, study):
    """The markers of the drawn picture, mapped back through its axis ticks, are the accuracies."""
    page = open_page(study / "report.html").page
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    columns = ("robust_accuracy", "clean_accuracy")
    means = {
        name: [np.mean([row[column] for row in rows if row["strategy"] == name]) for column in columns]
        for name in ("easy", "difficult", "puma-plus")
    }
    centres = page.evaluate(
        """() => {
            const svg = document.querySelector("figure svg");
            return [...svg.querySelectorAll("use")].map((use) => {
                const box = use.getBoundingClientRect();
                return [use.getAttribute("style") || "", box.x + box.width / 2, box.y + box.height / 2];
            });
        }"""
    )
    colours = {"easy": "0072b2", "difficult": "3a9bd9", "puma-plus": "b0578d"}
    places = {
        name: next([x, y] for style, x, y in centres if f"fill: var(--c-{colour}" in style)
        for name, colour in colours.items()
    }
    # Three points fix the two linear axes; the third must agree with the line through the first two.
    for axis in (0, 1):
        (a, b, c), (pa, pb, pc) = zip(*((means[n][axis], places[n][axis]) for n in colours), strict=True)
        assert pc == pytest.approx(pa + (pb - pa) * (c - a) / (b - a), abs=1.5)


def test_sorting_the_gap_table_by_its_headline(open_page, study):
    page = open_page(study / "report.html").page
    table = page.locator("table", has_text="clean at equal robust")
    table.locator("th button").nth(1).click()
    values = [cell.get_attribute("data-value") for cell in table.locator("tbody tr td:nth-child(2)").all()]
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers)
    assert values[len(numbers) :] == [""] * (len(values) - len(numbers))


def test_empty_study_opens(open_page, tmp_path):
    write_rows(tmp_path, [])
    seen = open_page(write_report(tmp_path), 400)
    assert "No run of this study is finished yet" in seen.page.inner_text("main")
    assert (seen.errors, seen.outside(), seen.overflow()) == ([], [], 0)
