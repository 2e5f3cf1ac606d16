"""The table of the functions of p: the value and the derivative of each, once.

A formula is given one voxel and class: p, q = 1−p, their logarithms, p^γ, q^γ and γ. Kernels
evaluate it along rows of voxels.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastloss.backends.numba.kernels import inner

LOG_P, LOG_Q, P_GAMMA, Q_GAMMA = 1, 2, 4, 8  # what a formula reads beside p and q
BY = ("p", "log_p", "log_q")


class Function(NamedTuple):
    """A function of p.

    Attributes:
        reads: what it and its derivative need beside p and q: ``LOG_P | LOG_Q | …``.
        by: what its derivative is by, one of `BY`.
        value, slope: the function and its derivative.
    """

    reads: int
    by: str
    value: Callable[..., Any]
    slope: Callable[..., Any]


@inner
def product(a, b):
    """a b, and 0 where a factor is 0 though the other be infinite."""
    nothing = ((a == 0) & (b == b)) | ((b == 0) & (a == a))
    return 0.0 if nothing else a * b


@inner
def _focal_slope(p, log_p, q, q_gamma, gamma):
    """The derivative of q^γ log p by log p."""
    # Near p = 1 it is like −q^γ, which below γ = 1 is no longer seen from its factors.
    return q_gamma - gamma * (0.0 if q == 0 else product(product(p, log_p), q_gamma / q))


FUNCTIONS = {
    "one": Function(
        0,
        "p",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: 1.0,
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: 0.0,
    ),
    "p": Function(
        0,
        "p",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: p,
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: 1.0,
    ),
    "p_squared": Function(
        0,
        "p",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: p * p,
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: p + p,
    ),
    "log": Function(
        LOG_P,
        "log_p",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -log_p,
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -1.0,
    ),
    "log_rest": Function(
        LOG_Q,
        "log_q",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -log_q,
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -1.0,
    ),
    "focal": Function(
        LOG_P | Q_GAMMA,
        "log_p",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -product(q_gamma, log_p),
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: (
            -_focal_slope(p, log_p, q, q_gamma, gamma)
        ),
    ),
    "focal_rest": Function(
        LOG_Q | P_GAMMA,
        "log_q",
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: -product(p_gamma, log_q),
        lambda p, q, log_p, log_q, p_gamma, q_gamma, gamma: (
            -_focal_slope(q, log_q, p, p_gamma, gamma)
        ),
    ),
}

# Of the voxel weight m and the target g.
WEIGHTS = {
    "one": lambda m, g: m,
    "target": lambda m, g: m * g,
    "rest": lambda m, g: m * (1 - g),
    "target_squared": lambda m, g: m * g * g,
}


def _row_of_function(formula: Callable[..., Any]) -> Any:
    formula = inner(formula)

    def row(p, q, log_p, log_q, p_gamma, q_gamma, gamma, out):
        for i in range(len(out)):
            out[i] = formula(p[i], q[i], log_p[i], log_q[i], p_gamma[i], q_gamma[i], gamma)

    return row


def _row_of_weight(formula: Callable[..., Any]) -> Any:
    formula = inner(formula)

    def row(m, g, out):
        for i in range(len(out)):
            out[i] = formula(m[i], g[i])

    return row


def _one_of(rows: Sequence[Callable[..., Any]]) -> Any:
    """A function (number, *arguments) that calls the row of this number."""
    if not rows:
        return inner(lambda number, *arguments: None)
    first, others = inner(rows[0]), _one_of(rows[1:])

    def pick(number, *arguments):
        if number == 0:
            first(*arguments)
        else:
            others(number - 1, *arguments)

    return inner(pick)


value_row = _one_of([_row_of_function(f.value) for f in FUNCTIONS.values()])
slope_row = _one_of([_row_of_function(f.slope) for f in FUNCTIONS.values()])
weight_row = _one_of([_row_of_weight(f) for f in WEIGHTS.values()])


@inner
def power_row(base, gamma, out):
    """base^γ."""
    if gamma == 0:
        for i in range(len(out)):
            out[i] = 1.0
    elif gamma == 1:
        for i in range(len(out)):
            out[i] = base[i]
    elif gamma == 2:
        for i in range(len(out)):
            out[i] = base[i] * base[i]
    else:
        for i in range(len(out)):
            out[i] = base[i] ** gamma
