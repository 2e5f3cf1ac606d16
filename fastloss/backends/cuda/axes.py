"""The spatial axes of several arrays at once, with as few of them as their strides allow."""

from __future__ import annotations

from collections.abc import Sequence


def merge_axes(
    spatial: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Axes in an order that goes upwards through the first array, as one where there is no gap.

    Args:
        spatial: the length of every axis.
        strides: per array, its step along every axis.

    Returns:
        Per array, where the first voxel lies; and the axes, slowest first, at least one: their
        length and the step of every array.
    """
    offsets = [0] * len(strides)
    axes = [(n, [s[i] for s in strides]) for i, n in enumerate(spatial) if n != 1]
    # Sums do not mind the order.
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
