"""Large new arrays on huge pages, where the system has them on request."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np

_PAGE = 1 << 21
_LEAST = 1 << 22
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def advise_huge_pages(array: np.ndarray) -> None:
    """Ask for huge pages under an array that nothing was written to yet, as NumPy does for its own.

    Pages of 4 KiB are made one by one when the gradient is first written, which can take as long
    as the gradient. The array's memory must lie in one piece.
    """
    if array.nbytes < _LEAST or _ADVICE is None:
        return
    address = array.__array_interface__["data"][0]
    first = -(-address // _PAGE) * _PAGE
    length = (address + array.nbytes - first) // _PAGE * _PAGE
    if length > 0:
        _madvise()(first, length, _ADVICE)  # a wish: it does not matter if it is refused


@cache
def _madvise() -> Any:
    assert sys.platform == "linux"
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
