"""What a study will cost: seconds of each kind of task, recorded in its folder or measured on a first run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.devices import Devices, resolve_device
from puma.evaluation import estimate_cost
from puma.generation import SamplerConfig, diffusion_config
from puma.generation.sampling import estimate_cost as sampling_cost
from puma.scoring.job import estimate
from puma.scoring.score import ScoringSettings
from puma.scoring.snapshots import SnapshotSettings
from puma.study.folder import StudyFolder
from puma.study.stages import SNAPSHOTS, load_pool, new_network, study_tasks
from puma.training.loop import prepare
from puma.training.recipe import Recipe, load_recipe

KINDS = {
    "synthetic": "synthetic images",
    "margins": "margin models and margins",
    "scores": "other scores",
    "reference": "reference model",
    "run": "runs",
    "attack": "attacks",
    "mislabelled": "mislabelled perturbations",
}


@dataclass(frozen=True)
class KindCost:
    """Tasks of one kind: how many, how many are finished, and seconds of each, ``recorded`` or measured now."""

    kind: str
    tasks: int
    finished: int
    seconds: float
    recorded: bool

    @property
    def left(self) -> float:
        """Seconds of those that are not finished."""
        return (self.tasks - self.finished) * self.seconds


def study_cost(study: StudyFolder) -> tuple[list[KindCost], int]:
    """The cost of each kind of task, and bytes of memory of one training; nothing is written."""
    groups: dict[str, list[float | None]] = {}
    for task in study_tasks(study):
        kind, result = task.name.partition("-")[0], study.result(task.name)
        seconds = None if result is None else float(result["seconds"])
        groups.setdefault(kind if kind in KINDS else "run", []).append(seconds)
    now, memory = _measured(study, groups)
    costs = []
    for kind, recorded in groups.items():
        known = [one for one in recorded if one is not None]
        each = fmean(known) if known else now[kind]
        costs.append(KindCost(KINDS[kind], len(recorded), len(known), each, bool(known)))
    return costs, memory


def _measured(study: StudyFolder, groups: dict[str, list[float | None]]) -> tuple[dict[str, float], int]:
    """Seconds of one task of each kind of which none is finished, and memory: a few steps, batches and images."""
    spec, device, recipe = study.spec, resolve_device("auto"), load_recipe(study.spec.recipe)
    unknown = {kind for kind, seconds in groups.items() if seconds.count(None) == len(seconds)}
    real, test = load_dataset(spec.pool.real), load_dataset(spec.pool.test)
    to_make = spec.pool.synthetic if isinstance(spec.pool.synthetic, int) and not study.synthetic_file.exists() else 0
    pool = Pool([real]) if to_make else load_pool(study, None)
    network, devices = new_network(study, pool, 0), Devices(recipe.precision, "auto")
    cost = prepare(network, pool, spec.threat_model, None, recipe, 0, 0, devices).estimate()
    seconds, network = dict.fromkeys(KINDS, 0.0), network.to(device)
    if not unknown:
        return seconds, cost.memory
    training, settings = cost.step_seconds * recipe.steps, spec.evaluation
    scale = fmean(_draws(load_recipe(run.recipe)) for run in spec.runs()) / _draws(recipe)
    if "synthetic" in unknown and to_make:
        config = diffusion_config(real.image_shape, **spec.pool.diffusion)
        seconds["synthetic"] = sum(sampling_cost(real, to_make, config, SamplerConfig(), device)[1:])
    if "margins" in unknown:
        scoring = ScoringSettings.sized(device, norm=spec.threat_model.norm, mode=spec.margins.mode)
        scored = (len(pool) + to_make) / estimate([network], pool, scoring).images_per_s
        seconds["margins"] = spec.margins.folds * spec.margins.models * (training + scored)
    if "scores" in unknown:
        scored_by = [network] * SNAPSHOTS, pool, SnapshotSettings(spec.threat_model, batch_size=256)
        seconds["scores"] = (len(pool) + to_make) / estimate(*scored_by).images_per_s
    attack = estimate_cost(network, test, attack=settings.attack, subset=settings.subset).seconds
    evaluated = attack
    if settings.screen is not None:
        evaluated = estimate_cost(network, test, attack=settings.screen, subset=settings.screen_subset).seconds
    count = len(settings.checkpoints)
    seconds |= {"reference": training, "run": scale * training + count * evaluated, "attack": count * attack}
    seconds["mislabelled"] = training * settings.mislabelled / _draws(recipe)
    return seconds, cost.memory


def _draws(recipe: Recipe) -> int:
    return recipe.steps * recipe.batch_size
