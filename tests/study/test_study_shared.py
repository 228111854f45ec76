"""Processes that share a study by number, without asking each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_study import small_study

from puma.study.folder import StudyFolder

pytestmark = pytest.mark.dist


def start(study: StudyFolder, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "puma", "study", "run", str(study.path), "--quiet", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_workers_by_number_do_every_cell_once_and_the_first_writes_the_results(tmp_path: Path) -> None:
    study = small_study(tmp_path, evaluation={"attack": "pgd-2", "mislabelled": 0})
    both = [start(study, "--worker", str(i), "--num-workers", "2") for i in range(2)]
    told = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert pq.read_metadata(study.path / "results.parquet").num_rows == 2
    assert "report.html" in told[0][0]
    assert "No run was attacked" in told[0][0]  # the verdict
    assert told[1][0] == ""


def test_a_worker_whose_time_is_up_ends_in_good_order_and_says_how_to_go_on(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    process = start(study, "--worker", "1", "--num-workers", "2", "--time-budget", "1s")  # its needs never come
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "time budget spent" in errors
    assert out == ""
