"""What a study compares: one TOML file, read and checked as a whole before anything runs."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puma.attacks.deepfool import Mode
from puma.errors import UsageError, unknown
from puma.evaluation.attacks import attack_steps
from puma.io import read_toml
from puma.strategies import get_strategy
from puma.threat import ThreatModel

Count = Annotated[int, Field(ge=0, lt=2**40, strict=True)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolSettings(_Settings):
    """Where the images come from: ``real`` and ``test`` name sources; test images are never trained on.

    ``synthetic`` is a list of sources, or how many images our own diffusion model makes (``diffusion``: its settings).
    """

    real: str
    test: str
    synthetic: Count | list[str]
    diffusion: dict[str, Any] = {}


class NetworkSettings(_Settings):
    """The network that is trained, also as margin model."""

    name: str
    options: dict[str, Any] = {}


class MarginSettings(_Settings):
    """How margins are measured: DeepFool's ``mode``, and ``models`` margin models per fold, whose margins are averaged.

    ``folds`` K > 1: a real image is scored by models that did not train on it, a synthetic one by all. 1: every margin
    model trains on the whole pool. ``seed`` is the margin models'.
    """

    mode: Mode = "refined"
    folds: int = Field(default=2, ge=1, le=1000, strict=True)
    models: int = Field(default=1, ge=1, le=1000, strict=True)
    seed: int = Field(default=1000, ge=0, lt=2**63, strict=True)


class EvaluationSettings(_Settings):
    """How models are evaluated: by ``attack``, on a stratified ``subset`` of so many test images.

    ``screen`` is a weaker attack for every run (ce-cw-20) on ``screen_subset`` images; ``attack`` is then run for grids
    with ``standard = true``. ``mislabelled`` kept training images are perturbed for a reference model (0: none).
    """

    attack: str = "standard"
    subset: Count | None = Field(default=None, gt=0)
    screen: str | None = None
    screen_subset: Count | None = Field(default=None, gt=0)
    checkpoints: list[Literal["last", "best"]] = Field(default=["last"], min_length=1)
    mislabelled: Count = 2000


class Grid(_Settings):
    """A block of runs: every combination of its lists.

    ``strategies`` are names, or tables such as ``{name = "puma", c = [0.25, 0.5]}``. ``recipes`` replace the study's.
    ``synthetic`` are pool sizes: stratified subsets of so many synthetic images, each with its own margin model.
    """

    strategies: list[str | dict[str, Any]] = Field(min_length=1)
    prune_fractions: list[Annotated[float, Field(ge=0, lt=1, strict=True)]] = Field(default=[0.3], min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**63, strict=True)]] = Field(default=[0], min_length=1)
    recipes: list[str] | None = Field(default=None, min_length=1)
    standard: bool = True
    synthetic: list[Count] | None = Field(default=None, min_length=1)


class StudySpec(_Settings):
    """A whole study; see ``puma study run --help`` for an example."""

    name: str = Field(pattern=r"^[^/\x00-\x1f]{0,79}[^./\x00-\x1f]$")
    threat: str
    recipe: str
    pool: PoolSettings
    network: NetworkSettings
    margins: MarginSettings = MarginSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    grid: list[Grid] = Field(min_length=1)

    @property
    def threat_model(self) -> ThreatModel:
        """The threat model that all runs train for and are evaluated under."""
        return ThreatModel.parse(self.threat)

    @classmethod
    def read(cls, path: Path | str) -> StudySpec:
        """Read and check a study file, see `parse`."""
        return cls.parse(read_toml(path), str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "study") -> StudySpec:
        """Check settings, strategies and threat model; `UsageError` names all problems with the settings at once."""
        try:
            spec = cls.model_validate(values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            fix = "`puma study run --help` has a complete example"
            raise UsageError(f"{origin} has unusable settings", why="; ".join(problems), fix=fix) from None
        _ = spec.threat_model
        for attack in filter(None, (spec.evaluation.attack, spec.evaluation.screen)):
            attack_steps(attack)
        for run in spec.runs():
            rule = get_strategy(run.strategy)
            made = {"features": None} if "features" in rule.parameters else {}  # the study makes those itself
            rule.resolve(made | dict(run.params))
        spec._refuse_equal_names(origin)
        return spec

    def _refuse_equal_names(self, origin: str) -> None:
        """Two recipes or runs of one name would share one folder, and the second take the first's result."""
        recipes, runs = [("recipes", Path(one).stem, one) for one in self.recipes], self.runs()
        seen: dict[tuple[str, str], Any] = {}
        for kind, name, value in (*recipes, *(("runs", run.key, run) for run in runs)):
            if (other := seen.setdefault((kind, name), value)) != value:
                why = f"{other} and {value} would share one result"
                fix = "rename one, or give values that differ in more"
                raise UsageError(f"{origin} has two {kind} called {name!r}", why=why, fix=fix)

    @property
    def recipes(self) -> list[str]:
        """The recipes of margin models and runs, each once."""
        return list(dict.fromkeys([self.recipe, *(run.recipe for run in self.runs())]))

    def runs(self, *, attacked: bool = False) -> list[RunSpec]:
        """All runs, each once, in the order they are run: grid by grid, seed by seed: a stopped study is balanced.

        With ``attacked`` only those that ``evaluation.attack`` is run on, beside the screening attack.
        """
        grids = [self._expand(grid) for grid in self.grid if grid.standard or not attacked]
        return list(dict.fromkeys(run for runs in grids for run in sorted(runs, key=lambda run: run.seed)))

    def only(self, pattern: str) -> StudySpec:
        """The same study with only the runs whose names match a pattern (``puma-p40-*``), or `UsageError`.

        What the runs share, such as margin models, does not depend on which runs there are: neither do their results.
        """
        names, attacked, grid = {run.key: run for run in self.runs()}, set(self.runs(attacked=True)), []
        for run in (names[name] for name in fnmatch.filter(names, pattern)):
            strategy: dict[str, Any] = {"name": run.strategy, **dict(run.params)}
            sizes = None if run.synthetic is None else [run.synthetic]
            lists: dict[str, Any] = {"prune_fractions": [run.prune_fraction], "seeds": [run.seed], "synthetic": sizes}
            grid.append(Grid(strategies=[strategy], recipes=[run.recipe], standard=run in attacked, **lists))
        if not grid:
            raise unknown("run", pattern, list(names))
        return self.model_copy(update={"grid": grid})

    def _expand(self, grid: Grid) -> Iterator[RunSpec]:
        sizes = grid.synthetic if grid.synthetic is not None else [None]
        recipes = grid.recipes or [self.recipe]
        for entry, size, recipe, prune, seed in itertools.product(
            grid.strategies, sizes, recipes, grid.prune_fractions, grid.seeds
        ):
            entry = {"name": entry} if isinstance(entry, str) else dict(entry)
            name = str(entry.pop("name", ""))
            fraction = prune if get_strategy(name).prunes else 0.0
            pool = None if size == self.pool.synthetic else size
            lists = [value if value and isinstance(value, list) else [value] for value in entry.values()]
            for value in itertools.chain(*lists):
                number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
                if not number and not isinstance(value, str):
                    fix = "give finite numbers or texts, or lists of them"
                    raise UsageError(f"strategy {name!r} has a parameter {value!r}", fix=fix)
            for values in itertools.product(*lists):
                yield RunSpec(name, tuple(sorted(zip(entry, values, strict=True))), fraction, seed, recipe, pool)


