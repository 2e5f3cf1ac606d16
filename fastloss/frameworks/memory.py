"""Large new arrays from the start of a huge page, of one allocator for all frameworks.

Pages of 4 KiB are made one by one when memory is first written, which for a gradient can take
longer than to compute it. NumPy asks the system for huge pages where it has them; they can only
lie where one starts.
"""

from __future__ import annotations

import numpy as np

LEAST = 1 << 25
"""Bytes from which allocators commonly take memory from the system each time, and give it back."""
_PAGE = 1 << 21


def large(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that start where a huge page can."""
    memory = np.empty(nbytes + _PAGE, np.uint8)
    before = -memory.ctypes.data % _PAGE
    return memory[before : before + nbytes]


def empty_like(array: np.ndarray) -> np.ndarray:
    """As `numpy.empty_like`; a large one starts where a huge page can."""
    if array.nbytes < LEAST:
        return np.empty_like(array, subok=False)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    memory = large(array.nbytes).view(array.dtype)
    return memory.reshape([array.shape[axis] for axis in order]).transpose(np.argsort(order))
