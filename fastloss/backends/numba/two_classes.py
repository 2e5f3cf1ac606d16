"""Softmax of two classes: each pass reads, computes and writes a tile in one loop.

With d = x₁ − x₀ and e = exp(−|d|), the larger p is 1 / (1 + e) and the smaller e / (1 + e): each is
1 − the other, without cancellation. −log p is log(1 + e), and |d| more for the smaller.
"""

from fastloss.backends.numba.kernels import inner, summing
from fastloss.backends.numba.maths import exp, log_sum


@inner
def _softmax(x0, x1, w, zero, one):
    """p₀, p₁, e, 1 / (1 + e) and d of a voxel; one of weight 0 may hold NaN."""
    d = zero if (x0 == x1) | (w == zero) else x1 - x0
    e = exp(-abs(d))
    inverse = one / (one + e)
    small = e * inverse
    first = d > zero
    return (small if first else inverse), (inverse if first else small), e, inverse, d


@summing
def sums(x0, x1, y, w):
    """The sums of `softmax_labels.SUMS` over a tile, for each of the classes."""
    zero, one = x0.dtype.type(0), x0.dtype.type(1)
    size0 = size1 = own0 = own1 = all0 = all1 = log0 = log1 = square0 = square1 = zero
    for i in range(len(y)):
        p0, p1, e, inverse, d = _softmax(x0[i], x1[i], w[i], zero, one)
        w0, w1 = (w[i] if y[i] == 0 else zero), (w[i] if y[i] == 1 else zero)
        size0 += w0
        size1 += w1
        own0 += w0 * p0
        own1 += w1 * p1
        all0 += w[i] * p0
        all1 += w[i] * p1
        square0 += w[i] * p0 * p0
        square1 += w[i] * p1 * p1
        log = log_sum(e, inverse)
        # Selected, as 0 · ∞ is NaN; but a NaN logit makes both cross-entropies NaN.
        log0 += w0 * (log + max(d, zero)) if (y[i] == 0) | (d != d) else zero
        log1 += w1 * (log + max(-d, zero)) if (y[i] == 1) | (d != d) else zero
    return (size0, own0, all0, log0, square0, size0), (size1, own1, all1, log1, square1, size1)


@inner
def gradient(x0, x1, y, w, k, out):
    """Write ∂L/∂x₀ = −∂L/∂x₁ = m (p₁ t₀ − p₀ t₁), with t_c as in `softmax_labels`."""
    zero, one = x0.dtype.type(0), x0.dtype.type(1)
    _, (own0, own1), (all0, all1), (log0, log1), (square0, square1), _ = k
    for i in range(len(y)):
        p0, p1, _, _, _ = _softmax(x0[i], x1[i], w[i], zero, one)
        t0 = (all0 + (square0 + square0) * p0) * p0 + (own0 * p0 - log0 if y[i] == 0 else zero)
        t1 = (all1 + (square1 + square1) * p1) * p1 + (own1 * p1 - log1 if y[i] == 1 else zero)
        out[i] = w[i] * (p1 * t0 - p0 * t1)
