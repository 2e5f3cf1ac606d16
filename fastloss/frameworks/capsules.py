"""DLPack capsules: whose memory they hold, and views of it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fastloss.borrowed import Borrowed

_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost: memory the processor reads
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_READ_ONLY = 1
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def device_of(array: Any, name: str) -> tuple[str, int]:
    """ "cpu", or "cuda" and the device's number, or "other" and DLPack's number of its type."""
    try:
        kind, number = array.__dlpack_device__()
    except Exception as error:
        raise _no_export(array, name, error) from error
    if int(kind) in _CPU_DEVICES:
        return "cpu", 0
    return ("cuda", int(number)) if int(kind) in _CUDA_DEVICES else ("other", int(kind))


def _no_export(array: Any, name: str, error: Exception) -> TypeError:
    return TypeError(f"{name}: the {type(array).__name__} could not be exported by DLPack: {error}")


def export(array: Any, name: str, **options: Any) -> Any:
    """A capsule with the array's memory; ``stream``: where it is going to be used."""
    try:
        try:
            return array.__dlpack__(max_version=(1, 0), **options)
        except TypeError:  # an exporter from before DLPack 1.0
            return array.__dlpack__(**options)
    except Exception as error:
        raise _no_export(array, name, error) from error


def view_of(capsule: Any, name: str, write: bool) -> Borrowed:
    """A NumPy view of a capsule's memory; of a GPU's memory what `Borrowed` says.

    The capsule is not consumed: it stays alive with the view, and frees the memory itself when
    the view is gone.
    """
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if write and managed.flags & _READ_ONLY:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        tensor = managed.tensor
    else:
        tensor = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    kind, bits = _KINDS.get(tensor.code), tensor.bits
    if kind is None or tensor.lanes != 1 or bits not in (8, 16, 32, 64):
        raise TypeError(f"{name}: unsupported DLPack dtype ({tensor.code}, {bits})")
    dtype = "bool" if kind == "bool" else f"{kind}{bits}"
    item = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    shape = tuple(tensor.shape[: tensor.ndim])
    if 0 in shape:
        return Borrowed(np.empty(shape, item), dtype)
    if tensor.strides:
        strides = tuple(s * item.itemsize for s in tensor.strides[: tensor.ndim])
    else:
        strides = np.empty((0, *shape[1:]), item).strides if shape else ()
    span = item.itemsize + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * span).from_address(tensor.data + tensor.byte_offset)
    memory.capsule = capsule
    view = np.ndarray(shape, item, memory, 0, strides)
    view.flags.writeable = write
    return Borrowed(view, dtype)
