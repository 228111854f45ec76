"""Adversarial training on a plan, top to bottom: `train`, `prepare`, and `Training` with its loop and its step.

The network that is attacked is the bare module: an attack through a wrapper for several processes would broadcast
buffers at every gradient. Only the pass that is differentiated for the optimiser goes through the wrapper.
"""

from __future__ import annotations

import copy
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from puma import losses
from puma.attacks.pgd import ascend
from puma.checkpoints import load_state, pack, require_savable, save_state, unpack
from puma.data.pool import Pool, to_tensor
from puma.data.source import Source
from puma.devices import Devices, environment
from puma.errors import CheckError, DataError, integer
from puma.io import lock, read_record
from puma.models.checks import as_logits, attack_mode, batchnorm_layers, kept_statistics
from puma.models.networks import config_of
from puma.models.weights import EMA, save_model
from puma.plan import Plan
from puma.progress import Progress
from puma.threat import ThreatModel
from puma.training.batches import Batch, Batches, Validation, held_out
from puma.training.optim import AWP, SeveralPasses, build_sgd, ema_decay, follow_schedules, trainable_copy
from puma.training.recipe import Recipe, load_recipe
from puma.training.run import Estimate, Metrics, Run, StopRequest, estimate, open_folder, require_logger

_AGREE_EVERY = 5  # steps between the exchanges in which several processes agree to stop
_CALMER = "lower learning_rate, or set clip_gradient; the last checkpoint is kept"


def train(
    model: nn.Module | str,
    pool: Pool | Source,
    *,
    threat: ThreatModel | str,
    plan: Plan | Path | str | None = None,
    recipe: Recipe | Path | str = "trades-edm",
    out: Path | str | None = None,
    seed: int = 0,
    validation: int | None = None,
    progress: bool = False,
    device: str = "auto",
    logger: str | None = None,
    ignore_estimate: bool = False,
) -> Run:
    """Train a network adversarially on the kept images of a pool, each with its own eps.

    Run again with the same ``out``, it goes on from the last checkpoint, and a finished run is returned at once. Killed
    and resumed, it gives the same bits as uninterrupted, unless machine type, threads, processes or libraries differ.

    Args:
        model: any network from float images ``[B, C, H, W]`` in [0, 1] to logits (copied, not changed), or a name of
            `build_model`, built for the pool with ``seed``.
        pool: the images; with a plan, the pool that it was made for.
        threat: norm, and the eps of images without a plan; with a plan, the plan's.
        plan: rows to keep, the eps of each, and perhaps a TRADES beta; its path; None for all rows at the threat's eps.
        recipe: everything else; a name, a TOML file or a `Recipe`.
        out: folder of the run; None keeps everything in memory.
        seed: of the order of images, augmentation, start noise and held-out images.
        validation: how many real images to hold out, by which the best checkpoint is chosen; None: the recipe's.
        progress: show progress.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. Several devices: start the program with torchrun.
        logger: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``: send the rows of ``metrics.csv`` there too.
        ignore_estimate: start also where memory or time do not suffice by the estimate.

    Raises:
        DataError: plan, pool and threat model do not belong together.
        ModelError: the network fails on the images, has too few logits, no parameter to train, or cannot be saved.
        UsageError: the recipe or an argument cannot be used, or this machine cannot do it.
        ResumeError: ``out`` holds a run with other settings, or is being written.
        CheckError: the loss or its gradient is not finite; the last checkpoint is kept.
        StorageError: ``out`` cannot be written.
    """
    recipe, threat = load_recipe(recipe), ThreatModel.parse(threat)
    require_logger(logger, out)
    devices = Devices(recipe.precision, device)
    folder = Path(out) if out is not None else None
    job = prepare(model, pool, threat, plan, recipe, integer("seed", seed, low=0), validation, devices)
    finished = folder is not None and (folder / "last.safetensors").is_file()
    job.fit(folder, check=not (finished or ignore_estimate))
    writes = folder if devices.is_rank_zero else None
    with lock(writes) if writes else nullcontext():
        if writes:
            open_folder(writes, recipe, job.settings, environment(devices.device) | {"processes": devices.world_size})
        devices.barrier()
        if folder and (folder / "last.safetensors").is_file():
            return Run.read(folder, job.network)
        return Training(job, folder, logger=logger).run(progress)


