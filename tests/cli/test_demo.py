"""`puma demo` from its command line to its report: the packaged study with fewer images and steps and a short attack.

Its worker's part is done in this process: starting processes is tested with the studies.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from pyautoattack import AutoAttack

from puma.cli.app import main
from puma.study.runner import work
from puma.study.spec import StudySpec
from puma.training.recipe import load_recipe


def shrink(folder: Path) -> None:
    """Write the demo's own settings into ``folder``, with sizes that take seconds."""
    settings = tomllib.loads((files("puma.study") / "demo.toml").read_text())
    recipe = load_recipe(settings["recipe"])
    changes = {"name": "short", "steps": 6, "batch_size": 32, "attack_steps": 2, "log_every": 2}
    (folder / "short.toml").write_text(recipe.model_copy(update=changes).to_toml())
    settings["recipe"] = str(folder / "short.toml")
    settings["pool"] |= {"real": "digits:train?subset=100", "test": "digits:test?subset=50", "synthetic": 60}
    settings["pool"]["diffusion"] = {"steps": 20, "warmup": 5, "width": 32, "blocks": 1}
    settings["evaluation"] |= {"subset": 20, "mislabelled": 20}
    (folder / "demo.toml").write_text(tomli_w.dumps(StudySpec.parse(settings).model_dump(exclude_none=True)))


def demo(out: Path, small: Path, seeds: int) -> list[dict[str, Any]]:
    """Run the verb in this process, its settings from ``small``; the rows of results.parquet."""
    words = ["demo", "--out", out, "--strategies", "none, puma", "--seeds", seeds, "--eps", "3/20", "--jobs", 1]
    configure = AutoAttack._set_version

    def shorter(self: AutoAttack, version: str = "standard") -> None:
        configure(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 6
        self.fab.n_iter, self.square.n_queries = 3, 40

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puma.cli.demo.files", lambda _: small)
        patch.setattr("puma.study.runner.run_study", lambda folder, *_, **__: work(folder))
        patch.setattr(AutoAttack, "_set_version", shorter)
        patch.setattr(sys, "argv", ["puma", *map(str, words), "--quiet"])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    rows: list[dict[str, Any]] = pq.read_table(out / "results.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    shrink(folder)
    return folder


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the verb leaves with one seed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    demo(out, small, seeds=1)
    return out


def test_the_demo_again_adds_seeds_and_repeats_nothing(
    made: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pq.read_table(made / "results.parquet").to_pylist()
    assert [(row["strategy"], row["seed"], row["prune_fraction"], row["kept"]) for row in first] == [
        ("none", 0, 0.0, 160),
        ("puma", 0, 0.6, 124),  # 60 % of the 60 synthetic images are gone, no real one
    ]
    for row in first:
        assert (row["study"], row["checkpoint"], row["n_test"], row["steps"]) == ("demo", "last", 20, 6)
        assert 0 <= row["clean_accuracy"] <= 1
        assert 0 <= row["robust_accuracy"] <= 1  # of fewer images, so not always below
    assert first[0]["eps_train"] == first[0]["mean_eps"] == pytest.approx(0.15)
    # The results and the report on top are written anew each time; everything that took work lies in folders.
    before = {path: path.stat().st_mtime_ns for path in made.glob("*/**/*") if path.is_file()}
    assert {path.parent.name for path in before} >= {"synthetic", "margins", "reference", "plans", "done"}
    second = demo(made, small, seeds=2)
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(re.match(r"puma 124 [0-9.]+ [0-9.]+ ", line) for line in said), said
    assert any(line.startswith("puma with 22 % fewer images:") for line in said), said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert second[:2] == first
    assert [(row["strategy"], row["seed"]) for row in second[2:]] == [("none", 1), ("puma", 1)]
    weights = {path.read_bytes() for path in made.glob("runs/*/last.safetensors")}
    assert len(weights) == 4  # no run is another's with a new name


@pytest.mark.browser
def test_the_demos_report_opens_on_a_phone(open_page: Any, made: Path) -> None:
    seen = open_page(made / "report.html", 400)
    assert (seen.errors, seen.outside(), seen.overflow()) == ([], [], 0)
    assert "demo" in seen.page.title()
    picture = seen.page.locator("figure img").first.get_attribute("alt")
    assert "none: robust" in picture
    assert "puma: robust" in picture
