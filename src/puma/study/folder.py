"""A study's folder: which file lies where, what has been finished, and the tables of results.

docs/studies.md lists its files. ``done/TASK.json`` is the result of each finished task, and how long it took;
``recipes/`` holds each recipe as it was when the study began to use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from puma import __version__, io
from puma.errors import DataError, ResumeError
from puma.study.spec import RunSpec, StudySpec
from puma.tradeoff import Flags, RunKey, read_runs
from puma.tradeoff import results as tables
from puma.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class StudyFolder:
    """A study and its folder."""

    spec: StudySpec
    path: Path

    @classmethod
    def create(cls, spec: StudySpec, path: Path | str, *, write: bool = True) -> StudyFolder:
        """Begin a study in ``path``, or go on with the one there, with other runs perhaps; ``write=False`` only checks.

        Raises:
            ResumeError: the folder holds a study with other shared settings or recipes; both values are named.
            UsageError, StorageError: a recipe that cannot be used; a folder that cannot be written.
        """
        folder = cls(spec, io.prepare_folder(path) if write else Path(path))
        if (folder.path / "study.toml").exists():
            there, now = (study.model_dump(exclude={"grid"}) for study in (cls.open(path).spec, spec))
            io.require_same_settings(path, there, now, fix="choose another --out, or delete the folder")
        folder.freeze_recipes(write=write)
        if write:
            io.write_text(folder.path / "study.toml", tomli_w.dumps(spec.model_dump(exclude_none=True)))
        return folder

    @classmethod
    def open(cls, path: Path | str) -> StudyFolder:
        """Open the study that lies in ``path``; `DataError` if there is none."""
        file = Path(path) / "study.toml"
        if not file.is_file():
            raise DataError(f"{path} holds no study", why="it has no study.toml", fix="make one with `puma study run`")
        return cls(StudySpec.parse(io.read_toml(file), str(file)), file.parent)

    def __repr__(self) -> str:
        return f"<StudyFolder {self.spec.name}: {len(self.spec.runs())} runs, in {self.path}>"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw clean against robust accuracy of every finished setting; `DataError` before there are results."""
        from puma.report.study import plot_study

        return plot_study(self.path, ax)

    @property
    def synthetic_file(self) -> Path:
        """The images the study makes for itself."""
        return self.path / "synthetic" / "images.npz"

    def pool_folder(self, synthetic: int | None) -> Path:
        """Where margin models, margins, scores and features of the pool with this many synthetic images lie."""
        return self.path if synthetic is None else self.path / "pools" / f"n{synthetic}"

    def run_folder(self, run: RunSpec) -> Path:
        """The folder of a run."""
        return self.path / "runs" / run.key

    def plan_file(self, run: RunSpec) -> Path:
        """The plan of a run."""
        return self.path / "plans" / f"{run.key}.parquet"

    def freeze_recipes(self, *, write: bool = True) -> None:
        """Keep a copy of each recipe that has none yet; `ResumeError` if another one has been edited since."""
        for recipe in self.spec.recipes:
            now, copy = load_recipe(recipe), self._recipe_file(recipe)
            if not copy.is_file():
                if write:
                    io.write_text(copy, now.to_toml())
            elif changed := io.settings_diff(_settings(load_recipe(copy)), _settings(now)):
                what = f"recipe {recipe} is not the one that {self.path} was begun with ({copy})"
                fix = "restore the recipe, give the other one a name of its own, or choose another --out"
                raise ResumeError(what, why="; ".join(changed), fix=fix)

    def _recipe_file(self, recipe: str) -> Path:
        return self.path / "recipes" / f"{Path(recipe).stem}.toml"  # no two recipes of a study share a stem

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What tells studies of one name apart: settings, recipes, pools and margin tables, where known."""
        files = {recipe: file for recipe in self.spec.recipes if (file := self._recipe_file(recipe)).is_file()}
        recipes = {recipe: io.fingerprint(_settings(load_recipe(file))) for recipe, file in files.items()}
        margins = {path.stem: io.read_json(path)["fingerprints"] for path in (self.path / "done").glob("margins*.json")}
        return {"study.toml": io.sha256_file(self.path / "study.toml"), "recipes": recipes, **margins}

    def result(self, task: str) -> dict[str, Any] | None:
        """What a finished task gave (``seconds``, where and by which code, and its own keys); None if not finished."""
        path = self.path / "done" / f"{task}.json"
        return dict(io.read_json(path)) if path.exists() else None

    def finish(self, task: str, result: dict[str, Any]) -> None:
        """Record that a task is finished."""
        io.write_json(self.path / "done" / f"{task}.json", result, checksum=True)

    def row(self, run: RunSpec, checkpoint: int = 0) -> dict[str, Any]:
        """The row of a finished run (its first checkpoint unless said otherwise), with its later attack if any."""
        row = (self.result(run.key) or {})["rows"][checkpoint]
        later = (self.result(f"attack-{run.key}") or {}).get("accuracies", [])
        return {**row, **next((found for found in later if found["checkpoint"] == row["checkpoint"]), {})}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe without its name and source."""
    return recipe.model_dump(mode="json", exclude={"name", "source"})


def collect(study: StudyFolder) -> list[dict[str, Any]]:
    """The rows of all finished runs, in the order of the study."""
    results = ((run, study.result(run.key)) for run in study.spec.runs())
    return [study.row(run, place) for run, result in results if result for place in range(len(result["rows"]))]


def write_results(study: StudyFolder) -> Path:
    """Write ``results.parquet``, ``mislabelled.parquet`` and ``flags.parquet`` from the finished runs.

    With ``study.toml``, ``recipes/`` and ``done/`` these are all that a study needs to go on elsewhere.
    """
    origin = {"puma": __version__, "study": study.spec.name, "fingerprints": study.fingerprints}
    tables.write_table(study.path / tables.RESULTS_FILE, tables.RESULTS, collect(study), origin)
    shares, flags = [], list[tuple[RunKey, tables.AttackedFlags]]()
    for run in study.spec.runs():
        if (result := study.result(run.key)) is None:
            continue
        if mislabelled := study.result(f"mislabelled-{run.key}"):
            row = result["rows"][0] | mislabelled
            shares.append({name: row[name] for name in tables.MISLABELLED.names})
        keys = {run_row.group.checkpoint: run_row.key for run_row in read_runs(result["rows"])}
        for entry in [*result.get("flags", []), *(study.result(f"attack-{run.key}") or {}).get("flags", [])]:
            clean, attacked, robust = (_bits(entry, name) for name in ("clean_correct", "attacked", "robust"))
            robust[attacked == 0] = np.nan
            flags.append((keys[entry["checkpoint"]], (Flags(clean, robust), entry["attack"])))
    if shares:
        tables.write_table(study.path / tables.MISLABELLED_FILE, tables.MISLABELLED, shares, origin)
    if flags:
        tables.write_flags(study.path / tables.FLAGS_FILE, flags, origin)
    return study.path / tables.RESULTS_FILE


def _bits(entry: dict[str, Any], name: str) -> NDArray[np.float64]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(entry[name]), np.uint8), count=entry["images"]).astype(np.float64)
