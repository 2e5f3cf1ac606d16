"""exp, log and log1p without branches, so that loops over them are vectorised.

In float32 they are polynomials, accurate to 2 ulp (log after the Cephes library); in float64 they
are the functions of the C library.
"""

import math

import numpy as np
from numba.core import types
from numba.extending import overload

from fastloss.backends.numba.kernels import OPTIONS, inner

_f, _i = np.float32, np.int32
_ZERO, _HALF, _ONE, _INF, _NAN = _f(0), _f(0.5), _f(1), _f(np.inf), _f(np.nan)
# log 2 = high + low, where n · high is exact for the integers n that occur.
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.4426950408889634), _f(0.693359375), _f(-2.12194440e-4)
_LOWEST = _f(-87.0)
_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_MANTISSA_BITS, _BIAS, _MANTISSA = _i(23), _i(127), _i((1 << 23) - 1)
_ROOT_HALF = _i(0x3F3504F3)  # the bits of √½
_TINY, _UP, _UP_EXPONENT = _f(2.0**-126), _f(2.0**23), _f(23)
# (e^r − 1) / r for |r| up to log(2)/2, fitted for the least relative error of e^r, 3e-9.
_E = (
    _f(1.3843645731e-03), _f(8.3741617502e-03), _f(4.1668002474e-02),
    _f(1.6666431188e-01), _f(4.9999994206e-01), _f(1.0000000322e00),
)  # fmt: skip
# log(1 + f) = f − f²/2 + f³ times this, for 1 + f in [√½, √2).
_L = (
    _f(7.0376836292e-2), _f(-1.1514610310e-1), _f(1.1676998740e-1),
    _f(-1.2420140846e-1), _f(1.4249322787e-1), _f(-1.6668057665e-1),
    _f(2.0000714765e-1), _f(-2.4999993993e-1), _f(3.3333331174e-1),
)  # fmt: skip


# Names for the kernels to call: Numba compiles the overloads below instead.


def exp(x):
    """e^x for x up to 0; in float32 0 below −87."""


def log(x): ...


def log_sum(x, inverse):
    """log(1 + x) for finite x of at least 0, given 1 / (1 + x)."""


@overload(exp, jit_options=OPTIONS)
def _exp(x):
    if x != types.float32:
        return lambda x: math.exp(x)

    # e^x = 2^n e^r with n = x / log 2, rounded, and r = x − n log 2. Adding _ROUND leaves n in the
    # low bits; n + 127, shifted into the exponent field, is 2^n.
    def exp32(x):
        shifted = x * _LOG2E + _ROUND
        n = shifted - _ROUND
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        y = ((((_E[0] * r + _E[1]) * r + _E[2]) * r + _E[3]) * r + _E[4]) * r + _E[5]
        y = y * r + _ONE
        power = (np.float32(shifted).view(np.int32) + _BIAS) << _MANTISSA_BITS
        return _ZERO if x < _LOWEST else y * np.int32(power).view(np.float32)

    return exp32


@inner
def _log_normal(x, lifted):
    """log x − ``lifted`` log 2, for a normal number x above 0.

    x = 2^e (1 + f) with 1 + f in [√½, √2): subtracting the bits of √½ makes the exponent field e.
    """
    bits = np.float32(x).view(np.int32) - _ROOT_HALF
    e = _f(bits >> _MANTISSA_BITS) - lifted
    f = np.int32((bits & _MANTISSA) + _ROOT_HALF).view(np.float32) - _ONE
    y = (((_L[0] * f + _L[1]) * f + _L[2]) * f + _L[3]) * f + _L[4]
    y = (((y * f + _L[5]) * f + _L[6]) * f + _L[7]) * f + _L[8]
    square = f * f
    y = y * (square * f) + e * _LN2_LOW - _HALF * square
    return f + y + e * _LN2_HIGH


@overload(log, jit_options=OPTIONS)
def _log(x):
    if x != types.float32:
        return lambda x: math.log(x)

    def log32(x):
        small = x < _TINY
        y = _log_normal(x * _UP if small else x, _UP_EXPONENT if small else _ZERO)
        y = y if x < _INF else _INF
        y = y if x > _ZERO else -_INF
        return y if x >= _ZERO else _NAN

    return log32


@overload(log_sum, jit_options=OPTIONS)
def _log_sum(x, inverse):
    if x != types.float32:
        return lambda x, inverse: math.log1p(x)

    def log_sum32(x, inverse):
        u = _ONE + x
        return _log_normal(u, _ZERO) - ((u - _ONE) - x) * inverse

    return log_sum32
