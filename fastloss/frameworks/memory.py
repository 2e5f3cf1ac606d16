"""Memory of large new arrays, for all frameworks: on huge pages, and kept for the next one.

A system hands out memory in pages that it makes when they are first written. For a gradient that
can take as long as to compute it, and in training there is one of the same size in every step,
while allocators give memory of this size back at once. Here it is kept, marked as free: the system
takes it when it needs it, and else nothing has to be made again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

LEAST = 1 << 23
"""Bytes from which allocators commonly take memory from the system and give it back."""
_PAGE = 1 << 21
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_FREE = getattr(mmap, "MADV_FREE", None)
_kept: deque[_Region] = deque(maxlen=4)
"""Memory of arrays that are gone, the latest last."""


class _Region:
    """Memory of the system that starts where a huge page can."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, nbytes + _PAGE, flags=flags)
        if _HUGE is not None:
            self._advise(_HUGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = -(-start // _PAGE) * _PAGE

    def free(self) -> bool:
        """Let the system take it, as what is in it is needed no more; false where it refuses."""
        return self._advise(_FREE)

    def _advise(self, advice: Any) -> bool:
        try:
            self.memory.madvise(advice)
        except OSError:
            return False
        return True


class _Loan:
    """A region while an array lies in it."""

    def __init__(self, region: _Region) -> None:
        self._region = region
        self.__array_interface__ = {
            "data": (region.address, False),
            "shape": (region.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(
        self,
        kept: deque[_Region] = _kept,
        is_finalizing: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        if not is_finalizing() and self._region.free():
            kept.append(self._region)


def large(nbytes: int) -> np.ndarray:
    """Uninitialised bytes that start where a huge page can."""
    if _FREE is None:  # nothing to mark memory by
        return np.empty(nbytes, np.uint8)
    return np.asarray(_Loan(_region(-(-nbytes // _PAGE) * _PAGE)))[:nbytes]


def _region(nbytes: int) -> _Region:
    """A kept one of this size, else a new one."""
    with suppress(IndexError):  # where another thread takes the last
        for _ in range(len(_kept)):
            region = _kept.pop()
            if region.nbytes == nbytes:
                return region
            _kept.appendleft(region)
    with suppress(OSError):
        return _Region(nbytes)
    forget()  # it counts where a process may have only so much
    try:
        return _Region(nbytes)
    except OSError as error:
        raise MemoryError(f"no {nbytes} bytes for a new array: {error}") from error


def forget() -> None:
    """Give back what is kept."""
    _kept.clear()


def empty_like(array: np.ndarray) -> np.ndarray:
    """As `numpy.empty_like`; a large one as all large ones."""
    if array.nbytes < LEAST:
        return np.empty_like(array, subok=False)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    memory = large(array.nbytes).view(array.dtype)
    shape = [array.shape[axis] for axis in order]
    new: np.ndarray = memory.reshape(shape).transpose(np.argsort(order))
    return new


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As `numpy.empty`, in C order; a large one as all large ones."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST:
        return np.empty(shape, dtype)
    new: np.ndarray = large(nbytes).view(dtype).reshape(shape)
    return new


def huge_pages(address: int, nbytes: int) -> None:
    """Let the system make memory that is not written yet of huge pages, where they fit in it."""
    if _HUGE is None or _madvise is None:
        return
    start = -(-address // _PAGE) * _PAGE
    size = (address + nbytes - start) // _PAGE * _PAGE
    if size > 0:
        _madvise(start, size, _HUGE)


def _find_madvise() -> Any:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()
