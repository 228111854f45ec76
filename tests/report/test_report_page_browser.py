"""The page in a real browser: nothing fails, nothing is fetched, tables sort, a phone needs no sideways scrolling."""

from __future__ import annotations

import numpy as np
import pytest

from puma.report.page import ImageRow, Page, Value
from puma.report.style import BLUE, house_style, new_figure

pytestmark = pytest.mark.browser
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with house_style():
        figure, (axes,) = new_figure()
        axes.plot([0, 1], [0, 1], color=BLUE)
        axes.set_title("curve")
    images = list(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    page = Page(HOSTILE, "a page for the tests").section("Figure").figure(figure, "A line.", "a rising line")
    page.section("Gallery").images([ImageRow("digit 3", images, ["+0.12"] * 30)], "Noise.")
    page.section("Tables").table(
        ["name", "robust accuracy", *(f"a rather long column {i}" for i in range(8))],
        [
            ["b, with comma", 0.51, *range(8)],
            ["a", Value(0.09, "0.09 ± 0.01"), *range(8)],
            [HOSTILE, None, *range(8)],
            ["c", 10, *range(8)],
        ],
        "Wide.",
    )
    page.table(["nothing"], []).settings({"a": {"fingerprint": "0123456789abcdef" * 4}}, "Settings")
    return page.write(tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_errors_requests_or_sideways_scroll(open_page, path, width, dark):
    seen = open_page(path, width, dark)
    assert seen.page.title() == HOSTILE
    assert seen.errors == []
    assert seen.outside() == []
    assert seen.overflow() == 0
    assert seen.page.locator("img:not([alt]), svg:not([aria-label])").count() == 0


def test_table_sorts_by_number_with_missing_last(open_page, path):
    page = open_page(path).page
    table = page.locator("table").first
    firsts = lambda: [text.split(",")[0] for text in table.locator("tbody tr td:first-child").all_inner_texts()]  # noqa: E731
    table.locator("th button").nth(1).click()
    assert firsts() == ["a", "b", "c", HOSTILE]
    table.locator("th button").nth(1).click()
    assert firsts() == ["c", "b", "a", HOSTILE]
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    table.locator("th button").nth(0).click()
    assert [name for name in firsts() if name != HOSTILE] == ["a", "b", "c"]


def test_table_downloads_as_csv(open_page, path):
    page = open_page(path).page
    with page.expect_download() as download:
        page.locator("button.csv").first.click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("name,robust accuracy,")
    assert lines[1] == '"b, with comma",0.51,0,1,2,3,4,5,6,7'
    assert lines[2].startswith("a,0.09,")


def test_dark_page_lightens_the_curve(open_page, path):
    stroke = "getComputedStyle(document.querySelector(\"svg [style*='0072b2']\")).stroke"
    assert open_page(path).page.evaluate(stroke) == "rgb(0, 114, 178)"
    assert open_page(path, dark=True).page.evaluate(stroke) == "rgb(77, 176, 238)"
