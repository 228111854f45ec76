"""The report of a study, against the results it was made from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_study import ARMS, REAL, SYNTHETIC, write_records, write_results, write_rows, write_run
from matplotlib.text import Text
from typer import Typer
from typer.testing import CliRunner

from puma.cli.report import report as verb
from puma.errors import DataError
from puma.report import write_report
from puma.report.content import Code
from puma.report.folder import make_report
from puma.report.materials import Materials
from puma.report.quality import quality_rows
from puma.report.study import study_report
from puma.tradeoff import compare, random_images_needed
from puma.tradeoff.tables import evaluation_file, read_evaluation, write_flags


def table_of(report, name):
    """A table's rows as dictionaries, by its name."""
    table = next(table for table in report.tables if table.name == name)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    from made_up_study import write_study

    return write_study(tmp_path_factory.mktemp("studies") / "study", seeds=2)


@pytest.fixture(scope="module")
def report(study):
    return study_report(study)


def test_every_arm_shows_the_means_of_results_parquet(study, report):
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    shown = {row["strategy"]: row for row in table_of(report, "arms")}
    assert len(shown) == len(ARMS)
    for strategy in ("none", "puma", "easy"):
        mine = [row for row in rows if row["strategy"] == strategy]
        assert shown[strategy]["clean accuracy"].number == pytest.approx(np.mean([r["clean_accuracy"] for r in mine]))
        robust = np.mean([r["robust_accuracy"] for r in mine])
        assert shown[strategy]["robust accuracy (AutoAttack standard)"].number == pytest.approx(robust)
        assert shown[strategy]["images kept"] == mine[0]["kept"]
        assert shown[strategy]["seeds"] == 2


def test_gaps_are_those_of_tradeoff_with_the_flags_of_the_runs(study, report):
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    expected = {entry.setting.strategy: entry for entry in compare(rows) if not entry.setting.is_control}
    shown = {row["strategy"]: row for row in table_of(report, "gap")}
    assert set(shown) == set(expected)
    for strategy, entry in expected.items():
        gap = shown[strategy]["clean at equal robust"]
        value = None if entry.clean_gap.estimate is None else pytest.approx(entry.clean_gap.estimate.value)
        assert gap.number == value
    plain = expected["puma"].clean_gap.estimate
    low = float(re.search(r"\[([-+.\d]+),", shown["puma"]["clean at equal robust"].text)[1])
    assert low <= plain.low + 1e-3, "the variance of the test images makes the interval no shorter"


def test_frontier_of_the_picture_runs_through_the_undominated_means(report):
    picture = next(picture for picture in report.pictures if picture.name == "tradeoff")
    axes = picture.figure.axes[0]
    lines = {
        line.get_label(): line.get_xydata()
        for line in axes.lines
        if line.get_label() in ("uniform-eps", "trades-weight")
    }
    assert set(lines) == {"uniform-eps", "trades-weight"}
    for points in lines.values():
        corners = points[1:-1]
        assert (np.diff(corners[:, 0]) > 0).all()
        assert (np.diff(corners[:, 1]) < 0).all()
        # level beyond its ends, as far as the dial was run
        assert points[0, 1] == corners[0, 1]
        assert points[0, 0] <= corners[0, 0]
        assert points[-1, 0] == corners[-1, 0]
        assert points[-1, 1] <= corners[-1, 1]


def test_labels_of_the_picture_do_not_overlap(report):
    figure = next(picture for picture in report.pictures if picture.name == "tradeoff").figure
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the lines to far labels
    assert len(boxes) == len(ARMS)
    overlaps = [
        (i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].padded(-1.5).overlaps(boxes[j].padded(-1.5))
    ]
    assert overlaps == []


def test_synthetic_quality_stands_beside_that_of_real_images():
    quality = {
        "schema": "puma.quality/1",
        "label_agreement": 0.99,
        "real_accuracy": 0.98,
        "neighbor": {"synthetic_to_train": {"mean": 1.2}, "test_to_train": {"mean": 1.1}, "copies": 0.001},
        "coverage": {"synthetic": {"0": 0.9, "1": 0.8}, "test": {"0": 1.0, "1": 1.0}},
    }
    rows = {row[0].partition(":")[0].partition(",")[0]: row[1:] for row in quality_rows(quality)}
    assert rows["label kept"] == [0.99, 0.98]
    assert rows["mean distance to the nearest training image"] == [1.2, 1.1]
    assert rows["copies"] == [0.001, None]
    assert rows["coverage of the real images"] == [pytest.approx(0.85), 1.0]


