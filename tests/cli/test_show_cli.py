"""``puma show``: every artefact says what it is, and what a person asks of it first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from puma.cli.app import app
from puma.cli.show import describe
from puma.data.load import load_dataset
from puma.errors import DataError, ModelError
from puma.evaluation import evaluate
from puma.models.weights import save_model
from puma.scoring.labels import score_labels
from puma.threat import ThreatModel
from puma.tradeoff import Flags, Group, Setting
from puma.tradeoff.tables import write_flags
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
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, judged by a weak attack, and the trust in the labels that it trained on."""
    folder, pool = tmp_path_factory.mktemp("show") / "run", load_dataset("digits?subset=100")
    recipe = load_recipe("digits", steps=4, batch_size=16, attack_steps=1, validation_images=20, validation_steps=1)
    trained = train("small-cnn", pool, threat=THREAT, recipe=recipe, out=folder)
    evaluate(trained.model, load_dataset("digits:test?subset=40"), THREAT, out=folder, subset=20, attack="pgd-2")
    score_labels(trained.model, pool, out=folder.parent / "labels")
    return folder


def test_an_evaluation_by_a_weaker_attack_and_its_flags(run: Path) -> None:
    kind, facts = describe(run / "evaluation-pgd-2.json")
    assert (kind, facts["attack"], facts["n_test"]) == ("evaluation", "pgd-2", 20)
    kind, flags = describe(run / "evaluation-pgd-2.parquet")
    assert (kind, flags["threat model"], flags["attack"], flags["images"]) == (
        "flags of an evaluation", "Linf:0.1", "pgd-2", "40",
    )  # fmt: skip
    assert flags["correct clean"] == f"{facts['clean_accuracy']:.1%} of 40"
    assert flags["correct under pgd-2"] == f"{facts['attacked_accuracy']:.1%} of 20"
    assert int(flags["broken by clean"]) == round(40 * (1 - facts["clean_accuracy"]))
    kind, piece = describe(run / "evaluation-pgd-2-shards" / "part-000000.parquet")
    assert (kind, piece["attack"], piece["images"]) == ("flags of an evaluation", "pgd-2", "20")
    assert piece["correct under pgd-2"] == flags["correct under pgd-2"]
    assert describe(run)[1]["evaluation-pgd-2"] == facts  # the run's folder tells of it too


def test_the_state_of_a_training(run: Path) -> None:
    kind, facts = describe(run / "checkpoints" / "state-000000004.safetensors")
    rows = (run / "metrics.csv").read_text().splitlines()
    seen = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))["unique_images"]
    assert (kind, facts["after step"], facts["distinct images seen"]) == ("state of a training", 4, seen)
    assert facts["numbers in model"] == facts["numbers in ema"] == "19,178"
    assert facts["best so far"].startswith("step ")
    damaged = run / "checkpoints" / "damaged.safetensors"
    data = bytearray((run / "checkpoints" / "state-000000004.safetensors").read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ModelError, match="is damaged"):
        describe(damaged)


def test_weights_of_any_network(run: Path, tmp_path: Path) -> None:
    kind, facts = describe(run / "last.safetensors")
    assert (kind, facts["network"]["name"], facts["parameters"]) == ("weights", "small-cnn", "19,178")
    save_model(nn.Linear(4, 3), tmp_path / "own.safetensors")
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "foreign.safetensors")
    for name in ("own", "foreign"):
        kind, facts = describe(tmp_path / f"{name}.safetensors")
        assert (kind, facts["tensors"], facts["numbers in them"]) == ("weights", 2, "15")


def test_trust_in_labels_has_no_norm_and_margins_have(run: Path) -> None:
    kind, facts = describe(run.parent / "labels")
    assert (kind, facts["mode"], facts["other scores"]) == (
        "margin table",
        "label-quality",
        "label_quality, label_issue",
    )
    assert "norm" not in facts
    assert "norm" not in facts["made by"]
    scored = CliRunner().invoke(
        app, ["score", str(run), "digits?subset=20", "--mode", "fast", "--out", str(run.parent / "margins"), "--quiet"]
    )
    assert scored.exit_code == 0, scored.output
    facts = describe(run.parent / "margins")[1]
    assert facts["norm"] == facts["made by"]["norm"] == "Linf"


def test_settings(run: Path, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    kind, facts = describe(tmp_path / "study.toml")
    assert (kind, facts["name"], facts["pool"]["synthetic"]) == ("settings of a study", "small", 10)
    assert facts["4 cells"] == [
        "none, 0% pruned, seed 0",
        "random, 30% pruned, seed 0",
        "uniform-eps(scale=0.5), 0% pruned, seed 0",
        "uniform-eps(scale=0.75), 0% pruned, seed 0",
    ]
    kind, facts = describe(run / "recipe.toml")
    assert (kind, facts["steps"], facts["objective"]) == ("recipe", 4, "trades")
    kind, facts = describe(run / "run.json")
    assert (kind, facts["settings"]["threat"]) == ("record", "Linf:0.1")
    (tmp_path / "broken.toml").write_text("steps = [")
    with pytest.raises(DataError, match="is not TOML"):
        describe(tmp_path / "broken.toml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="is no artefact"):
        describe(tmp_path / "list.json")


def test_tables_of_a_study_tell_its_cells_apart(tmp_path: Path) -> None:
    clean, robust = np.array([1, 1, 0, 1.0]), np.array([1, 0, np.nan, np.nan])
    judged = {
        (Group("small", "digits", "digits", checkpoint), Setting("uniform-eps", params, 0.0), 0): (
            Flags(clean, robust if checkpoint == "last" else clean),
            "cw-20",
        )
        for checkpoint in ("last", "best")
        for params in ('{"scale": 0.5}', '{"scale": 0.75}')
    }
    write_flags(tmp_path / "flags.parquet", judged, {})
    kind, facts = describe(tmp_path / "flags.parquet")
    assert kind == "flags of a study"
    cells = [f'uniform-eps {{"scale": {scale}}}, 0% pruned, seed 0' for scale in (0.5, 0.75)]
    assert facts == {
        "checkpoint last": dict.fromkeys(cells, "75.0% of 4 clean, 50.0% of 2 under cw-20"),
        "checkpoint best": dict.fromkeys(cells, "75.0% of 4 clean, 75.0% of 4 under cw-20"),
    }
    shares = [
        {"pool": "digits", "prune_fraction": 0.6, "seed": seed, "strategy": "puma(c=0.5)", "share": 0.1 * seed}
        for seed in (1, 2)
    ]
    pq.write_table(pa.Table.from_pylist(shares), tmp_path / "mislabelled.parquet")
    assert describe(tmp_path / "mislabelled.parquet") == (
        "mislabelled perturbed images of a study",
        {"puma(c=0.5), 60% pruned, seed 1": "10.0%", "puma(c=0.5), 60% pruned, seed 2": "20.0%"},
    )


def test_the_verb_prints_it_and_a_stranger_is_refused(run: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["show", str(run / "evaluation-pgd-2.json")], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    assert "evaluation-pgd-2.json: evaluation" in shown.output
    assert json.loads((run / "evaluation-pgd-2.json").read_text())["identity"] in shown.output
    pq.write_table(pa.table({"a": [1]}), tmp_path / "stranger.parquet")
    with pytest.raises(DataError, match="no column"):
        describe(tmp_path / "stranger.parquet")
