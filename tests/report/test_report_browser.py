"""Pages in a real browser: no errors, no requests, few screens, sortable tables, no sideways scrolling on a phone."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_page import HOSTILE, hostile_report
from made_up_study import write_rows, write_study

from puma.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return hostile_report().write(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("browser") / "study", name=HOSTILE, seeds=2)
    write_report(folder)
    return folder


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1280, False), (1280, True)])
@pytest.mark.parametrize("unfolded", [False, True])
def test_pages_open_without_errors_requests_or_sideways_scroll(open_page, path, study, width, dark, unfolded):
    for file in (path, study / "report.html"):
        seen = open_page(file, width, dark)
        if unfolded:
            seen.page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        assert HOSTILE in seen.page.title()
        assert HOSTILE in seen.page.locator("h1").inner_text()
        assert (seen.errors, seen.outside(), seen.overflow()) == ([], [], 0)
        assert seen.page.locator("img:not([alt])").count() == 0
        assert seen.page.locator("script").count() == 1


@pytest.mark.parametrize(("width", "screens"), [(1280, 6), (400, 10)])
def test_a_folded_page_is_short_and_starts_with_the_verdict(open_page, study, width, screens):
    page = open_page(study / "report.html", width).page
    assert page.evaluate("document.documentElement.scrollHeight") <= screens * 800
    assert page.locator("main > :first-child").inner_text().startswith("puma with 24 % fewer images: clean +")
    assert page.locator("main > figure").count() == 1
    assert page.locator("main > figure").bounding_box()["y"] < 500  # the picture begins on the first screen
    assert page.locator("main > .table").count() == 1
    assert page.locator("details[open]").count() == 0


def test_figures_stay_on_white_in_a_dark_theme(open_page, study):
    page = open_page(study / "report.html", 1280, True).page
    drawn = page.evaluate(
        """async () => {
            const image = document.querySelector("figure.picture img");
            await image.decode();
            const canvas = new OffscreenCanvas(20, 20);
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0, 20, 20);
            return [...context.getImageData(0, 0, 1, 1).data];
        }"""
    )
    assert drawn == [255, 255, 255, 255]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"


def test_numbers_of_results_parquet_are_on_the_page(open_page, study):
    page = open_page(study / "report.html").page
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    puma = [row for row in rows if row["strategy"] == "puma"]
    cells = page.locator("main > .table tr.strong td")
    assert cells.nth(0).inner_text() == "puma"
    for head, column in (("clean, %", "clean_accuracy"), ("robust, %", "robust_accuracy")):
        value = page.locator(f'main > .table tr.strong td[data-label="{head}"]').get_attribute("data-value")
        assert float(value) == pytest.approx(np.mean([row[column] for row in puma]), abs=1e-12)
    alt = page.locator("figure.picture img").first.get_attribute("alt")
    assert f"puma: robust {100 * np.mean([row['robust_accuracy'] for row in puma]):.1f} %" in alt


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
    assert lines[0].startswith("name,robust,")
    assert lines[1] == '"b, with comma",0.51,0,1,2,3,4,5,6,7'
    assert lines[2].startswith("a,0.09,")


def test_empty_study_opens(open_page, tmp_path):
    write_rows(tmp_path, [])
    seen = open_page(write_report(tmp_path), 400)
    assert "No run of this study is finished yet" in seen.page.inner_text("main")
    assert (seen.errors, seen.outside(), seen.overflow()) == ([], [], 0)
