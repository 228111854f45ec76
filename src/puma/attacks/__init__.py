"""Attacks as pure functions on tensors: DeepFool (distance to the boundary) and PGD (worst image within eps)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuned:
    """Every tuned constant of DeepFool's search, with the measurement that set it.

    ``benchmarks/margins_constants.py``, 512 CIFAR-10 images at 16x16, the robust CNN. For half and twice the value (or
    that named) the change of mean margin and passes (p) in percent, Linf / L2; "no effect": below 0.05 and 0.5 %.
    Modes `deepfool`, `refined`, `tight`, and `refined` on misclassified images (the last group, and "back").
    """

    gradients: tuple[float, float] = (1e-15, 1e15)  # outside float32 cannot square them: no-gradient, nan
    tolerance: float = 1e-6  # of the logits' size, twice where the largest is below 1; passes in float32 differ by less
    doubtful: float = 20.0  # times it: from there on a crossing needs no confirmation. No effect
    overshoot: float = 0.005  # of the first logit gap. -0.1/-0.2, p +4/+3; +0.3/+0.4, p -3/-3
    growth: float = 1.5  # of the overshoot a step, from the fifth on. No effect here; ends stalls on ties
    max_stretch: float = 0.04  # of the way, where a step fell short. -0.1/-0.1, p +2/+1; +0.2/+0.4, p -1/-1

    second_boundary: float = 1.25  # times the first's distance: evaluated too. 1.125: 0/0, p -1/-1; 1.5: 0/0, p +1/+1
    secant: tuple[float, float] = (0.4, 3.0)  # bounds of the time's first correction. No effect
    least_rise: float = 0.3  # of the level expected that has to be there. No effect
    ray_overshoot: float = 0.1  # of the overshoot: a ray crosses by itself. -0.1/-0.1, p 0/+1; +0.2/+0.2, p 0/-1
    full_speed: float = 0.1  # of the mean gradient: in Linf slower pixels lag. +0.2/0; +0.3/0
    ray_newton_steps: int = 3  # for when a ray meets a plane. No effect of 2 or 6
    meet: tuple[float, float] = (0.4, 2.0)  # bounds of the time's change. (0.2, 1.5): +1.3/+3.6; (0.8, 3): -0.9/-0.2
    trims: int = 2  # forward passes at the end of a ray. 1: +3.2/+3.8, p -3/-3; 4: -0.3/-0.2, p +3/+1
    reaches: int = 6  # further ones while nothing has crossed. No effect of 3 or 12
    trim_tolerance: float = 1e-3  # of the time: nearer is not trimmed. No effect
    least_slope: float = 0.2  # of the mean slope from the image. No effect
    bracket: tuple[float, float] = (0.02, 0.98)  # of the interval, for the secant. No effect
    inward: float = 0.7  # of the time, at least, in a step back. No effect
    outward: tuple[float, float, float] = (1.1, 1.6, 1.3)  # step out: factor, growth, bound. -0.1/-0.1; +0.2/+0.1
    raised_aim: float = 4.0  # factor of the overshoot after falling short. 2.5: -0.1/-0.1; 7: +0.3/+0.2

    stride: float = 0.8  # share of the way to the projection. -0.1/0, back -0.7/-1.2; 1.0: -0.1/0, back +0.1/+0.4
    least_stride: float = 0.2  # ends the steps. -0.1/0, p +2/0; +0.2/0, p -3/0
    stride_factors: tuple[float, float] = (1.3, 0.6)  # after gain, loss. (1.15, 0.3): +0.2/0, p -3/0; (1.6, 1): p +7/+1
    secant_factors: tuple[float, float] = (1.05, 0.02)  # beyond it. -0.1/0, back -0.1/-0.3; +0.2/0, back +0.1/+0.2
    least_gain: float = 2e-3  # of the distance that counts as a gain. No effect
    worth_a_step: float = 0.05  # nearer the linearized boundary has to be. 0/0, p +5/+2; +0.1/0, p -3/0

    newton_steps: int = 6  # onto a half-space in the box. No effect of 2 or 12 ("ahead"); 1: -0.2/+0.1
    iterations: int = 12  # of the interior-point method. 8: +3.2/-0.3; 16: -1.5/-1.1, time +1 %; 24: -2.9/-1.5, +8 %
    centering: float = 0.1  # of its mean complementarity. -0.1/+0.1; -0.3/-0.2
    to_the_boundary: float = 0.95  # share of its longest step. 0.9: +0.2/0; 0.99: -0.4/-0.2
    gap: float = 1e-3  # of the norm: closer to the optimum float32 runs out of digits. No effect
    box_slack: float = 1e-3  # of the norm: pixels at 0 or 1 need an interior too. 0/+0.1; 0/-0.1


TUNED = Tuned()
