"""Row functions: copy one row of voxels from the caller's dtype and stride, or to them.

They are compiled one by one for the dtypes that come, and called by address (`call_row`).
"""

# mypy: ignore-errors
# What Numba compiles has no types that mypy could check.

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit
from numba.core import types

from fastloss.backends._numba_cache import renamed
from fastloss.backends._numba_pointers import (
    LINE,
    address,
    fence,
    from_bits,
    item_size,
    shift,
    shift_bytes,
    stream_line,
    to_bits,
)

_STORED = {"bfloat16": types.uint16, "float16": types.uint16, "bool": types.uint8}

# Each takes (source, stride in bytes of the caller's side, number of elements, target).


def _load(source: Any, stride: int, count: int, target: Any) -> None:
    if stride == item_size(source):
        for i in range(count):
            target[i] = source[i]
    else:
        for i in range(count):
            target[i] = shift_bytes(source, i * stride)[0]


def _load_bfloat16(source: Any, stride: int, count: int, target: Any) -> None:
    if stride == 2:
        for i in range(count):
            target[i] = from_bits(np.uint32(np.uint32(source[i]) << np.uint32(16)))
    else:
        for i in range(count):
            bits = np.uint32(shift_bytes(source, i * stride)[0])
            target[i] = from_bits(np.uint32(bits << np.uint32(16)))


def _load_float16(source: Any, stride: int, count: int, target: Any) -> None:
    half = np.float32(2.0**-14)
    for i in range(count):
        h = np.uint32(shift_bytes(source, i * stride)[0])
        exponent = h & np.uint32(0x7C00)
        bits = np.uint32(((h & np.uint32(0x7FFF)) << np.uint32(13)) + np.uint32(0x38000000))
        # Infinity and NaN have the largest exponent there as here; a subnormal has no leading 1.
        bits = np.uint32(bits + np.uint32(0x38000000)) if exponent == 0x7C00 else bits
        bits = np.uint32(bits + np.uint32(0x00800000)) if exponent == 0 else bits
        value = from_bits(bits)
        value = value - half if exponent == 0 else value
        target[i] = -value if h & np.uint32(0x8000) else value


def _store(source: Any, stride: int, count: int, target: Any) -> None:
    if stride == item_size(target):
        for i in range(count):
            target[i] = source[i]
    else:
        for i in range(count):
            shift_bytes(target, i * stride)[0] = source[i]


def _stream(source: Any, stride: int, count: int, target: Any) -> None:
    """As `_store`, past the caches, where a store does not first read the line."""
    size = item_size(target)
    i = 0
    if (stride == size) & (address(target) % size == 0):
        head = min((-address(target) & (LINE - 1)) // size, count)
        while i < head:
            target[i] = source[i]
            i += 1
        step = LINE // size
        while i + step <= count:
            stream_line(shift(target, i), shift(source, i))
            i += step
    while i < count:
        shift_bytes(target, i * stride)[0] = source[i]
        i += 1


def _store_bfloat16(source: Any, stride: int, count: int, target: Any) -> None:
    for i in range(count):
        bits = to_bits(source[i])
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = rounded >> np.uint32(16)  # to the nearest, ties to even
        value = np.uint16(rounded) if source[i] == source[i] else np.uint16(0x7FC0)
        shift_bytes(target, i * stride)[0] = value


def _store_float16(source: Any, stride: int, count: int, target: Any) -> None:
    magic = np.float32(0.5)
    for i in range(count):
        bits = to_bits(source[i])
        sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
        bits = np.uint32(bits & np.uint32(0x7FFFFFFF))
        odd = (bits >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32(np.uint32(bits + np.uint32(0xC8000FFF)) + odd) >> np.uint32(13)
        # Adding ½ leaves a subnormal's bits, rounded, at the end of the mantissa.
        small = np.uint32(to_bits(from_bits(bits) + magic) - np.uint32(0x3F000000))
        h = small if bits < np.uint32(0x38800000) else np.uint32(normal)
        h = np.uint32(0x7C00) if bits >= np.uint32(0x47800000) else h
        h = np.uint32(0x7E00) if bits > np.uint32(0x7F800000) else h
        shift_bytes(target, i * stride)[0] = np.uint16(h | sign)


@cache
def loader(dtype: str, to: str) -> int:
    """The address of the row function that reads ``dtype`` as ``to``."""
    function = {"bfloat16": _load_bfloat16, "float16": _load_float16}.get(dtype, _load)
    return _compile(function, _type(dtype), _type(to))


@cache
def storer(dtype: str, stream: bool) -> int:
    """The address of the row function that writes ``dtype`` from what it is computed in; with
    ``stream`` past the caches, if it can, and `settle` must follow."""
    functions = {"bfloat16": _store_bfloat16, "float16": _store_float16}
    function = functions.get(dtype, _stream if stream else _store)
    computed = types.float64 if dtype == "float64" else types.float32
    return _compile(function, computed, _type(dtype))


@njit(nogil=True)
def settle() -> None:
    """Let no other thread see anything before what this one stored."""
    fence()


def _type(dtype: str) -> Any:
    return _STORED.get(dtype) or getattr(types, dtype)


_compiled: list[Any] = []  # the addresses live as long as these


def _compile(function: Any, source: Any, target: Any) -> int:
    signature = types.void(types.CPointer(source), types.intp, types.intp, types.CPointer(target))
    try:
        compiled = cfunc(signature, cache=True, error_model="numpy")(renamed(function))
    except RuntimeError:  # nowhere to keep the cache
        compiled = cfunc(signature, error_model="numpy")(function)
    _compiled.append(compiled)
    return int(compiled.address)