def test_companions_add_their_sections(report):
    titles = [section.title for section in report.sections if section.items]
    assert titles == [
        "Result", "Every arm", "Which beats which", "Mislabelled perturbations", "Training", "Margins", "Attack norms",
        "Images", "Synthetic images", "To repeat it",
    ]  # fmt: skip


def test_margin_table_counts_every_image(report):
    rows = table_of(report, "margin-status")
    assert sum(row["count"] for row in rows if row["images"] == "real") == REAL
    assert sum(row["count"] for row in rows if row["images"] == "synthetic") == SYNTHETIC
    assert {row["status"] for row in rows} == {"crossed", "misclassified", "unconverged"}


def test_overlap_is_one_on_the_diagonal_and_a_share_elsewhere(report):
    rows = table_of(report, "overlap")
    assert all(row[row["removed by"]] == 1 for row in rows)
    puma = next(row for row in rows if row["removed by"] == "puma")
    assert puma["easy"] == 1
    assert puma["difficult"] == pytest.approx((2 * 0.6 - 1) / 0.6, abs=0.01)


def test_eps_table_is_that_of_the_plans(report):
    rows = {row["strategy"]: row for row in table_of(report, "eps")}
    assert rows["none"]["at full eps"].number == 1
    assert rows["uniform-eps scale=0.5"]["mean eps (Linf, in 1/255)"] == pytest.approx(25.5)
    assert rows["puma"]["lowered"].number > 0.5
    parts = [rows["puma"][name].number for name in ("at full eps", "lowered", "trained clean (eps 0)")]
    assert sum(parts) == pytest.approx(1)


def test_best_checkpoint_of_a_curve_is_the_latest_of_the_best(report):
    rows = table_of(report, "training")
    assert {row["best step"] for row in rows} == {450}
    assert {row["last step"] for row in rows} == {500}


def test_one_seed_is_said_and_its_interval_is_of_the_images(tmp_path):
    report = study_report(write_results(tmp_path / "one", seeds=1))
    notes = [item.text for item in report.sections[0].items if hasattr(item, "kind")]
    assert any("There is one seed" in text for text in notes)
    shown = table_of(report, "arms")[0]["robust accuracy (AutoAttack standard)"]
    assert re.search(r"\[0\.\d+, 0\.\d+\]", shown.text)
    assert all(row["against the controls"] == "no interval" or "not comparable" in row["against the controls"]
               for row in table_of(report, "gap"))  # fmt: skip


def test_results_alone_make_a_page_that_says_what_is_missing(tmp_path):
    folder = write_results(tmp_path / "bare", seeds=2)
    text = write_report(folder).read_text()
    assert "Flags of single images are not at hand" in text
    assert "no <code>study.toml</code>" in text


def test_no_finished_run_makes_a_page_that_says_so(tmp_path):
    write_rows(tmp_path / "empty", [])
    assert "No run of this study is finished yet" in write_report(tmp_path / "empty").read_text()


def test_runs_without_autoattack_are_named_by_their_attack(tmp_path):
    folder = write_results(tmp_path / "weak", seeds=2)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    write_rows(folder, [{**row, "robust_accuracy": None} for row in rows])
    text = write_report(folder).read_text()
    assert "No run was judged by AutoAttack standard" in text
    assert "accuracy under APGD-CE" in text
    assert "robust accuracy (AutoAttack" not in text
    write_rows(folder, [{**row, "robust_accuracy": None, "apgd_accuracy": None} for row in rows])
    assert "No run was attacked" in write_report(folder).read_text()


