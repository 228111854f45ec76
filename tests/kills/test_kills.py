"""Every command that resumes, killed with SIGKILL at random moments, also while it resumes: the same bytes as in one.

``PUMA_KILLS=26 make slow`` kills each command 26 times (those that start processes or take long, less often).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from kills import Command, Server, trials

from puma.training.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

TIMES = ("seconds", "images_per_second")
STUDY_TIMES = (*TIMES, "hours, summed over tasks")
TINY = ("attack_steps=2", "batch_size=32", "log_every=2", "checkpoint_every=2")


def changes(*fields: str) -> tuple[str, ...]:
    return tuple(word for field in (*TINY, *fields) for word in ("--set", field))


LEARN = ("train", "--real", "digits", "--threat", "Linf:0.1", "--model", "small-cnn", "--recipe", "digits")
VALIDATE = ("--validation", "50", "--set", "validation_every=10", "--set", "validation_steps=2", "--set", "snapshots=3")
SCORE = ("score", "{model}", "digits?subset=300", "--mode", "deepfool", "--part-rows", "30", "--batch-size", "15")
SCORE_RUN = ("score-run", "{run}", "digits?subset=300", "--part-rows", "30", "--features", "out/features")
LABELS = ("data", "labels", "{model}", "digits?subset=300", "--part-rows", "30", "--batch-size", "15")
GENERATE = ("generate", "digits", "--out", "out/images.npz", "--count", "300")
SAMPLE = ("--set", "sampler.shard_rows=30", "--set", "sampler.batch_size=30")
DIFFUSION = (*SAMPLE, "--set", "steps=300", "--set", "width=32", "--set", "blocks=1", "--set", "sampler.steps=6")
EVALUATE = ("evaluate", "{run}", "--data", "digits:test?subset=40", "--threat", "Linf:0.02", "--shard-rows", "10")
STUDY = ("study", "run", "{study}")
COMMANDS = [
    Command("score", SCORE),
    Command("score-refine", (*SCORE, "--threat", "Linf:0.1")),
    Command("score-devices", (*SCORE, "--devices", "2"), processes=True, kills=0.3),
    Command("score-run", SCORE_RUN),
    Command("labels", LABELS),
    Command("train", (*LEARN, *changes("steps=40"), *VALIDATE), TIMES),
    Command("train-ranks", (*LEARN, *changes("steps=30"), "--devices", "2"), TIMES, processes=True, kills=0.3),
    Command("generate", (*GENERATE, *DIFFUSION)),
    Command("evaluate", EVALUATE, ("seconds",)),
    Command("study", STUDY, STUDY_TIMES, kills=0.5),
    Command("study-jobs", (*STUDY, "--jobs", "2"), STUDY_TIMES, processes=True, kills=0.3),
    Command("perceptron", ("perceptron", "--jobs", "1")),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def places(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A trained run, its model, and a study file."""
    folder = tmp_path_factory.mktemp("places")
    run = Command("run", (*LEARN, *changes("steps=60", "snapshots=3"), "--out", "out"))
    assert server.run(run, folder).code == 0, (folder / "log").read_text()
    short = {"name": "short", "steps": 12, "batch_size": 32, "attack_steps": 2, "checkpoint_every": 2, "log_every": 2}
    (folder / "short.toml").write_text(load_recipe("digits", **short).to_toml())
    diffusion = {"steps": 40, "warmup": 5, "width": 32, "blocks": 1}
    pool = {"real": "digits:train?subset=100", "test": "digits:test?subset=50", "synthetic": 60, "diffusion": diffusion}
    study = {
        "name": "killed",
        "threat": "Linf:0.1",
        "recipe": str(folder / "short.toml"),
        "pool": pool,
        "network": {"name": "small-cnn"},
        "margins": {"mode": "fast"},
        "evaluation": {"attack": "pgd-5", "mislabelled": 20, "checkpoints": ["last", "best"]},
        "grid": [{"strategies": ["none", "puma", "robust-failure"], "prune_fractions": [0.5]}],
    }
    (folder / "study.toml").write_text(tomli_w.dumps(study))
    out = folder / "out"
    return {"run": str(out), "model": str(out / "last.safetensors"), "study": str(folder / "study.toml")}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_killed_at_random_moments_a_command_leaves_the_same_bytes(
    command: Command, server: Server, places: dict[str, str], tmp_path: Path
) -> None:
    words = [word.format(**places) for word in command.arguments]
    ready = replace(command, arguments=(*words, *(() if "--out" in words else ("--out", "out")), "--quiet"))
    kills = max(1, round(float(os.environ.get("PUMA_KILLS", "2")) * command.kills))
    done, runs, wrong = 0, 0, []
    for killed, problems in trials(server, ready, kills, tmp_path / "work"):
        done, runs = done + killed, runs + 1
        wrong += problems
    print(f"\n{command.name}: {done} kills in {runs} runs, {len(wrong)} differences")
    assert not wrong, "\n".join(wrong)
