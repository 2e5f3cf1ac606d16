"""Host functions that programs compiled by XLA call on their own buffers, without a copy.

XLA calls a function of C with one structure that describes buffers and attributes, the "call frame"
of its foreign function interface (xla/ffi/api/c_api.h, which jaxlib ships). The function here is
Python's, by way of ctypes, as are the views of DLPack capsules: nothing is compiled for a version
of JAX, and a fastloss that was built without JAX works with it. `jax.pure_callback`, the fallback
for versions without that interface, copies all operands and results.
"""

from __future__ import annotations

import ctypes
import re
import traceback
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastloss.frameworks.jax import host
from fastloss.frameworks.memory import LEAST, huge_pages

NAME = "fastloss_call"
_EXECUTE = 3
_METADATA = 1
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13
_ERROR_CREATE = 48
"""The place of XLA_FFI_Error_Create in XLA_FFI_Api."""

_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64,
    6: np.uint8, 7: np.uint16, 8: np.uint32, 9: np.uint64,
    10: np.float16, 11: np.float32, 12: np.float64, 16: jnp.bfloat16,
}  # fmt: skip
_dtypes = {code: np.dtype(kind) for code, kind in _DTYPES.items()}


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


def _called(address: int) -> int | None:
    """What XLA calls: the address of an error, or None."""
    frame = _Frame.from_address(address)
    try:
        if frame.extension:
            extension = _Extension.from_address(frame.extension)
            if extension.kind == _METADATA:
                metadata = extension.metadata.contents
                metadata.major, metadata.minor = _version()
                metadata.traits = 0
                return None
        if frame.stage != _EXECUTE:
            return None
        text = frame.attributes.items[0].contents
        call = ctypes.string_at(text.start, text.size)
        host.run(call, _views(frame.operands), _views(frame.results, new=True))
    except (ValueError, TypeError) as error:
        return _error(frame, _INVALID_ARGUMENT, str(error))
    except BaseException:
        return _error(frame, _INTERNAL, traceback.format_exc())
    return None


def _on_gpu(address: int) -> int | None:
    """As `_called`, for a program that runs on a GPU."""
    frame = _Frame.from_address(address)
    if frame.extension or frame.stage != _EXECUTE:
        return _called(address)
    return _error(frame, _UNIMPLEMENTED, ON_GPU)


ON_GPU = (
    "logits: a program that JAX compiles for a GPU cannot call fastloss; call the loss outside "
    "jax.jit, where it computes on the GPU (jax.value_and_grad of it, or loss.value_and_grad), "
    "or compile the program for the CPU"
)


def _error(frame: _Frame, code: int, message: str) -> int | None:
    create = _make_error(c_void_p.from_address(frame.api + _ERROR_CREATE).value or 0)
    arguments = _Error(ctypes.sizeof(_Error), None, message.encode(), code)
    error: int | None = create(ctypes.byref(arguments))
    return error


# XLA holds their addresses for as long as the process lives.
_handlers = [ctypes.CFUNCTYPE(c_void_p, c_void_p)(function) for function in (_called, _on_gpu)]


@cache
def _version() -> tuple[int, int]:
    """Of the interface that this jaxlib has."""
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text("utf-8")
    major, minor = (
        int(re.findall(rf"^#define XLA_FFI_API_{name} (\d+)$", text, re.MULTILINE)[0])
        for name in ("MAJOR", "MINOR")
    )
    return major, minor


@cache
def is_there() -> bool:
    """Whether XLA can call; registers the functions."""
    try:
        ffi = jax.ffi
        if _version()[0] != 0:
            return False
    except (AttributeError, OSError, IndexError):
        return False
    for handler, platform in zip(_handlers, ("cpu", "CUDA"), strict=True):
        pointer = ctypes.cast(handler, c_void_p).value
        ffi.register_ffi_target(NAME, ffi.pycapsule(pointer), platform=platform)
    return True


def call(
    text: str, results: Sequence[Any], operands: Sequence[Any], aliases: Any = None
) -> Sequence[Any]:
    """The results of the host function for these tracers."""
    if is_there():
        function = jax.ffi.ffi_call(
            NAME, list(results), vmap_method="expand_dims", input_output_aliases=aliases
        )
        found: Sequence[Any] = function(*operands, call=text)
        return found
    encoded = text.encode()

    def callback(*arrays: Any) -> list[np.ndarray]:
        made = [np.empty(r.shape, r.dtype) for r in results]
        host.run(encoded, [np.asarray(a) for a in arrays], made)
        return made

    # Under vmap it is called in a loop, which versions do that have no option for it.
    named = "vmap_method" in signature(jax.pure_callback).parameters
    options: dict[str, Any] = {"vmap_method": "sequential"} if named else {}
    copied: Sequence[Any] = jax.pure_callback(callback, list(results), *operands, **options)
    return copied
