"""Pages as text: escaping, determinism, structure; tables as pages and CSV show them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re

import numpy as np
import pytest
from made_up_page import hostile_report, make_figure
from PIL import Image

from puma.errors import StorageError
from puma.plots import MARKS, mark
from puma.report.page import Picture, Table, png_uri
from puma.tradeoff import Estimate


def test_every_user_string_is_escaped():
    text = hostile_report().html()
    assert text.count("<script") == 1
    assert "alert(1)</script>" not in text
    assert 'alt="&lt;script&gt;' in text


def test_page_is_the_same_bytes_every_time():
    report = hostile_report()
    assert report.html() == report.html() == hostile_report().html()


def test_policy_allows_exactly_the_script_inside():
    text = hostile_report().html()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(https?:)?//", text)


def test_figures_are_on_white_and_mathtext_is_off():
    picture = Picture(make_figure(), "a line")
    svg = base64.b64decode(picture.uri.partition(",")[2]).decode()
    ground = re.search(r'<g id="patch_1">\s*<path [^>]*style="([^"]*)"', svg)[1]
    assert "fill: #ffffff" in ground
    assert "$x_1$ &lt;b&gt;" in svg


def test_png_keeps_every_pixel():
    for shape in [(8, 8), (8, 8, 1), (5, 7, 3)]:
        image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
        back = np.asarray(Image.open(io.BytesIO(base64.b64decode(png_uri(image).partition(",")[2]))))
        assert np.array_equal(back.reshape(shape), image)


def test_write_returns_the_path_and_refuses_a_folder_that_is_a_file(tmp_path):
    report = hostile_report()
    assert report.write(tmp_path / "deep" / "page.html").read_text() == report.html()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report.write(tmp_path / "file" / "page.html")


def test_strategies_look_different_and_always_the_same():
    looks = [(m.colour, m.marker, m.hollow) for m in MARKS.values()]
    assert len(looks) == len(set(looks))
    assert mark("somebody's own") == mark("somebody's own")


def test_csv_holds_full_precision_and_intervals_in_columns_of_their_own():
    gap = Estimate(0.1 + 0.2, 0.1, 0.4, 3)
    table = Table(
        {"a `b`": "text", "gap": "points", "n": "number"}, [['x, "y"', gap, 3], ["z", "not comparable", None]]
    )
    assert list(csv.reader(table.csv().splitlines())) == [
        ["a b", "gap", "gap, low", "gap, high", "n"],
        ['x, "y"', "0.30000000000000004", "0.1", "0.4", "3"],
        ["z", "not comparable", "", "", ""],
    ]
