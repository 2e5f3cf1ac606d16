"""Encodes labels for the other kernels, and finds the label of the largest logit."""

import numpy as np

from fastloss.backends.numba.general import NONE, SIGMOID
from fastloss.backends.numba.kernels import kernel


@kernel
def largest(x, first, activation, out):
    """The first class of the largest logit, or of NaN; for one class, whether p > ½."""
    for i in range(len(out)):
        a = x[0, first + i]
        if x.shape[0] == 1:
            out[i] = a > 0.5 if activation == NONE else a > 0 if activation == SIGMOID else a == a
            continue
        at = 0
        for c in range(1, x.shape[0]):
            b = x[c, first + i]
            if b > a or (b != b and a == a):
                a, at = b, c
        out[i] = at


@kernel
def encode(labels, classes, ignored, ignore, codes):
    """Encode labels as int32: −1 for ``ignore`` if ``ignored``, −2 for no class; count the latter.

    ``labels`` are numbers of any type, (n,).
    """
    bad = 0
    for i in range(len(codes)):
        y = labels[i]
        inside = (y >= 0) & (y < classes)
        code = np.int32(y) if inside else np.int32(-2)
        code = code if code == y else np.int32(-2)
        skip = ignored & (y == ignore)
        bad += (code < 0) & (not skip)
        codes[i] = np.int32(-1) if skip else code
    return bad
