"""exp, log and log1p for the Numba kernels, free of branches, so that LLVM vectorises them.

In float32 they are the polynomials of the Cephes library, within 2 units in the last place. In
float64 they are those of the C library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from fastloss.backends._numba_pointers import exponent, mantissa, power_of_two

# Fused multiply-add may replace a product and a sum; anything more would break the tricks below.
_OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy"}

_f = np.float32
_ZERO, _HALF, _ONE, _INF, _NAN = _f(0), _f(0.5), _f(1), _f(np.inf), _f(np.nan)
_LOWEST, _HIGHEST = _f(-87.0), _f(88.3)
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_E0, _E1, _E2, _E3, _E4, _E5 = (
    _f(c)
    for c in (
        1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
        5.0000001201e-1,
    )
)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (
    _f(c)
    for c in (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )
)
_TINY, _UP, _UP_EXPONENT = _f(2.0**-126), _f(2.0**23), _f(23)


def exp(x: Any) -> Any:
    """e^x; in float32 0 below −87."""
    raise NotImplementedError


def log(x: Any) -> Any:
    raise NotImplementedError


def log1p(x: Any) -> Any:
    raise NotImplementedError


@overload(exp, jit_options=_OPTIONS)
def _exp(x):  # type: ignore
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp32(x):  # type: ignore
        shifted = x * _LOG2E + _ROUND
        n = shifted - _ROUND
        r = x - n * _LN2_HIGH
        r = r - n * _LN2_LOW
        y = _E0 * r + _E1
        y = y * r + _E2
        y = y * r + _E3
        y = y * r + _E4
        y = y * r + _E5
        y = y * (r * r) + r + _ONE
        y = y * power_of_two(shifted)
        y = _ZERO if x < _LOWEST else y
        return _INF if x > _HIGHEST else y

    return exp32


@overload(log, jit_options=_OPTIONS)
def _log(x):  # type: ignore
    if x != types.float32:
        return lambda x: math.log(x)

    def log32(x):  # type: ignore
        small = x < _TINY
        scaled = x * _UP if small else x
        e = exponent(scaled) - (_UP_EXPONENT if small else _ZERO)
        f = mantissa(scaled) - _ONE
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
        y = f + y + e * _LN2_HIGH
        y = y if x < _INF else _INF
        y = y if x > _ZERO else -_INF
        return y if x >= _ZERO else _NAN

    return log32


@overload(log1p, jit_options=_OPTIONS)
def _log1p(x):  # type: ignore
    if x != types.float32:
        return lambda x: math.log1p(x)

    def log1p32(x):  # type: ignore
        u = _ONE + x
        y = log(u) - ((u - _ONE) - x) / u  # what 1 + x rounded off is put back
        y = y if u != _ZERO else -_INF
        return y if u < _INF else u

    return log1p32
