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
from typer import Typer
from typer.testing import CliRunner

from puma.cli.report import report as command
from puma.errors import DataError
from puma.plan import Plan
from puma.report import make_report, verdict, write_report
from puma.report.page import number
from puma.report.study_data import StudyData
from puma.study.folder import StudyFolder
from puma.tradeoff import compare


def table_of(report, name):
    """A table's rows as dictionaries, by its name."""
    table = report.tables[name]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    from made_up_study import write_study

    return write_study(tmp_path_factory.mktemp("studies") / "study", seeds=2)


@pytest.fixture(scope="module")
def report(study):
    return make_report(study)


def test_every_setting_shows_the_means_of_results_parquet(study, report):
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    shown = {row["strategy"]: row for row in table_of(report, "settings")}
    assert len(shown) == len(ARMS)
    for strategy in ("none", "puma", "easy"):
        mine = [row for row in rows if row["strategy"] == strategy]
        assert shown[strategy]["clean"].value == pytest.approx(np.mean([r["clean_accuracy"] for r in mine]))
        assert shown[strategy]["robust"].value == pytest.approx(np.mean([r["robust_accuracy"] for r in mine]))
        assert shown[strategy]["images"] == mine[0]["kept"]
        assert shown[strategy]["seeds"] == 2
    main = {row["strategy"] for row in table_of(report, "strategies")}
    assert main == {strategy for strategy, _, _ in ARMS} - {"uniform-eps", "trades-beta"}


def test_differences_and_gaps_are_those_of_tradeoff_with_the_flags_of_the_runs(study, report):
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    expected = {entry.setting.strategy: entry for entry in compare(rows) if not entry.setting.is_control}
    shown = {row["strategy"]: row for row in table_of(report, "settings")}
    main = {row["strategy"]: row for row in table_of(report, "strategies")}
    assert set(expected) <= set(shown)
    for strategy, entry in expected.items():
        for axis, gap in (("clean", entry.clean_gap), ("robust", entry.robust_gap)):
            cell = shown[strategy][f"{axis} against free controls"]
            if gap.estimate is None:
                assert cell == "not comparable"
            elif gap.seeds < gap.of:  # a mean over the others would be selected by its own outcome
                assert cell == f"{gap.of - gap.seeds} of {gap.of} seeds not comparable"
            else:
                assert number(cell) == pytest.approx(gap.estimate.value)
        assert main[strategy]["clean against none"].value == pytest.approx(entry.clean_difference.value)
        assert main[strategy]["robust against none"].value == pytest.approx(entry.robust_difference.value)
    plain = expected["puma"].clean_gap.estimate
    low = shown["puma"]["clean against free controls"].low
    assert low <= plain.low + 1e-3, "the variance of the test images makes the interval no shorter"


def test_lines_of_the_picture_run_through_the_undominated_means(report):
    axes = report.pictures["tradeoff"].figure.axes[0]
    lines = [line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(lines) == 2
    for points in lines:
        corners = points[1:-1]
        assert (np.diff(corners[:, 0]) > 0).all()
        assert (np.diff(corners[:, 1]) < 0).all()
        # level beyond its ends, as far as the control was run
        assert points[0, 1] == corners[0, 1]
        assert points[0, 0] <= corners[0, 0]
        assert points[-1, 0] == corners[-1, 0]
        assert points[-1, 1] <= corners[-1, 1]


def test_axes_of_the_picture_fit_the_points_in_percent(study, report):
    axes = report.pictures["tradeoff"].figure.axes[0]
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "last"]
    for limits, column in ((axes.get_xlim(), "robust_accuracy"), (axes.get_ylim(), "clean_accuracy")):
        means = [np.mean([r[column] for r in rows if (r["strategy"], r["params"]) == key[:2]]) for key in ARMS]
        span = 100 * (max(means) - min(means))
        assert limits[0] <= 100 * min(means) <= 100 * max(means) <= limits[1]
        assert limits[1] - limits[0] < 1.5 * span


