"""CuPy arrays, and arrays on a CUDA device that come by DLPack from other frameworks."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from fastloss.borrowed import Borrowed, Kind, Place, device_view
from fastloss.frameworks.base import Adapter
from fastloss.frameworks.capsules import device_of, export, view_of

_LEGACY_STREAM = 1  # what DLPack calls the default stream, whose address is 0


class CupyPlace(Place):
    """A CUDA device and CuPy's current stream on it."""

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    @property
    def stream(self) -> int:
        return int(cupy.cuda.get_current_stream(self.ordinal).ptr)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        with cupy.cuda.Device(self.ordinal):
            return cupy.empty(shape, dtype)

    def ones(self, shape: tuple[int, ...], dtype: str) -> Any:
        with cupy.cuda.Device(self.ordinal):
            return cupy.ones(shape, dtype)

    def array(self, values: Any, dtype: str) -> Any:
        with cupy.cuda.Device(self.ordinal):
            return cupy.ascontiguousarray(cupy.asarray(values, dtype))

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def numpy(self, array: Any) -> np.ndarray:
        result: np.ndarray = cupy.asnumpy(array)
        return result


class CupyAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return isinstance(array, cupy.ndarray)

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        dtype = array.dtype.name
        view = device_view(array, array.data.ptr, array.shape, array.strides, dtype)
        return Borrowed(view, dtype, CupyPlace(array.device.id))

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        new = self.like(array)
        return new, self.borrow(new, "out", write=True)

    def kind(self, array: Any, name: str) -> Kind | None:
        if type(array) is not cupy.ndarray:
            return None
        traits = (array.device.id, array.dtype, array.shape, array.strides)
        return Kind(traits, int(array.data.ptr))

    def like(self, array: Any) -> Any:
        with array.device:
            # K: in the order of the logits' strides, as they need not be contiguous.
            return cupy.empty_like(array, order="K")


class ExporterAdapter(Adapter):
    """Any exporter of DLPack on a CUDA device. Results are CuPy arrays.

    The exporter knows the stream that it hands its memory to, CuPy's current one, but not when
    what is queued there is done: until then the caller keeps the arrays.
    """

    def serves(self, array: Any) -> bool:
        return device_of(array, "array")[0] == "cuda"

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        place = CupyPlace(device_of(array, name)[1])
        capsule = export(array, name, stream=place.stream or _LEGACY_STREAM)
        return view_of(capsule, name, write)._replace(place=place)

    def numbers(self, array: Any, name: str) -> np.ndarray:
        with cupy.cuda.Device(device_of(array, name)[1]):
            return CUPY.numbers(cupy.from_dlpack(array), name)

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        assert borrowed.place is not None
        dtype: Any = borrowed.dtype
        if dtype == "bfloat16":
            from ml_dtypes import bfloat16 as dtype  # which CuPy needs for it, too
        view = borrowed.array
        with cupy.cuda.Device(borrowed.place.ordinal):
            # In the order of the logits' strides.
            order = sorted(range(view.ndim), key=lambda i: -abs(view.strides[i]))
            new = cupy.empty([view.shape[i] for i in order], dtype)
            new = new.transpose(np.argsort(order).tolist())
        return new, CUPY.borrow(new, "out", write=True)


CUPY = CupyAdapter()
EXPORTER = ExporterAdapter()
