"""A study's folder: which file lies where, and what has been finished.

```
study.toml             the settings
recipes/NAME.toml      each recipe as it was when the study took it up
synthetic/             images.npz and quality.json, where the study makes its own images
margin-model-0/ ...    runs of the margin models (one, or one per fold)
margins/               the margin table
scores/  features/     what some strategies need besides, from the margin model's run
reference/             the run of the reference model for mislabelled perturbations
plans/CELL.parquet     runs/CELL/
pools/nSIZE/           margin models and margins of a smaller pool
done/TASK.json         what each finished task gave, and how long it took
results.parquet        report.html
```
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puma.errors import DataError, ResumeError
from puma.io import fingerprint, prepare_folder, read_json, sha256_file, write_json, write_text
from puma.study.spec import Cell, StudySpec
from puma.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class StudyFolder:
    """A study and where it lies."""

    spec: StudySpec
    path: Path

    @classmethod
    def create(cls, spec: StudySpec, path: Path | str) -> StudyFolder:
        """Begin a study in ``path``, or go on with the one there.

        Cells may have been added or taken away since; what the cells share (pool, network, margins, evaluation,
        threat, recipes) must be the same.

        Raises:
            ResumeError: the folder holds a study with other shared settings or recipes; both values are named.
            UsageError: a recipe that cannot be used.
            StorageError: the folder cannot be written.
        """
        folder = cls(spec, prepare_folder(path))
        if folder.settings_file.exists():
            before = cls.open(path).spec.model_dump(exclude={"grid"})
            if changed := _changes(before, spec.model_dump(exclude={"grid"})):
                raise ResumeError(
                    f"{path} holds a study with other settings",
                    why="; ".join(changed),
                    fix="choose another --out, or delete the folder",
                )
        folder.freeze_recipes()
        write_text(folder.settings_file, to_toml(spec))
        return folder

    @classmethod
    def open(cls, path: Path | str) -> StudyFolder:
        """Open the study that lies in ``path``.

        Raises:
            DataError: there is none.
        """
        path = Path(path)
        if not (path / "study.toml").is_file():
            raise DataError(f"{path} holds no study", why="it has no study.toml", fix="make one with `puma study run`")
        return cls(StudySpec.parse(tomllib.loads((path / "study.toml").read_text()), str(path / "study.toml")), path)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw clean against robust accuracy of every finished setting; return the matplotlib axes.

        Raises:
            DataError: there are no results yet.
        """
        from puma.report.study import plot_study

        return plot_study(self.path, ax)

    @property
    def settings_file(self) -> Path:
        """The study's own copy of its settings."""
        return self.path / "study.toml"

    @property
    def synthetic_file(self) -> Path:
        """The images the study makes for itself."""
        return self.path / "synthetic" / "images.npz"

    def recipe_file(self, recipe: str) -> Path:
        """The study's own copy of a recipe; no two of its recipes share a stem."""
        return self.path / "recipes" / f"{Path(recipe).stem}.toml"

    def freeze_recipes(self) -> None:
        """Keep a copy of each recipe that has none yet, and hold the others against theirs.

        A file may be edited while a study runs or lie elsewhere on another machine, so that its name alone freezes
        nothing. A study begun before there were copies takes its recipes as they are now.

        Raises:
            ResumeError: a recipe is no longer what it was; both values are named.
            UsageError: a recipe that cannot be used.
        """
        for recipe in self.spec.recipes:
            now, copy = load_recipe(recipe), self.recipe_file(recipe)
            if not copy.is_file():
                write_text(copy, now.to_toml())
                continue
            if changed := _changes(_substance(load_recipe(copy)), _substance(now)):
                raise ResumeError(
                    f"recipe {recipe} is not the one that {self.path} was begun with ({copy})",
                    why="; ".join(changed),
                    fix="restore the recipe, give the other one a name of its own, or choose another --out",
                )

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What tells studies of one name apart: settings, recipes, pools and margin tables, where known."""
        copies = {recipe: self.recipe_file(recipe) for recipe in self.spec.recipes}
        recipes = {name: _substance(load_recipe(copy)) for name, copy in copies.items() if copy.is_file()}
        found: dict[str, Any] = {
            "study.toml": sha256_file(self.settings_file),
            "recipes": {name: fingerprint(values) for name, values in recipes.items()},
        }
        for path in sorted((self.path / "done").glob("margins*.json")):
            if prints := read_json(path).get("fingerprints"):  # studies begun before they were recorded have none
                found[path.stem] = prints
        return found

    def pool_folder(self, synthetic: int | None) -> Path:
        """Where margin models and margins of the pool with this many synthetic images lie."""
        return self.path if synthetic is None else self.path / "pools" / f"n{synthetic}"

    def margin_folder(self, synthetic: int | None) -> Path:
        """The margin table of a pool."""
        return self.pool_folder(synthetic) / "margins"

    def scores_folder(self, synthetic: int | None) -> Path:
        """Scores of a pool that need a training run, as a table."""
        return self.pool_folder(synthetic) / "scores"

    def features_folder(self, synthetic: int | None) -> Path:
        """Feature vectors of a pool."""
        return self.pool_folder(synthetic) / "features"

    def run_folder(self, cell: Cell) -> Path:
        """The run of a cell."""
        return self.path / "runs" / cell.key

    def plan_file(self, cell: Cell) -> Path:
        """The plan of a cell."""
        return self.path / "plans" / f"{cell.key}.parquet"

    def result(self, task: str) -> dict[str, Any] | None:
        """What a finished task gave (``settings``, ``seconds`` and its own keys); None if it is not finished."""
        path = self._done_file(task)
        return dict(read_json(path)) if path.exists() else None

    def finish(self, task: str, result: dict[str, Any]) -> None:
        """Record that a task is finished."""
        write_json(self._done_file(task), result)

    def forget(self, task: str) -> None:
        """Have a finished task done again."""
        self._done_file(task).unlink(missing_ok=True)

    def _done_file(self, task: str) -> Path:
        return self.path / "done" / f"{task}.json"


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Both values of every setting that is not what it was."""
    return [f"{key}: {before[key]!r} there, {after[key]!r} now" for key in after if before[key] != after[key]]


def _substance(recipe: Recipe) -> dict[str, Any]:
    """What a recipe does; not what it is called."""
    return recipe.model_dump(mode="json", exclude={"name", "source"})


def to_toml(spec: StudySpec) -> str:
    """A study's settings as TOML; reading it gives the same settings."""
    values = spec.model_dump(exclude_none=True)
    grids = values.pop("grid")
    tables = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
    lines = [f"{key} = {_literal(value)}" for key, value in values.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_literal(value)}" for key, value in table.items())]
    for grid in grids:
        lines += ["", "[[grid]]", *(f"{key} = {_literal(value)}" for key, value in grid.items())]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_literal(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)