def test_labels_of_the_picture_do_not_overlap(report):
    figure = report.pictures["tradeoff"].figure
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(boxes) >= 12
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            wide, high = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or high <= 1


def test_a_study_and_its_plans_are_plotted(study, report):
    folder = StudyFolder.open(study)
    assert repr(folder).startswith(f"<StudyFolder {folder.spec.name}: ")
    axes = folder.plot()
    assert axes.get_xlabel() == "robust accuracy, % →"
    assert {"puma", "none", "×0.5", "β 8"} <= {text.get_text() for text in axes.texts}
    picture = report.pictures["tradeoff"].figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == (picture.get_xlim(), picture.get_ylim())
    assert folder.plot(axes) is axes
    plan = Plan.read(next((study / "plans").glob("puma-p*.parquet")))
    (step,) = plan.plot().patches
    assert step.get_data().values.sum() == pytest.approx(100)


def test_verdict_says_both_comparisons_with_their_numbers(study, report):
    found = verdict(study)
    puma = next(row for row in table_of(report, "strategies") if row["strategy"] == "puma")
    clean, gap = puma["clean against none"], puma["clean against free controls"]
    assert found.headline.startswith(f"`puma` with 24 % fewer images: clean {100 * clean.value:+.1f} points [")
    assert "against training on everything at full eps. Against the free controls" in found.headline
    assert f"clean {100 * gap.value:+.1f} points [" in found.headline
    assert "`" not in str(found)
    assert report.values["verdict"] == found
    regime = re.search(r"misclassifies ([\d.]+) % of the pool, (\d+) % of it have 0 < margin < eps", found.regime)
    table = StudyData(study).table
    assert float(regime[1]) == pytest.approx(100 * (table.status == 1).mean(), abs=0.05)
    assert float(regime[2]) == pytest.approx(100 * ((table.margin > 0) & (table.margin < 0.2)).mean(), abs=0.5)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((0.0, 0.001, 0.002), "next to nothing. The pool is redundant: no saving of data can be shown on it."),
        ((-0.02, 0.03, 0.05), "no loss that could be shown, so no saving of data can be claimed here."),
        ((0.05, 0.05, 0.05), "`puma` against it, at equally many images: clean +6.0 points [+6.0, +6.0]"),
    ],
)
def test_verdict_judges_the_saving_of_data_by_random_pruning(tmp_path, losses, expected):
    rows = pq.read_table(write_results(tmp_path, seeds=3) / "results.parquet").to_pylist()
    for row in rows:
        loss = losses[row["seed"]]
        clean = {"none": 0.9, "random": 0.9 - loss, "puma": 0.96 - loss}.get(row["strategy"])
        if clean is not None:
            row["clean_accuracy"], row["robust_accuracy"] = clean, 0.5
    write_rows(tmp_path, rows)
    assert expected in verdict(tmp_path).data


def test_verdict_of_an_unfinished_study_says_what_is_missing(tmp_path):
    rows = pq.read_table(write_results(tmp_path, seeds=1) / "results.parquet").to_pylist()
    write_rows(tmp_path, [row for row in rows if row["strategy"] in ("uniform-eps", "none")])
    assert verdict(tmp_path).headline.startswith("Only `none` and the free controls are finished")
    write_rows(tmp_path, [row for row in rows if row["strategy"] == "puma"])
    found = verdict(tmp_path)
    assert "`none` is not finished yet" in found.headline
    assert "were not run" in found.headline
    assert "`random` at the same share was not run" in found.data


def test_a_smaller_eps_that_beats_none_in_both_is_said(tmp_path):
    rows = pq.read_table(write_results(tmp_path, seeds=2) / "results.parquet").to_pylist()
    for row in rows:
        if row["strategy"] == "none":
            row["clean_accuracy"], row["robust_accuracy"] = 0.9, 0.4
    write_rows(tmp_path, rows)
    warning = next(text for text in verdict(tmp_path).warnings if "too large" in text)
    assert warning.startswith("All data with uniform eps × 0.375 beats `none` in both accuracies")
    assert "too large" in write_report(tmp_path).read_text()


