"""Large tensors in parts that fit the cache, on as many threads as the kernels take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastloss.backends import current_backend

PART = 1 << 16
"""Voxels."""
_MANY = 1 << 19
"""Numbers, from which on threads are worth their start."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def parts(voxels: int) -> list[slice]:
    return [slice(start, start + PART) for start in range(0, voxels, PART)]


def on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], numbers: int
) -> list[Result]:
    """The results for all items, which together read so many numbers."""
    threads = min(current_backend().get_num_threads(), len(items))
    if threads < 2 or numbers < _MANY:
        return [function(item) for item in items]
    # NumPy lets other threads run while it computes.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def in_numpy(row: Tensor) -> np.ndarray:
    """The numbers of a tensor in CPU memory; half types as float32."""
    if row.dtype in (torch.float16, torch.bfloat16):
        row = row.float()  # NumPy is slow with the one and lacks the other
    found: np.ndarray = row.as_subclass(Tensor).detach().numpy()
    return found
