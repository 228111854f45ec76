from __future__ import annotations

import tomllib
from datetime import date
from importlib.resources import files
from typing import Any

import pytest
import tomli_w

from puma.errors import ResumeError, UsageError
from puma.study.folder import StudyFolder
from puma.study.spec import StudySpec


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "threat": "Linf:0.1",
        "recipe": "digits",
        "pool": {"real": "digits", "test": "digits:test", "synthetic": 500},
        "network": {"name": "small-cnn"},
        "grid": [{"strategies": ["none", "puma"], "prune_fractions": [0.3, 0.6], "seeds": [0, 1]}],
        **changes,
    }


def test_cells_are_every_combination_once_and_seed_by_seed() -> None:
    runs = StudySpec.parse(settings()).runs()
    # none prunes nothing, so its prune fractions fall together
    assert [(c.strategy, c.prune_fraction, c.seed) for c in runs] == [
        ("none", 0.0, 0), ("puma", 0.3, 0), ("puma", 0.6, 0), ("none", 0.0, 1), ("puma", 0.3, 1), ("puma", 0.6, 1),
    ]  # fmt: skip


def test_lists_of_parameters_expand_and_repeated_blocks_do_not_repeat_runs() -> None:
    grid = [
        {"strategies": [{"name": "uniform-eps", "scale": [0.5, 0.75]}]},
        {"strategies": [{"name": "uniform-eps", "scale": 0.5}], "synthetic": [100, 500]},
    ]
    runs = StudySpec.parse(settings(grid=grid)).runs()
    assert [(c.params, c.synthetic) for c in runs] == [
        ((("scale", 0.5),), None), ((("scale", 0.75),), None), ((("scale", 0.5),), 100),
    ]  # fmt: skip
    assert len({c.key for c in runs}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threat": "Linf"}, "has no eps"),
        ({"grid": [{"strategies": ["pumma"]}]}, "did you mean 'puma'"),
        ({"grid": [{"strategies": [{"name": "puma", "cc": 1}]}]}, "did you mean 'c'"),
        ({"grid": [{"strategies": ["puma"], "prune_fractions": [1.0]}]}, "grid.0.prune_fractions.0"),
        ({"evaluation": {"subset": 0, "checkpoints": ["first"]}}, "evaluation.subset.*evaluation.checkpoints"),
        ({"poll": 1}, "poll"),
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"threat": "Linf:1e400"}, "1e400"),
        ({"grid": [{"strategies": ["none"], "seeds": [10**30]}]}, "grid.0.seeds.0"),
        ({"grid": [{"strategies": ["none"], "seeds": [True]}]}, "grid.0.seeds.0"),
        ({"grid": [{"strategies": ["none"], "seeds": ["none"]}]}, "grid.0.seeds.0"),
        ({"margins": {"seed": 10**30, "folds": True, "models": 10**9}}, "margins.folds.*margins.models.*margins.seed"),
        ({"evaluation": {"subset": True, "mislabelled": 10**30}}, "evaluation.subset.*evaluation.mislabelled"),
        ({"evaluation": {"attack": "pgd--5"}}, "unknown attack 'pgd--5'"),
        ({"evaluation": {"screen": "pdg-20"}}, "did you mean 'pgd-20'"),
        ({"grid": [{"strategies": ["none"], "synthetic": [True]}]}, "grid.0.synthetic.0"),
        ({"grid": [{"strategies": ["none"], "prune_fractions": [False]}]}, "grid.0.prune_fractions.0"),
        ({"grid": [{"strategies": [{"name": "puma", "c": True}]}]}, "parameter True"),
        ({"grid": [{"strategies": [{"name": "puma", "c": 10**400}]}]}, "parameter 1000"),
        ({"grid": [{"strategies": [{"name": "puma", "c": float("nan")}]}]}, "parameter nan"),
        ({"grid": [{"strategies": [{"name": "puma", "c": -1}]}]}, r"c = -1 is not a number in \(0, inf\)"),
        ({"grid": [{"strategies": [{"name": "uniform-eps", "scale": [0.5, 3]}]}]}, r"scale = 3 is not .* \[0, 2\]"),
        ({"grid": [{"strategies": [{"name": "ccs", "bins": 2.5}]}]}, "bins = 2.5 is not an integer"),
        ({"grid": [{"strategies": [{"name": "puma", "c": [[1]]}]}]}, r"parameter \[1\]"),
        ({"grid": [{"strategies": [{"name": "puma", "c": {"a": 1}}]}]}, "parameter"),
        ({"grid": [{"strategies": [{"name": "puma", "c": date(2026, 1, 1)}]}]}, "parameter datetime.date"),
        ({"grid": [{"strategies": ["none"], "seeds": []}, {"strategies": ["puma"]}]}, r"grid\.0\.seeds"),
        ({"grid": [{"strategies": ["none"], "synthetic": []}]}, r"grid\.0\.synthetic"),
        ({"grid": [{"strategies": ["none", {"name": "puma", "c": []}]}]}, r"a parameter \[\]"),
    ],
)
def test_unusable_settings_are_refused_all_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        StudySpec.parse(settings(**changes))


def test_settings_survive_toml() -> None:
    grid = [{"strategies": ["none", {"name": "puma", "c": [0.25, 0.5]}], "synthetic": [100], "recipes": ["digits"]}]
    spec = StudySpec.parse(settings(grid=grid, name='a "quoted" <name>'))
    assert StudySpec.parse(tomllib.loads(tomli_w.dumps(spec.model_dump(exclude_none=True)))) == spec


def test_the_packaged_demo_is_a_valid_study() -> None:
    spec = StudySpec.parse(tomllib.loads((files("puma.study") / "demo.toml").read_text()))
    assert {run.strategy for run in spec.runs()} == {
        "none", "random", "difficult", "easy", "puma", "puma-plus", "uniform-eps",
    }  # fmt: skip


def test_a_folder_takes_more_cells_but_no_other_settings(tmp_path: Any) -> None:
    StudyFolder.create(StudySpec.parse(settings()), tmp_path)
    more = settings(grid=[{"strategies": ["easy"]}])
    assert StudyFolder.create(StudySpec.parse(more), tmp_path).spec.runs()[0].strategy == "easy"
    with pytest.raises(ResumeError, match=r"Linf:0\.1.*Linf:0\.2"):
        StudyFolder.create(StudySpec.parse(settings(threat="Linf:0.2")), tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"grid": [{"strategies": ["none"], "recipes": ["a/mine.toml", "b/mine.toml"]}]},
            "a/mine.toml and b/mine.toml",
        ),
        ({"grid": [{"strategies": ["none"], "recipes": ["mine.toml", "./mine.toml"]}]}, "two recipes called 'mine'"),
        ({"grid": [{"strategies": ["none"], "recipes": ["b/digits.toml"]}]}, "digits and b/digits.toml"),
        ({"grid": [{"strategies": ["puma"], "prune_fractions": [0.33333333, 0.33333334]}]}, "two runs called"),
    ],
)
def test_names_that_would_share_a_result_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        StudySpec.parse(settings(**changes))
    assert words in str(caught.value)
