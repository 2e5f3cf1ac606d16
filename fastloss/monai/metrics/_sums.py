"""Sums over the voxels of pairs of masks, each read once and in parts that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastloss.monai.metrics._parts import in_numpy, on_threads, parts

_FEW = 1 << 10
"""Voxels of a channel, below which all channels are one operation."""


class Side(NamedTuple):
    """The masks of a prediction or a reference."""

    tensor: Tensor
    """(B, C, *spatial); a label map has one channel."""
    labels: bool = False
    """Whether it is a label map, in which class c is the mask of channel c."""

    def row(self, b: int, c: int) -> Tensor:
        return self.tensor[b, 0 if self.labels else c].reshape(-1)


class Overlap(NamedTuple):
    """Sums over voxels for each sample and channel, (B, C) of float64."""

    both: Tensor
    """Prediction times reference."""
    predicted: Tensor
    reference: Tensor


def overlap(
    predicted: Side,
    reference: Side,
    channels: Sequence[int],
    mask: Tensor | None = None,
    *,
    binary: bool = False,
) -> Overlap:
    """The sums over the voxels of each channel.

    Args:
        predicted, reference: of masks, or of any numbers.
        channels: those to look at.
        mask: (B, 1, *spatial), which both are multiplied by.
        binary: any number but 0 in the prediction, or in the mask that it is multiplied by, is 1.
    """
    p, g = predicted.tensor, reference.tensor
    if not p.is_cpu or not g.is_cpu:
        found = list(_on_device(predicted, reference, channels, mask, binary))
    elif math.prod(p.shape[2:]) < _FEW and not predicted.labels and not reference.labels:
        return _few(p[:, list(channels)], g[:, list(channels)], mask, binary)
    else:
        found = _on_cpu(predicted, reference, channels, mask, binary)
    shape = (3, p.shape[0], len(channels))
    return Overlap(*torch.stack(found or [g.new_zeros(3)], 1).double().reshape(shape))


def _few(p: Tensor, g: Tensor, mask: Tensor | None, binary: bool) -> Overlap:
    p, g = _multiplied(p, g, mask, binary)
    p, g = (t.double().reshape(*t.shape[:2], -1) for t in (p, g))
    return Overlap((p * g).sum(2), p.sum(2), g.sum(2))


def _multiplied(p: Tensor, g: Tensor, mask: Tensor | None, binary: bool) -> tuple[Tensor, Tensor]:
    if binary:
        p = p != 0
    if mask is None:
        return p, g
    return p * (mask != 0 if binary else mask), g * mask


def _on_device(
    predicted: Side, reference: Side, channels: Sequence[int], mask: Tensor | None, binary: bool
) -> Iterator[Tensor]:
    for b in range(predicted.tensor.shape[0]):
        m = None if mask is None else mask[b].reshape(-1)
        for c in channels:
            p, g = predicted.row(b, c), reference.row(b, c)
            p, g = p == c if predicted.labels else p, g == c if reference.labels else g
            p, g = _multiplied(p, g, m, binary)
            wide = torch.float64 if torch.float64 in (p.dtype, g.dtype) else torch.float32
            p, g = p.to(wide), g.to(wide)
            yield torch.stack([torch.dot(p, g), p.sum(), g.sum()])


def _on_cpu(
    predicted: Side, reference: Side, channels: Sequence[int], mask: Tensor | None, binary: bool
) -> list[Tensor]:
    def sums(place: tuple[int, int]) -> Tensor:
        b, c = place
        m = None if mask is None else in_numpy(mask[b].reshape(-1))
        p, g = in_numpy(predicted.row(b, c)), in_numpy(reference.row(b, c))
        found = np.zeros(3)
        for at in parts(len(p)):
            part_p = p[at] == c if predicted.labels else p[at]
            part_g = g[at] == c if reference.labels else g[at]
            found += _of_part(part_p, part_g, None if m is None else m[at], binary)
        return torch.from_numpy(found)

    places = [(b, c) for b in range(len(predicted.tensor)) for c in channels]
    return on_threads(sums, places, len(places) * predicted.tensor[:1, :1].numel())


def _of_part(
    p: np.ndarray, g: np.ndarray, m: np.ndarray | None, binary: bool
) -> tuple[float, float, float]:
    """Counts if all numbers are 0 or 1, and sums otherwise."""
    hard_p = p != 0 if binary else _hard(p)
    hard_g, hard_m = _hard(g), None if m is None else _hard(m)
    if hard_p is not None and hard_g is not None and (m is None or hard_m is not None):
        if hard_m is not None:
            hard_p, hard_g = hard_p & hard_m, hard_g & hard_m
        return tuple(map(np.count_nonzero, (hard_p & hard_g, hard_p, hard_g)))  # type: ignore[return-value]
    wide_p = (p if hard_p is None else hard_p).astype(np.float64)
    wide_g = g.astype(np.float64)
    if m is not None:
        wide_p *= m != 0 if binary else m
        wide_g *= m
    return float(wide_p @ wide_g), float(wide_p.sum()), float(wide_g.sum())


def _hard(numbers: np.ndarray) -> np.ndarray | None:
    """Where they are 1, if they are 0 elsewhere."""
    if numbers.dtype == np.bool_:
        return numbers
    ones: np.ndarray = numbers == 1
    return ones if np.count_nonzero(ones) == np.count_nonzero(numbers != 0) else None


def value_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of them is, and float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