def test_prune_fractions_and_pools_become_curves(tmp_path):
    folder = write_results(tmp_path / "axes", seeds=3)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    more = [
        {
            **row,
            "prune_fraction": 0.3,
            "kept": REAL + round(0.7 * SYNTHETIC),
            "clean_accuracy": row["clean_accuracy"] - 0.01,
        }
        for row in rows
        if row["strategy"] in ("puma", "random")
    ]
    small = [
        {
            **row,
            "pool": f"digits:train ({REAL}) + images (100)",
            "kept": REAL + (40 if row["prune_fraction"] else 100),
            "robust_accuracy": row["robust_accuracy"] - 0.1,
            # puma reaches with 40 of them what the whole small pool gives
            "clean_accuracy": 0.9 if row["prune_fraction"] == 0 or row["strategy"] == "puma" else 0.85,
        }
        for row in rows
        if row["strategy"] in ("none", "random", "puma")
    ]
    write_rows(folder, [*rows, *more, *small])
    report = study_report(folder)
    assert {"prune-fraction", "images"} <= {picture.name for picture in report.pictures}
    labels = {row["strategy"] for row in table_of(report, "arms")}
    assert {"puma p=0.3", "puma p=0.6", "none"} <= labels
    needed = table_of(report, "needed")
    assert {row["images trained on"] for row in needed} >= {REAL + 40, REAL + 240}
    last = [row for row in pq.read_table(folder / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    expected = {
        (need.setting.label, need.kept, need.axis): None if need.images is None else need.images.value
        for need in random_images_needed(last, ["puma"])
    }
    shown = {
        (row["strategy"], row["images trained on"], axis): row[f"for its {axis} accuracy"].number
        for row in needed
        for axis in ("clean", "robust")
    }
    assert shown == pytest.approx(expected, nan_ok=True)
    assert any(value is None for value in shown.values())  # a bound
    assert any(value is not None for value in shown.values())


def test_same_folder_gives_the_same_bytes(study, report):
    assert study_report(study).page().html() == report.page().html()


def test_unreadable_companions_are_named_and_left_out(tmp_path, make_study):
    folder = make_study(tmp_path / "broken", seeds=2)
    next((folder / "margins").glob("part-*.parquet")).write_bytes(b"not parquet")
    (folder / "synthetic" / "quality.json").write_text("{")
    flags = next((folder / "runs").glob("none-*")) / "evaluation.parquet"
    flags.write_bytes(flags.read_bytes()[:100])
    report = study_report(folder)
    text = report.page().html()
    assert "What could not be read" in text
    assert "Left out, margins:" in text
    assert "Left out, synthetic quality:" in text
    assert "Left out, flags of none, seed 0" in text
    assert "Flags of single images are not at hand" in text


def test_intervals_need_the_small_flags_file_only(tmp_path, make_study):
    folder = make_study(tmp_path / "study")
    before = study_report(folder)
    materials = Materials(folder)
    judged = {
        row.key: read_evaluation(evaluation_file(materials.run_folder(row), "last"))
        for row in materials.results
        if row.checkpoint == "last"
    }
    write_flags(folder / "flags.parquet", judged, {})
    shutil.rmtree(folder / "runs")
    after = study_report(folder)
    assert table_of(after, "gap") == table_of(before, "gap")
    (folder / "flags.parquet").unlink()
    assert table_of(study_report(folder), "gap") != table_of(before, "gap")  # without the images' share


def test_a_page_is_not_replaced_by_one_made_from_less(tmp_path, make_study, caplog):
    folder = make_study(tmp_path / "study")
    page = write_report(folder)
    whole = page.read_bytes()
    for name in ("plans", "runs", "margins", "synthetic"):
        shutil.rmtree(folder / name)
    assert write_report(folder) == page
    assert page.read_bytes() == whole
    assert "it shows Training, Margins, Attack norms, Images" in caplog.text
    assert "--out" in caplog.text
    less = write_report(folder, tmp_path / "less.html").read_text()
    assert "<h2>Training</h2>" not in less
    assert page.read_bytes() == whole
    page.unlink()
    assert write_report(folder).read_text() == less  # nothing is lost where nothing was
    assert write_report(folder).read_text() == less


def test_exporting_keeps_a_page_made_from_more(tmp_path, make_study):
    folder = make_study(tmp_path / "study")
    whole = write_report(folder).read_bytes()
    shutil.rmtree(folder / "runs")
    make_report(folder)
    app = Typer()
    app.command()(verb)
    told = CliRunner().invoke(app, [str(folder), "--export", "csv", "--export-out", str(tmp_path / "csv")])
    assert told.exit_code == 0, told.output
    assert (folder / "report.html").read_bytes() == whole
    assert (tmp_path / "csv" / "arms.csv").is_file()


def test_the_way_to_repeat_it_is_that_of_the_code_that_ran(tmp_path):
    folder = write_results(tmp_path / "study")
    (folder / "study.toml").write_text('name = "made up"\nthreat = "Linf:0.2"\n')
    write_records(folder)
    commit, records = "0123456789abcdef0123456789abcdef01234567", sorted((folder / "done").glob("*.json"))

    def commands(**first):
        for path in records:
            told = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "puma": "0.2.0", "commit": commit}
            path.write_text(json.dumps(json.loads(path.read_text()) | told | (first if path == records[0] else {})))
        items = study_report(folder).sections[-1].items
        return next(item.text for item in items if isinstance(item, Code))

    assert commands() == (
        f"git checkout {commit}\npip install torch==2.13.0 numpy==2.4.6 .\n"
        "puma study run study.toml --out repeated/\npuma report repeated/"
    )
    assert commands(numpy="2.4.7").splitlines()[1] == "pip install torch==2.13.0 ."
    several = commands(commit=f"{commit}-dirty")
    assert f"\n#   {commit}-dirty\n#   {commit}\n" in several
    assert "git checkout" not in several
    for path in records:
        path.write_text(json.dumps({"rows": json.loads(path.read_text())["rows"]}))
    text = study_report(folder).page().html()
    assert "the commit that ran was not recorded; this page was made by PUMA" in text


def test_the_program_on_the_statistics_page_gives_the_intervals_of_the_report(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    program = re.search(r"```python\n(.*?)```", (root / "docs" / "statistics.md").read_text(), re.S)[1]
    monkeypatch.chdir(root)
    exec(program, {})
    line = next(line for line in capsys.readouterr().out.splitlines() if "(10000) puma 60% " in line)
    shown = [float(number) for number in re.findall(r"-?\d\.\d{3}", line)]
    row = next(row for row in table_of(study_report("results/digits"), "arms") if row["strategy"] == "puma")
    robust = row["robust accuracy (AutoAttack standard)"]
    assert shown[3:6] == pytest.approx([robust.number, robust.low, robust.high], abs=3e-3)  # other resamples


def test_flags_of_another_result_are_not_used(tmp_path, make_study):
    folder = make_study(tmp_path / "swapped", seeds=2)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    rows[0]["clean_accuracy"] -= 0.1
    write_rows(folder, rows)
    assert "they do not give the accuracies in the results" in study_report(folder).page().html()


def test_broken_results_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither a study nor a run"):
        make_report(tmp_path)
    (tmp_path / "study.toml").write_text("")
    with pytest.raises(DataError, match="has no results yet"):
        make_report(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot read"):
        make_report(tmp_path)
    rows = pq.read_table(write_results(tmp_path / "good", seeds=1) / "results.parquet").to_pylist()
    write_rows(tmp_path, [*rows, rows[0]])
    with pytest.raises(DataError, match="twice"):
        make_report(tmp_path)
    write_rows(tmp_path, [{**rows[0], "clean_accuracy": 95.0}])
    with pytest.raises(DataError, match="clean_accuracy 95"):
        make_report(tmp_path)
    write_rows(tmp_path, [{**rows[0], "kept": None}])
    with pytest.raises(DataError, match="empty kept"):
        make_report(tmp_path)


def test_run_report_shows_its_evaluation_and_settings(tmp_path):
    write_run(tmp_path / "run", "puma", "{}", 0.6, 0)
    text = write_report(tmp_path / "run").read_text()
    assert "How it was judged" in text
    assert "[0.400, 0.600]" in text
    assert "trades_weight" in text
    (tmp_path / "run" / "evaluation.json").unlink()
    assert "has not been judged yet" in write_report(tmp_path / "run").read_text()
    (tmp_path / "run" / "metrics.csv").write_text("step,loss\n")
    assert "No step is in" in write_report(tmp_path / "run").read_text()