# --- preparation: everything that can be wrong, checked before any compute -----------------------------------------


@dataclass
class Job:
    """A training that has passed all checks."""

    network: nn.Module
    examples: Tensor  # a few images of the pool, float [b, C, H, W]
    recipe: Recipe
    threat: ThreatModel
    batches: Batches
    validation: Validation | None
    settings: dict[str, Any]  # everything beside the recipe that decides the result, by name
    devices: Devices
    micro_batch: int = 0  # images of one forward pass; 0: the whole batch

    def estimate(self, micro_batch: int | None = None) -> Estimate:
        """Memory and time of this training on this machine; ``micro_batch`` overrides the recipe's."""
        recipe = self.recipe.replace(micro_batch=micro_batch) if micro_batch else self.recipe
        return estimate(self.network, self.examples, recipe, self.devices)

    def fit(self, folder: Path | None, *, check: bool) -> None:
        """Choose the micro-batch: that of the run in ``folder``, or one that fits; ``check`` that this machine can."""
        begun = read_record(record)["settings"] if folder and (record := folder / "run.json").is_file() else {}
        cost = self.estimate(begun.get("micro_batch"))
        if check:
            cost.require_feasible()
        first = torch.tensor(float(cost.micro_batch * self.devices.is_rank_zero), device=self.devices.device)
        self.micro_batch = self.settings["micro_batch"] = int(self.devices.all_reduce(first))  # the first process's
        if self.micro_batch < cost.batch and self.devices.is_rank_zero:
            effect = "; the gradients are the same"
            if batchnorm_layers(self.network):
                effect = f": batch normalisation uses statistics of {self.micro_batch} images, which changes the result"
            log = logging.getLogger("puma")
            log.warning("batches of %d are split into micro-batches of %d%s", cost.batch, self.micro_batch, effect)


def prepare(
    model: nn.Module | str,
    pool: Pool | Source,
    threat: ThreatModel,
    plan: Plan | Path | str | None,
    recipe: Recipe,
    seed: int,
    validation: int | None,
    devices: Devices,
) -> Job:
    """Check a training and put its network and data in place; `train` explains arguments and errors."""
    pool = pool if isinstance(pool, Pool) else Pool([pool])
    keep, eps, beta = np.ones(len(pool), dtype=np.bool_), np.full(len(pool), threat.eps, dtype=np.float32), recipe.beta
    if plan is not None:
        plan = plan if isinstance(plan, Plan) else Plan.read(plan)
        pool.check_plan(plan)
        if plan.threat != threat:
            fix = f"plan again with --threat {threat}"
            raise DataError(f"the plan was made for {plan.threat}, not for {threat}", fix=fix)
        keep, eps, beta = plan.keep.copy(), plan.eps, beta if plan.beta is None else plan.beta
    rows = held_out(pool, recipe.validation_images if validation is None else int(validation), seed)
    keep[rows] = False
    validator = Validation(pool, rows, threat, recipe, devices) if len(rows) else None
    examples = to_tensor(pool.read(np.arange(min(4, len(pool)))), devices.device)
    network = trainable_copy(model, pool, examples, recipe, seed, devices)
    batches = Batches(pool, keep, eps, recipe, threat, devices, seed=seed)
    settings = {
        "network": config_of(network) or type(network).__qualname__,
        "threat": str(threat),
        "eps": threat.eps,
        "seed": seed,
        "pool": pool.fingerprint,
        "plan": plan.fingerprint if plan else None,
        "beta": beta,
        "validation": f"{len(rows)} held out" if validator else "none",
        "frozen": [name for name, parameter in network.named_parameters() if not parameter.requires_grad],
    }
    return Job(network, examples, recipe, threat, batches, validator, settings, devices)


