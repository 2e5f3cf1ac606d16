"""The inputs of the benchmark: sizes, dtypes and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastloss.bench.inputs import Spec

SIZES: dict[str, tuple[int, int, int]] = {
    "B2C2-128": (2, 2, 128),
    "B2C4-128": (2, 4, 128),
    "B2C14-128": (2, 14, 128),
    "B2C105-128": (2, 105, 128),
    "B1C14-256": (1, 14, 256),
}
"""Batch, classes and edge of the volume."""
DTYPES = ("float32", "float16", "bfloat16")
MAIN = "B2C14-128"
"""The size for int64 labels, and for compiled peers in every dtype and layout."""
TINY = 32
"""The edge of volumes that compile the same kernels as the measured ones."""


def spec_of(size: str, device: str, edge: int | None = None, **options: str) -> Spec:
    """One input of this size, or of its batch and classes with another edge."""
    batch, classes, own = SIZES[size]
    edges = (edge or own,) * 3
    return Spec("phantom", (batch, classes, *edges), device=device, **options)


def all_specs(
    sizes: Sequence[str], dtypes: Sequence[str], device: str, smoke: bool = False
) -> list[Spec]:
    """Every input of these sizes, contiguous before channels-last."""
    specs = []
    for size in sizes:
        edge = max(8, SIZES[size][2] // 16) if smoke else SIZES[size][2]
        specs += [
            spec_of(size, device, edge, dtype=dtype, layout=layout)
            for layout in ("contiguous", "channels_last")
            for dtype in dtypes
        ]
        if size == MAIN:
            specs.append(spec_of(size, device, edge, target="int64"))
    return specs


def tiny(spec: Spec) -> Spec:
    """The same input on few voxels."""
    return replace(spec, shape=(*spec.shape[:2], *(TINY,) * 3))


def is_plain(spec: Spec) -> bool:
    return (spec.dtype, spec.layout, spec.target) == ("float32", "contiguous", "uint8")


def is_main(spec: Spec) -> bool:
    return spec.shape[:2] == SIZES[MAIN][:2]
