"""Fields on a GPU: powers of distances, and boundary voxels. Nothing synchronises."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from fastloss.backends.cuda.backend import CudaBackend
from fastloss.backends.cuda.indices import (
    AXES,
    THREADS,
    address_of,
    blocks_for,
    is_aligned,
    merged,
    readable,
    type_of,
)
from fastloss.backends.cuda.source import source
from fastloss.borrowed import Borrowed

# Mirrors `struct PowerCall` in csrc/cuda/powers.cu.
POWER_CALL = np.dtype(
    [
        ("from", np.int64, 2),
        ("to", np.int64),
        ("count", np.int64),
        ("shape", np.int64, AXES),
        ("stride", np.int64, (3, AXES)),
        ("exponent", np.float32),
        ("axes", np.int32),
        ("type", np.int32, 2),
        ("aligned", np.int32, 2),
        ("half", np.int32),
    ],
    align=True,
)
_POWER_RECORD = np.dtype(("V", POWER_CALL.itemsize))
POWER_KERNELS = ("fastloss_powers",)

# Mirrors `struct BoundaryCall` in csrc/cuda/boundary_voxels.cu.
BOUNDARY_CALL = np.dtype(
    [
        ("classes", np.int64),
        ("to", np.int64),
        ("count", np.int64),
        ("shape", np.int64, AXES),
        ("axes", np.int32),
        ("item", np.int32),
        ("masks", np.int32),
    ],
    align=True,
)
_BOUNDARY_RECORD = np.dtype(("V", BOUNDARY_CALL.itemsize))
BOUNDARY_KERNELS = ("fastloss_boundary_voxels",)


def powers(
    exponent: float, arrays: Sequence[Borrowed], dtype: str = "float32", out: Any = None
) -> Any:
    """x^e of an array, or x^e + y^e of two of one shape, computed in float32; in C order.

    Args:
        arrays: on one device, of any number type, strides and alignment.
        dtype: "float32", or "float16", in which the largest numbers stand for all beyond.
        out: an array of the framework that takes the result in C order; one of ``arrays``, or new.
    """
    first = arrays[0]
    place, shape = first.place, first.array.shape
    assert place is not None
    made = place.empty(shape, dtype) if out is None else out
    if not prod(shape):
        return made
    item = 2 if dtype == "float16" else 4
    strides = [b.array.strides for b in arrays]
    strides += [first.array.strides] * (2 - len(strides))
    to = [item * prod(shape[axis + 1 :]) for axis in range(len(shape))]
    offsets, axes = merged("fields", shape, [*strides, to])
    call = np.zeros(1, POWER_CALL)
    for k, borrowed in enumerate(arrays):
        call["from"][0, k] = address_of(borrowed.array) + offsets[k]
        call["type"][0, k], call["aligned"][0, k] = type_of(borrowed), is_aligned(borrowed.array)
    call["to"] = place.address(made) + offsets[2]
    call["count"], call["axes"] = prod(shape), len(axes)
    call["shape"][0, : len(axes)] = [n for n, _ in axes]
    for k in range(3):
        call["stride"][0, k, : len(axes)] = [by[k] for _, by in axes]
    call["exponent"], call["half"] = exponent, dtype == "float16"
    device = CudaBackend(place).device
    (kernel,) = device.kernels(source("powers.cu"), POWER_KERNELS)
    device.launch(kernel, blocks_for(call), (THREADS, 1), 0, call.view(_POWER_RECORD))
    return made


def boundary_voxels(classes: Borrowed, masks: bool) -> Any:
    """Where a voxel shares a face with one of another class, or lies at the edge of the array.

    Args:
        classes: class indices (B, *spatial) of uint8 or uint16; with ``masks`` one mask for each
            class, (B, C, *spatial), and the boundary voxels are those within it.

    Returns:
        A new array of bool in the shape of ``classes``.

    Raises:
        ValueError: more than 18 spatial axes.
    """
    place, shape = classes.place, classes.array.shape
    assert place is not None
    spatial = shape[1 + masks :]
    if len(spatial) > AXES:
        raise ValueError(f"target: at most {AXES} spatial axes on a GPU, got {len(spatial)}")
    made = place.empty(shape, "bool")
    if not prod(shape):
        return made
    device = CudaBackend(place).device
    indices = readable(device, classes, "target", 0)
    call = np.zeros(1, BOUNDARY_CALL)
    call["classes"], call["item"] = indices.address, indices.item
    call["to"], call["count"] = place.address(made), prod(shape)
    call["axes"], call["masks"] = len(spatial), masks
    call["shape"][0, : len(spatial)] = spatial
    (kernel,) = device.kernels(source("boundary_voxels.cu"), BOUNDARY_KERNELS)
    device.launch(kernel, blocks_for(call), (THREADS, 1), 0, call.view(_BOUNDARY_RECORD))
    return made
