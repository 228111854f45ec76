"""A study on a real local Ray cluster: the same figures as one process, also when a worker is killed at its task."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_study import outcome, small_study

from puma.errors import UsageError
from puma.study.runner import StudyStatus, run_study, time_limit, work
from puma.tasks import Workers, run_tasks
from puma.training.recipe import load_recipe

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SHORT: dict[str, Any] = {"grid": [{"strategies": ["none"]}]}


@pytest.fixture
def address() -> Iterator[str]:
    """A running cluster: two CPUs, and one GPU that it only claims to have."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    yield cluster.address
    cluster.shutdown()


def test_a_killed_worker_loses_its_task_to_another_and_the_figures_are_the_same(tmp_path: Path) -> None:
    expected = small_study(tmp_path / "alone", **SHORT)
    work(expected)
    study = small_study(tmp_path / "ray", **SHORT)
    command = [sys.executable, "-m", "puma", "study", "run", str(study.path), "--engine", "ray", "--quiet"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    locks, owner = study.path / "done", None
    while owner is None and run.poll() is None:
        found = [re.match(r"pid (\d+) ", path.read_text()) for path in locks.glob(".reference.lock")]
        owner = next((int(match[1]) for match in found if match), None)
        time.sleep(0.02)
    assert owner is not None, run.communicate()
    os.kill(owner, signal.SIGKILL)
    out, errors = run.communicate()
    assert run.returncode == 0, errors
    assert (study.result("reference") or {})["host"]
    assert outcome(study) == outcome(expected)
    assert (study.path / "report.html").exists()
    assert "report.html" in out


def test_a_cluster_of_our_own_beside_another(address: str) -> None:
    """Joining the one that runs here would end the work with it."""
    tasks = run_tasks(lambda _: ray.get_runtime_context().gcs_address, [1], Workers(ray="local"))
    ((_, used),) = tasks
    assert used != address


def test_stated_cpus_and_gpus_a_users_mistake_and_a_time_budget(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "remote", lambda real=ray.remote, **options: given.append(options) or real(**options))
    study = small_study(tmp_path / "mistaken", network={"name": "small-cnn", "options": {"widht": 8}}, **SHORT)
    with pytest.raises(UsageError, match="widht"):  # as it was raised on the cluster
        run_study(study, Workers(ray=address, cpus=2, gpus=0.5))
    asked = [options for options in given if "max_retries" in options]
    assert asked == [{"num_cpus": 2, "num_gpus": 0.5, "max_retries": 5}]
    assert (study.result("synthetic") or {})["threads"] == 2  # done before the mistake was met

    study = small_study(tmp_path / "long", **SHORT)
    endless = load_recipe(study.spec.recipe).replace(steps=1_000_000).to_toml()  # no machine finishes it in the time
    for recipe in (Path(study.spec.recipe), study.path / "recipes" / f"{Path(study.spec.recipe).stem}.toml"):
        recipe.write_text(endless)
    with time_limit(2):
        run_study(study, Workers(ray=address))
    assert StudyStatus(study).done() < 100
