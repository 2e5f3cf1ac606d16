"""The CUDA kernels behind NumPy arrays, so that every test of a backend can run them.

`EmulatedDevice` runs them on the CPU, through `cuda_emulation`, to check their logic; its times
mean nothing. `CudaTestDevice` runs them on a GPU, over copies of the arrays.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends.base import Backend
from fastloss.backends.cuda import engine
from fastloss.backends.cuda.by_target import KERNELS as TARGET_KERNELS
from fastloss.backends.cuda.copies import KERNELS as COPY_KERNELS
from fastloss.backends.cuda.distance import KERNELS as DISTANCE_KERNELS
from fastloss.backends.cuda.fields import BOUNDARY_KERNELS, POWER_KERNELS
from fastloss.backends.cuda.general import MAX_SUMS
from fastloss.backends.cuda.histograms import KERNELS as HISTOGRAM_KERNELS
from fastloss.backends.cuda.indices import KERNELS as INDEX_KERNELS
from fastloss.backends.cuda.lovasz import KERNELS as LOVASZ_KERNELS
from fastloss.backends.cuda.metrics import CONFUSION_KERNELS, READ_KERNELS
from fastloss.backends.cuda.operands import KERNELS as OPERAND_KERNELS
from fastloss.backends.cuda.source import PASSES, source, source_of, specialised
from fastloss.backends.cuda.surfaces import KERNELS as SURFACE_KERNELS
from fastloss.backends.cuda.top_k import KERNELS
from fastloss.backends.targets import check_targets
from fastloss.borrowed import byte_bounds, device_view
from fastloss.maps import Map
from fastloss.request import Request

STRUCTS = {"passes.cu": "Call", "general.cu": "GeneralCall"}
"""The argument of the kernels of a source."""
STRUCTS_OF_OTHERS = {
    KERNELS: "TopKCall",
    OPERAND_KERNELS: "OperandCall",
    COPY_KERNELS: "CopyCall",
    DISTANCE_KERNELS: "DistanceCall",
    INDEX_KERNELS: "IndexCall",
    POWER_KERNELS: "PowerCall",
    BOUNDARY_KERNELS: "BoundaryCall",
    READ_KERNELS: "ReadCall",
    CONFUSION_KERNELS: "ConfusionCall",
    SURFACE_KERNELS: "SurfaceCall",
    HISTOGRAM_KERNELS: "HistogramCall",
    TARGET_KERNELS: "TargetCall",
    LOVASZ_KERNELS: "LovaszCall",
}
"""The same for the kernels of other sources."""


_one_at_a_time = threading.RLock()
"""Held by a launch: an emulated kernel's threads are global to the process."""


class Allocated(NamedTuple):
    address: int
    owner: Any


class EmulatedDevice:
    """Kernels that run on the CPU, over NumPy's memory.

    Args:
        special: compile every pass for its kind of call, as for a GPU; else one build serves all.
        order: the order in which the blocks of a launch run: "forward", "reverse" or "random".
    """

    shared_bytes = 48 << 10
    multiprocessors = 132

    def __init__(self, special: bool = False, order: str = "forward") -> None:
        self.special, self.order = special, order

    def empty(self, nbytes: int) -> Allocated:
        array = np.full(nbytes + 16, 0xFF, np.uint8)
        address = array.ctypes.data
        return Allocated(address + -address % 16, array)

    def upload(self, numbers: np.ndarray) -> Allocated:
        copy = np.array(numbers, np.float64)
        return Allocated(copy.ctypes.data, copy)

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        text, compiled, struct = self.what_to_compile(constants, kernel)
        library = _library(text, compiled, struct)
        return tuple((library, name) for name in PASSES[kernel])

    def what_to_compile(
        self, constants: tuple[tuple[str, object], ...], kernel: str
    ) -> tuple[str, tuple[str, ...], str]:
        """A text, its kernels, and the struct that they take."""
        file = source_of(constants)
        if self.special:
            return specialised(constants, kernel), PASSES[kernel], STRUCTS[file]
        general = file == "general.cu"
        assert not general or dict(constants)["slots"] <= MAX_SUMS
        kernels = [name for names in PASSES.values() for name in names]
        return source(file), tuple(kernels if general else kernels[:3]), STRUCTS[file]

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        library = _library(text, names, STRUCTS_OF_OTHERS.get(names, "CombineCall"))
        return tuple((library, name) for name in names)

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        library, name = kernel
        with _one_at_a_time:
            library.launch(
                name, (grid, 1, 1), (*block, 1), shared, call.tobytes(), order=self.order
            )


def _library(text: str, names: tuple[str, ...], struct: str) -> Any:
    with _one_at_a_time:
        return _built(text, names, struct)