@dataclass(frozen=True)
class RunSpec:
    """One run: ``params`` are sorted pairs, ``synthetic`` the number of synthetic images in the pool (None for all)."""

    strategy: str
    params: tuple[tuple[str, Any], ...]
    prune_fraction: float
    seed: int
    recipe: str
    synthetic: int | None

    @property
    def needs_snapshots(self) -> bool:
        """Whether the strategy needs scores of a training run, or features."""
        return bool(set(get_strategy(self.strategy).needs) - {"margin"})

    @property
    def label(self) -> str:
        """Strategy and parameters, as ``uniform-eps(scale=0.5)``."""
        inner = ", ".join(f"{key}={value}" for key, value in self.params)
        return f"{self.strategy}({inner})" if inner else self.strategy

    @property
    def key(self) -> str:
        """The run's folder name: unique within a study, readable, safe on every file system.

        >>> RunSpec("uniform-eps", (("scale", 0.5),), 0.0, 3, "digits", None).key
        'uniform-eps-scale-0.5-p0-s3-digits'
        """
        parts = [self.strategy, *(f"{key}-{value}" for key, value in self.params)]
        parts += [f"p{self.prune_fraction * 100:g}", f"s{self.seed}", Path(self.recipe).stem]
        if self.synthetic is not None:
            parts.append(f"n{self.synthetic}")
        return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))
