"""Exact Euclidean distances: of masks, and signed ones to the boundaries of classes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from fastloss.arrays import FLOATS, INTEGERS
from fastloss.backends import current_backend
from fastloss.backends.distances import CONVENTIONS
from fastloss.borrowed import Borrowed
from fastloss.fields import spacing_of
from fastloss.frameworks import Adapter, adapter_of, borrow
from fastloss.frameworks.memory import new_array
from fastloss.options import check_choice, check_spacing

MOST_AXES = 3
MOST_CLASSES = 65535


def distance_transform(
    mask: Any,
    *,
    spacing: Any = None,
    max_distance: float | None = None,
    batch_axes: int = 0,
    out: Any = None,
) -> Any:
    """The distance of every voxel to the nearest one that is 0, in float32.

    It is exact but for the rounding of float32: 0 where the mask is 0, and infinite in a volume
    without a 0. SciPy's ``distance_transform_edt`` has the same convention.

    Args:
        mask: (\\*batch, \\*spatial) with one to three spatial axes, of any numbers or bool; what is
            not 0 is inside. NumPy, PyTorch, CuPy, or another array that DLPack passes on.
        spacing: the distance between voxels: one number, or one for each spatial axis; 1 by
            default.
        max_distance: larger distances become this one, which saves time.
        batch_axes: how many axes of ``mask`` come before the spatial ones.
        out: a float32 array of the mask's shape that takes the result.

    Returns:
        Distances in the mask's shape and framework, or ``out``.

    Raises:
        ValueError: a number of axes, spacing or ``max_distance`` out of range, an ``out`` of
            another shape.
        TypeError: an argument of another kind; an ``out`` of another dtype.

    Arrays on a GPU stay there: the work is queued on the current stream, and nothing synchronises.

    Source: Felzenszwalb & Huttenlocher 2012, "Distance transforms of sampled functions", for the
    decomposition by axes.

    >>> import numpy as np, fastloss as fl
    >>> print(fl.distance_transform(np.array([0, 1, 1, 1, 0])))
    [0. 1. 2. 1. 0.]
    >>> print(fl.distance_transform(np.array([[0, 1], [1, 1]]), spacing=(3, 4)))
    [[0. 4.]
     [3. 5.]]
    """
    adapter = adapter_of(mask, "mask")
    array = _borrowed(adapter, mask, "mask")
    if isinstance(batch_axes, bool) or not isinstance(batch_axes, (int, np.integer)):
        raise TypeError(f"batch_axes: expected an integer, got {batch_axes!r}")
    axes = array.array.ndim - batch_axes
    if batch_axes < 0 or not 1 <= axes <= MOST_AXES:
        raise ValueError(
            f"batch_axes: expected one to {MOST_AXES} spatial axes behind them, got {batch_axes} "
            f"for a mask of shape {array.array.shape}"
        )
    sizes, limit = _sizes(spacing, axes), _limit(max_distance)
    shape = array.array.shape
    if array.place is not None:
        into = None if out is None else _output(out, array, "mask", shape, "float32")
        made = _cuda().distance_transform(array, int(batch_axes), sizes, limit, into)
        return made if out is None else out
    volumes = (prod(shape[:batch_axes]), *(1,) * (MOST_AXES - axes), *shape[batch_axes:])
    inside = _masks(array).reshape(volumes)
    found, give = _result(adapter, mask, shape, "float32", out, "mask")
    current_backend().distance_transform(inside, sizes, limit, found.reshape(volumes))
    return give()


def signed_distance(
    labels: Any,
    classes: int,
    *,
    spacing: Any = None,
    convention: str = "kervadec",
    max_distance: float | None = None,
    dtype: str = "float32",
    out: Any = None,
) -> Any:
    """Distances to the boundary of every class of a label map, negative inside.

    With d the distance to the nearest voxel of the class, and inside the class to the nearest that
    is not of it:

    ==============  ========  =======  ==============================================
    ``convention``  inside    outside  a class of no voxel, or of all of a sample
    ==============  ========  =======  ==============================================
    "kervadec"      1 − d     d        0
    "exact"         −d        d        ∞, or −∞; with ``max_distance`` ± that
    "unsigned"      d         d        0
    ==============  ========  =======  ==============================================

    The 1 of "kervadec" is one, whatever the spacing, as in the code of its paper.

    Args:
        labels: (B, \\*spatial) with one to three spatial axes, of integers, bool, or whole floating
            numbers; labels outside [0, classes) are of no class.
        classes: C, from 1 to 65535.
        spacing: as in `distance_transform`.
        convention: see the table.
        max_distance: d is clamped to it, which saves time.
        dtype: "float32" or "float16".
        out: an array of the result's shape and dtype that takes it.

    Returns:
        (B, C, \\*spatial) in the labels' framework, or ``out``.

    Raises:
        ValueError: labels with a fraction, a number of axes or classes, spacing or ``max_distance``
            out of range, an unknown convention or dtype, an ``out`` of another shape.
        TypeError: an argument of another kind; an ``out`` of another dtype.

    Arrays on a GPU stay there: the work is queued on the current stream, and nothing synchronises.
    Labels with a fraction are thus not reported; they are of no class.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation".

    >>> import numpy as np, fastloss as fl
    >>> print(fl.signed_distance(np.array([[0, 0, 1, 1]]), 2))
    [[[-1.  0.  1.  2.]
      [ 2.  1.  0. -1.]]]
    """
    adapter = adapter_of(labels, "labels")
    array = _borrowed(adapter, labels, "labels")
    if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)):
        raise TypeError(f"classes: expected an integer, got {classes!r}")
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes: expected a number in [1, {MOST_CLASSES}], got {classes}")
    grid, options = _map_options(
        array, "labels", ("batch",), spacing, convention, max_distance, dtype
    )
    batch, *spatial = array.array.shape
    shape = (batch, int(classes), *spatial)
    if array.place is not None:
        into = None if out is None else _output(out, array, "labels", shape, dtype)
        made = _cuda().signed_distance(array, int(classes), *options, dtype, into)
        return made if out is None else out
    indices = _indices(array, int(classes)).reshape(batch, *grid)
    found, give = _result(adapter, labels, shape, dtype, out, "labels")
    current_backend().signed_distance(indices, 0, *options, found.reshape(batch, classes, *grid))
    return give()


def signed_of_masks(
    masks: Any,
    *,
    spacing: Any = None,
    convention: str = "kervadec",
    max_distance: float | None = None,
    dtype: str = "float32",
    out: Any = None,
) -> Any:
    """As `signed_distance`, of a mask for each class, (B, C, \\*spatial); they may overlap.

    Arrays on a GPU stay there.
    """
    adapter = adapter_of(masks, "masks")
    array = _borrowed(adapter, masks, "masks")
    grid, options = _map_options(
        array, "masks", ("batch", "classes"), spacing, convention, max_distance, dtype
    )
    shape = array.array.shape
    if array.place is not None:
        into = None if out is None else _output(out, array, "masks", shape, dtype)
        made = _cuda().signed_of_masks(array, *options, dtype, into)
        return made if out is None else out
    maps = prod(shape[:2])
    inside = _masks(array).reshape(maps, *grid)
    found, give = _result(adapter, masks, shape, dtype, out, "masks")
    current_backend().signed_distance(inside, 1, *options, found.reshape(maps, 1, *grid))
    return give()


def _map_options(
    array: Borrowed,
    name: str,
    leading: tuple[str, ...],
    spacing: Any,
    convention: str,
    max_distance: Any,
    dtype: str,
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], str, float]]:
    """The sizes of z, y and x, and the checked options of a signed map: spacing, convention, limit.

    ``leading``: the axes of ``array`` before the spatial ones.
    """
    spatial = array.array.shape[len(leading) :]
    if not 1 <= len(spatial) <= MOST_AXES or array.array.ndim < len(leading):
        axes = ", ".join((*leading, "*spatial"))
        raise ValueError(
            f"{name}: expected ({axes}) with one to {MOST_AXES} spatial axes, got shape "
            f"{array.array.shape}"
        )
    sizes, limit = _sizes(spacing, len(spatial)), _limit(max_distance)
    check_choice("convention", convention, CONVENTIONS)
    check_choice("dtype", dtype, ("float32", "float16"))
    return (*(1,) * (MOST_AXES - len(spatial)), *spatial), (sizes, convention, limit)


def _borrowed(adapter: Adapter, array: Any, name: str) -> Borrowed:
    """A view of the array; TypeError for one that is not of numbers."""
    found = adapter.borrow(array, name)
    if found.dtype not in FLOATS and found.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, bool or floating numbers, got {found.dtype}")
    return found


def _cuda() -> Any:
    # Where no array is on a GPU, nothing of it is imported.
    from fastloss.backends.cuda import distance

    return distance


def _masks(array: Borrowed) -> np.ndarray:
    """Where the numbers are not 0: 1 of uint8, in C order."""
    numbers = array.array
    if array.dtype == "bool":
        return np.ascontiguousarray(numbers).view(np.uint8)
    if array.dtype in ("float16", "bfloat16"):  # by their bits, which is quicker
        numbers = numbers.view(np.uint16) & np.uint16(0x7FFF)
    inside: np.ndarray = np.not_equal(numbers, 0, order="C")
    return inside.view(np.uint8)


def _indices(array: Borrowed, classes: int) -> np.ndarray:
    """Class indices of uint8 or uint16, in C order."""
    numbers = array.array
    dtype = np.uint8 if classes <= 255 else np.uint16
    if array.dtype in ("bool", "uint8") and dtype is np.uint8:
        return np.ascontiguousarray(numbers).view(np.uint8)
    if array.dtype == "bfloat16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    elif array.dtype == "float16":
        numbers = numbers.astype(np.float32)
    elif array.dtype == "bool":
        numbers = numbers.view(np.uint8)
    found = np.empty(numbers.shape, dtype)
    lines = (1,) * (MOST_AXES + 1 - numbers.ndim)
    fractions = current_backend().class_indices(
        numbers.reshape(numbers.shape[0], *lines, *numbers.shape[1:]),
        classes,
        found.reshape(numbers.shape[0], *lines, *numbers.shape[1:]),
    )
    if fractions:
        plural = "label is" if fractions == 1 else "labels are"
        raise ValueError(f"labels: expected whole numbers, but {fractions} {plural} not")
    return found


def _result(
    adapter: Adapter, like: Any, shape: tuple[int, ...], dtype: str, out: Any, name: str
) -> tuple[np.ndarray, Callable[[], Any]]:
    """An array in C order to write to, and a function that gives it to the caller."""
    if out is None:
        found = new_array(shape, np.dtype(dtype))
        return found, lambda: adapter.wrap(found, like)
    view = _output(out, adapter.borrow(like, name), name, shape, dtype)
    if view.array.flags.c_contiguous:
        return view.array, lambda: out
    found = new_array(shape, np.dtype(dtype))

    def give() -> Any:
        view.array[...] = found
        return out

    return found, give


def _output(out: Any, source: Borrowed, name: str, shape: tuple[int, ...], dtype: str) -> Borrowed:
    """A view of ``out``, which must fit and lie where the array ``name`` does."""
    view = borrow(out, "out", write=True)
    if view.array.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {view.array.shape}")
    if view.dtype != dtype:
        raise TypeError(f"out: expected {dtype}, got {view.dtype}")
    if _where(view) != _where(source):
        raise TypeError(
            f"out: expected an array in {_where(source)}, as {name} is measured there, got one in "
            f"{_where(view)}"
        )
    if np.shares_memory(view.array, source.array):
        raise ValueError(f"out: overlaps {name}, which would be overwritten")
    return view


def _where(view: Borrowed) -> str:
    place = view.place
    return "CPU memory" if place is None else f"the memory of CUDA device {place.ordinal}"


def _sizes(spacing: Any, axes: int) -> tuple[float, ...]:
    """The spacing of z, y and x; 1 along the axes that there are not."""
    return (*(1.0,) * (MOST_AXES - axes), *spacing_of(check_spacing(spacing), axes))


def _limit(max_distance: Any) -> float:
    if max_distance is None:
        return np.inf
    try:
        limit = float(max_distance)
    except (TypeError, ValueError):
        raise TypeError(f"max_distance: expected a number or None, got {max_distance!r}") from None
    if not 0 < limit < np.inf:
        raise ValueError(f"max_distance: expected a finite number above 0, got {max_distance!r}")
    return limit