def test_autoattack_leads_where_it_was_run_and_the_screen_of_all_runs_is_named(tmp_path):
    rows = pq.read_table(write_results(tmp_path, seeds=2) / "results.parquet").to_pylist()
    for row in rows:
        row |= {"pgd_accuracy": row["robust_accuracy"] + 0.02, "n_pgd": 800}
        if row["strategy"] not in ("none", "puma") and row["params"] not in ('{"scale": 0.5}', '{"scale": 0.75}'):
            row |= {"robust_accuracy": None, "apgd_accuracy": None, "n_test": 0}
    write_rows(tmp_path, rows)
    report = make_report(tmp_path)
    found = report.values["verdict"]
    paper, _, controls = found.headline.partition(". Against")
    assert " and robust " in paper
    assert "at equal accuracy under CE + CW PGD" in controls  # of the controls only two have AutoAttack
    assert found.data.startswith("All runs under a screen, CE + CW PGD, which is weaker than AutoAttack: `puma` clean ")
    shown = {row["strategy"]: row for row in table_of(report, "strategies")}
    mine = [r for r in rows if r["strategy"] == "puma" and r["checkpoint"] == "last"]
    assert shown["puma"]["under CE + CW PGD"].value == pytest.approx(np.mean([r["pgd_accuracy"] for r in mine]))
    assert shown["puma"]["robust"].value == pytest.approx(np.mean([r["robust_accuracy"] for r in mine]))
    assert shown["easy"]["robust"] is None
    text = report.html()
    assert "under CE + CW PGD, on 800 test images" in text
    assert "under AutoAttack standard, on 400" in text


def test_best_checkpoint_stands_beside_the_last(study, report):
    rows = [row for row in pq.read_table(study / "results.parquet").to_pylist() if row["checkpoint"] == "best"]
    shown = {row["strategy"]: row for row in table_of(report, "settings")}
    mine = [row["clean_accuracy"] for row in rows if row["strategy"] == "puma"]
    assert shown["puma"]["clean, best checkpoint"] == pytest.approx(np.mean(mine))


def test_companions_add_their_parts_all_folded(report):
    text = report.html()
    folds = [part.strip() for part in re.findall("<summary>([^<]*)<", text)]
    assert folds == [
        "Every setting", "Mislabelled perturbations", "Margins", "Eps of the images", "Images", "To repeat it",
    ]  # fmt: skip
    assert "<details open" not in text
    assert text.count("image/png") == 40  # thumbnails of both ends
    assert "<dt>neighbor.synthetic_to_train.mean</dt><dd>0.123</dd>" in text
    assert len(text) < 1_000_000


def test_margin_table_counts_every_image(report):
    rows = table_of(report, "margins")
    assert sum(row["count"] for row in rows if row["images"] == "real") == REAL
    assert sum(row["count"] for row in rows if row["images"] == "synthetic") == SYNTHETIC
    assert {row["status"] for row in rows} == {"crossed", "misclassified", "unconverged"}


def test_eps_table_is_that_of_the_plans(report):
    rows = {row["strategy"]: row for row in table_of(report, "eps")}
    assert rows["none"]["at full eps"] == 1
    assert rows["uniform-eps scale=0.5"]["mean eps (Linf, in 1/255)"] == pytest.approx(25.5)
    assert rows["puma"]["lowered"] > 0.5
    assert sum(rows["puma"][name] for name in ("at full eps", "lowered", "trained clean (eps 0)")) == pytest.approx(1)


def test_one_seed_is_said_and_its_interval_is_of_the_images(tmp_path):
    report = make_report(write_results(tmp_path / "one", seeds=1))
    assert any("One seed" in text for text in report.values["verdict"].warnings)
    shown = table_of(report, "settings")[0]["robust"]
    assert 0.04 < shown.value - shown.low < 0.06
    assert report.values["verdict"].controls.endswith("points at equal robustness, no interval.")


