"""Student's t distribution: probabilities and quantiles."""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, inf, isinf, isnan, lgamma, log, log1p, nan, pi, sqrt
from statistics import NormalDist

NORMAL = NormalDist()


def two_sided(t: float, df: float) -> float:
    """The probability of a value at least as far from 0 as ``t``.

    NaN for NaN, and below any degree of freedom.

    >>> round(two_sided(2.201, 11), 3)
    0.05
    """
    if isnan(t) or isnan(df) or df <= 0:
        return nan
    if isinf(t):
        return 0.0
    if isinf(df) or df > 1e7:
        return erfc(abs(t) / sqrt(2))
    return _beta(df / 2, 0.5, df / (df + t * t))


@lru_cache(maxsize=1024)
def critical(df: float, alpha: float = 0.05) -> float:
    """The t whose `two_sided` probability is ``alpha``; infinite without degrees of freedom.

    >>> round(critical(2), 3)
    4.303
    """
    if isnan(df) or df <= 0:
        return inf
    t = NORMAL.inv_cdf(1 - alpha / 2)
    if isinf(df) or df > 1e7:
        return t
    # Newton's steps for log p as a function of log t, which is concave, and a line in the tails.
    front = lgamma((df + 1) / 2) - lgamma(df / 2) - log(pi * df) / 2
    for _ in range(50):
        p = two_sided(t, df)
        density = exp(front - (df + 1) / 2 * log1p(t * t / df))
        step = log(p / alpha) * p / (2 * density * t)
        t *= exp(step)
        if abs(step) < 1e-12:
            break
    return t


def _beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction.

    NIST Handbook of Mathematical Functions, 8.17.22, evaluated from its end.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _beta(b, a, 1 - x)
    fraction = 0.0
    for n in range(60 + int(4 * sqrt(a + b)), 0, -1):
        m, odd = divmod(n, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = d / (1 + fraction)
    front = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)
    return exp(front) / (a * (1 + fraction))
