"""Overlaps of a soft skeleton with another volume, weighed by the radius of the skeleton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = 1e-7


class Side(NamedTuple):
    """One of two volumes that are compared, (B, 1, *spatial) each, 0 outside of the volume.

    Distances to its surface are divided by the largest of its skeleton in the sample.
    """

    depth: Tensor
    """The distance, at most 1, times the volume."""
    radius: Tensor
    """The distance on the skeleton, times the volume; 0 elsewhere."""
    line: Tensor
    """The skeleton, divided by the distance, in 3D by its square."""


def side(volume: Tensor, skeleton: Tensor, distance: Tensor) -> Side:
    """A volume, its soft skeleton, and the distances within it, which are constants.

    Args:
        volume: probabilities or a mask, (B, 1, *spatial) with 2 or 3 spatial axes.
        skeleton: as `soft_skeleton` finds it; above ½ it is the line that has a radius.
        distance: of the voxels above ½ to the nearest other one, 0 elsewhere.
    """
    on_line = skeleton > 0.5
    radius = torch.where(on_line, distance, 0.0)
    largest = radius.flatten(1).amax(1).clamp(min=1.0).reshape(-1, *[1] * (volume.ndim - 1))
    radius = radius / largest
    depth = torch.minimum(distance, largest) / largest
    thinness = (1.0 + _EPSILON) / (radius ** (volume.ndim - 3) + _EPSILON)
    return Side(depth * volume, radius * volume, torch.where(on_line, thinness, 0.0) * skeleton)


def share_within(one: Side, other: Side, smooth: float) -> Tensor:
    """How much of the skeleton of one side lies within the other, over all samples."""
    alone = (one.radius != 0) & (other.radius == 0)
    radius = torch.where(alone, one.radius, other.radius)
    return ((one.line * other.depth).sum() + smooth) / ((one.line * radius).sum() + smooth)
