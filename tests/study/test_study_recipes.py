"""Recipes of a study: frozen by what they say, told apart in every table and in the report."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_study import small_study
from typer import Typer
from typer.testing import CliRunner

from puma import __version__
from puma.cli.report import report
from puma.errors import ResumeError
from puma.io import read_json, sha256_file, write_json
from puma.plan import Plan
from puma.report import make_report
from puma.report.study_data import StudyData
from puma.study.folder import StudyFolder, collect, write_results
from puma.study.runner import commit, run_task, work
from puma.study.stages import study_tasks
from puma.training.recipe import load_recipe
from puma.verify import verify

TABLES = ("results.parquet", "flags.parquet", "mislabelled.parquet")


@pytest.fixture(scope="module")
def two_recipes(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study of one strategy with two recipes, and another variant of it with one; one name holds the other."""
    folder = tmp_path_factory.mktemp("recipes")
    longer = folder / "short-longer.toml"
    short = load_recipe("digits").replace(name="other", steps=8, batch_size=32, attack_steps=2, log_every=2)
    longer.write_text(short.to_toml())
    grid = [
        {"strategies": ["puma"], "prune_fractions": [0.5], "recipes": [str(folder / "short.toml"), str(longer)]},
        {"strategies": [{"name": "puma", "c": 0.25}], "prune_fractions": [0.5]},
    ]
    study = small_study(folder, grid=grid)
    work(study)
    write_results(study)
    return study


def test_the_report_pairs_each_row_with_its_own_plan_and_run(two_recipes: StudyFolder) -> None:
    data = StudyData(two_recipes.path)
    found = [
        (data.plan(run.key).meta["params"]["c"], data.names[run.key])  # type: ignore[union-attr]
        for run in data.runs
    ]
    assert found == [
        (1.0, "puma-p50-s0-short"), (1.0, "puma-p50-s0-short-longer"), (0.25, "puma-c-0.25-p50-s0-short"),
    ]  # fmt: skip
    assert [row["steps"] for row in collect(two_recipes)] == [6, 8, 6]
    assert isinstance(data.plan(data.runs[0].key), Plan)
    assert data.problems == []


def test_mislabelled_shares_are_not_pooled_over_recipes(two_recipes: StudyFolder) -> None:
    rows = pq.read_table(two_recipes.path / "mislabelled.parquet").to_pylist()
    results = [two_recipes.result(f"mislabelled-{run.key}") for run in two_recipes.spec.runs()]
    assert [(row["share"], row["by_attack"]) for row in rows] == [(r["share"], r["by_attack"]) for r in results if r]
    assert [Path(row["recipe"]).stem for row in rows] == ["short", "short-longer", "short"]
    table = make_report(two_recipes.path).tables["mislabelled"]  # of the recipe with most settings
    assert [(row[1], row[2].value) for row in table.rows] == [(1, rows[0]["by_attack"]), (1, rows[2]["by_attack"])]


def test_the_report_first_writes_results_that_are_behind_the_finished_runs(
    two_recipes: StudyFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_recipes.path, copy, ignore=shutil.ignore_patterns("runs"))
    record = next(path for path in (copy / "done").glob("puma-*.json"))
    value = read_json(record)
    value["rows"] = [{**row, "kept": 10 * row["kept"] + 1000} for row in value["rows"]]
    write_json(record, value, checksum=True)  # as if another process had finished it anew
    app = Typer()
    app.command()(report)
    answer = CliRunner().invoke(app, [str(copy), "--out", str(tmp_path / "page.html")])
    assert answer.exit_code == 0, answer.output
    assert pq.read_table(copy / "results.parquet")["kept"].to_pylist() == [
        row["kept"] for row in collect(StudyFolder.open(copy))
    ]
    assert max(pq.read_table(copy / "results.parquet")["kept"].to_pylist()) > 1000


def test_a_study_holds_on_to_the_recipe_it_began_with(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    recipe = Path(study.spec.recipe)
    shorter = load_recipe(recipe).replace(steps=5)
    recipe.write_text(shorter.to_toml())
    for go_on in (
        lambda: StudyFolder.create(study.spec, study.path),
        lambda: run_task(study, study_tasks(study)[0], show=False),  # edited while the study runs
    ):
        with pytest.raises(ResumeError, match="steps: 6 there, 5 now"):
            go_on()
    recipe.write_text(shorter.replace(steps=6, name="renamed", source="elsewhere").to_toml())
    study.freeze_recipes()  # another name or comment is the same recipe
    (study.path / "recipes" / "short.toml").unlink()  # begun before there were copies
    recipe.write_text(shorter.to_toml())
    StudyFolder.create(study.spec, study.path)
    assert load_recipe(study.path / "recipes" / f"{Path(study.spec.recipe).stem}.toml").steps == 5


def test_tables_say_who_wrote_them_and_from_what(two_recipes: StudyFolder) -> None:
    margins = two_recipes.result("margins")
    assert margins is not None
    for name in TABLES:
        metadata = pq.read_schema(two_recipes.path / name).metadata
        version = 2 if name == "mislabelled.parquet" else 1
        assert metadata[b"schema"] == f"puma.{Path(name).stem}/{version}".encode()
        told = json.loads(metadata[b"puma"])
        assert (told["puma"], told["study"]) == (__version__, "small")
        assert told["fingerprints"]["study.toml"] == sha256_file(two_recipes.path / "study.toml")
        assert len(set(told["fingerprints"]["recipes"].values())) == 2
        assert told["fingerprints"]["margins"] == margins["fingerprints"]
    run = two_recipes.spec.runs()[0]
    plan = Plan.read(two_recipes.plan_file(run)).meta
    assert margins["fingerprints"] == {"pool": plan["pool"]["fingerprint"], "table": plan["table"]}


def test_a_flipped_bit_in_a_table_is_found_or_changes_nothing(two_recipes: StudyFolder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in TABLES:
        path = tmp_path / name
        data = (two_recipes.path / name).read_bytes()
        path.write_bytes(data)
        assert verify(path).problems == []
        whole = pq.read_table(path)
        footer = int.from_bytes(data[-8:-4], "little")  # checksums guard the pages before it
        for place in rng.integers(4, len(data) - footer - 8, size=60):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            assert verify(path).problems or pq.read_table(path).equals(whole), (name, place, len(data))


def test_a_whole_study_verifies(two_recipes: StudyFolder) -> None:
    assert verify(two_recipes.path).problems == []


def test_a_piece_records_the_code_that_ran(two_recipes: StudyFolder) -> None:
    record = two_recipes.result("margins")
    assert record is not None
    assert (record["puma"], record["numpy"], record["commit"]) == (__version__, np.__version__, commit())


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "puma"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    assert commit(package) is None  # no repository

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", *named, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    commit.cache_clear()
    assert commit(package) == head
    assert commit(tmp_path / "lib" / "puma") is None  # an environment inside somebody's repository
    (package / "a.py").write_text("2\n")
    commit.cache_clear()
    assert commit(package) == f"{head}-dirty"
    commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert commit(package) is None  # no git
    commit.cache_clear()
