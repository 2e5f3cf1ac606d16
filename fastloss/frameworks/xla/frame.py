"""The call frame by which XLA calls a function of the host on its own buffers, without a copy.

XLA calls a function of C with one structure that describes buffers and attributes, the "call frame"
of its foreign function interface (xla/ffi/api/c_api.h, which jaxlib and TensorFlow ship). The
function here is Python's, by way of ctypes, as are the views of DLPack capsules: nothing is
compiled for a version of either, and a fastloss that was built without them works with them.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable
from contextlib import suppress
from ctypes import POINTER, c_char, c_int, c_int64, c_size_t, c_void_p
from importlib import import_module
from typing import Any

import numpy as np

from fastloss.frameworks.memory import LEAST, huge_pages

NAME = "fastloss_call"
ATTRIBUTE = "call"
"""The text that says what to compute; the only attribute."""
_EXECUTE = 3
"""The stage in which a function computes, the last of four."""
_METADATA = 1
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13
_ERROR_CREATE = 48
"""The place of XLA_FFI_Error_Create in XLA_FFI_Api."""

_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.uint8, 7: np.uint16, 8: np.uint32, 9: np.uint64,
    10: np.float16, 11: np.float32, 12: np.float64,
}  # fmt: skip
_dtypes: dict[int, Any] = {code: np.dtype(kind) for code, kind in _DTYPES.items()}
with suppress(ImportError):  # JAX and TensorFlow bring it; without it there is no bfloat16
    _dtypes[16] = np.dtype(import_module("ml_dtypes").bfloat16)


class _Base(ctypes.Structure):
    """How every structure of the interface begins."""

    _fields_ = [("struct_size", c_size_t), ("extension", c_void_p)]


class _Buffer(_Base):
    _fields_ = [
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class _Buffers(_Base):
    _fields_ = [("size", c_int64), ("types", c_void_p), ("items", POINTER(POINTER(_Buffer)))]


class _Bytes(ctypes.Structure):
    _fields_ = [("start", c_void_p), ("size", c_size_t)]


class _Attributes(_Base):
    _fields_ = [
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("items", POINTER(POINTER(_Bytes))),
    ]


class _Frame(_Base):
    _fields_ = [
        ("api", c_void_p),
        ("context", c_void_p),
        ("stage", c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("version_size", c_size_t),
        ("version_extension", c_void_p),
        ("major", c_int),
        ("minor", c_int),
        ("traits", ctypes.c_uint32),
    ]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("kind", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    ]


class _Error(_Base):
    _fields_ = [("message", ctypes.c_char_p), ("code", c_int)]


_make_error = ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))


def _view(buffer: _Buffer, new: bool) -> np.ndarray:
    shape = tuple(buffer.dims[: buffer.rank])
    dtype = _dtypes.get(buffer.dtype)
    if dtype is None:
        raise TypeError(f"unsupported dtype: XLA's number {buffer.dtype}")
    size = dtype.itemsize
    for n in shape:
        size *= n
    if not size:
        return np.empty(shape, dtype)
    memory = (c_char * size).from_address(buffer.data)
    if new and size >= LEAST:
        huge_pages(buffer.data, size)
    view: np.ndarray = np.ndarray(shape, dtype, memory)
    return view


def _views(buffers: _Buffers, new: bool = False) -> list[np.ndarray]:
    return [_view(buffers.items[i].contents, new) for i in range(buffers.size)]


Run = Callable[[bytes, list[np.ndarray], list[np.ndarray]], None]
"""Of a text, operands and results, which it writes."""


def function(version: Callable[[], tuple[int, int]], run: Run) -> Any:
    """What XLA calls: a function of ctypes, of the address of a call frame, that returns the
    address of an error or None. XLA keeps its address for as long as the process lives.

    Args:
        version: gives that of the interface of this XLA.
        run: is called with views of XLA's buffers. ValueError and TypeError are told as errors of
            arguments, NotImplementedError as such.
    """

    def called(address: int) -> int | None:
        frame = _Frame.from_address(address)
        try:
            if frame.extension:
                extension = _Extension.from_address(frame.extension)
                if extension.kind == _METADATA:
                    metadata = extension.metadata.contents
                    metadata.major, metadata.minor = version()
                    metadata.traits = 0
                    return None
            if frame.stage != _EXECUTE:
                return None
            text = frame.attributes.items[0].contents
            call = ctypes.string_at(text.start, text.size)
            run(call, _views(frame.operands), _views(frame.results, new=True))
        except (ValueError, TypeError) as error:
            return _error(frame, _INVALID_ARGUMENT, str(error))
        except NotImplementedError as error:
            return _error(frame, _UNIMPLEMENTED, str(error))
        except BaseException:
            return _error(frame, _INTERNAL, traceback.format_exc())
        return None

    return _of_c(called)


_of_c = ctypes.CFUNCTYPE(c_void_p, c_void_p)


def _error(frame: _Frame, code: int, message: str) -> int | None:
    create = _make_error(c_void_p.from_address(frame.api + _ERROR_CREATE).value or 0)
    arguments = _Error(ctypes.sizeof(_Error), None, message.encode(), code)
    error: int | None = create(ctypes.byref(arguments))
    return error
