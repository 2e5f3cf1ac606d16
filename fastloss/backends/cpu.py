"""The C++ kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fastloss import _cpu
from fastloss.arrays import Arrays
from fastloss.backends.base import Backend, bad_labels, bad_weights
from fastloss.request import ACTIVATIONS, Request
from fastloss.voxel_losses import VoxelLosses


class CpuBackend(Backend):
    name = "cpu"

    @property
    def isa(self) -> str:
        """The instruction set that computes."""
        return str(_cpu.isa())

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that this processor runs; ``FASTLOSS_ISA`` forces one."""
        return tuple(_cpu.available_isas())

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        faults = _passes(request).reduce(
            arrays.logits,
            arrays.logits_dtype,
            arrays.target,
            arrays.target_dtype,
            arrays.voxel_weight,
            arrays.weight_dtype,
            sums,
            voxels,
            None if losses is None else losses.values,
            None if losses is None else losses.class_weight,
        )
        if faults is not None:
            labels, first_label, weights, first_weight = faults
            if labels:
                raise bad_labels(labels, first_label, request, arrays.logits.shape[1])
            raise bad_weights(weights, first_weight)

    def apply(
        self,
        request: Request,
        arrays: Arrays,
        coefficients: np.ndarray,
        out: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        _passes(request).apply(
            arrays.logits,
            arrays.logits_dtype,
            arrays.target,
            arrays.target_dtype,
            arrays.voxel_weight,
            arrays.weight_dtype,
            coefficients,
            out,
            None if losses is None else losses.values,
        )

    def get_num_threads(self) -> int:
        return int(_cpu.get_num_threads())

    def set_num_threads(self, number: int) -> None:
        _cpu.set_num_threads(number)

    def copy_bandwidth(self, nbytes: int) -> float:
        """Bytes read plus written per second by a copy past the caches on the same threads."""
        return float(_cpu.copy_bandwidth(nbytes))

    def read_bandwidth(self, nbytes: int) -> float:
        """Bytes read per second on the same threads."""
        return float(_cpu.read_bandwidth(nbytes))


@lru_cache(maxsize=1024)
def _passes(request: Request) -> Any:
    return _cpu.Passes(
        ACTIVATIONS.index(request.activation),
        request.dense,
        request.ignore_index,
        list(request.slots),
        list(request.gammas),
    )


BACKEND = CpuBackend()
