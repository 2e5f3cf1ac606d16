"""The CUDA kernels behind NumPy arrays, so that every test of a backend can run them.

`EmulatedDevice` runs them on the CPU, through `cuda_emulation`: a check of their logic, from which
no timing means anything. `CudaTestDevice` runs them on a GPU, over copies of the arrays.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends import _cuda_engine as engine
from fastloss.backends._cuda_source import source, specialised
from fastloss.backends._cuda_top_k import KERNELS
from fastloss.backends.base import Backend
from fastloss.backends.reference import check_targets
from fastloss.request import Request
from fastloss.voxel_losses import VoxelLosses

PASSES = ("fastloss_reduce", "fastloss_finish", "fastloss_apply")


class Allocated(NamedTuple):
    address: int
    owner: Any


class EmulatedDevice:
    """Kernels that run on the CPU, over NumPy's memory.

    Args:
        special: compile every pass for its kind of call, as a GPU does; else one build serves all.
        order: the order in which the blocks of a launch run: "forward", "reversed" or "random".
    """

    shared_bytes = 48 << 10

    def __init__(self, special: bool = False, order: str = "forward") -> None:
        self.special, self.order = special, order

    def empty(self, nbytes: int) -> Allocated:
        array = np.full(nbytes + 16, 0xFF, np.uint8)
        address = array.ctypes.data
        return Allocated(address + -address % 16, array)

    def constant(self, numbers: np.ndarray) -> Allocated:
        copy = numbers.copy()
        return Allocated(copy.ctypes.data, copy)

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        names = PASSES[:2] if kernel == "reduce" else PASSES[2:]
        text = specialised(constants, kernel) if self.special else source("passes.cu")
        library = _library(text, names if self.special else PASSES, "Call")
        return tuple((library, name) for name in names)

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        library = _library(text, names, "TopKCall" if names == KERNELS else "CombineCall")
        return tuple((library, name) for name in names)

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        library, name = kernel
        library.launch(name, (grid, 1, 1), (*block, 1), shared, call.tobytes(), order=self.order)


@cache
def _library(text: str, names: tuple[str, ...], struct: str) -> Any:
    from cuda_emulation import Library

    return Library(text, dict.fromkeys(names, struct))


class DeviceBackend(Backend):
    """A backend that runs a device's kernels."""

    def __init__(self, name: str, device: Any) -> None:
        self.name, self.device = name, device

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        addresses = []
        if losses is not None:
            addresses = [losses.values.ctypes.data, losses.class_weight.ctypes.data]
        engine.reduce(
            self.device, request, arrays, sums.ctypes.data, voxels.ctypes.data, *addresses
        )
        if np.isnan(voxels).any():
            check_targets(request, arrays)
            raise AssertionError("the kernel found a fault where there is none")

    def apply(
        self,
        request: Request,
        arrays: Arrays,
        coefficients: np.ndarray,
        out: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        coefficients = np.ascontiguousarray(coefficients, np.float64)
        _, batch, classes = coefficients.shape
        engine.apply(
            self.device,
            request,
            arrays,
            coefficients.ctypes.data,
            out,
            slot_stride=batch * classes,
            sample_stride=classes,
            losses=0 if losses is None else losses.values.ctypes.data,
        )
