"""The training loop: `Training.run` reads top to bottom."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma.checkpoints import load_state, save_state
from puma.data.pool import Pool
from puma.data.source import Source
from puma.distribute import Devices
from puma.errors import CheckError
from puma.io import lock
from puma.models.batchnorm import set_momentum
from puma.models.weights import save_model
from puma.plan import Plan
from puma.progress import Progress
from puma.threat import ThreatModel
from puma.training.averaging import Average
from puma.training.metrics import Metrics
from puma.training.prepare import Job, optimizer_of, prepare
from puma.training.recipe import Recipe, load_recipe
from puma.training.run import Run, environment, open_folder
from puma.training.schedule import learning_rate, momentum
from puma.training.signals import StopRequest
from puma.training.state import Seen, pack, unpack
from puma.training.step import Both, Objective
from puma.training.validation import Validation
from puma.training.weights import WeightPerturbation

_AGREE_EVERY = 5  # steps

log = logging.getLogger("puma")


def train(
    model: nn.Module | str,
    pool: Pool | Source,
    *,
    threat: ThreatModel,
    plan: Plan | Path | str | None = None,
    recipe: Recipe | Path | str = "trades-edm",
    out: Path | str | None = None,
    seed: int = 0,
    validation: int | Source | None = None,
    progress: bool = False,
    accelerator: str = "auto",
    tensorboard: bool = False,
) -> Run:
    """Train a network adversarially on the kept images of a pool, each with its own attack norm.

    Run again with the same ``out``, it goes on from the last checkpoint, and a finished run is returned at once. Killed
    and resumed, it gives the same weights bit for bit as uninterrupted, on the same machine type, thread count, number
    of processes and library versions; what differs is named in the log.

    Args:
        model: any network from float images ``[B, C, H, W]`` in [0, 1] to logits (it is copied, not changed), or a name
            of `build_model`, built for the pool with ``seed``.
        pool: the images; labels have to be below the network's number of classes.
        threat: norm and radius of the attack at full strength.
        plan: rows to keep, their radii, and perhaps a TRADES weight; its path; None for all rows at full strength.
        recipe: everything else; a name, a TOML file or a `Recipe`.
        out: folder of the run; None keeps everything in memory.
        seed: of the order of images, augmentation, start noise and validation split.
        validation: how many real images to hold out, stratified, to choose the best checkpoint; or another source for
            it; None for the recipe's number.
        progress: show progress on the terminal.
        accelerator: ``"auto"``, ``"cpu"`` or ``"cuda"``. Several devices: start the program with torchrun.
        tensorboard: write TensorBoard's files to ``out`` too.

    Raises:
        DataError: plan, pool and network do not belong together.
        UsageError: the recipe or an argument cannot be used.
        ResumeError: ``out`` holds a run with other settings, or is being written.
        CheckError: the loss is not finite; the step is not taken and the last checkpoint is kept.
        StorageError: ``out`` cannot be written.
    """
    recipe = load_recipe(recipe)
    devices = Devices(recipe.precision, accelerator)
    job = prepare(model, pool, threat, plan, recipe, seed, validation, devices)
    folder = Path(out) if out is not None else None
    with lock(folder) if folder and devices.leads else nullcontext():
        if folder and devices.leads:
            changed = open_folder(folder, job.settings, environment(devices))
            if changed:
                log.warning("going on is not bit-exact: %s", ", ".join(changed))
        devices.barrier()
        if folder and (folder / "last.safetensors").is_file():
            return Run.read(folder, job.network)
        return Training(job, devices, folder, tensorboard=tensorboard).run(progress)


class Training:
    """A training in progress.

    Args:
        job: what to do, checked.
        devices: where.
        folder: where to write; None keeps everything in memory.
        tensorboard: write TensorBoard's files too.
    """

    def __init__(self, job: Job, devices: Devices, folder: Path | None, *, tensorboard: bool = False) -> None:
        self.job, self.recipe, self.devices, self.folder = job, job.recipe, devices, folder
        self.network = job.network
        self._sgd: Any = optimizer_of(self.network, self.recipe)
        self._broken = torch.zeros((), device=devices.device)
        self.average, self.seen = Average(self.network, self.recipe, devices), Seen(len(job.pool))
        self.done, self.best_step, self.best_score = 0, 0, -1.0
        self.best: nn.Module | None = None
        self._seconds, sums, gradients = 0.0, [0.0] * 5, 0
        if folder and (found := load_state(folder / "checkpoints")):
            tensors, meta = found
            unpack(tensors, self.network, self.average.model, self._sgd, self.seen)
            self.done, self.best_step, self.best_score = meta["step"], meta["best_step"], meta["best_score"]
            self._seconds, sums, gradients = meta["seconds"], meta["sums"], meta["gradients"]
        self.metrics = Metrics(folder if devices.leads else None, self.done, tensorboard=tensorboard)
        bare: Any = torch.compile(self.network) if self.recipe.compile else self.network
        both, self.optimizer = devices.place(Both(bare), self._sgd)
        self.objective = Objective(self.recipe, job.threat, job.weight, self.network, bare, both, devices)
        self.objective.gradients = gradients
        self.perturbation = WeightPerturbation(self.network, self.recipe.awp, devices) if self.recipe.awp else None
        self._sums = torch.tensor(sums, device=devices.device)
        self._since = time.monotonic()

    def run(self, progress: bool = False) -> Run:
        """Train to the end."""
        recipe = self.recipe
        tenth, drawn = max(recipe.steps // 10, 1), (recipe.batch_size, "images")
        snapshots = {recipe.steps * (k + 1) // recipe.snapshots for k in range(recipe.snapshots)}
        self.network.train()
        with (
            StopRequest(alone=self.devices.world == 1) as stop,
            Progress("training", recipe.steps, "steps", show=progress, done=self.done, each=drawn) as bar,
        ):
            for step in range(self.done, recipe.steps):
                self._set_rates(step)
                self._take_step(step)
                self.done = step + 1
                last = self.done == recipe.steps
                stopping = self._stopping(stop) and not last
                validated: dict[str, float] = {}
                if self.job.validation and (last or self.done % (recipe.validation_every or tenth) == 0):
                    validated = self._validate(self.job.validation)
                if validated or last or self.done % recipe.log_every == 0:
                    self._log(validated)
                bar.advance(1)
                if stopping:
                    stop.calm()
                else:
                    stop.alive()
                if self.done in snapshots:  # before the checkpoint: a kill between the two only repeats it
                    self._snapshot()
                if last or stopping or self.done % (recipe.checkpoint_every or tenth) == 0:
                    self._checkpoint()
                if stopping:
                    stop.stop()
        return self._finish()

    def _set_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = learning_rate(self.recipe, step), momentum(self.recipe, step)
        if self.recipe.batchnorm_momentum is not None:
            first = step == 0 and self.recipe.batchnorm_first_step
            set_momentum(self.network, 1.0 if first else self.recipe.batchnorm_momentum)

    def _take_step(self, step: int) -> None:
        batch = self.job.batches.get(step, ahead=step + 1 < self.recipe.steps)
        clean = self.objective.clean_pass(batch.images, batch.labels)
        adversarial = self.objective.attack(batch.images, batch.labels, batch.eps, batch.noise, clean)
        if self.perturbation and step >= self.recipe.awp_warmup:
            self.perturbation.add(lambda: self.objective.bare_loss(batch.images, adversarial, batch.labels, batch.eps))
        losses = self.objective.losses(batch.images, adversarial, batch.labels, batch.eps, clean)
        loss = losses.loss.mean()
        # the optimiser's kernel skips the step where this flag is up, so that an accelerator need not wait for the host
        self._broken = torch.maximum(self._broken, self.devices.total((~torch.isfinite(loss)).float()))
        if self.devices.device.type == "cpu":
            self._require_finite(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.devices.backward(loss)
        if self.perturbation:
            self.perturbation.remove()
        if longest := self.recipe.clip_gradient:
            nn.utils.clip_grad_norm_(self.network.parameters(), longest)
        self._sgd.found_inf = self._broken
        self.optimizer.step()
        self.average.update(self.network, step + 1)
        self.seen.add(batch.rows)
        self._sums += losses.summary(batch.labels, batch.eps)

    def _require_finite(self, step: int) -> None:
        if bool(self._broken > 0):
            raise CheckError(
                f"the loss became infinite or NaN by step {step}; that step was not taken",
                why="the learning rate may be too high for this network",
                fix="lower learning_rate; the last checkpoint is kept",
            )

    def _stopping(self, stop: StopRequest) -> bool:
        """Whether to stop after this step; processes agree on it now and then: signals reach them at other times."""
        if self.devices.world == 1:
            return stop.wanted is not None
        return self.done % _AGREE_EVERY == 0 and self.devices.any(stop.wanted is not None)

    def _validate(self, validation: Validation) -> dict[str, float]:
        self._require_finite(self.done)
        judged = self.average.sync(self.network)
        clean, robust = validation.measure(judged)
        if robust >= self.best_score:  # of equals the latest, as in the reference code
            self.best_step, self.best_score = self.done, robust
            if self.folder is None:
                self.best = copy.deepcopy(judged)
            elif self.devices.leads:
                save_model(judged, self.folder / "best.safetensors", training=self._meta())
        return {"validation_clean": clean, "validation_robust": robust}

    def _log(self, validated: dict[str, float]) -> None:
        self._require_finite(self.done)
        loss, clean, adversarial, eps, images = self.devices.total(self._sums).tolist()
        self._sums.zero_()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self._seconds += seconds
        row = {
            "step": self.done,
            "draws": self.done * self.recipe.batch_size,
            "unique_images": self.seen.unique,
            "learning_rate": learning_rate(self.recipe, self.done - 1),
            "momentum": momentum(self.recipe, self.done - 1),
            "loss": loss / images,
            "adversarial_accuracy": adversarial / images,
            "mean_eps": eps / images,
            "seconds": self._seconds,
            "images_per_second": images / seconds,
        }
        if self.recipe.objective != "pgd-at":
            row["clean_accuracy"] = clean / images
        self.metrics.add(**row, **validated)

    def _checkpoint(self) -> None:
        self._require_finite(self.done)
        if self.folder is None:
            return
        average = self.average.sync(self.network)
        if self.devices.leads:
            tensors = pack(self.network, average, self._sgd, self.seen)
            best = {"best_step": self.best_step, "best_score": self.best_score}
            meta = {
                **best,
                "seconds": self._seconds,
                "sums": self._sums.tolist(),
                "gradients": self.objective.gradients,
            }
            save_state(self.folder / "checkpoints", self.done, tensors, meta)

    def _snapshot(self) -> None:
        """Keep the averaged network of this step, for scores that need several stages of one training."""
        self._require_finite(self.done)
        average = self.average.sync(self.network)
        if self.folder and self.devices.leads:
            path = self.folder / "snapshots" / f"step-{self.done:09d}.safetensors"
            save_model(average, path, step=self.done)

    def _finish(self) -> Run:
        model, meta = self.average.sync(self.network), self._meta()
        if self.folder and self.devices.leads:
            if not self.best_step:
                save_model(model, self.folder / "best.safetensors", training=meta)
            save_model(model, self.folder / "last.safetensors", training=meta)
        self.devices.barrier()
        if self.folder:
            return Run.read(self.folder, model)
        return Run(model.cpu(), (self.best or model).cpu(), None, self.metrics.rows, meta)

    def _meta(self) -> dict[str, Any]:
        return {
            "steps": self.done,
            "draws": self.done * self.recipe.batch_size,
            "unique_images": self.seen.unique,
            "trained_on": self.job.batches.sampler.kept,
            "validation_images": self.job.validation.count if self.job.validation else 0,
            "best_step": self.best_step or self.done,
            "best_validation": self.best_score if self.best_step else None,
            "attack_cost": self._attack_cost(),
            "seconds": self._seconds,
        }

    def _attack_cost(self) -> float:
        full = self.done * self.recipe.batch_size // self.devices.world * self.recipe.attack_steps
        return self.objective.gradients / full if full else 0.0
