"""The table of the functions of p: the value and the derivative of each, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from fastloss.backends.numba.kernels import inner


class Voxel(NamedTuple):
    """The inputs of a formula for one voxel and class: with q = 1−p, p^γ, q^γ, and the target g."""

    p: float
    q: float
    log_p: float
    log_q: float
    p_gamma: float
    q_gamma: float
    gamma: float
    g: float


class Function(NamedTuple):
    """A function of p, and its derivative by what ``by`` names: "p", "log_p" or "log_q"."""

    by: str
    value: Callable[[Voxel], float]
    slope: Callable[[Voxel], float]

    @property
    def reads(self) -> int:
        """The optional inputs that the formulas read: a sum of values of `READS`."""
        names = {*self.value.__code__.co_names, *self.slope.__code__.co_names}
        return sum(flag for name, flag in READS.items() if name in names)


LOG_P, LOG_Q, P_GAMMA, Q_GAMMA = 1, 2, 4, 8
READS = {"log_p": LOG_P, "log_q": LOG_Q, "p_gamma": P_GAMMA, "q_gamma": Q_GAMMA}


@inner
def product(a, b):
    """a b, but 0 for 0 · ∞."""
    nothing = ((a == 0) & (b == b)) | ((b == 0) & (a == a))
    return 0.0 if nothing else a * b


@inner
def _focal_slope(p, log_p, q, q_gamma, gamma):
    """The derivative of q^γ log p by log p: q^γ − γ p log p · q^(γ−1), as dq = −p d(log p)."""
    # At q = 0 the second part has the limit 0, as log p ≈ −q, though for γ < 1 q^(γ−1) is infinite.
    return q_gamma - gamma * (0.0 if q == 0 else product(product(p, log_p), q_gamma / q))


@inner
def _difference(v):
    """p − g, exact where both are near 1."""
    return (1 - v.g) - v.q if v.p > 0.5 else v.p - v.g


@inner
def _sign(d):
    return 1.0 if d > 0 else (-1.0 if d < 0 else d)


@inner
def _log_of_target(g):
    """log g, and 0 where g is 0."""
    return 0.0 if g == 0 else math.log(g)


FUNCTIONS = {
    "one": Function("p", lambda v: 1.0, lambda v: 0.0),
    "p": Function("p", lambda v: v.p, lambda v: 1.0),
    "p_squared": Function("p", lambda v: v.p * v.p, lambda v: v.p + v.p),
    "log": Function("log_p", lambda v: -v.log_p, lambda v: -1.0),
    "log_rest": Function("log_q", lambda v: -v.log_q, lambda v: -1.0),
    "focal": Function(
        "log_p",
        lambda v: -product(v.q_gamma, v.log_p),
        lambda v: -_focal_slope(v.p, v.log_p, v.q, v.q_gamma, v.gamma),
    ),
    "focal_rest": Function(
        "log_q",
        lambda v: -product(v.p_gamma, v.log_q),
        lambda v: -_focal_slope(v.q, v.log_q, v.p, v.p_gamma, v.gamma),
    ),
    "generalized": Function(
        "log_p", lambda v: -math.expm1(v.gamma * v.log_p) / v.gamma, lambda v: -v.p_gamma
    ),
    "log_power": Function(
        "log_p",
        lambda v: (-v.log_p) ** v.gamma,
        lambda v: 0.0 if v.log_p == 0 else -v.gamma * (-v.log_p) ** (v.gamma - 1),
    ),
    "error": Function("p", lambda v: abs(_difference(v)), lambda v: _sign(_difference(v))),
    "sign": Function("p", lambda v: _sign(_difference(v)), lambda v: 0.0),
    "log_ratio": Function("log_p", lambda v: _log_of_target(v.g) - v.log_p, lambda v: -1.0),
    "log_ratio_rest": Function(
        "log_q", lambda v: _log_of_target(1 - v.g) - v.log_q, lambda v: -1.0
    ),
}

# Functions of the voxel weight m and the target g.
WEIGHTS = {
    "one": lambda m, g: m,
    "target": lambda m, g: m * g,
    "rest": lambda m, g: m * (1 - g),
    "target_squared": lambda m, g: m * g * g,
}
