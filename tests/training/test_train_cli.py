"""``puma train`` as a user types it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from puma.cli.app import app
from puma.errors import DataError, ModelError, PumaError, UsageError
from puma.models.weights import load_model
from puma.training.recipe import load_recipe

GIVEN = [
    "train",
    "--real",
    "digits",
    "--synthetic",
    "digits:test",
    "--threat",
    "Linf:0.2",
    "--model",
    "small-cnn",
    "--recipe",
    "digits",
    "--quiet",
]
GIVEN += ["--set", "steps=3", "--set", "batch_size=16", "--set", "attack_steps=1"]


def run(*arguments):
    return CliRunner().invoke(app, [*GIVEN, *map(str, arguments)])


def test_train_leaves_a_model_and_says_where(tmp_path):
    done = run("--out", tmp_path / "r", "--seed", 4)
    assert done.exit_code == 0, done.output
    assert "48 draws" in done.output
    assert f"puma evaluate {tmp_path / 'r'}" in done.output
    assert load_model(tmp_path / "r").config["in_channels"] == 1
    assert load_recipe(tmp_path / "r" / "recipe.toml").steps == 3
    again = run("--out", tmp_path / "r", "--seed", 4, "--weights", tmp_path / "r" / "last.safetensors")
    assert again.exit_code == 0  # a finished run is left alone


def test_a_training_alone_in_a_slurm_job_is_no_rank_of_another(tmp_path, monkeypatch):
    for name, value in {"JOB_ID": "7", "NTASKS": "4", "PROCID": "1", "LOCALID": "1", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # which Fabric reads
    done = run("--out", tmp_path)
    assert done.exit_code == 0, repr(done.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("--set", "steps"), UsageError, "is not NAME=VALUE"),
        (("--set", "lerning_rate=0.1"), UsageError, "did you mean learning_rate"),
        (("--model", "no_such_module:factory"), ModelError, "cannot find the factory"),
        (("--weights", "no.safetensors"), ModelError, "cannot read weights"),
        (("--plan", "no.parquet"), PumaError, "no.parquet"),
        (("--validation", "800"), UsageError, "more than half"),
        (("--real", "digits:tset"), PumaError, "digits"),
        (("--model", "wrn-10-1", "--weights", "CNN"), ModelError, "missing: batchnorm"),
    ],
)
def test_mistakes_end_in_a_message(tmp_path, arguments, error, said):
    if "CNN" in arguments:
        assert run("--out", tmp_path / "cnn").exit_code == 0
        arguments = [str(tmp_path / "cnn" / "last.safetensors") if part == "CNN" else part for part in arguments]
    result = run("--out", tmp_path / "r", *arguments)
    assert isinstance(result.exception, error), result.output
    assert said in str(result.exception)
    assert not (tmp_path / "r" / "last.safetensors").exists()


def test_a_plan_of_another_threat_model_is_refused(tmp_path):
    import numpy as np

    from puma.data.load import load_dataset
    from puma.data.pool import Pool
    from puma.plan import Plan

    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    meta = {"strategy": "none", "threat": {"norm": "L2", "eps": 0.5}, "pool": pool.describe()}
    Plan(np.ones(len(pool), bool), np.full(len(pool), 0.5, np.float32), meta).write(tmp_path / "p.parquet")
    result = run("--out", tmp_path / "r", "--plan", tmp_path / "p.parquet")
    assert isinstance(result.exception, DataError)
    assert "made for L2:0.5, not for Linf:0.2" in str(result.exception)
