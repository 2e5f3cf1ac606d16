"""The C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import frexp
from typing import Any

import numpy as np

import fastloss._cpu as _cpu
from fastloss.arrays import Arrays
from fastloss.backends.base import Backend
from fastloss.backends.components import Labelled
from fastloss.backends.distances import CONVENTIONS
from fastloss.backends.surfaces import Directed
from fastloss.backends.targets import bad_labels, bad_weights, load
from fastloss.histogram import HISTOGRAMS
from fastloss.maps import KINDS, Map
from fastloss.request import ACTIVATIONS, Request
from fastloss.sums import FUNCTIONS, WEIGHTS


class CpuBackend(Backend):
    name = "cpu"
    skeletonizes = True
    counts_errors = True

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return _cpu.isa()

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that this processor supports; ``FASTLOSS_ISA`` forces one."""
        return tuple(_cpu.available_isas())

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
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
            None if voxel_map is None else _described(voxel_map),
            _more(arrays),
            _weight_scale(arrays) if request.histograms else 1.0,
        )
        if faults is not None:
            _raise(faults, request, arrays)

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
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
            _more(arrays),
        )

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        faults = _passes(request).write_map(
            arrays.logits,
            arrays.logits_dtype,
            arrays.target,
            arrays.target_dtype,
            arrays.voxel_weight,
            arrays.weight_dtype,
            _described(voxel_map),
            _more(arrays),
        )
        if faults is not None:
            _raise(faults, request, arrays)

    def distance_transform(
        self, mask: np.ndarray, spacing: Sequence[float], limit: float, out: np.ndarray
    ) -> None:
        _cpu.distance_transform(mask, list(spacing), limit, out)

    def signed_distance(
        self,
        classes: np.ndarray,
        first: int,
        spacing: Sequence[float],
        convention: str,
        limit: float,
        out: np.ndarray,
    ) -> None:
        _cpu.signed_distance(
            classes, first, list(spacing), CONVENTIONS.index(convention), limit, out
        )

    def class_indices(self, labels: np.ndarray, classes: int, out: np.ndarray) -> int:
        return _cpu.class_indices(labels, classes, out)

    def surface_distances(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        structures: np.ndarray,
        axes: int,
        spacing: Sequence[float],
        areas: np.ndarray | None,
        counted: np.ndarray | None,
    ) -> list[tuple[Directed, Directed]]:
        found = _cpu.surface_distances(
            prediction,
            reference,
            structures,
            axes,
            list(spacing),
            areas,
            None if counted is None else np.ascontiguousarray(counted).view(np.uint8),
        )
        return [(Directed(*there), Directed(*back)) for there, back in found]

    def bounds(self, numbers: np.ndarray) -> tuple[int, int]:
        if not numbers.flags.c_contiguous:
            return super().bounds(numbers)
        return _cpu.bounds(numbers, numbers.dtype.name)

    def likeliest(self, scores: np.ndarray, dtype: str, out: np.ndarray) -> None:
        _cpu.likeliest(scores, dtype, out)

    def confusion(self, prediction: np.ndarray, reference: np.ndarray, found: np.ndarray) -> None:
        _cpu.confusion(prediction, reference, found)

    def components(self, classes: np.ndarray, table: np.ndarray, connectivity: int) -> Labelled:
        return _cpu.Labelled(classes, table, connectivity)

    def voronoi(self, numbers: np.ndarray, spacing: Sequence[float], out: np.ndarray) -> None:
        _cpu.voronoi(numbers, list(spacing), out)

    def soft_skeleton(
        self,
        p: np.ndarray,
        dtype: str,
        out: np.ndarray,
        iterations: int,
        upstream: np.ndarray | None = None,
    ) -> None:
        _cpu.soft_skeleton(p, dtype, upstream, out, iterations)

    def get_num_threads(self) -> int:
        return _cpu.get_num_threads()

    def set_num_threads(self, number: int) -> None:
        _cpu.set_num_threads(number)

    def copy_bandwidth(self, nbytes: int) -> float:
        """Bytes read plus written per second by a non-temporal copy on the same threads."""
        return _cpu.copy_bandwidth(nbytes)

    def read_bandwidth(self, nbytes: int) -> float:
        """Bytes read per second on the same threads."""
        return _cpu.read_bandwidth(nbytes)


def _raise(faults: tuple[int, float, int, float], request: Request, arrays: Arrays) -> None:
    labels, first_label, weights, first_weight = faults
    if labels:
        raise bad_labels(labels, first_label, request, arrays.logits.shape[1])
    raise bad_weights(weights, first_weight)


def _more(arrays: Arrays) -> tuple[Any, ...] | None:
    """Fields and regions as arguments of the kernels."""
    if not arrays.fields and arrays.regions is None:
        return None
    fields = tuple((f.array, f.dtype, _FIELDS.index(f.kind)) for f in arrays.fields)
    return fields, arrays.regions, arrays.regions_dtype, arrays.rows


def _weight_scale(arrays: Arrays) -> float:
    """The power of 2 by which the largest voxel weight is at most 2^21, and at least 2^20."""
    weight = arrays.voxel_weight
    if weight is None:
        return 1.0
    if arrays.weight_dtype == "bfloat16":
        weight = load(weight, arrays.weight_dtype)
    # Others than finite ones raise an error later.
    largest = float(weight.max(initial=0, where=np.isfinite(weight)))
    return 2.0 ** (_WEIGHT_BITS - frexp(largest)[1]) if largest > 0 else 1.0


def _described(voxel_map: Map) -> tuple[Any, ...]:
    out = voxel_map.out
    return 1 + KINDS.index(voxel_map.kind), out, out.dtype.name, voxel_map.coefficients


_WEIGHT_BITS = 21
_FIELDS = ("voxel", "class", "labels")
_FUNCTIONS = tuple(FUNCTIONS)


@lru_cache(maxsize=1024)
def _passes(request: Request) -> _cpu.Passes:
    def place(field: str) -> int:
        return request.fields.index(field) if field else -1

    return _cpu.Passes(
        ACTIVATIONS.index(request.activation),
        request.dense,
        request.ignore_index,
        [
            (WEIGHTS.index(s.weight), _FUNCTIONS.index(s.function), s.parameter, place(s.field))
            for s in request.sums
        ],
        [HISTOGRAMS.index(kind) for kind in request.histograms],
    )


BACKEND = CpuBackend()
