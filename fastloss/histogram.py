"""Histograms of errors, from which losses that rank voxels by their errors are computed.

Sorting all voxels by their errors is replaced by counting them in bins. Counts and sums per bin
add over tiles, threads, chunks of a volume and ranks, as other sums do.

A bin holds the numbers whose float32 bits agree but for the last ones: it is a fixed share of an
octave wide, so that small errors are told apart as well as large ones. Two kinds of error are
counted:

``errors``  e = |g − p| in [0, 1], by e itself up to ½ and by 1 − e above: bins are narrow near 1,
            where the few voxels lie that a rare class is ranked by, and near ½, where a network
            begins.
``hinge``   h = 1 − x of the foreground, 1 + x of the background, where x is the logit, up to 0 as
            0: bins are narrow near 1, where a network begins, and for the large ones.

The number that a bin is found by is called v. In both, a voxel is foreground where g > ½. Bins are
in the order of their errors. This module is mirrored by `csrc/errors.h`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

HISTOGRAMS = ("errors", "hinge")

Octaves = tuple[tuple[int, int, int], ...]
"""The exponent of 2 at which octaves begin, how many there are, and log2 of the bins of each."""
_SMALL: Octaves = ((-24, 16, 6), (-8, 6, 8), (-2, 1, 11))
_LARGE: Octaves = ((-24, 11, 7), (-13, 11, 10), (-2, 1, 11))
_HINGE: Octaves = ((-12, 10, 6), (-2, 1, 8), (-1, 3, 11), (2, 2, 12), (4, 1, 10), (5, 11, 7))
_MANTISSA = 23
_BIAS = 127


class Layout(NamedTuple):
    """The bins of one kind of error.

    Attributes:
        kind: one of `HISTOGRAMS`.
        octaves: those by e, or h. Below them is one bin more, and above them another.
        mirrored: those by 1 − e, in falling order, likewise.
    """

    kind: str
    octaves: Octaves
    mirrored: Octaves = ()

    @property
    def places(self) -> int:
        """The number of bins by e, or h."""
        return _places(self.octaves)

    @property
    def bins(self) -> int:
        """The number of all bins."""
        return self.places + (_places(self.mirrored) if self.mirrored else 0)

    @property
    def slots(self) -> int:
        """The sums of a histogram: for either of background and foreground the number of voxels of
        every bin, and then likewise Σ v."""
        return 4 * self.bins


_LAYOUTS = {
    "errors": Layout("errors", _SMALL, _LARGE),
    "hinge": Layout("hinge", _HINGE),
}


def layout(kind: str) -> Layout:
    """The bins of a kind of error."""
    return _LAYOUTS[kind]


@cache
def _places(octaves: Octaves) -> int:
    return 2 + sum(count << log_bins for _, count, log_bins in octaves)


def _placed(octaves: Octaves, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of v among these, and v as it is counted: 0 below the octaves, their end above."""
    exponent, count, _ = octaves[-1]
    v = np.minimum(np.asarray(v, np.float32), np.float32(2.0 ** (exponent + count)))
    bits = v.view(np.int32).astype(np.int64)
    place = np.zeros(bits.shape, np.int64)
    first = 1
    for exponent, count, log_bins in octaves:
        start = (exponent + _BIAS) << _MANTISSA
        own = first + ((bits - start) >> (_MANTISSA - log_bins))
        place = np.where(bits >= start, own, place)
        first += count << log_bins
    return np.minimum(place, first), np.where(place == 0, 0.0, v.astype(np.float64))


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
        h = np.maximum(1 - np.where(foreground, x, -x), 0)
        return *_placed(own.octaves, h), np.where(foreground, -1.0, 1.0)
    error, rest = np.where(foreground, q, p), np.where(foreground, p, q)
    # As float32, for which of the two is larger is asked of the numbers that are counted.
    large = error.astype(np.float32) > rest.astype(np.float32)
    small_place, small = _placed(own.octaves, error)
    large_place, distance = _placed(own.mirrored, rest)
    place = np.where(large, own.bins - 1 - large_place, small_place)
    return place, np.where(large, distance, small), np.where(foreground == large, 1.0, -1.0)
