"""Options of a loss in JAX that `fastloss.Loss` has not: data over several devices, and memory.

A loss itself, ``loss(logits, target)``, is differentiable in JAX: see `fastloss.Loss`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import jax

from fastloss.borrowed import Extras
from fastloss.frameworks.jax import sharded
from fastloss.frameworks.jax.adapter import ADAPTER
from fastloss.loss import Loss, Term
from fastloss.options import check_choice

__all__ = ["keep_memory", "value"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # of malloc.h


def value(
    loss: Loss | Term,
    logits: jax.Array,
    target: Any,
    voxel_weight: Any = None,
    *,
    fields: Any = None,
    regions: Any = None,
    region_count: int | None = None,
    axis_name: Any = None,
    shard: str = "batch",
    reuse_logits: bool = False,
) -> jax.Array:
    """As ``loss(logits, target, ...)``, in a function that JAX transforms.

    Args:
        loss: a `fastloss.Loss` or a term.
        logits, target, voxel_weight, fields, regions, region_count: as `fastloss.Loss` takes them.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the name of the axis (or the names) over
            which the data lies: the value is that of all of it, the same on every device. Sums
            over voxels are exchanged, no voxels. As with every loss that ends in `jax.lax.psum`,
            a `jax.grad` inside such a function, where JAX does not keep account of what differs
            (``check_vma=False``, `jax.pmap`), gives the gradient times the number of devices: take
            `jax.lax.pmean` of the gradients of the parameters, which is then their sum.
        shard: "batch": each device has other samples. "volume": each has parts of the same ones;
            fields that terms make of the target are to be given then, see `fastloss.Loss.fields`.
        reuse_logits: let the gradient take the memory of the logits, in a compiled program. XLA
            copies the logits first if they are needed later, for instance because they are an
            argument that is not donated.

    Returns:
        A scalar, float32 (float64 for float64 logits), or an array where a term has
        ``reduction="none"``: with ``axis_name`` of the samples of all devices.

    Raises:
        TypeError, ValueError: arrays that do not fit each other, options out of their range, and
            with ``axis_name`` a loss that is no function of sums: `fastloss.TopKCrossEntropy`.
    """
    check_choice("shard", shard, sharded.SHARDS)
    if not isinstance(loss, (Loss, Term)):
        raise TypeError(f"loss: expected a fastloss.Loss or a term, got {loss!r}")
    if not isinstance(logits, jax.Array):
        raise TypeError(f"logits: expected an array of JAX, got {type(logits).__name__}")
    extras = Extras.of(fields, regions, region_count)
    if axis_name is None:
        found = ADAPTER.value(
            loss, logits, target, voxel_weight, extras=extras, reuse_logits=reuse_logits
        )
    else:
        arrays = (logits, target, voxel_weight, extras)
        found = sharded.value(Loss(loss), *arrays, axis_name, shard, reuse_logits)
    result: jax.Array = found
    return result


def keep_memory() -> bool:
    """Let the process keep the memory of large arrays that are gone, for the next ones.

    XLA takes memory on the CPU from the C library, which hands large arrays back to the system at
    once. In every step of a training the system then makes their pages anew, which can take as long
    as the loss. After this call, once at the start of a program, glibc keeps up to 2 GiB that are
    free at the end of its heap. It concerns the whole process, whose resident memory stays nearer
    to its peak.

    Returns:
        Whether the C library can do it: glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    most = 2**31 - 1
    # Older versions refuse so high a threshold.
    from_heap = mallopt(_M_MMAP_THRESHOLD, most) or mallopt(_M_MMAP_MAX, 0)
    return bool(from_heap and mallopt(_M_TRIM_THRESHOLD, most) and mallopt(_M_TOP_PAD, 2**28))
