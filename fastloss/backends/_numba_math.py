"""exp, log and log1p for the Numba kernels, free of branches, so that LLVM vectorises them.

In float32 they are polynomials, that of log from the Cephes library, within 2 units in the last
place (exp: up to |x| = 30, and within 5 below). In float64 they are the functions of the C library.
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import njit
from numba.core import types
from numba.extending import overload

from fastloss.backends._numba_pointers import exponent, mantissa, power_of_two

# Fused multiply-add may replace a product and a sum; anything more would break the tricks below.
_OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy"}

_f = np.float32
_ZERO, _HALF, _ONE, _INF, _NAN = _f(0), _f(0.5), _f(1), _f(np.inf), _f(np.nan)
_LOWEST = _f(-87.0)
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
# Of a product that is not rounded, one number for log(2) is enough: it is 2e-9 from it.
_LN2 = _f(0.6931471805599453)
_FUSED = bool(get_host_cpu_features().get("fma", False))
_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
# (e^r − 1) / r for |r| up to log(2)/2, fitted for the least relative error of e^r, 3e-9.
_E0, _E1, _E2, _E3, _E4, _E5 = (
    _f(c)
    for c in (
        1.3843645731e-03,
        8.3741617502e-03,
        4.1668002474e-02,
        1.6666431188e-01,
        4.9999994206e-01,
        1.0000000322e00,
    )
)
# log(1 + f) = f − f²/2 + f³ times this, for 1 + f in [√½, √2).
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    _f(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
# log(1 + x) / x − 1 for x in [0, 1], by x, fitted for the least relative error, 3e-8.
_S0, _S1, _S2, _S3, _S4, _S5, _S6, _S7 = (
    _f(c)
    for c in (
        -0.49999648332595825,
        0.3332132399082184,
        -0.24857163429260254,
        0.191536545753479,
        -0.13753800094127655,
        0.0792045146226883,
        -0.030065778642892838,
        0.0053648208267986774,
    )
)
_TINY, _UP, _UP_EXPONENT = _f(2.0**-126), _f(2.0**23), _f(23)


# Names for the kernels to call: Numba compiles the overloads below in their place, and they are
# never run as Python.


def exp(x: Any) -> Any:
    """e^x for x up to 88; in float32 0 below −87, and exactly 1 at 0."""
    raise NotImplementedError


def exp_near(x: Any) -> Any:
    """e^x for |x| up to 87, and NaN for NaN; what it is for other x means nothing."""
    raise NotImplementedError


def log(x: Any) -> Any:
    raise NotImplementedError


def log1p(x: Any) -> Any:
    raise NotImplementedError


def log1p_small(x: Any) -> Any:
    """log(1 + x) for x from 0 to 1, and NaN for NaN."""
    raise NotImplementedError


def log_sum(x: Any, inverse: Any) -> Any:
    """log(1 + x) for finite x of at least 0, given 1 / (1 + x)."""
    raise NotImplementedError


@overload(exp_near, jit_options=_OPTIONS)
def _exp_near(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    if _FUSED:

        def reduced(x, n):
            return x - n * _LN2

    else:

        def reduced(x, n):
            return (x - n * _LN2_HIGH) - n * _LN2_LOW

    reduced = njit(inline="always", **_OPTIONS)(reduced)

    def exp_near32(x):
        shifted = x * _LOG2E + _ROUND
        n = shifted - _ROUND
        r = reduced(x, n)
        y = _E0 * r + _E1
        y = y * r + _E2
        y = y * r + _E3
        y = y * r + _E4
        y = y * r + _E5
        y = y * r + _ONE
        return y * power_of_two(shifted)

    return exp_near32


@overload(exp, jit_options=_OPTIONS)
def _exp(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp32(x):
        y = exp_near(x)
        return _ZERO if x < _LOWEST else y

    return exp32


@njit(**_OPTIONS)
def _log_normal(x, e):
    """e log 2 + log of the mantissa of x."""
    f = mantissa(x) - _ONE
    y = _L0 * f + _L1
    y = y * f + _L2
    y = y * f + _L3
    y = y * f + _L4
    y = y * f + _L5
    y = y * f + _L6
    y = y * f + _L7
    y = y * f + _L8
    square = f * f
    y = y * (square * f) + e * _LN2_LOW - _HALF * square
    return f + y + e * _LN2_HIGH


@overload(log, jit_options=_OPTIONS)
def _log(x):
    if x != types.float32:
        return lambda x: math.log(x)

    def log32(x):
        small = x < _TINY
        scaled = x * _UP if small else x
        y = _log_normal(scaled, exponent(scaled) - (_UP_EXPONENT if small else _ZERO))
        y = y if x < _INF else _INF
        y = y if x > _ZERO else -_INF
        return y if x >= _ZERO else _NAN

    return log32


@overload(log1p, jit_options=_OPTIONS)
def _log1p(x):
    if x != types.float32:
        return lambda x: math.log1p(x)

    def log1p32(x):
        u = _ONE + x
        y = log(u) - ((u - _ONE) - x) / u  # what 1 + x rounded off is put back
        y = y if u != _ZERO else -_INF
        return y if u < _INF else u

    return log1p32


@overload(log1p_small, jit_options=_OPTIONS)
def _log1p_small(x):
    if x != types.float32:
        return lambda x: math.log1p(x)

    def log1p_small32(x):
        # In pairs, as a long chain of dependent steps is what would take the time.
        x2 = x * x
        low = (_S3 * x + _S2) * x2 + (_S1 * x + _S0)
        high = (_S7 * x + _S6) * x2 + (_S5 * x + _S4)
        return (high * (x2 * x2) + low) * x2 + x

    return log1p_small32


@overload(log_sum, jit_options=_OPTIONS)
def _log_sum(x, inverse):
    if x != types.float32:
        return lambda x, inverse: math.log1p(x)

    def log_sum32(x, inverse):
        u = _ONE + x
        return _log_normal(u, exponent(u)) - ((u - _ONE) - x) * inverse

    return log_sum32
