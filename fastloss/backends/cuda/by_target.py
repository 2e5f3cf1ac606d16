"""The gradient by a dense target on a GPU: a map, of coefficients that the combine step left there.

One pass writes it for all samples and regions. Nothing synchronises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastloss.backends.cuda.device import Device, Memory
from fastloss.backends.cuda.source import source
from fastloss.request import Request, make_request
from fastloss.sums import slopes_by_target

_MOST_PARTS = 96
# Mirrors `struct TargetCall` in csrc/cuda/by_target.cu.
TARGET_CALL = np.dtype(
    [
        ("from", np.int64),
        ("to", np.int64),
        ("each", np.int64),
        ("sums", np.int32),
        ("parts", np.int32),
        ("of", np.int32, _MOST_PARTS),
        ("is", np.int32, _MOST_PARTS),
        ("factor", np.float64, _MOST_PARTS),
    ],
    align=True,
)
_RECORD = np.dtype(("V", TARGET_CALL.itemsize))
KERNELS = ("fastloss_by_target",)
_THREADS, _BLOCKS = 256, 1024


class ByTarget(NamedTuple):
    """The sums whose summands are slopes by the target, and the derivatives by them."""

    request: Request
    memory: Memory
    """(S', rows, C) float64."""


def by_target(device: Device, request: Request, coefficients: int, each: int) -> ByTarget:
    """The sums by the target of a request, given derivatives (S, rows, C) in float64 at an address.

    Args:
        each: rows · C.

    Raises:
        ValueError: a sum has no derivative by the target, or there are too many sums.
    """
    slopes = [slopes_by_target(total) for total in request.sums]
    needs = frozenset(total for parts in slopes for _, total in parts)
    wanted = make_request(request.activation, True, request.ignore_index, needs)
    parts = [
        (s, wanted.index[total], factor) for s, own in enumerate(slopes) for factor, total in own
    ]
    if len(parts) > _MOST_PARTS:
        raise ValueError(
            f"target: on a GPU its gradient is that of at most {_MOST_PARTS} sums, got {len(parts)}"
        )
    size = len(wanted.sums) * each
    memory = device.empty(max(8, 8 * size))
    call = np.zeros(1, TARGET_CALL)
    call["from"], call["to"], call["each"] = coefficients, memory.address, each
    call["sums"], call["parts"] = len(wanted.sums), len(parts)
    for k, (s, place, factor) in enumerate(parts):
        call["of"][0, k], call["is"][0, k], call["factor"][0, k] = s, place, factor
    if size:
        (kernel,) = device.kernels(source("by_target.cu"), KERNELS)
        grid = min(_BLOCKS, -(-size // _THREADS))
        device.launch(kernel, grid, (_THREADS, 1), 0, call.view(_RECORD))
    return ByTarget(wanted, memory)
