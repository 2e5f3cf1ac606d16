"""Regions of wrong voxels, and what they cost by the map of a loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastloss.instances import components


class Cost(NamedTuple):
    """A connected region of voxels that are wrong in the same way."""

    sample: int
    channel: int | None
    """Of channels that may overlap; else None."""
    label: int
    """That of the reference; of a channel, whether it is there."""
    predicted: int
    voxels: int
    cost: float
    """The sum of the map."""
    peak: tuple[int, ...]
    """The voxel of the region with the largest number in the map."""
    box: tuple[slice, ...]
    """Where the region is."""


def costs(
    numbers: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    by_channel: bool,
    most: int,
) -> list[Cost]:
    """The regions that cost most, the dearest first.

    Args:
        numbers: the map, (B, \\*spatial), or ``by_channel`` (B, C, \\*spatial); one to three
            spatial axes.
        prediction, reference: the same of labels, or of masks. A voxel whose reference is negative
            counts for nothing.
        by_channel: whether there are channels, which may overlap.
        most: how many regions.
    """
    found: list[tuple[float, int, int]] = []
    maps = numbers.reshape(-1, *numbers.shape[1 + by_channel :])  # each of a sample and a channel
    ours, theirs = (each.reshape(maps.shape) for each in (prediction, reference))
    regions = []
    for i, (values, p, g) in enumerate(zip(maps, ours, theirs, strict=True)):
        wrong = (p != g) & (g >= 0)
        # A number for each pair of labels, as components are those of one number.
        pairs, numbered = np.unique(
            np.where(wrong, 1 + g.astype(np.int64) * (1 << 20) + p, 0), return_inverse=True
        )
        numbered = numbered.reshape(p.shape) + int(pairs[0] != 0)
        own = components(numbered[None].astype(np.int32)).numbers[0]
        regions.append(own)
        sums = np.bincount(own.ravel(), values.ravel())
        found += [(float(cost), i, k) for k, cost in enumerate(sums) if k]
    # Of equal ones the first; NaN is the dearest.
    found.sort(key=lambda each: (-np.inf if np.isnan(each[0]) else -each[0], each[1], each[2]))
    channels = numbers.shape[1] if by_channel else 1
    dearest = []
    for cost, i, k in found[:most]:
        places = np.flatnonzero(regions[i] == k)
        peak = int(places[maps[i].reshape(-1)[places].argmax()])
        along = np.unravel_index(places, maps[i].shape)
        dearest.append(
            Cost(
                sample=i // channels,
                channel=i % channels if by_channel else None,
                label=int(theirs[i].flat[peak]),
                predicted=int(ours[i].flat[peak]),
                voxels=len(places),
                cost=cost,
                peak=tuple(int(n) for n in np.unravel_index(peak, maps[i].shape)),
                box=tuple(slice(int(n.min()), int(n.max()) + 1) for n in along),
            )
        )
    return dearest
