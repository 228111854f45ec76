from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest
from small_study import outcome, small_study

from puma.errors import DataError, UsageError
from puma.margins import MarginTable
from puma.study.folder import StudyFolder, collect, write_results
from puma.study.runner import StudyStatus, grid, run_study, time_limit, work
from puma.tasks import Workers
from puma.tradeoff.results import read_flags
from puma.training.run import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study run in one go, by one process."""
    study = small_study(tmp_path_factory.mktemp("finished"))
    work(study)
    return study


def test_one_run_of_a_study_is_repeated_in_a_folder_of_its_own(finished, command, capsys, tmp_path) -> None:
    words = ["study", "run", finished.path / "study.toml", "--quiet", "--only", "puma-*", "--out"]
    assert command(*words, tmp_path / "again") == 0
    again = StudyFolder.open(tmp_path / "again")
    assert collect(again) == collect(finished)[1:]
    assert not (again.path / "plans" / f"{finished.spec.runs()[0].key}.parquet").exists()
    capsys.readouterr()
    assert command(*words, finished.path) == 2
    assert "holds other runs of this study" in capsys.readouterr().err
    assert command("study", "run", finished.path, "--only", "puma-*") == 2
    assert (
        command("study", "run", finished.path / "study.toml", "--only", "pumma-p50-s0-short", "--out", tmp_path / "no")
        == 2
    )
    assert "did you mean 'puma-p50-s0-short'" in capsys.readouterr().err


def start(study: StudyFolder, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "puma", "study", "run", str(study.path), "--join", "--quiet", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def at_work(study: StudyFolder, pid: int) -> bool:
    """Whether a process holds one of the study's tasks."""
    return any(path.read_text().startswith(f"pid {pid} ") for path in (study.path / "done").glob(".*.lock"))


def test_every_piece_leaves_what_the_next_reads(finished: StudyFolder) -> None:
    rows = collect(finished)
    assert [row["strategy"] for row in rows] == ["none", "puma"]
    assert [row["kept"] for row in rows] == [160, 130]  # half of the 60 synthetic images are pruned, no real one
    assert all(0 <= row["clean_accuracy"] <= 1 and row["robust_accuracy"] is None for row in rows)
    # 6 steps of 32 images, 2 attack steps of a forward and a backward pass each
    assert rows[0]["attack_cost"] == 6 * 32 * 2 * 2
    table = pq.read_table(write_results(finished))
    assert table.num_rows == 2
    assert table.schema.metadata[b"schema"] == b"puma.results/1"
    assert (finished.path / "mislabelled.parquet").exists()
    flags = read_flags(finished.path / "flags.parquet")
    for (_, arm, _), (judged, attack) in flags.items():
        row = next(row for row in rows if row["strategy"] == arm.strategy)
        assert (np.mean(judged.clean), attack) == (row["clean_accuracy"], "pgd-2")


def test_results_read_alike_in_pandas_polars_and_duckdb(finished: StudyFolder) -> None:
    path = write_results(finished)
    expected = {row["strategy"]: row["clean_accuracy"] for row in collect(finished)}
    duck = duckdb.sql(f"select strategy, clean_accuracy from '{path}' where robust_accuracy is null").fetchall()
    assert dict(duck) == expected
    assert dict(polars.read_parquet(path).select("strategy", "clean_accuracy").iter_rows()) == expected
    assert pandas.read_parquet(path).set_index("strategy")["clean_accuracy"].to_dict() == expected


def test_status_counts_what_is_finished(finished: StudyFolder) -> None:
    lines = grid(finished)
    assert set(lines) == {"synthetic", "margins", "reference", "none", "puma, prune 0.5"}
    assert all(set(states.values()) == {"finished"} for states in lines.values())
    assert StudyStatus(finished).done() == 100
    assert StudyStatus(finished).eta() == 0


