"""Merges the spatial axes of several arrays into as few as their strides allow."""

from __future__ import annotations

from collections.abc import Sequence


def merge_axes(
    spatial: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Sort the axes by the strides of the first array, and merge those that are contiguous.

    Args:
        spatial: the length of every axis.
        strides: per array, its step along every axis.

    Returns:
        Per array, the offset of the first voxel; and the axes, slowest first, at least one: their
        length and the step of every array.
    """
    offsets = [0] * len(strides)
    axes = [(n, [s[i] for s in strides]) for i, n in enumerate(spatial) if n != 1]
    # The order of voxels does not matter for sums.
    for i, (n, steps) in enumerate(axes):
        if steps[0] < 0:
            offsets = [o + s * (n - 1) for o, s in zip(offsets, steps, strict=True)]
            axes[i] = (n, [-s for s in steps])
    axes.sort(key=lambda axis: -axis[1][0])
    merged: list[tuple[int, list[int]]] = []
    for n, steps in axes:
        if merged and all(s == n * t for s, t in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * n, steps)
        else:
            merged.append((n, steps))
    return offsets, merged or [(1, [0] * len(strides))]
