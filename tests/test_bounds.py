"""No memory before or after the arrays is accessed: they border on protected pages."""

from __future__ import annotations

import sys

import pytest
from support import run_python

SCRIPT = """
import ctypes
import numpy as np, fastloss as fl

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = 4096
mapped = []

def guarded(array, at_end):
    size = -(-array.nbytes // PAGE) * PAGE
    base = libc.mmap(None, size + 2 * PAGE, 3, 0x22, -1, 0)  # private, of no file
    for forbidden in (base, base + PAGE + size):
        assert libc.mprotect(forbidden, PAGE, 0) == 0
    mapped.append((base, size + 2 * PAGE))
    start = base + PAGE + (size - array.nbytes if at_end else 0)
    memory = (ctypes.c_char * array.nbytes).from_address(start)
    copy = np.ndarray(array.shape, array.dtype, memory)
    copy[...] = array
    return copy

rng, count = np.random.default_rng(0), 0
for activation in ("softmax", "sigmoid", "none"):
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), activation=activation, ignore_index=255)
    for dtype in ("f4", "f2"):
        for classes in (1, 2, 3, 8, 17):
            for voxels in (1, 7, 17, 255, 257, 519):
                x = rng.uniform(0.1, 0.9, (1, classes, voxels)).astype(dtype)
                labels = rng.integers(0, classes, (1, voxels)).astype("u1")
                dense = (rng.uniform(size=x.shape) < 0.5).astype("f4")
                for y in (labels, dense if classes > 1 else labels):
                    w = rng.uniform(size=labels.shape).astype("f4") if count % 3 == 0 else None
                    at_end = count % 4 < 2
                    given = guarded(x, at_end)
                    if count % 5 == 0:
                        last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
                        given = np.moveaxis(guarded(last, at_end), -1, 1)
                    w = None if w is None else guarded(w, at_end)
                    loss.value_and_grad(given, guarded(y, at_end), w, out=guarded(x, at_end))
                    count += 1
                    while mapped:
                        libc.munmap(*mapped.pop())
print(count)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mmap's numbers are Linux's")
def test_nothing_outside_the_arrays_is_touched(fast_backend: str) -> None:
    assert int(run_python(SCRIPT, FASTLOSS_BACKEND=fast_backend, timeout=300)) == 360