def test_results_alone_make_a_page_that_says_what_is_missing(tmp_path):
    folder = write_results(tmp_path / "bare", seeds=2)
    text = write_report(folder).read_text()
    assert "flags of single test images are not at hand" in text
    assert "no <code>study.toml</code>" in text


@pytest.mark.parametrize(("screen", "name"), [("cw-20", "CW PGD"), ("apgd-ce", "APGD-CE"), ("pgd-20", "CE + CW PGD")])
def test_a_screen_has_its_name_on_the_whole_page(tmp_path, screen, name):
    folder = write_results(tmp_path / "screened", seeds=2)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    fewer = [row | {"pgd_accuracy": row["robust_accuracy"], "n_pgd": 400, "n_test": 0} for row in rows]
    for row in fewer:  # beyond what the free controls reach
        row["pgd_accuracy"] += 0.3 if row["strategy"] == "puma" else 0.0
    write_rows(folder, [row | {"robust_accuracy": None, "apgd_accuracy": None} for row in fewer])
    (folder / "study.toml").write_text(f'name = "screened"\n[evaluation]\nscreen = "{screen}"\n')
    text = write_report(folder).read_text()
    assert "not comparable: accuracy under attack " in text
    assert f"under {name}, %" in text
    assert f"reach at the same accuracy under {name};" in text
    assert f"Scatter plot of clean against accuracy under {name}." in text
    assert "robust accuracy" not in text.replace("is a screen, not robust accuracy", "").lower()


def test_no_finished_run_makes_a_page_that_says_so(tmp_path):
    write_rows(tmp_path / "empty", [])
    assert "No run of this study is finished yet" in write_report(tmp_path / "empty").read_text()


def test_runs_without_autoattack_are_named_by_their_attack(tmp_path):
    folder = write_results(tmp_path / "weak", seeds=2)
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    write_rows(folder, [{**row, "robust_accuracy": None} for row in rows])
    text = write_report(folder).read_text()
    assert "AutoAttack standard was not run: accuracy under APGD-CE is a screen, not robust accuracy." in text
    assert "under APGD-CE, %" in text
    assert "robust, %" not in text
    assert (
        "robust accuracy" not in text.replace("is a screen, not robust accuracy", "").lower()
    )  # neither is a picture's
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
    report = make_report(folder)
    assert {"prune-fraction", "images"} <= set(report.pictures)
    labels = {row["strategy"] for row in table_of(report, "settings")}
    assert {"puma 30 %", "puma 60 %", "none"} <= labels
    assert report.values["verdict"].headline.startswith("`puma` at prune fraction 60 %, with ")


def test_same_folder_gives_the_same_bytes(study, report):
    assert make_report(study).html() == report.html()


def test_unreadable_companions_are_named_and_left_out(tmp_path, make_study):
    folder = make_study(tmp_path / "broken", seeds=2)
    next((folder / "margins").glob("part-*.parquet")).write_bytes(b"not parquet")
    (folder / "done" / "synthetic.json").write_text("{")
    (folder / "flags.parquet").write_bytes((folder / "flags.parquet").read_bytes()[:100])
    report = make_report(folder)
    text = report.html()
    assert "What could not be read" in text
    assert "Left out, margins:" in text
    assert "Left out, record synthetic:" in text
    assert "Left out, flags: cannot read" in text
    assert "flags of single test images are not at hand" in text


def test_flags_put_the_choice_of_images_into_the_intervals(tmp_path, make_study):
    folder = make_study(tmp_path / "study")
    widths = []
    for _ in range(2):
        puma = next(row for row in table_of(make_report(folder), "strategies") if row["strategy"] == "puma")
        widths.append(puma["robust"].high - puma["robust"].low)
        (folder / "flags.parquet").unlink(missing_ok=True)
    assert widths[0] > widths[1]


