"""The two learning tasks: Gaussian inputs with a linear teacher, isotropic or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from puma.errors import UsageError, unknown
from puma.perceptron.gaussian import Array
from puma.perceptron.generalisation import capped_robust_error, clean_error, robust_error


@dataclass(frozen=True)
class Block:
    """Coordinates that share one standard deviation.

    Args:
        share: their share of all coordinates.
        scale: their standard deviation.
        signal: the share of the teacher's variance that they carry.
    """

    share: float
    scale: float
    signal: float


ISOTROPIC = (Block(share=1.0, scale=1.0, signal=1.0),)
ANISOTROPIC = (Block(share=0.05, scale=1.0, signal=0.7), Block(share=0.95, scale=0.2, signal=0.3))
TASKS: dict[str, tuple[Block, ...]] = {"isotropic": ISOTROPIC, "anisotropic": ANISOTROPIC}


@dataclass(frozen=True)
class Task:
    """``x ~ N(0, S)`` with diagonal ``S`` constant on blocks, and ``y = sign(w*.x)``.

    ``isotropic``: one block, ``S = I``. It has no accuracy-robustness trade-off and can only show harm.
    ``anisotropic``: few strong coordinates, and many weak ones that carry part of the label. An L2 attack reaches the
    weak ones first, so a robust student has to give up their share of the label: a trade-off, as images have it.
    Inside a block the Gaussian has no preferred direction, so the teacher may lie on one coordinate of each.

    Args:
        blocks: of the coordinates, in order.
        dimension: number of coordinates ``d``.

    >>> task = Task.named("anisotropic", dimension=100)
    >>> task.scale[[0, 5]].tolist(), round(float(task.teacher @ (task.scale**2 * task.teacher)), 12)
    ([1.0, 0.2], 1.0)
    """

    blocks: tuple[Block, ...]
    dimension: int

    @classmethod
    def named(cls, name: str, dimension: int) -> Task:
        """The task called ``name`` (``"isotropic"`` or ``"anisotropic"``) in ``dimension`` coordinates.

        Raises:
            UsageError: another name, or too few coordinates for the blocks.
        """
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        if dimension < 20:
            raise UsageError(f"dimension {dimension} is too small", fix="use 20 coordinates or more")
        return cls(TASKS[name], dimension)

    @cached_property
    def sizes(self) -> list[int]:
        """Coordinates per block."""
        ends = np.rint(np.cumsum([block.share for block in self.blocks]) * self.dimension).astype(int)
        return [int(size) for size in np.diff(ends, prepend=0)]

    @cached_property
    def scale(self) -> Array:
        """Standard deviation of each coordinate ``[d]``."""
        return np.repeat([block.scale for block in self.blocks], self.sizes)

    @cached_property
    def teacher(self) -> Array:
        """Weights of the teacher ``[d]``, with ``w*'S w* = 1``; its L2 margin is ``|w*.x| / |w*|``."""
        weights = np.zeros(self.dimension)
        starts = np.cumsum([0, *self.sizes[:-1]])
        for start, block in zip(starts, self.blocks, strict=True):
            weights[start] = np.sqrt(block.signal) / block.scale
        return weights

    def draw(self, rows: int, rng: np.random.Generator) -> Array:
        """``rows`` examples as label times input ``[rows, d]``; more rows of one seed begin with the fewer."""
        x = rng.standard_normal((rows, self.dimension)) * self.scale
        return x * np.sign(x @ self.teacher)[:, None]

    def overlap(self, weights: Array) -> float:
        """Correlation of student and teacher outputs, in [-1, 1]; NaN for a student of no length."""
        length = float(np.linalg.norm(self.scale * weights))
        if length == 0:
            return float("nan")
        return float(np.clip(weights @ (self.scale**2 * self.teacher) / length, -1, 1))

    def errors(self, weights: Array, eps: float, c: float = 0.5) -> dict[str, float]:
        """Exact errors of a student: no test set, the closed forms of `generalisation`.

        Args:
            weights: ``[d]``; a student of no length guesses, and every attack on it succeeds.
            eps: attack norm at the test.
            c: cap of the label-consistent error.

        Returns:
            ``clean_error``, ``robust_error`` (label fixed) and ``consistent_error`` (test norm ``min(eps, c s)``).
        """
        overlap, length = self.overlap(weights), float(np.linalg.norm(weights))
        stretch = length / float(np.linalg.norm(self.scale * weights)) if length > 0 else math.nan
        return self.errors_at(overlap, stretch, eps, c)

    def errors_at(self, overlap: float, stretch: float, eps: float, c: float = 0.5) -> dict[str, float]:
        """The errors of `errors` for a student with this overlap and ``stretch = |w| / |w|_S``."""
        if math.isnan(overlap):
            robust = 1.0 if eps > 0 else 0.5
            return {"clean_error": 0.5, "robust_error": robust, "consistent_error": robust if c > 0 else 0.5}
        # in units of the student's output: eps grows by the stretch, the teacher's distance shrinks by its own length
        cap = c * stretch / float(np.linalg.norm(self.teacher))
        return {
            "clean_error": float(clean_error(overlap)),
            "robust_error": float(robust_error(overlap, eps * stretch)),
            "consistent_error": float(capped_robust_error(overlap, eps * stretch, cap)),
        }
