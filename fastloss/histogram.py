"""Histograms of errors, from which losses that rank voxels by their errors are computed.

Sorting all voxels by their errors is replaced by counting them in bins. Counts and sums per bin
add over tiles, threads, chunks of a volume and ranks, as other sums do.

A bin holds the numbers whose float32 bits agree but for the last ones: it is a fixed share of an
octave wide, so that small errors are told apart as well as large ones. Two kinds of error are
counted:

``errors``  e = |g − p| in [0, 1], by v = min(e, 1 − e): bins are narrow near 0, near 1, where the
            few voxels lie that a rare class is ranked by, and near ½, where a network begins.
``hinge``   h = 1 − x of the foreground, 1 + x of the background, where x is the logit, by
            v = max(h, 0): bins are narrow near 1, where a network begins.

In both, a voxel is foreground where g > ½. Bins are in the order of their errors. This module is
mirrored by `csrc/cpu/errors.h`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

HISTOGRAMS = ("errors", "hinge")

# (the exponent of 2 at which the octaves begin, how many there are, log2 of the bins of each).
_OCTAVES = {
    "errors": ((-24, 16, 6), (-8, 6, 8), (-2, 1, 11)),
    "hinge": ((-12, 10, 6), (-2, 1, 8), (-1, 2, 11), (1, 4, 9), (5, 11, 6)),
}
_MANTISSA = 23
_BIAS = 127


class Layout(NamedTuple):
    """The bins of one kind of error.

    Attributes:
        kind: one of `HISTOGRAMS`.
        places: the number of bins of v: one of all below the octaves, one of all above them.
        bins: twice as many of ``errors``: those of e ≤ ½, then those of e > ½, where v falls.
    """

    kind: str
    places: int
    bins: int

    @property
    def slots(self) -> int:
        """The sums of a histogram: for either of background and foreground the number of voxels of
        every bin, and then likewise Σ v."""
        return 4 * self.bins

    def place(self, v: np.ndarray) -> np.ndarray:
        """The bin of v, in [0, places), before those of large errors are put behind the others."""
        bits = np.asarray(v, np.float32).view(np.int32).astype(np.int64)
        found = np.zeros(bits.shape, np.int64)
        first = 1
        for exponent, octaves, log_bins in _OCTAVES[self.kind]:
            start = (exponent + _BIAS) << _MANTISSA
            own = first + ((bits - start) >> (_MANTISSA - log_bins))
            found = np.where(bits >= start, own, found)
            first += octaves << log_bins
        return np.minimum(found, first)

    def counted(self, v: np.ndarray) -> np.ndarray:
        """v as its bin counts it: 0 below all octaves, and their end above them."""
        v = np.asarray(v, np.float32).astype(np.float64)
        found = self.place(v)
        v = np.where(found == 0, 0.0, v)
        return np.where(found == self.places - 1, np.minimum(v, self.end), v)

    @property
    def end(self) -> float:
        """The least number above all octaves."""
        exponent, octaves, _ = _OCTAVES[self.kind][-1]
        return float(2.0 ** (exponent + octaves))


@cache
def layout(kind: str) -> Layout:
    """The bins of a kind of error."""
    places = 2 + sum(octaves << log_bins for _, octaves, log_bins in _OCTAVES[kind])
    return Layout(kind, places, places * (2 if kind == "errors" else 1))


def binned(
    kind: str, p: np.ndarray, q: np.ndarray, x: np.ndarray, foreground: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bin of every voxel, v as it is counted, and dv/dp, of ``hinge`` dv/dx.

    Args:
        p, q, x: the probability, 1 − p, and the logit.
        foreground: whether g > ½.
    """
    own = layout(kind)
    if kind == "hinge":
        v = np.maximum(1 - np.where(foreground, x, -x), 0)
        return own.place(v), own.counted(v), np.where(foreground, -1.0, 1.0)
    error, rest = np.where(foreground, q, p), np.where(foreground, p, q)
    # As float32, for which of the two is larger is asked of the numbers that are counted.
    large = error.astype(np.float32) > rest.astype(np.float32)
    v = np.where(large, rest, error)
    place = own.place(v)
    place = np.where(large, own.bins - 1 - place, place)
    return place, own.counted(v), np.where(foreground == large, 1.0, -1.0)
