"""Instances: the connected components of label maps, and each voxel's nearest one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import FLOATS, INTEGERS
from fastloss.backends import current_backend
from fastloss.backends.components import CLASS
from fastloss.borrowed import Borrowed
from fastloss.fields import spacing_of
from fastloss.frameworks import Adapter, adapter_of
from fastloss.frameworks.memory import new_array
from fastloss.options import check_spacing

MOST_AXES = 3
MOST_LABEL = 65534
_CONNECTIVITIES = {1: {2: 6}, 2: {4: 6, 8: 26}, 3: {6: 6, 18: 18, 26: 26}}
"""By the number of axes: which neighbours there may be, and what that is in three dimensions."""


class Components(NamedTuple):
    """The connected components of a batch of label maps."""

    numbers: Any
    """(B, \\*spatial) of int32, in the labels' framework: from 1 within each sample, in the order
    of their first voxels in C order; 0 is the background."""
    classes: tuple[np.ndarray, ...]
    """For every sample the class of each of its components, (components,) of int64."""


def components(
    labels: Any, connectivity: int | None = None, *, ignore_index: int | None = None
) -> Components:
    """The connected components of every class of a label map.

    Args:
        labels: (B, \\*spatial) with one to three spatial axes, of integers, bool, or whole floating
            numbers from 0 to 65534; 0 is the background. NumPy, PyTorch, CuPy, or another array
            that DLPack passes on.
        connectivity: how many neighbours a voxel has: 26 (faces, edges and corners), 18 (faces and
            edges) or 6 (faces) in 3D; 8 or 4 in 2D; 2 in 1D. By default the most.
        ignore_index: voxels of this label are background; it may be any number.

    Returns:
        `Components`: the number of every voxel's component, and the class of each component.

    Raises:
        ValueError: a number of axes, a connectivity or labels that are not as described.
        TypeError: an argument of another kind.

    Arrays on a GPU are copied, computed on the CPU, and copied back.

    >>> import numpy as np, fastloss as fl
    >>> found = fl.components(np.array([[[1, 0, 2], [0, 1, 2], [0, 0, 2]]]))
    >>> print(found.numbers[0])
    [[1 0 2]
     [0 1 2]
     [0 0 2]]
    >>> print(found.classes[0])
    [1 2]
    >>> print(fl.components(np.array([[[1, 0, 2], [0, 1, 2]]]), connectivity=4).numbers[0])
    [[1 0 2]
     [0 3 2]]
    """
    adapter, array = _borrowed(labels, "labels")
    shape = array.array.shape
    axes = _axes("labels", shape)
    neighbours = check_connectivity(connectivity, axes)
    indices, table = _indices(array, ignore_index)
    grid = (shape[0], *(1,) * (MOST_AXES - axes), *shape[1:])
    numbers = new_array(shape, np.dtype(np.int32))
    backend = current_backend()
    classes = []
    for volume, to in zip(indices.reshape(grid), numbers.reshape(grid), strict=True):
        labelled = backend.components(volume, table, neighbours)
        labelled.write(to, 0, 0, 0)
        classes.append(labelled.rows[:, CLASS].copy())
    return Components(adapter.wrap(numbers, labels), tuple(classes))


def voronoi(components: Any, *, spacing: Any = None) -> Any:
    """The component that is nearest to each voxel, by exact Euclidean distance.

    Of components that are equally far, the one of the lowest number; 0 throughout a sample that has
    no component. Distances are compared after division by the smallest spacing, so that whole
    multiples of it are exact; otherwise they are rounded to float64.

    Args:
        components: (B, \\*spatial) of integers with one to three spatial axes, components numbered
            from 1 and 0 elsewhere; or what `components` returns.
        spacing: the distance between voxels: one number, or one for each spatial axis; 1 by
            default.

    Returns:
        (B, \\*spatial) of int32, in the framework of the components.

    Raises:
        ValueError: a number of axes, a spacing or numbers out of range.
        TypeError: an argument of another kind.

    Arrays on a GPU are copied, computed on the CPU, and copied back.

    >>> import numpy as np, fastloss as fl
    >>> print(fl.voronoi(np.array([[1, 0, 0, 0, 2, 0]])))
    [[1 1 1 2 2 2]]
    """
    given = components.numbers if isinstance(components, Components) else components
    adapter, array = _borrowed(given, "components")
    if array.dtype not in INTEGERS or array.dtype == "bool":
        raise TypeError(f"components: expected integers, got {array.dtype}")
    shape = array.array.shape
    axes = _axes("components", shape)
    sizes = np.array(spacing_of(check_spacing(spacing), axes))
    relative = (*(1.0,) * (MOST_AXES - axes), *(sizes / sizes.min()).tolist())
    numbers = array.array
    if numbers.dtype != np.int32:
        low, high = (numbers.min(), numbers.max()) if numbers.size else (0, 0)
        if low < -(2**31) or high >= 2**31 - 1:
            raise ValueError(f"components: expected numbers below 2³¹ − 1, got {low} to {high}")
    numbers = np.ascontiguousarray(numbers, np.int32)
    grid = (shape[0], *(1,) * (MOST_AXES - axes), *shape[1:])
    found = new_array(shape, np.dtype(np.int32))
    backend = current_backend()
    for volume, to in zip(numbers.reshape(grid), found.reshape(grid), strict=True):
        backend.voronoi(volume, relative, to)
    return adapter.wrap(found, given)


def check_connectivity(connectivity: Any, axes: int) -> int:
    """6, 18 or 26: the same connectivity in three dimensions.

    Raises:
        ValueError: a number that there is not for so many axes.
        TypeError: no integer, and not None.
    """
    known = _CONNECTIVITIES[axes]
    if connectivity is None:
        return max(known.values())
    if isinstance(connectivity, bool) or not isinstance(connectivity, (int, np.integer)):
        raise TypeError(f"connectivity: expected an integer, got {connectivity!r}")
    if connectivity not in known:
        choices = " or ".join(map(str, known))
        raise ValueError(
            f"connectivity: expected {choices} for {axes} spatial axes, got {connectivity}"
        )
    return known[int(connectivity)]


def table_of(classes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The class of every number that a dtype has, uint8 or uint16; 0 of those not given."""
    table = np.zeros(1 << 8 * dtype.itemsize, np.uint16)
    table[: len(classes)] = classes
    return table