@cache
def _built(text: str, names: tuple[str, ...], struct: str) -> Any:
    from cuda_emulation import Library

    return Library(text, dict.fromkeys(names, struct))


class EmulatedBackend(Backend):
    """A backend that runs the kernels on the CPU."""

    counts_errors = True

    def __init__(self, name: str, device: EmulatedDevice | None = None) -> None:
        self.name, self.device = name, device or EmulatedDevice()

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
    ) -> None:
        addresses = sums.ctypes.data, voxels.ctypes.data
        engine.reduce(self.device, request, arrays, *addresses, voxel_map)
        _raise_faults(request, arrays, voxels)

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        coefficients = np.ascontiguousarray(coefficients, np.float64)
        _, rows, classes = coefficients.shape
        engine.apply(
            self.device,
            request,
            arrays,
            coefficients.ctypes.data,
            out,
            slot_stride=rows * classes,
            row_stride=classes,
        )

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        check_targets(request, arrays)
        engine.write_map(self.device, request, arrays, voxel_map)


class CudaTestBackend(Backend):
    """A backend that runs the kernels on a GPU, over copies of the arrays in the same strides.

    As for users, they are compiled for every kind of call, which takes most of the time.
    """

    counts_errors = True

    def __init__(self, name: str) -> None:
        from fastloss.backends.cuda.backend import CudaDevice, why_absent

        absent = why_absent()
        if absent:
            raise ImportError(absent)
        self.name = name
        self.memory = _cupy_place()
        self.device: Any = CudaDevice(self.memory)

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
    ) -> None:
        there = self._upload_all(arrays)
        device_sums, device_voxels = _Copy(self.memory, sums), _Copy(self.memory, voxels)
        addresses = device_sums.address, device_voxels.address
        if voxel_map is None:
            engine.reduce(self.device, request, there, *addresses)
        else:
            out = _Copy(self.memory, voxel_map.out)
            engine.reduce(self.device, request, there, *addresses, replace(voxel_map, out=out.view))
            out.fetch(voxel_map.out)
        device_sums.fetch(sums)
        device_voxels.fetch(voxels)
        _raise_faults(request, arrays, voxels)

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        there = self._upload_all(arrays)
        in_place = _address(out) == _address(arrays.logits)
        to = self._logits if in_place else _Copy(self.memory, out)
        numbers = _Copy(self.memory, np.ascontiguousarray(coefficients, np.float64))
        _, rows, classes = coefficients.shape
        engine.apply(
            self.device,
            request,
            there,
            numbers.address,
            to.view,
            slot_stride=rows * classes,
            row_stride=classes,
        )
        to.fetch(out)

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        check_targets(request, arrays)
        out = _Copy(self.memory, voxel_map.out)
        there = replace(voxel_map, out=out.view)
        engine.write_map(self.device, request, self._upload_all(arrays), there)
        out.fetch(voxel_map.out)

    def _upload_all(self, arrays: Arrays) -> Arrays:
        self._logits = _Copy(self.memory, arrays.logits)

        def there(array: np.ndarray | None) -> Any:
            return None if array is None else _Copy(self.memory, array).view

        return replace(
            arrays,
            logits=self._logits.view,
            target=there(arrays.target),
            voxel_weight=there(arrays.voxel_weight),
            fields=tuple(field._replace(array=there(field.array)) for field in arrays.fields),
            regions=there(arrays.regions),
        )


class _Copy:
    """A copy of an array's memory on the device, including gaps between its numbers."""

    def __init__(self, place: Any, array: np.ndarray) -> None:
        import cupy

        low, high = byte_bounds(array)
        before = low % 16  # the same alignment as here
        raw = np.full(high - low + before + 16, 0xFF, np.uint8)
        if array.size:
            raw[before : before + high - low] = _bytes(low, high - low)
        self.memory = cupy.asarray(raw)
        offset = before + (_address(array) - low if array.size else 0)
        self.address = int(self.memory.data.ptr) + offset
        self.view = device_view(self, self.address, array.shape, array.strides, array.dtype.name)
        self._before, self._length = before, high - low

    def fetch(self, array: np.ndarray) -> None:
        """Copy the device's numbers back to the array."""
        if array.size:
            raw = self.memory.get()[self._before : self._before + self._length]
            low, _ = byte_bounds(array)
            start = _address(array) - low
            array[...] = np.ndarray(array.shape, array.dtype, raw.tobytes(), start, array.strides)


def _bytes(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * count).from_address(address), np.uint8)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _cupy_place() -> Any:
    from fastloss.frameworks.cupy import CupyPlace

    return CupyPlace(0)


def _raise_faults(request: Request, arrays: Arrays, voxels: np.ndarray) -> None:
    if np.isnan(voxels).any():
        check_targets(request, arrays)
        raise AssertionError("the kernel found a fault where there is none")