def test_a_page_is_not_replaced_by_one_made_from_less(tmp_path, make_study, caplog):
    folder = make_study(tmp_path / "study")
    page = write_report(folder)
    whole = page.read_bytes()
    for name in ("plans", "margins", "synthetic"):
        shutil.rmtree(folder / name)
    assert write_report(folder) == page
    assert page.read_bytes() == whole
    assert "it shows margins, eps, for which" in caplog.text
    assert "--out" in caplog.text
    less = write_report(folder, tmp_path / "less.html").read_text()
    assert "<summary>Margins" not in less
    assert page.read_bytes() == whole
    page.unlink()
    assert write_report(folder).read_text() == less  # nothing is lost where nothing was
    assert write_report(folder).read_text() == less


def test_exporting_keeps_a_page_made_from_more(tmp_path, make_study):
    folder = make_study(tmp_path / "study")
    whole = write_report(folder).read_bytes()
    shutil.rmtree(folder / "plans")
    make_report(folder)
    app = Typer()
    app.command()(command)
    told = CliRunner().invoke(app, [str(folder), "--export", "csv", "--export-out", str(tmp_path / "csv")])
    assert told.exit_code == 0, told.output
    assert (folder / "report.html").read_bytes() == whole
    assert (tmp_path / "csv" / "settings.csv").is_file()


def test_the_way_to_repeat_it_is_that_of_the_code_that_ran(tmp_path):
    folder = write_results(tmp_path / "study")
    (folder / "study.toml").write_text('name = "made up"\nthreat = "Linf:0.2"\n')
    write_records(folder)
    commit, records = "0123456789abcdef0123456789abcdef01234567", sorted((folder / "done").glob("*.json"))

    def commands(**first):
        for path in records:
            told = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "puma": "0.2.0", "commit": commit}
            path.write_text(json.dumps(json.loads(path.read_text()) | told | (first if path == records[0] else {})))
        return make_report(folder).values["commands"]

    assert commands() == (
        f"git checkout {commit}\npip install .\npuma study run study.toml --out repeated/\npuma report repeated/"
    )
    several = commands(commit=f"{commit}-dirty")
    assert f"\n#   {commit}-dirty\n#   {commit}\n" in several
    assert "git checkout" not in several
    for path in records:
        path.write_text(json.dumps({"rows": json.loads(path.read_text())["rows"]}))
    text = make_report(folder).html()
    assert "the commit that ran was not recorded; this page was made by PUMA" in text


def test_the_program_on_the_statistics_page_gives_the_intervals_of_the_report(
    tmp_path, monkeypatch, capsys, make_study
):
    root = Path(__file__).parents[2]
    make_study(tmp_path / "results" / "cifar10-16px", seeds=2)
    program = re.search(r"```python\n(.*?)```", (root / "docs" / "statistics.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    line = next(line for line in capsys.readouterr().out.splitlines() if "(600) puma 60% " in line)
    shown = [float(number) for number in re.findall(r"-?\d\.\d{3}", line)]
    row = next(
        row
        for row in table_of(make_report(tmp_path / "results" / "cifar10-16px"), "settings")
        if row["strategy"] == "puma"
    )
    robust = row["robust"]
    assert shown[3:6] == pytest.approx([robust.value, robust.low, robust.high], abs=6e-4)  # three digits are printed


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
    assert "% under AutoAttack standard (400 images), last checkpoint." in text
    assert "[40.0, 60.0]" in text or "±10.0" in text
    assert "beta" in text
    assert "Dotted: step 450, the best robust accuracy" in text  # the latest of the best
    (tmp_path / "run" / "evaluation.json").unlink()
    assert "Not evaluated yet" in write_report(tmp_path / "run").read_text()
    (tmp_path / "run" / "metrics.csv").write_text("step,loss\n")
    assert "No step is in" in write_report(tmp_path / "run").read_text()