def _borrowed(array: Any, name: str) -> tuple[Adapter, Borrowed]:
    """The adapter of an array, and a view in CPU memory; TypeError for one that has no numbers."""
    adapter = adapter_of(array, name)
    found = adapter.borrow(array, name)
    if found.dtype not in FLOATS and found.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, bool or floating numbers, got {found.dtype}")
    if found.place is not None:
        return adapter, Borrowed(found.place.numpy(array), found.dtype)
    return adapter, found


def _axes(name: str, shape: tuple[int, ...]) -> int:
    axes = len(shape) - 1
    if not 1 <= axes <= MOST_AXES:
        raise ValueError(
            f"{name}: expected (batch, *spatial) with one to {MOST_AXES} spatial axes, got shape "
            f"{shape}"
        )
    return axes


def _indices(array: Borrowed, ignore_index: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Class indices in C order, and the class of each index."""
    numbers = array.array
    if array.dtype == "bool":
        numbers = numbers.view(np.uint8)
    elif array.dtype == "bfloat16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    elif array.dtype == "float16":
        numbers = numbers.astype(np.float32)
    ignored = None if ignore_index is None else numbers == ignore_index
    if array.dtype in ("bool", "uint8"):
        classes = np.arange(256)
        if ignore_index is not None and 0 <= ignore_index < 256:
            classes[ignore_index] = 0
        return np.ascontiguousarray(numbers), table_of(classes, np.dtype(np.uint8))
    kept = numbers if ignored is None else np.where(ignored, numbers.dtype.type(0), numbers)
    low, high = (kept.min(), kept.max()) if kept.size else (0, 0)
    if not (low >= 0 and high <= MOST_LABEL):  # NaN too
        raise ValueError(f"labels: expected numbers in [0, {MOST_LABEL}], got {low} to {high}")
    dtype = np.dtype(np.uint8 if high < 255 else np.uint16)
    found = np.empty(kept.shape, dtype)
    lines = (kept.shape[0], *(1,) * (MOST_AXES + 1 - kept.ndim), *kept.shape[1:])
    size = int(high) + 1
    fractions = current_backend().class_indices(kept.reshape(lines), size, found.reshape(lines))
    if fractions:
        plural = "label is" if fractions == 1 else "labels are"
        raise ValueError(f"labels: expected whole numbers, but {fractions} {plural} not")
    return found, table_of(np.arange(size), dtype)
