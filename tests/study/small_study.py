"""A whole study in seconds: few images, few steps, a weak attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puma.margins import MarginTable
from puma.study.folder import StudyFolder, collect
from puma.study.spec import StudySpec
from puma.training.recipe import load_recipe


def small_study(folder: Path, **changes: Any) -> StudyFolder:
    """Settings of a small study, begun in ``folder / "study"``; its recipe lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "short.toml"
    short = load_recipe("digits").model_copy(
        update={"name": "short", "steps": 6, "batch_size": 32, "attack_steps": 2, "checkpoint_every": 2, "log_every": 2}
    )
    recipe.write_text(short.to_toml())
    settings = {
        "name": "small",
        "threat": "Linf:0.1",
        "recipe": str(recipe),
        "pool": {
            "real": "digits:train?subset=100",
            "test": "digits:test?subset=50",
            "synthetic": 60,
            "diffusion": {"steps": 20, "warmup": 5, "width": 32, "blocks": 1},
        },
        "network": {"name": "small-cnn"},
        "margins": {"mode": "fast"},
        "evaluation": {"attack": "pgd-2", "mislabelled": 20},
        "grid": [{"strategies": ["none", "puma"], "prune_fractions": [0.5]}],
    }
    return StudyFolder.create(StudySpec.parse(settings | changes), folder / "study")


def outcome(study: StudyFolder) -> list[Any]:
    """Everything a study found out, apart from times and where its recipe file lies."""
    rows = [{**row, "recipe": Path(row["recipe"]).name} for row in collect(study)]
    shares = [study.result(f"mislabelled-{run.key}") for run in study.spec.runs()]
    margins = MarginTable.read(study.path / "margins")
    return [rows, [share and share["share"] for share in shares], margins.fingerprint]
