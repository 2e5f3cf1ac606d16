"""Exact Euclidean distance transforms on a GPU: queued on the current stream, nothing synchronises.

Arrays are passed as `Borrowed` views, with their `Place`. Results are arrays of that framework, in
C order, unless an output is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, inf, ldexp, prod
from typing import Any

import numpy as np

from fastloss.backends.cuda.backend import CudaBackend
from fastloss.backends.cuda.copies import copy_back
from fastloss.backends.cuda.device import Device
from fastloss.backends.cuda.indices import Indices, address_of, readable
from fastloss.backends.cuda.source import source
from fastloss.borrowed import Borrowed

# Mirrors `struct DistanceCall` in csrc/cuda/distance.cu.
DISTANCE_CALL = np.dtype(
    [
        ("classes", np.int64),
        ("from", np.int64),
        ("to", np.int64),
        ("of_map", np.int64),
        ("of_plane", np.int64),
        ("maps", np.int64),
        ("first", np.int64),
        ("count", np.int64),
        ("per_volume", np.int64),
        ("shape", np.int64, 3),
        ("length", np.int64),
        ("step", np.int64),
        ("boxes", np.int64),
        ("blocks", np.int64),
        ("item", np.int32),
        ("any", np.int32),
        ("lanes", np.int32),
        ("last", np.int32),
        ("convention", np.int32),
        ("half", np.int32),
        ("square", np.float32),
        ("limit_square", np.float32),
        ("scale", np.float32),
        ("limit", np.float32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", DISTANCE_CALL.itemsize))
KERNELS = tuple(f"fastloss_distance_{name}" for name in ("begin", "rows", "lines"))

# In the order of `enum Convention` in csrc/cuda/distance.cu; the first is a plain transform's.
_CONVENTIONS = ("inside", "kervadec", "exact", "unsigned")
_LANES, _THREADS, _GRID = 32, 256, 2**31 - 1
_BLOCKS = 4096
_TOGETHER = 1 << 24
"""Voxels of the maps of one launch: enough to fill a GPU, and scratch memory of 64 MiB or so."""


def distance_transform(
    mask: Borrowed,
    batch_axes: int,
    spacing: Sequence[float],
    limit: float,
    out: Borrowed | None = None,
) -> Any:
    """The distance of every voxel to the nearest 0 of its volume, float32 in the mask's shape.

    Args:
        mask: (\\*batch, \\*spatial) on a device, of any number type, strides and alignment.
        spacing: of z, y and x; 1 along the axes that there are not.
        limit: what distances are clamped to; may be infinite.
        out: a float32 array of the mask's shape on the device, of any strides.

    Returns:
        A new array, or None with ``out``.

    Raises:
        ValueError: an array of more than 18 axes without an even step between them.
    """
    shape = mask.array.shape
    return _distances(
        mask, "mask", 0, prod(shape[:batch_axes]), shape[batch_axes:], spacing, "inside", limit,
        shape, "float32", out,
    )  # fmt: skip


def signed_distance(
    labels: Borrowed,
    classes: int,
    spacing: Sequence[float],
    convention: str,
    limit: float,
    dtype: str,
    out: Borrowed | None = None,
) -> Any:
    """Distances to the boundary of every class, with a sign: (B, C, \\*spatial).

    Args:
        labels: (B, \\*spatial) on a device. Those that are outside [0, classes) or have a fraction
            are of no class.
        convention: one of `fastloss.backends.distances.CONVENTIONS`.
        dtype: "float32" or "float16".
        spacing, limit, out: as in `distance_transform`.
    """
    batch, *spatial = labels.array.shape
    shape = (batch, classes, *spatial)
    return _distances(
        labels, "labels", classes, batch, spatial, spacing, convention, limit, shape, dtype, out
    )


def signed_of_masks(
    masks: Borrowed,
    spacing: Sequence[float],
    convention: str,
    limit: float,
    dtype: str,
    out: Borrowed | None = None,
) -> Any:
    """As `signed_distance`, of a mask for each class, (B, C, \\*spatial)."""
    shape = masks.array.shape
    return _distances(
        masks, "masks", 0, prod(shape[:2]), shape[2:], spacing, convention, limit, shape, dtype, out
    )


def _distances(
    array: Borrowed,
    name: str,
    classes: int,
    volumes: int,
    spatial: Sequence[int],
    spacing: Sequence[float],
    convention: str,
    limit: float,
    shape: tuple[int, ...],
    dtype: str,
    out: Borrowed | None,
) -> Any:
    """Write the maps of every volume: one for each class; one of what is not 0 for 0 classes."""
    place = array.place
    assert place is not None
    into = None if out is None else out.array
    made: Any = None
    if into is not None and into.flags.c_contiguous and not address_of(into) % into.itemsize:
        to = address_of(into)
    else:
        made = place.empty(shape, dtype)
        to = place.address(made)
    if prod(shape):
        device: Device = CudaBackend(place).device
        grid = (*(1,) * (3 - len(spatial)), *spatial)
        indices = readable(device, array, name, classes)
        _launch(
            device, indices, volumes, max(1, classes), grid, spacing, convention, limit, dtype, to
        )
        if into is not None and made is not None:
            copy_back(device, to, into)
    return made if out is None else None


def _launch(
    device: Device,
    indices: Indices,
    volumes: int,
    per_volume: int,
    grid: tuple[int, ...],
    spacing: Sequence[float],
    convention: str,
    limit: float,
    dtype: str,
    to: int,
) -> None:
    """Queue the passes: along x, then along y and z where these have more than one voxel."""
    nz, ny, nx = grid
    voxels, maps = prod(grid), volumes * per_volume
    together = min(maps, max(1, _TOGETHER // voxels))
    half = dtype == "float16"
    item = 2 if half else 4
    # Boxes, voxels along the axis, step. There is always one, to write the result.
    lines = [(nz, ny, nx)] * (ny > 1) + [(1, nz, ny * nx)] * (nz > 1) or [(1, 1, nx)]
    # The passes alternate between two places, of which a float32 result can be one.
    scratch = [device.empty(4 * voxels * together) for _ in range(len(lines) if half else 1)]
    by_plane = ny > 1 and nz > 1
    flags = maps * (1 + nz * by_plane)
    kinds = device.empty(4 * flags)

    squares, scale = _squares(grid, spacing)
    begin, rows, along = device.kernels(source("distance.cu"), KERNELS)
    call = np.zeros(1, DISTANCE_CALL)
    call["classes"], call["item"], call["any"] = indices.address, indices.item, indices.any
    call["of_map"], call["of_plane"] = kinds.address, by_plane and kinds.address + 4 * maps
    call["maps"], call["per_volume"], call["shape"] = maps, per_volume, grid
    call["convention"], call["half"] = _CONVENTIONS.index(convention), half
    most = float(np.finfo(np.float32).max)
    call["scale"] = min(scale, most)
    call["limit"] = limit if limit <= most else inf
    # A little more, as a distance at the limit needs no more care than one beyond it.
    beyond = (limit / scale) * (limit / scale) * (1 + 1e-6)
    call["limit_square"] = beyond if beyond <= most else inf

    _run(device, begin, call, min(_BLOCKS, -(-flags // _THREADS)), _THREADS)
    for first in range(0, maps, together):
        count = min(together, maps - first)
        own = to + first * voxels * item
        places = [m.address for m in scratch]
        if not half and len(lines) > 1:
            places.insert(0, own)
        call["first"], call["count"], call["last"] = first, count, 0
        call["to"], call["square"] = places[0], squares[2]
        warps = min(_THREADS // _LANES, _power(ny))
        call["blocks"] = count * nz * -(-ny // warps)
        _run(device, rows, call, int(call["blocks"][0]), warps * _LANES)
        for number, (boxes, length, step) in enumerate(lines):
            last = number == len(lines) - 1
            lanes = min(_LANES, _power(step))
            call["from"], call["to"] = places[number % 2], own if last else places[1]
            call["boxes"], call["length"], call["step"] = boxes, length, step
            call["lanes"], call["last"] = lanes, last
            call["square"] = squares[0] if boxes == 1 and nz > 1 else squares[1]
            tiles = -(-step // lanes) * -(-length // (_THREADS // lanes))
            call["blocks"] = count * boxes * tiles
            _run(device, along, call, int(call["blocks"][0]), _THREADS)


def _run(device: Device, kernel: Any, call: np.ndarray, blocks: int, threads: int) -> None:
    record = call.copy().view(_RECORD)
    device.launch(kernel, min(blocks, _GRID), (threads, 1), 0, record)


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << (n - 1).bit_length()


def _squares(grid: Sequence[int], spacing: Sequence[float]) -> tuple[list[float], float]:
    """Squares of the spacing in units of a power of two near the largest one, and this unit.

    Squares of distances then do not overflow in float32, and small whole ones are exact.
    """
    sizes = [size if n > 1 else 0.0 for n, size in zip(grid, spacing, strict=True)]
    scale = ldexp(1.0, frexp(max(sizes) or 1.0)[1] - 1)
    return [(size / scale) ** 2 for size in sizes], scale
