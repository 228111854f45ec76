"""Figures and tables as files, and the verb that writes them."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree

import pyarrow.parquet as pq
import pytest
from made_up_study import write_results
from typer import Typer
from typer.testing import CliRunner

from puma.cli.report import report as verb
from puma.errors import DataError, UsageError
from puma.report.cells import Value
from puma.report.content import Table
from puma.report.export import csv_text, export, latex_text
from puma.report.study import study_report

app = Typer()
app.command()(verb)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("export") / "study", seeds=2)


@pytest.fixture(scope="module")
def report(folder):
    return study_report(folder)


def test_csv_holds_the_full_precision_of_results_parquet(folder, report, tmp_path):
    files = export(report, ["csv"], tmp_path)
    assert {file.stem for file in files} == {table.name for table in report.tables}
    rows = {row["strategy"]: row for row in csv.DictReader((tmp_path / "arms.csv").open())}
    values = [
        row["clean_accuracy"]
        for row in pq.read_table(folder / "results.parquet").to_pylist()
        if row["strategy"] == "puma" and row["checkpoint"] == "last"
    ]
    assert float(rows["puma"]["clean accuracy"]) == pytest.approx(sum(values) / 2, abs=1e-15)


def test_csv_quotes_and_leaves_gaps_empty():
    table = Table("t", ["a `b`", "n"], [['x, "y"', None], ["z", Value(None, "–")], ["w", Value(0.1, "0.1 [0, 1]")]], "")
    assert list(csv.reader(csv_text(table).splitlines())) == [["a b", "n"], ['x, "y"', ""], ["z", ""], ["w", "0.1"]]


def test_csv_has_intervals_in_columns_of_their_own():
    table = Table("t", ["name", "gap"], [["a", Value(0.25, "0.25 [0.1, 0.4]", 0.1, 0.4)], ["b", Value(None, "–")]], "")
    assert csv_text(table) == 'name,gap,"gap, low","gap, high"\na,0.25,0.1,0.4\nb,,,\n'


def test_latex_escapes_everything_special():
    text = latex_text(Table("t", ["a_b"], [[r"50 % & $x$ #1 {y} ~ ^ \z <t>"]], "caption\nof two lines"))
    assert r"a\_b \\" in text
    assert r"50 \% \& \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z" in text
    assert text.startswith("% caption of two lines\n")


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_figures_are_whole_files_and_the_same_bytes_twice(report, tmp_path, kind):
    first = export(report, [kind], tmp_path / "a")
    second = export(report, [kind], tmp_path / "b")
    assert [file.stem for file in first] == [picture.name for picture in report.pictures]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    if kind == "svg":
        root = ElementTree.parse(first[0]).getroot()
        words = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"puma", "puma-plus", "none", "clean accuracy →"} <= words
    else:
        assert first[0].read_bytes().startswith(b"%PDF-")


def test_unknown_format_is_refused_before_anything_is_written(report, tmp_path):
    with pytest.raises(UsageError, match="unknown format 'svgg'") as caught:
        export(report, ["csv", "svgg"], tmp_path / "out")
    assert "did you mean 'svg'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_verb_writes_page_and_exports_and_prints_where(folder, tmp_path):
    arguments = [
        "--out",
        tmp_path / "p.html",
        "--export",
        "latex",
        "--export",
        "csv",
        "--export-out",
        tmp_path / "files",
    ]
    result = CliRunner().invoke(app, [str(folder), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    printed = result.output.split()
    assert printed[0] == str(tmp_path / "p.html")
    assert str(tmp_path / "files" / "gap.tex") in printed
    assert (tmp_path / "files" / "gap.csv").is_file()
    assert not (folder / "report.html").exists()


def test_verb_refuses_what_is_no_study(tmp_path):
    assert isinstance(CliRunner().invoke(app, [str(tmp_path)]).exception, DataError)
    assert isinstance(CliRunner().invoke(app, [str(tmp_path), "--export", "png"]).exception, UsageError)
