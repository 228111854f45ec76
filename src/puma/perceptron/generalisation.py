"""Clean and robust error of a linear student, in closed form.

The task: ``x ~ N(0, I_d)``, a unit teacher ``w*`` and the label ``y = sign(w*.x)``. The student is a unit vector ``w``
with overlap ``R = w.w* = cos(theta)``. Only two directions matter: ``u = w*.x`` and ``v = w.x`` are standard normals
with correlation ``R``. By symmetry take ``y = 1``: then ``s = |u|`` is half-normal and the student's signed margin is
``y v = R s + sqrt(1 - R^2) z`` with an independent standard normal ``z``.

The attacker moves ``x`` by at most ``eps`` in L2. Against a linear student its best move lowers ``y v`` by exactly
``eps``. All errors are probabilities in [0, 1], lower is better, and all of them decrease in ``R``: **the isotropic
task has no accuracy-robustness trade-off**. For ``x ~ N(0, S)`` and weights of any length put
``R = w'S w* / (|w|_S |w*|_S)`` and ``eps |w| / |w|_S`` in place of ``R`` and ``eps``, where ``|w|_S^2 = w'S w``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, owens_t

from puma.errors import unknown
from puma.perceptron.gaussian import Array, divide, wedge, within

Definition = Literal["fixed", "moved"]


def clean_error(R: ArrayLike) -> Array:
    """Probability that the student's label differs from the teacher's: ``arccos(R) / pi``.

    The two hyperplanes cut the plane of ``w`` and ``w*`` into four wedges; they disagree in two of angle ``theta``
    each, out of ``2 pi``, and the normal distribution has no preferred direction.

    Args:
        R: overlap in [-1, 1], any shape.

    >>> clean_error([1.0, 0.0, -1.0]).tolist()
    [0.0, 0.5, 1.0]

    Raises:
        UsageError: an overlap beyond [-1, 1].
    """
    return np.asarray(np.arccos(within("R", R, -1, 1)) / np.pi)


def robust_error(R: ArrayLike, eps: ArrayLike, definition: Definition = "fixed") -> Array:
    """Probability that an attack of norm ``eps`` succeeds.

    ``"fixed"``: the label stays that of the clean ``x`` ("corrupted instance"), as adversarial training and AutoAttack
    have it. The attack succeeds iff ``y v < eps``, and ``y v`` is skew-normal with shape ``k = R / sqrt(1 - R^2)``, so
    the error is ``Phi(eps) - 2 T(eps, k)``. It does not vanish at ``R = 1``: what is left there is `mislabelled_share`,
    the examples that the attack carries over the teacher's own boundary.

    ``"moved"``: the label moves with ``x`` ("error region"): some point of the ball is labelled differently by student
    and teacher. They agree in the cones ``u, v > 0`` and ``u, v < 0``, and the ball stays inside one iff both ``|u|``
    and ``|v|`` exceed ``eps`` with one sign. So the error is ``1 - 2 P(u > eps, v > eps)``, which is
    ``1 - 2 Phi(-eps) + 4 T(eps, tan(theta / 2))``. It is never below the fixed one, and useless for ranking: it tends
    to `mislabelled_share` as ``theta`` falls to 0 but is 0 at ``theta = 0``, where no point is labelled differently.

    Args:
        R: overlap in [-1, 1].
        eps: attack norm, not negative; broadcasts against ``R``.
        definition: ``"fixed"`` or ``"moved"``.

    >>> robust_error(1.0, [0.1, 0.3, 0.5]).round(3).tolist()
    [0.08, 0.236, 0.383]
    >>> float(robust_error(1.0, 0.3, definition="moved"))
    0.0

    Raises:
        UsageError: a value out of its range, or another definition.
    """
    R, eps = within("R", R, -1, 1), within("eps", eps, 0, np.inf)
    if definition == "fixed":
        return np.asarray(np.clip(ndtr(eps) - 2 * owens_t(eps, _cotangent(R)), 0.0, 1.0))
    if definition == "moved":
        tan_half = divide(np.sqrt(1 - R), np.sqrt(1 + R))
        error = 1 - 2 * ndtr(-eps) + 4 * owens_t(eps, tan_half)
        return np.where(R == 1, 0.0, np.clip(error, 0.0, 1.0))
    raise unknown("definition", definition, ("fixed", "moved"))


def capped_robust_error(R: ArrayLike, eps: ArrayLike, c: ArrayLike) -> Array:
    """Robust error when each example is attacked with norm ``min(eps, c s)``, ``s`` its distance to the teacher.

    With ``c < 1`` no attack crosses the teacher's boundary: the label is right for every attacked point (a
    "label-consistent" error), and it vanishes as ``R`` tends to 1. The attack succeeds iff ``y v < min(eps, c s)``.
    Against the full attack this spares the triangle ``{c s < y v < eps}``. In the coordinates ``y v`` and the
    independent ``t``, with ``s = R y v + sqrt(1 - R^2) t``, the triangle is ``0 < y v < eps``, ``-k y v < t < q y v``
    with ``k = R / sqrt(1 - R^2)`` and ``q = (1/c - R) / sqrt(1 - R^2)``: two wedges (`gaussian.wedge`), so

        ``robust_error - 2 [wedge(eps, q) + wedge(eps, k) - (Phi(eps) - 1/2)]``.

    At ``c = 1`` it tends to half of `mislabelled_share` as ``R`` tends to 1 (which of the two boundaries is nearer is a
    coin flip) and is 0 at ``R = 1`` itself. ``c = 0`` gives the clean error, ``c = inf`` the fixed robust error.

    Args:
        R: overlap in [-1, 1].
        eps: largest attack norm, not negative.
        c: share of the distance ``s`` that the attack may go, not negative. All three broadcast.

    >>> capped_robust_error(0.98, 0.3, [0.0, 0.5, np.inf]).round(4).tolist()
    [0.0638, 0.1212, 0.2405]

    Raises:
        UsageError: a value out of its range.
    """
    R, eps, c = within("R", R, -1, 1), within("eps", eps, 0, np.inf), within("c", c, 0, np.inf)
    fixed = robust_error(R, eps)
    q = divide(divide(1.0, c) - R, np.sqrt((1 - R) * (1 + R)))
    spared = wedge(eps, q) + wedge(eps, _cotangent(R)) - (ndtr(eps) - 0.5)
    error = np.clip(fixed - 2 * spared, 0.0, 1.0)
    return np.where((R == 1) & (c <= 1), 0.0, error)


def _cotangent(R: Array) -> Array:
    """``R / sqrt(1 - R^2)``, without cancellation near +-1."""
    return divide(R, np.sqrt((1 - R) * (1 + R)))