class Training:
    """A training in progress: a checked job, the folder it writes to (None: memory), a metrics logger."""

    def __init__(self, job: Job, folder: Path | None = None, *, logger: str | None = None) -> None:
        self.job, self.recipe, self.devices, self.folder = job, job.recipe, job.devices, folder
        self.network, recipe, devices = job.network, job.recipe, job.devices
        self._writes = folder if devices.is_rank_zero else None  # one process writes
        self._sgd = build_sgd(self.network, recipe)
        self.ema, self._seen = EMA(self.network), np.zeros(len(job.batches.eps), dtype=np.bool_)
        self.best: nn.Module | None = None
        self.done, self.best_step, self.best_score, self._seconds, sums = 0, 0, -1.0, 0.0, [0.0] * 5
        if folder and (state := load_state(folder / "checkpoints")):
            tensors, meta = state
            unpack(tensors, self.network, self.ema.model, self._sgd)
            self._seen = np.unpackbits(tensors["seen"].numpy(), count=len(self._seen)).astype(np.bool_)
            self.done, self.best_step, self.best_score = meta["step"], meta["best_step"], meta["best_score"]
            self._seconds, sums = meta["seconds"], meta["sums"] if devices.is_rank_zero else sums  # of all processes
        self._sums = torch.tensor(sums, device=devices.device)  # of the steps since the last row of metrics
        self._broken = torch.zeros((), device=devices.device)  # above 0 once a loss or gradient was not finite
        self._since = time.monotonic()
        self.metrics = Metrics(self._writes, self.done, logger=logger)
        self.bare = cast(nn.Module, torch.compile(self.network)) if recipe.compile else self.network
        self.wrapped, self.optimizer = devices.wrap(SeveralPasses(self.bare), self._sgd)
        if devices.world_size > 1:  # DDP regroups gradients after its first backward pass, which shall be this one, not
            self.wrapped()  # a step: a resumed one would add those of three processes in another order (last bits)
            devices.backward(torch.stack([p.sum() for p in self.network.parameters() if p.requires_grad]).sum())
        self.awp = AWP(self.network, recipe.awp, devices) if recipe.awp else None
        self.step_size = recipe.attack(job.threat.norm)[0] * job.threat.eps
        # One clean pass serves attack and loss where both compute it with the same weights and batch statistics: AWP
        # moves the weights between the two, and a wrapper for several processes has to see both passes in one call.
        trades = recipe.objective == "trades" and not recipe.awp and devices.world_size == 1
        random = any(isinstance(module, _DropoutNd) for module in self.network.modules())
        self.shares_clean_pass = trades and recipe.attack_batchnorm == "train" and not random

    def run(self, progress: bool = False) -> Run:
        """Train to the end."""
        recipe, validation, single = self.recipe, self.job.validation, self.devices.world_size == 1
        snapshots = {recipe.steps * (k + 1) // recipe.snapshots for k in range(recipe.snapshots)}
        tenth, each = max(recipe.steps // 10, 1), (recipe.batch_size, "images")
        bar = Progress("training", recipe.steps, "steps", show=progress, done=self.done, each=each)

        def due(every: int | None) -> bool:
            return self.done == recipe.steps or self.done % (every or tenth) == 0

        self.network.train()
        if self._writes and not self.done:
            require_savable(self._writes / "checkpoints", pack(self.network, self.ema.model, self._sgd))
        with StopRequest(single_process=single) as stop, bar:
            for step in range(self.done, recipe.steps):
                self.take_step(step)
                agree = single or self.done % _AGREE_EVERY == 0  # signals reach processes at different times
                stopping = agree and self.devices.any(stop.wanted is not None) and self.done < recipe.steps
                validated = self._validate(validation) if validation and due(recipe.validation_every) else {}
                bar.advance(1, self._log(validated) if validated or due(recipe.log_interval) else "")
                stop.heartbeat(ends=stopping)
                if self.done in snapshots:  # before the checkpoint: a kill between the two only repeats it
                    self._save(self.averaged(), f"snapshots/step-{self.done:09d}", step=self.done)
                if stopping or due(recipe.checkpoint_every):
                    self.checkpoint()
                if stopping:
                    self.devices.barrier()  # launchers kill the process that still writes when another has ended
                    stop.stop()
        return self._finish()

    def take_step(self, step: int) -> None:
        """Take optimiser step ``step``, counted from 0; on a CPU not with a loss that is not finite (`CheckError`)."""
        recipe = self.recipe
        follow_schedules(self.optimizer, self.network, recipe, step)
        batch = self.job.batches.get(step, ahead=step + 1 < recipe.steps)
        parts = batch.split(self.job.micro_batch or len(batch))
        self.optimizer.zero_grad(set_to_none=True)
        shares = []
        if self.awp:
            attacked = [(part, self._attack(part, None)) for part in parts]
            self.awp.add(*(partial(self._bare_loss, *pair, len(batch)) for pair in attacked))
            shares = [self._backward(*pair, None, batch, pair[0] is parts[-1]) for pair in attacked]
            self.awp.remove()
        else:
            for part in parts:
                # With a graph: the same bits for attack and loss, in the memory that the loss needs anyway.
                clean = self.wrapped(part.images)[0] if self.shares_clean_pass else None
                shares.append(self._backward(part, self._attack(part, clean), clean, batch, part is parts[-1]))
        self._check_gradients(step, torch.stack(shares).sum())
        self.optimizer.step()
        self.done = step + 1
        self.ema.update(self.network, ema_decay(recipe, self.done))
        self._seen[batch.rows] = True

    def _logits(self, images: Tensor) -> Tensor:
        return as_logits(self.bare(images), len(images)).float()

    def _attack(self, batch: Batch, clean: Tensor | None) -> Tensor:
        """The perturbed images: of highest KL from the clean prediction in TRADES, else of highest cross entropy."""
        recipe = self.recipe
        with attack_mode(self.network, recipe.attack_batchnorm), self.devices.autocast():
            reference = None if clean is None else clean.detach()
            if recipe.objective == "trades" and reference is None:
                with torch.no_grad():
                    reference = self._logits(batch.images)

            def objective(x: Tensor) -> Tensor:
                logits = self._logits(x)
                if reference is None:
                    return losses.cross_entropy(logits, batch.labels)
                return losses.kl_divergence(logits, reference)

            given = objective, batch.images, batch.eps, batch.noise, self.job.threat
            return ascend(*given, steps=recipe.attack_steps, step_size=self.step_size)

    def _backward(self, part: Batch, adversarial: Tensor, clean: Tensor | None, batch: Batch, last: bool) -> Tensor:
        """Add the gradient of a micro-batch's share of the mean loss; return that share."""
        with self.devices.no_sync(self.wrapped, enabled=not last):
            needed = () if self.recipe.objective == "pgd-at" or clean is not None else (part.images,)
            *fresh, attacked = self.wrapped(*needed, adversarial)
            clean = fresh[0] if fresh else clean
            each = self._losses(clean, attacked, part)
            loss = each.mean() * (len(part) / len(batch))
            self.devices.backward(loss)
        self._count(each, clean, attacked, part)
        return loss.detach()

    def _bare_loss(self, part: Batch, adversarial: Tensor, size: int) -> Tensor:
        """A micro-batch's share of the mean loss over ``size`` images, by the bare network; no buffer changes."""
        with kept_statistics(self.network), self.devices.autocast():
            clean = None if self.recipe.objective == "pgd-at" else self._logits(part.images)
            return self._losses(clean, self._logits(adversarial), part).mean() * (len(part) / size)

    def _losses(self, clean: Tensor | None, attacked: Tensor, batch: Batch) -> Tensor:
        """The loss of every image, ``[B]``."""
        smoothing = self.recipe.label_smoothing
        if clean is None:  # PGD-AT (arXiv 1706.06083, eq. 2.1)
            return losses.cross_entropy(attacked, batch.labels, smoothing)
        given: dict[str, Any] = {"weight": self.job.settings["beta"], "attacked": batch.eps > 0}
        if self.recipe.objective == "mart":
            return losses.mart(clean, attacked, batch.labels, **given)
        return losses.trades(clean, attacked, batch.labels, smoothing=smoothing, **given)

    @torch.no_grad()
    def _count(self, each: Tensor, clean: Tensor | None, attacked: Tensor, batch: Batch) -> None:
        """Add up loss, clean and adversarial hits, eps and images, without waiting for the device."""
        hits = (attacked.argmax(1) == batch.labels).sum()
        clean_hits = torch.zeros_like(hits) if clean is None else (clean.argmax(1) == batch.labels).sum()
        self._sums += torch.stack([each.sum(), clean_hits, hits, batch.eps.sum(), torch.ones_like(batch.eps).sum()])

    def _check_gradients(self, step: int, loss: Tensor) -> None:
        """Clip the gradient; note whether it and the loss are finite, which only a CPU is asked for at once."""
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None and p.numel()])
        if longest := self.recipe.clip_gradient:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), longest, norm)
        broken = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self._broken = torch.maximum(self._broken, self.devices.all_reduce(broken.float()))
        if self.devices.device.type == "cpu":
            self._require_finite(step)

    def _require_finite(self, step: int) -> None:
        if bool(self._broken > 0):
            what = f"the loss or its gradient became infinite or NaN by step {step}; nothing of that is kept"
            raise CheckError(what, why="the learning rate may be too high for this network", fix=_CALMER)

    def averaged(self) -> nn.Module:
        """The averaged network with its running statistics, to be evaluated or saved, if everything is finite.

        All processes call it together: statistics are each one's own until here. Then all have the first one's.
        """
        self._require_finite(self.done)
        largest = nn.utils.get_total_norm([p for p in self.network.parameters() if p.numel()], float("inf"))
        if not bool(torch.isfinite(largest)):
            raise CheckError(f"a weight became infinite or NaN by step {self.done}; it is not written", fix=_CALMER)
        self.devices.share_buffers(self.network)
        self.ema.copy_buffers(self.network)
        return self.ema.model

    def _validate(self, validation: Validation) -> dict[str, float]:
        clean, robust = validation.measure(average := self.averaged())
        if robust >= self.best_score:  # of equals the latest, as in the reference code
            self.best_step, self.best_score = self.done, robust
            if self.folder is None:
                self.best = copy.deepcopy(average)
            self._save(average, "best", training=self._meta())
        return {"validation_clean": clean, "validation_robust": robust}

    def _log(self, validated: dict[str, float]) -> str:
        """Add a row of metrics; return its figures for the progress bar."""
        self._require_finite(self.done)
        loss, clean, adversarial, eps, images = self.devices.all_reduce(self._sums).tolist()
        self._sums.zero_()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self._seconds += seconds
        group, drawn = self.optimizer.param_groups[0], self.done * self.recipe.batch_size
        both = {} if self.recipe.objective == "pgd-at" else {"clean_accuracy": clean / images}
        accuracies = both | {"adversarial_accuracy": adversarial / images}
        unique = int(np.count_nonzero(self._seen))
        row = {"step": self.done, "draws": drawn, "unique_images": unique, "learning_rate": group["lr"]}
        row |= {"momentum": group["momentum"], "loss": loss / images, "mean_eps": eps / images}
        row |= {"seconds": self._seconds, "images_per_second": images / seconds}
        self.metrics.add(**row, **accuracies, **validated)
        shown = [f"{name.removesuffix('_accuracy')} {share:.1%}" for name, share in accuracies.items()]
        return ", ".join([f"loss {row['loss']:.3f}", *shown])

    def checkpoint(self) -> None:
        """Write the state after the last step, if there is a folder; all processes call it together."""
        average, sums = self.averaged(), self.devices.all_reduce(self._sums.clone()).tolist()
        if self._writes:
            score = {"best_step": self.best_step, "best_score": self.best_score}
            meta = {**score, "seconds": self._seconds, "sums": sums}
            seen = {"seen": torch.from_numpy(np.packbits(self._seen))}
            save_state(self._writes / "checkpoints", self.done, pack(self.network, average, self._sgd) | seen, meta)

    def _save(self, model: nn.Module, name: str, **meta: Any) -> None:
        if self._writes:
            save_model(model, self._writes / f"{name}.safetensors", **meta)

    def _finish(self) -> Run:
        model, meta = self.averaged(), self._meta()
        for own, live in zip(model.parameters(), self.network.parameters(), strict=True):
            own.requires_grad_(live.requires_grad)
        self.metrics.close()
        if not self.best_step:
            self._save(model, "best", training=meta)
        self._save(model, "last", training=meta)
        self.devices.barrier()
        if self.folder:
            return Run.read(self.folder, model)
        return Run(model.cpu(), (self.best or model).cpu(), None, self.metrics.rows, meta)

    def _meta(self) -> dict[str, Any]:
        return {
            "steps": self.done,
            "draws": self.done * self.recipe.batch_size,
            "unique_images": int(np.count_nonzero(self._seen)),
            "trained_on": self.job.batches.sampler.kept,
            "validation_images": self.job.validation.count if self.job.validation else 0,
            "best_step": self.best_step or self.done,
            "best_validation": self.best_score if self.best_step else None,
            "seconds": self._seconds,
        }
