"""Losses of volumes that do not fit into memory: Dask arrays of logits and labels.

Statistics of chunks add, so that a few chunks are in memory at a time. The logits are read twice
for a gradient, once for a value.

>>> import dask.array as da, numpy as np, fastloss as fl, fastloss.dask
>>> logits = da.zeros((1, 4, 16, 8, 8), chunks=(1, 4, 4, 8, 8))  # da.from_zarr("logits.zarr")
>>> labels = da.zeros((1, 16, 8, 8), chunks=(1, 4, 8, 8), dtype=np.uint8)
>>> print(round(float(fastloss.dask.value(fl.CrossEntropy(), logits, labels)), 4))
1.3863
>>> gradient = fastloss.dask.gradient(fl.CrossEntropy(), logits, labels)  # .to_zarr(...)
>>> gradient.shape
(1, 4, 16, 8, 8)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from fastloss.protocol import as_loss
from fastloss.statistics import Statistics

__all__ = ["gradient", "statistics", "value"]

_IN_TURN = 8  # how many tiny results are added in one task


def value(
    loss: Any, logits: Any, target: Any, voxel_weight: Any = None, *, fields: Any = None
) -> Any:
    """The value of a loss, computed now.

    Args:
        loss: a `fastloss.Loss` or a term whose statistics add (all but those that rank voxels).
        logits: a Dask array (B, C, \\*spatial). Chunks of several samples or all classes are made
            where it has others: a chunk holds the whole batch and all classes of a part of space.
        target: a Dask or NumPy array, (B, \\*spatial), (B, 1, \\*spatial) or (B, C, \\*spatial).
        voxel_weight: likewise, (B, \\*spatial).
        fields: such arrays by name, of losses that read fields.

    Raises:
        ValueError: arrays that do not fit; labels outside [0, C).
        TypeError: logits that are no Dask array; a loss whose statistics do not add.
    """
    whole: Any = as_loss(loss)
    return whole.value(_total(whole, logits, target, voxel_weight, fields))


def statistics(
    loss: Any, logits: Any, target: Any, voxel_weight: Any = None, *, fields: Any = None
) -> Statistics:
    """The statistics of the whole volume, computed now. Arguments as in `value`."""
    return _total(as_loss(loss), logits, target, voxel_weight, fields)


def _total(loss: Any, logits: Any, target: Any, voxel_weight: Any, fields: Any) -> Statistics:
    from dask.delayed import delayed

    arrays, names = _aligned(logits, target, voxel_weight, fields)
    blocks = [_flat(array) for array in arrays]
    count = partial(_statistics, loss, names)
    parts = [delayed(count, pure=False)(*each) for each in zip(*blocks, strict=True)]
    while len(parts) > 1:
        groups = (parts[i : i + _IN_TURN] for i in range(0, len(parts), _IN_TURN))
        parts = [delayed(sum, pure=False)(group) for group in groups]
    found: Statistics = parts[0].compute()
    return found


def gradient(
    loss: Any,
    logits: Any,
    target: Any,
    voxel_weight: Any = None,
    *,
    fields: Any = None,
    statistics: Statistics | None = None,
    upstream: float | None = None,
) -> Any:
    """The gradient by the logits, a Dask array of their shape, dtype and chunks that is made later.

    Args:
        statistics: those of the volume; computed now if not given.
        upstream: the gradient of what follows by the loss; 1 by default.
        others: as in `value`.
    """
    import dask.array as da

    whole: Any = as_loss(loss)
    if statistics is None:
        statistics = _total(whole, logits, target, voxel_weight, fields)
    arrays, names = _aligned(logits, target, voxel_weight, fields)
    axes = [_axes(array, arrays[0].ndim) for array in arrays]
    return da.blockwise(
        partial(_gradient, whole, names, statistics, upstream),
        axes[0],
        *chain.from_iterable(zip(arrays, axes, strict=True)),
        dtype=arrays[0].dtype,
        concatenate=True,
        meta=np.empty((0,) * arrays[0].ndim, arrays[0].dtype),
    )


def _statistics(loss: Any, names: tuple[str, ...], *blocks: Any) -> Statistics:
    logits, target, weight, fields = _call(names, blocks)
    found: Statistics = loss.statistics(logits, target, weight, fields=fields)
    return found


def _gradient(
    loss: Any,
    names: tuple[str, ...],
    statistics: Statistics,
    upstream: float | None,
    *blocks: Any,
) -> Any:
    logits, target, weight, fields = _call(names, blocks)
    return loss.gradient(
        logits, target, weight, fields=fields, statistics=statistics, upstream=upstream
    )


def _call(names: tuple[str, ...], blocks: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """Logits, target, voxel weight and fields of a chunk."""
    given = dict(zip(names, blocks, strict=True))
    fields = {name[6:]: block for name, block in given.items() if name.startswith("field ")}
    return given["logits"], given["target"], given.get("voxel_weight"), fields or None


def _aligned(
    logits: Any, target: Any, voxel_weight: Any, fields: Any
) -> tuple[list[Any], tuple[str, ...]]:
    """The arrays in chunks that lie together, and the argument that each is."""
    import dask.array as da

    if not isinstance(logits, da.Array):
        raise TypeError(f"logits: expected a Dask array, got {type(logits).__name__}")
    if logits.ndim < 3:
        raise ValueError(f"logits: expected shape (B, C, *spatial), got {logits.shape}")
    if any(len(chunks) > 1 for chunks in logits.chunks[:2]):
        whole = dict.fromkeys(range(2), -1)
        logits = logits.rechunk({**whole, **dict.fromkeys(range(2, logits.ndim), "auto")})
    given = {"logits": logits, "target": target}
    if voxel_weight is not None:
        given["voxel_weight"] = voxel_weight
    if fields is not None:
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: expected arrays by name, got {type(fields).__name__}")
        given |= {f"field {name}": array for name, array in fields.items()}
    found = []
    for name, array in given.items():
        shape, spatial = tuple(array.shape), logits.shape[2:]
        leading = shape[: len(shape) - len(spatial)]
        if shape[len(leading) :] != spatial or len(leading) not in (1, 2):
            shown = name.replace("field ", "fields: ")
            raise ValueError(
                f"{shown}: expected spatial axes {spatial} behind those of batch and classes, got "
                f"shape {shape}"
            )
        chunks = (*((n,) for n in leading), *logits.chunks[2:])
        if isinstance(array, da.Array):
            found.append(array.rechunk(chunks))
        else:
            found.append(da.from_array(array, chunks=chunks))
    return found, tuple(given)


def _flat(array: Any) -> list[Any]:
    """The chunks as delayed arrays, in the order of space."""
    return list(array.to_delayed().ravel())


def _axes(array: Any, ndim: int) -> tuple[str, ...]:
    """Names of axes for `dask.array.blockwise`; equal ones are those of the logits."""
    spatial = tuple(f"axis {i}" for i in range(2, ndim))
    if array.ndim < ndim:
        return ("axis 0", *spatial)
    return ("axis 0", "axis 1" if array.shape[1] > 1 else "channel", *spatial)
