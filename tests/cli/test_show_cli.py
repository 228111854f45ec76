"""``puma show``: every artefact says what it is, how it was made, what it holds and what comes next."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from puma.cli.app import app
from puma.cli.show import describe
from puma.data.load import load_dataset
from puma.errors import DataError, ModelError, PumaError, UsageError
from puma.evaluation import evaluate
from puma.models.weights import save_model
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe

THREAT = ThreatModel("Linf", 0.1)
STUDY = """
name = "small"
threat = "Linf:0.1"
recipe = "digits"
pool = { real = "digits", test = "digits:test", synthetic = 10 }
network = { name = "small-cnn" }
[[grid]]
strategies = ["none", "random", { name = "uniform-eps", scale = [0.5, 0.75] }]
prune_fractions = [0.3]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps with its margin table, plan and evaluation by a weak attack."""
    folder, pool = tmp_path_factory.mktemp("show"), load_dataset("digits?subset=100")
    recipe = load_recipe("digits", steps=4, batch_size=16, attack_steps=1, validation_images=20, validation_steps=1)
    trained = train("small-cnn", pool, threat=THREAT, recipe=recipe, out=folder / "run")
    test = load_dataset("digits:test?subset=40")
    evaluate(trained.model, test, THREAT, out=folder / "run", subset=20, attack="pgd-2")
    for words in (
        ["score", folder / "run", "digits?subset=100", "--mode", "fast", "--out", folder / "margins", "--quiet"],
        ["plan", "--table", folder / "margins", "--threat", "Linf:0.1", "--out", folder / "plan.parquet"],
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    return folder


def printed(path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["show", str(path), *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_margin_table(made: Path) -> None:
    kind, facts, next_ = describe(made / "margins")
    assert (kind, facts["rows"], facts["norm"], facts["mode"]) == ("margin table", 100, "Linf", "fast")
    assert facts["columns"]["status"].startswith(("estimated: ", "misclassified: "))
    assert facts["columns"]["steps"] == "1: 100"  # a value and how many rows have it
    assert facts["columns"]["margin"].endswith("at 5, 25, 50, 75, 95 %")
    assert next_.startswith(f"puma plan --table {made / 'margins'} --threat Linf:EPS ")  # it was scored for no eps
    (part,) = (made / "margins").glob("part-*.parquet")
    assert describe(part)[:2] == (kind, facts)


def test_a_table_of_scores_goes_to_puma_plan_beside_the_margins(made: Path, tmp_path: Path) -> None:
    (part,) = (made / "margins").glob("part-*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(["margin"]), tmp_path / part.name)
    kind, _, next_ = describe(tmp_path)
    assert (kind, next_.startswith(f"puma plan --table MARGINS --table {tmp_path} ")) == ("table of scores", True)


def test_a_plan(made: Path) -> None:
    kind, facts, next_ = describe(made / "plan.parquet")
    assert (kind, facts["strategy"], facts["rows"]) == ("plan", "puma", 100)
    assert facts["columns"]["keep"] == "70.0% true"
    assert next_ == f"puma train --plan {made / 'plan.parquet'} --real SOURCE --threat Linf:0.1 --out RUN"


def test_the_next_command_has_the_threat_model_that_the_table_was_scored_for(made: Path, tmp_path: Path) -> None:
    for norm, eps in (("Linf", "6/255"), ("L2", "0.5")):
        words = ["score", made / "run", "digits?subset=40", "--threat", f"{norm}:{eps}", "--out", tmp_path / norm]
        assert CliRunner().invoke(app, [*map(str, words), "--quiet"]).exit_code == 0
        assert f" --threat {norm}:{eps} " in describe(tmp_path / norm)[2]


def test_a_run_and_its_evaluation(made: Path) -> None:
    kind, facts, next_ = describe(made / "run")
    judged = json.loads((made / "run" / "evaluation-pgd-2.json").read_text())
    assert (kind, facts["finished"], facts["settings"]["threat"]) == ("run", True, "Linf:0.1")
    assert facts["evaluation-pgd-2"]["clean_accuracy"] == judged["clean_accuracy"]
    assert float(facts["last metrics"]["step"]) == 4
    assert next_ == f"puma evaluate {made / 'run'} --data TEST --threat Linf:0.1"
    assert describe(made / "run" / "run.json")[2] == next_
    kind, facts, _ = describe(made / "run" / "evaluation-pgd-2.json")
    assert (kind, facts["attack"], facts["n_test"]) == ("evaluation", "pgd-2", 20)
    kind, flags, _ = describe(made / "run" / "evaluation-pgd-2.parquet")
    assert (kind, flags["rows"]) == ("evaluation", 40)
    assert flags["columns"]["clean_correct"].startswith(f"{judged['clean_accuracy']:.1%} true")


def test_settings(made: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    kind, facts, next_ = describe(tmp_path / "study.toml")
    assert (kind, facts["name"], facts["pool"]["synthetic"]) == ("settings of a study", "small", 10)
    assert next_ == f"puma study run {tmp_path / 'study.toml'}"
    assert describe(tmp_path)[0] == "study"
    kind, facts, _ = describe(made / "run" / "recipe.toml")
    assert (kind, facts["steps"], facts["objective"]) == ("recipe", 4, "trades")
    (tmp_path / "broken.toml").write_text("steps = [")
    with pytest.raises(UsageError, match="is not TOML"):
        describe(tmp_path / "broken.toml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="is no artefact"):
        describe(tmp_path / "list.json")


def test_weights_and_the_state_of_a_training(made: Path, tmp_path: Path) -> None:
    kind, facts, next_ = describe(made / "run" / "last.safetensors")
    assert (kind, next_.split()[:2]) == ("weights", ["puma", "score"])
    assert "small-cnn" in printed(made / "run" / "last.safetensors")
    (state,) = (made / "run" / "checkpoints").glob("state-*4.safetensors")
    numbers = facts["numbers"]
    kind, facts, _ = describe(state)
    assert (kind, facts["numbers"] >= 2 * numbers) == ("state of a training", True)  # the network and its average
    save_model(nn.Linear(4, 3), tmp_path / "own.safetensors")
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "foreign.safetensors")
    for name in ("own", "foreign"):
        kind, facts, _ = describe(tmp_path / f"{name}.safetensors")
        assert (kind, facts["tensors"], facts["numbers"]) == ("weights without their network", 2, 15)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "own.safetensors").read_bytes()[:60])
    with pytest.raises(ModelError, match="cannot read"):
        describe(tmp_path / "cut.safetensors")


def test_any_artefact_fits_one_screen_and_all_shows_the_rest(made: Path) -> None:
    for name in ("margins", "plan.parquet", "run", "run/last.safetensors", "run/recipe.toml", "run/run.json"):
        lines = printed(made / name).splitlines()
        assert len(lines) <= 38, name
    assert "lines more (--all shows them)" in printed(made / "run")
    assert re.search(r"threat +Linf:0.1\n", printed(made / "run"))
    assert re.search(r"strategy +puma\n", printed(made / "plan.parquet"))
    assert len(printed(made / "run", "--all").splitlines()) > 38
    digest = describe(made / "margins")[1]["model"]["sha256"]
    assert digest not in printed(made / "margins")
    assert digest in printed(made / "margins", "--all")


def test_a_data_set_keeps_its_class_names_and_nothing_commands_the_terminal(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "[bold]\x1b]0;x", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8, 3), number * 9 + len(name), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    said = printed(tmp_path / "images")
    assert re.search(r"classes +\[bold\]\\x1b\]0;x: 2, cat: 2, dog: 2", said)
    assert "\x1b" not in said
    shutil.rmtree(tmp_path / "images")


def test_strangers_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "stranger.parquet")
    with pytest.raises(DataError, match="no column"):
        describe(tmp_path / "stranger.parquet")
    with pytest.raises(DataError, match="nowhere"):
        describe(tmp_path / "nowhere")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["threat", "settings", "eps", "norm", "schema", "pool", "a"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(value=JSON, metrics=st.sampled_from(["", "a", "a,b\n1"]), kind=st.sampled_from(["recipe", "study", "none"]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_there_is_described_or_refused(tmp_path: Path, value: object, metrics: str, kind: str) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / f"{kind}.toml").write_text("a = 1")
    (tmp_path / "metrics.csv").write_text(metrics)
    text = json.dumps(value)
    for name in ("run.json", "settings.json", "evaluation.json"):
        (tmp_path / name).write_text(text)
    made = {"schema": "puma.plan/1", **(value if isinstance(value, dict) else {})}
    columns = {"a": [[1, 2]], "b": [{"c": 1}], "d": [b"\xff"], "e": [None], "f": [float("nan")], "g": [10**15]}
    table = pa.table(columns).replace_schema_metadata({b"puma": json.dumps(made).encode()})
    pq.write_table(table, tmp_path / "table.parquet")
    for path in (tmp_path, tmp_path / "run.json", tmp_path / "table.parquet"):
        result = CliRunner().invoke(app, ["show", str(path)])
        assert result.exit_code == 0 or isinstance(result.exception, PumaError), result.exception
