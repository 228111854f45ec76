"""Figures and tables as files, and the command that writes them."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree

import pyarrow.parquet as pq
import pytest
from made_up_study import write_results
from typer import Typer
from typer.testing import CliRunner

from puma.cli.report import report as command
from puma.errors import DataError, UsageError
from puma.report import export, make_report

app = Typer()
app.command()(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("export") / "study", seeds=2)


@pytest.fixture(scope="module")
def report(folder):
    return make_report(folder)


def test_csv_holds_the_full_precision_of_results_parquet(folder, report, tmp_path):
    files = export(report, ["csv"], tmp_path)
    assert {file.stem for file in files} == set(report.tables)
    rows = {row["strategy"]: row for row in csv.DictReader((tmp_path / "settings.csv").open())}
    values = [
        row["clean_accuracy"]
        for row in pq.read_table(folder / "results.parquet").to_pylist()
        if row["strategy"] == "puma" and row["checkpoint"] == "last"
    ]
    assert float(rows["puma"]["clean"]) == pytest.approx(sum(values) / 2, abs=1e-15)


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_figures_are_whole_files_and_the_same_bytes_twice(report, tmp_path, kind):
    first = export(report, [kind], tmp_path / "a")
    second = export(report, [kind], tmp_path / "b")
    assert [file.stem for file in first] == list(report.pictures)
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    if kind == "svg":
        root = ElementTree.parse(first[0]).getroot()
        words = {"".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"puma", "puma-plus", "none", "clean accuracy, % →"} <= words
    else:
        assert first[0].read_bytes().startswith(b"%PDF-")


def test_unknown_format_is_refused_before_anything_is_written(report, tmp_path):
    with pytest.raises(UsageError, match="unknown format 'svgg'") as caught:
        export(report, ["csv", "svgg"], tmp_path / "out")
    assert "did you mean 'svg'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_writes_page_and_exports_and_prints_where(folder, tmp_path):
    arguments = [
        "--out",
        tmp_path / "p.html",
        "--export",
        "svg",
        "--export",
        "csv",
        "--export-out",
        tmp_path / "files",
    ]
    result = CliRunner().invoke(app, [str(folder), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    printed = result.output.split()
    assert result.output.startswith("puma with 24 % fewer images: clean +")
    assert str(tmp_path / "p.html") in printed
    assert str(tmp_path / "files" / "tradeoff.svg") in printed
    assert (tmp_path / "files" / "settings.csv").is_file()
    assert not (folder / "report.html").exists()


def test_summary_is_a_pdf_of_two_pages_and_the_same_bytes_twice(folder, tmp_path):
    for name in ("a.pdf", "b.pdf"):
        result = CliRunner().invoke(
            app, [str(folder), "--out", str(tmp_path / "p.html"), "--pdf", str(tmp_path / name)]
        )
        assert result.exit_code == 0, result.output
    text = (tmp_path / "a.pdf").read_bytes()
    assert text.startswith(b"%PDF-")
    assert text.count(b"/Type /Page ") == 2
    assert text == (tmp_path / "b.pdf").read_bytes()


def test_command_refuses_what_is_no_study(tmp_path):
    assert isinstance(CliRunner().invoke(app, [str(tmp_path)]).exception, DataError)
    assert isinstance(CliRunner().invoke(app, [str(tmp_path), "--export", "png"]).exception, UsageError)
