"""The page as text: escaping, determinism, structure."""

from __future__ import annotations

import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from puma.errors import StorageError, UsageError
from puma.report.page import ImageRow, Page, Value, png_uri
from puma.report.style import BLUE, MARKS, house_style, mark, new_figure

HOSTILE = "<script>alert(1)</script>\"'&"


def _figure():
    with house_style():
        figure, (axes,) = new_figure(4, 3)
        axes.plot([0, 1], [0, 1], color=BLUE, label="$x_1$ <b>")
        axes.legend()
    return figure


def _full_page() -> Page:
    rng = np.random.default_rng(0)
    page = Page(HOSTILE, HOSTILE).section(HOSTILE, HOSTILE).subsection(HOSTILE).text([HOSTILE, "plain"])
    page.note("warning", HOSTILE).code(HOSTILE).figure(_figure(), HOSTILE, HOSTILE)
    page.images([ImageRow(HOSTILE, list(rng.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)), [HOSTILE])], HOSTILE)
    page.table([HOSTILE, "n"], [[HOSTILE, 1], [Value(2, HOSTILE), None]], HOSTILE)
    return page.settings({HOSTILE: {HOSTILE: [HOSTILE]}}, HOSTILE).section("second")


def test_every_user_string_is_escaped():
    text = _full_page().html()
    assert text.count("<script") == 1
    assert "alert(1)</script>" not in text
    assert 'alt="&lt;script&gt;' in text


def test_page_is_the_same_bytes_every_time():
    assert _full_page().html() == _full_page().html()


def test_policy_allows_exactly_the_script_inside():
    text = _full_page().html()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)


def test_ids_are_unique_with_several_figures():
    text = Page("p").figure(_figure(), "one", "one").figure(_figure(), "two", "two").html()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text):
        assert target in ids


def test_house_colours_follow_the_page_and_mathtext_is_off():
    text = Page("p").figure(_figure(), "c", "a").html()
    assert f"var(--c-{BLUE[1:]}, {BLUE})" in text
    assert "$x_1$ &lt;b&gt;" in text


def test_png_keeps_every_pixel():
    for shape in [(8, 8), (8, 8, 1), (5, 7, 3)]:
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        back = np.asarray(Image.open(io.BytesIO(base64.b64decode(png_uri(image).partition(",")[2]))))
        assert np.array_equal(back.reshape(shape), image)


@pytest.mark.parametrize("bad", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8)])
def test_foreign_images_are_refused(bad):
    with pytest.raises(UsageError, match="cannot show an image"):
        Page("p").images([("row", [bad])])


def test_table_refuses_ragged_rows_and_shows_that_there_are_none():
    with pytest.raises(UsageError, match="1 cells"):
        Page("p").table(["a", "b"], [[1]])
    assert "no rows" in Page("p").table(["a"], []).html()


def test_figure_without_alt_text_is_refused():
    with pytest.raises(UsageError, match="alt text"):
        Page("p").figure(_figure(), "caption", " ")


def test_write_returns_the_path_and_refuses_a_folder_that_is_a_file(tmp_path):
    page = Page("p").text("hello")
    assert page.write(tmp_path / "deep" / "page.html").read_text() == page.html()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        page.write(tmp_path / "file" / "page.html")


def test_strategies_look_different_and_always_the_same():
    looks = [(m.colour, m.marker, m.hollow) for m in MARKS.values()]
    assert len(looks) == len(set(looks))
    assert mark("somebody's own") == mark("somebody's own")