def test_a_changed_bit_in_what_is_recorded_is_seen(finished: StudyFolder) -> None:
    """In the results of a task and in the metrics of a run: read as it was, or refused by name."""
    run = finished.spec.runs()[0]
    record, metrics = finished.path / "done" / f"{run.key}.json", finished.run_folder(run) / "metrics.csv"
    result, rows, draw = finished.result(run.key), read_metrics(metrics), random.Random(0)

    def same_result() -> bool:  # the name of the checksum may have changed, nothing that is used
        found = finished.result(run.key)
        return found == {**found, **result}

    for file, same in ((record, same_result), (metrics, lambda: read_metrics(metrics) == rows)):
        data, seen = file.read_bytes(), 0
        try:
            for place in draw.sample(range(len(data)), 60):
                file.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
                with suppress(DataError):
                    assert same()
                    continue
                seen += 1
        finally:
            file.write_bytes(data)
        assert seen > 50


def test_another_run_repeats_nothing(finished: StudyFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    work(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()} == before


def test_a_study_goes_on_elsewhere_from_its_small_files(finished: StudyFolder, tmp_path: Path) -> None:
    grid_of = [{"strategies": ["none", "puma", "random"], "prune_fractions": [0.5]}]
    study = small_study(tmp_path, grid=grid_of)
    write_results(finished)
    shutil.copytree(finished.path / "done", study.path / "done", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(finished.path / "flags.parquet", study.path)
    work(study)
    before, after = collect(finished), collect(study)
    assert [row["strategy"] for row in after] == ["none", "puma", "random"]
    assert [{**row, "recipe": ""} for row in after[:2]] == [{**row, "recipe": ""} for row in before]
    assert not (study.path / "runs" / study.spec.runs()[0].key).exists()  # its figures were carried over
    write_results(study)
    assert len(read_flags(study.path / "flags.parquet")) == 3  # two carried over, one from its run
    assert (
        MarginTable.read(study.path / "margins").fingerprint == MarginTable.read(finished.path / "margins").fingerprint
    )


@pytest.mark.dist
def test_two_processes_share_a_study(finished: StudyFolder, tmp_path: Path) -> None:
    study = small_study(tmp_path)
    run_study(study, Workers(2))
    assert outcome(study) == outcome(finished)


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_killed_ten_times_equals_uninterrupted(finished: StudyFolder, tmp_path: Path) -> None:
    study, draw = small_study(tmp_path), random.Random(0)
    kills = 0
    while kills < 10:
        process = start(study)
        # Until it has begun to work; then at any moment. Imports alone are not worth killing.
        while not at_work(study, process.pid) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2))
        if process.poll() is not None:  # finished before the kill: take away the last piece and go on killing
            for path in (study.path / "done").glob("*puma*.json"):
                path.unlink()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(study).wait(120) == 0
    assert outcome(study) == outcome(finished)


@pytest.mark.dist
def test_the_time_budget_stops_between_checkpoints_and_the_study_goes_on(finished: StudyFolder, tmp_path: Path) -> None:
    study = small_study(tmp_path)
    with time_limit(0.5) as over:
        run_study(study, Workers(1))
    assert over.is_set()
    assert StudyStatus(study).done() < 100
    run_study(study, Workers(1))
    assert outcome(study) == outcome(finished)


def test_a_time_limit_ends_what_runs_when_its_time_has_come() -> None:
    with time_limit(0.2) as over:
        time.sleep(60)
        pytest.fail("nobody was stopped")
    assert over.is_set()


def test_somebody_elses_sigterm_is_not_the_end_of_the_time() -> None:
    with pytest.raises(SystemExit), time_limit(600):
        signal.raise_signal(signal.SIGTERM)
    finished = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # SLURM sends several
            finished.append("put away")

    with pytest.raises(SystemExit), time_limit(None):
        work()
    assert finished


@pytest.mark.dist
def test_a_workers_error_reaches_the_user(tmp_path: Path) -> None:
    study = small_study(tmp_path, network={"name": "small-cnn", "options": {"widht": 8}})
    with pytest.raises(UsageError, match="widht"):  # met when the images are made
        run_study(study, Workers(1))
