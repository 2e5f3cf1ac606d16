"""Histograms of errors on a GPU: their memory, and the steps around the pass that counts."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends.cuda.device import Device, Memory
from fastloss.backends.cuda.source import source
from fastloss.histogram import HISTOGRAMS, layout
from fastloss.request import Request

# Mirrors `struct HistogramCall` in csrc/cuda/histograms.cu.
HISTOGRAM_CALL = np.dtype(
    [
        ("tallies", np.int64),
        ("sums", np.int64),
        ("words", np.int64),
        ("words_of_part", np.int64),
        ("first", np.int64),
        ("parts", np.int32),
        ("kind", np.int32),
        ("each", np.int32),
        ("weighted", np.int32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", HISTOGRAM_CALL.itemsize))
KERNELS = ("fastloss_histogram_clear", "fastloss_histogram_finish")
_THREADS, _BLOCKS = 256, 2048
PART_BITS = 23
"""A word of a tally counts at most 2^23 voxels, see csrc/errors.h: these are a part of a sample."""


class Tallies(NamedTuple):
    """The tallies of a call: (parts, places of every kind, B, C) entries of one word or, with
    voxel weights, two; and one word behind them for the largest voxel weight."""

    memory: Memory
    parts: int
    words_of_part: int
    weighted: bool

    @property
    def words(self) -> int:
        return self.parts * self.words_of_part

    @property
    def largest_weight(self) -> int:
        """Its address."""
        return self.memory.address + 8 * self.words


def kinds_of(request: Request) -> int:
    """The kinds of error that are counted, as bits."""
    return sum(1 << HISTOGRAMS.index(kind) for kind in request.histograms)


def begin(device: Device, request: Request, arrays: Arrays) -> Tallies:
    """Tallies of 0."""
    (batch, classes), voxels = arrays.logits.shape[:2], prod(arrays.logits.shape[2:])
    weighted = arrays.voxel_weight is not None
    places = sum(2 * layout(kind).bins for kind in request.histograms)
    parts = max(1, -(-voxels >> PART_BITS))
    words = places * batch * classes * (1 + weighted)
    tallies = Tallies(device.empty(8 * (parts * words + 1)), parts, words, weighted)
    call = _call(tallies)
    clear, _ = device.kernels(source("histograms.cu"), KERNELS)
    device.launch(clear, _grid(tallies.words + 1), (_THREADS, 1), 0, call.view(_RECORD))
    return tallies


def finish(device: Device, request: Request, arrays: Arrays, tallies: Tallies, sums: int) -> None:
    """Write the sums of all histograms, (4 · bins, B, C) each, to an address."""
    each = prod(arrays.logits.shape[:2])
    _, add = device.kernels(source("histograms.cu"), KERNELS)
    first = 0
    for kind in request.histograms:
        bins = layout(kind).bins
        call = _call(tallies)
        call["kind"], call["each"], call["first"] = HISTOGRAMS.index(kind), each, first
        call["sums"] = sums
        device.launch(add, _grid(2 * bins * each), (_THREADS, 1), 0, call.view(_RECORD))
        first += 2 * bins * each * (1 + tallies.weighted)
        sums += 8 * 4 * bins * each


def _call(tallies: Tallies) -> np.ndarray:
    call = np.zeros(1, HISTOGRAM_CALL)
    call["tallies"], call["words"] = tallies.memory.address, tallies.words
    call["words_of_part"], call["parts"] = tallies.words_of_part, tallies.parts
    call["weighted"] = tallies.weighted
    return call


def _grid(count: int) -> int:
    return max(1, min(_BLOCKS, -(-count // _THREADS)))
