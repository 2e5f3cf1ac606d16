"""The compiled module of csrc/cpu/module.cpp."""

from collections.abc import Sequence

import numpy as np

_Faults = tuple[int, float, int, float]
"""How many labels are bad, and the first; how many voxel weights are, and the first."""
_VoxelMap = tuple[int, np.ndarray, str, np.ndarray | None]
"""Its kind, where it is written to, the dtype of that, and coefficients."""
_More = tuple[tuple[tuple[np.ndarray, str, int], ...], np.ndarray | None, str, int]
"""Fields, each an array, its dtype and its kind; regions, their dtype, and rows of a sample."""

_Directed = tuple[np.ndarray, np.ndarray | None]
"""Distances and areas."""

class Passes:
    def __init__(
        self,
        activation: int,
        dense: bool,
        ignore_index: int | None,
        sums: Sequence[tuple[int, int, float, int]],
        histograms: Sequence[int],
        /,
    ) -> None: ...
    def reduce(
        self,
        logits: np.ndarray,
        logits_dtype: str,
        target: np.ndarray,
        target_dtype: str,
        weight: np.ndarray | None,
        weight_dtype: str,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: _VoxelMap | None,
        more: _More | None,
        weight_scale: float,
        /,
    ) -> _Faults | None: ...
    def apply(
        self,
        logits: np.ndarray,
        logits_dtype: str,
        target: np.ndarray,
        target_dtype: str,
        weight: np.ndarray | None,
        weight_dtype: str,
        coefficients: np.ndarray,
        out: np.ndarray,
        more: _More | None,
        /,
    ) -> None: ...
    def write_map(
        self,
        logits: np.ndarray,
        logits_dtype: str,
        target: np.ndarray,
        target_dtype: str,
        weight: np.ndarray | None,
        weight_dtype: str,
        voxel_map: _VoxelMap,
        more: _More | None,
        /,
    ) -> _Faults | None: ...

def distance_transform(
    mask: np.ndarray, spacing: list[float], limit: float, out: np.ndarray, /
) -> None: ...
def signed_distance(
    classes: np.ndarray,
    first: int,
    spacing: list[float],
    convention: int,
    limit: float,
    out: np.ndarray,
    /,
) -> None: ...
def class_indices(labels: np.ndarray, classes: int, out: np.ndarray, /) -> int: ...
def surface_distances(
    prediction: np.ndarray,
    reference: np.ndarray,
    structures: np.ndarray,
    axes: int,
    spacing: list[float],
    areas: np.ndarray | None,
    counted: np.ndarray | None,
    /,
) -> list[tuple[_Directed, _Directed]]: ...
def bounds(numbers: np.ndarray, dtype: str, /) -> tuple[int, int]: ...
def likeliest(scores: np.ndarray, dtype: str, out: np.ndarray, /) -> None: ...
def confusion(prediction: np.ndarray, reference: np.ndarray, counts: np.ndarray, /) -> None: ...

class Labelled:
    def __init__(self, classes: np.ndarray, table: np.ndarray, connectivity: int, /) -> None: ...
    def dilated(self, times: int, connectivity: int, /) -> Labelled: ...
    def write(self, out: np.ndarray, z: int, y: int, x: int, /) -> None: ...
    def overlaps(self, other: Labelled, /) -> np.ndarray: ...
    @property
    def rows(self) -> np.ndarray: ...

def voronoi(components: np.ndarray, spacing: list[float], out: np.ndarray, /) -> None: ...
def isa() -> str: ...
def built_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(number: int, /) -> None: ...
def copy_bandwidth(nbytes: int, /) -> float: ...
def read_bandwidth(nbytes: int, /) -> float: ...
def soft_skeleton(
    p: np.ndarray,
    dtype: str,
    upstream: np.ndarray | None,
    out: np.ndarray,
    iterations: int,
    /,
) -> None: ...
