"""Predictions and references of any kind, brought to class indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import FLOATS, INTEGERS
from fastloss.backends import current_backend
from fastloss.borrowed import Borrowed
from fastloss.fields import spacing_of
from fastloss.frameworks import adapter_of
from fastloss.options import check_choice, check_spacing

MOST_AXES = 3
MOST_LABEL = 65534
ACTIVATIONS = ("labels", "softmax", "sigmoid", "none")


class Group(NamedTuple):
    """Volumes of class indices, and the classes that are found in them."""

    prediction: np.ndarray
    """(B, z, y, x) of uint8 or uint16, in C order."""
    reference: np.ndarray
    members: np.ndarray
    """Which indices make up each class, (classes, indices) of bool."""


class Pair(NamedTuple):
    """A prediction and its reference, each a batch of volumes.

    Of label maps there is one group; of masks, which may overlap, one for each class.
    """

    groups: tuple[Group, ...]
    classes: tuple[str, ...]
    """Their names, in the order of the groups."""
    axes: int
    """The number of spatial axes: the last ones of z, y, x."""
    spacing: tuple[float, ...]
    """Of z, y and x; 1 along those that there are not."""
    counted: np.ndarray | None
    """(B, z, y, x) of bool: voxels that count; None: all."""

    @property
    def batch(self) -> int:
        return len(self.groups[0].prediction)


def read_pair(
    prediction: Any,
    reference: Any,
    *,
    classes: Any = None,
    include_background: bool = False,
    activation: str | None = None,
    ignore_index: int | None = None,
    mask: Any = None,
    spacing: Any = None,
) -> Pair:
    """See `fastloss.metrics.evaluate` for the arguments and errors."""
    predicted, true = _borrowed(prediction, "prediction"), _borrowed(reference, "reference")
    if activation is None:
        activation = "labels" if predicted.array.shape == true.array.shape else "softmax"
    check_choice("activation", activation, ACTIVATIONS)
    scores = activation != "labels"
    shape = predicted.array.shape
    spatial = shape[2:] if scores else shape[1:]
    if (scores and not 1 <= len(spatial) <= MOST_AXES) or not 1 <= len(spatial) <= MOST_AXES + 1:
        axes = "(batch, classes, *spatial)" if scores else "(batch, *spatial)"
        raise ValueError(
            f"prediction: expected {axes} with one to {MOST_AXES} spatial axes, got shape {shape}"
        )
    dense = scores and true.array.shape == shape and (shape[1] > 1 or activation != "softmax")
    if not scores and len(spatial) > 1 and spatial[0] == 1 and len(spatial) > _axes(spacing):
        # A channel axis of one, as label maps often have.
        spatial = spatial[1:]
    if len(spatial) > MOST_AXES:
        raise ValueError(
            f"prediction: expected (batch, *spatial) with one to {MOST_AXES} spatial axes, got "
            f"shape {shape}"
        )
    if not dense and true.array.shape not in ((shape[0], *spatial), (shape[0], 1, *spatial)):
        other = f" or {shape}" if scores else ""
        raise ValueError(
            f"reference: expected shape {(shape[0], *spatial)}{other} for a prediction of shape "
            f"{shape}, got {true.array.shape}"
        )
    grid = (*(1,) * (MOST_AXES - len(spatial)), *spatial)
    sizes = spacing_of(check_spacing(spacing), len(spatial))
    volumes = (shape[0], *grid)
    counted = _counted(mask, volumes, (shape[0], *spatial))
    if activation in ("sigmoid", "none"):
        groups, names, ignored = _masks(
            predicted, true, activation, classes, include_background, ignore_index, volumes, dense
        )
    else:
        groups, names, ignored = _label_maps(
            predicted, true, scores, classes, include_background, ignore_index, volumes, dense
        )
    if ignored is not None:
        counted = ~ignored if counted is None else counted & ~ignored
    spacings = (*(1.0,) * (MOST_AXES - len(spatial)), *sizes)
    return Pair(groups, names, len(spatial), spacings, counted)


def _axes(spacing: Any) -> int:
    """The least number of spatial axes that a leading axis of one cannot be one of."""
    several = check_spacing(spacing)
    return len(several) if isinstance(several, tuple) else MOST_AXES


def _borrowed(array: Any, name: str) -> Borrowed:
    """A view in CPU memory; TypeError for one that is not of numbers."""
    found = adapter_of(array, name).borrow(array, name)
    if found.dtype not in FLOATS and found.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, bool or floating numbers, got {found.dtype}")
    if found.place is not None:
        copy = found.place.numpy(array)
        return Borrowed(copy, found.dtype)
    return found


def _numbers(array: Borrowed) -> np.ndarray:
    """The numbers as NumPy knows them."""
    if array.dtype == "bfloat16":
        found: np.ndarray = (array.array.astype(np.uint32) << 16).view(np.float32)
        return found
    if array.dtype == "bool":
        return array.array.view(np.uint8)
    return array.array


def _counted(mask: Any, volumes: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray | None:
    if mask is None:
        return None
    found = _borrowed(mask, "mask")
    if found.array.shape not in (shape, (shape[0], 1, *shape[1:])):
        raise ValueError(f"mask: expected shape {shape}, got {found.array.shape}")
    counted: np.ndarray = _numbers(found).reshape(volumes) != 0
    return counted


_Read = tuple[tuple[Group, ...], tuple[str, ...], "np.ndarray | None"]


def _label_maps(
    predicted: Borrowed,
    true: Borrowed,
    scores: bool,
    classes: Any,
    include_background: bool,
    ignore_index: int | None,
    volumes: tuple[int, ...],
    dense: bool,
) -> _Read:
    backend = current_backend()
    if scores and predicted.dtype not in FLOATS:
        raise TypeError(f"prediction: expected floating scores, got {predicted.dtype}")
    channels = predicted.array.shape[1] if scores else None
    given = _numbers(true) if not scores or not dense else None
    if channels is None:
        numbers = _numbers(predicted)
        largest = _largest(numbers, "prediction"), _largest(given, "reference", ignore_index)
        found = 1 + max(largest)
    else:
        found = channels
    names, labels = _classes(classes, found, include_background)
    if channels is not None:
        beyond = max((label for each in labels for label in each), default=0)
        if beyond >= channels:
            raise ValueError(
                f"classes: expected labels in [0, {channels}), the classes of the prediction, got "
                f"{beyond}"
            )
        size = channels
    elif classes is not None and not isinstance(classes, Mapping):
        size = len(classes) if isinstance(classes, Sequence) else int(classes)
    else:
        size = max(found, 1 + max((label for each in labels for label in each), default=0))
    if size > MOST_LABEL + 1:
        raise ValueError(f"classes: expected labels up to {MOST_LABEL}, got {size - 1}")
    dtype = np.uint8 if size < 256 else np.uint16
    indices = np.empty(volumes, dtype), np.empty(volumes, dtype)
    if channels is not None:
        grid = predicted.array.reshape(volumes[0], channels, *volumes[1:])
        backend.likeliest(grid, predicted.dtype, indices[0])
    else:
        _indices(numbers, size, None, "prediction", indices[0])
    ignored = None
    if dense:
        backend.likeliest(_float(true).reshape(volumes[0], channels, *volumes[1:]), "float32",
                          indices[1])  # fmt: skip
        if ignore_index is not None:
            ignored = indices[1] == ignore_index
    else:
        assert given is not None
        grid = given.reshape(volumes)
        if ignore_index is not None:
            ignored = grid == ignore_index
        _indices(grid, size, ignored, "reference", indices[1])
    members = np.zeros((len(labels), size + 1), bool)
    for row, each in zip(members, labels, strict=True):
        row[list(each)] = True
    return (Group(*indices, members),), names, ignored


def _masks(
    predicted: Borrowed,
    true: Borrowed,
    activation: str,
    classes: Any,
    include_background: bool,
    ignore_index: int | None,
    volumes: tuple[int, ...],
    dense: bool,
) -> _Read:
    """Channels that are masks, each for itself."""
    channels = predicted.array.shape[1]
    names, labels = _classes(classes, channels, include_background or channels == 1)
    inside = _numbers(predicted) > (0 if activation == "sigmoid" else 0.5)
    given = _numbers(true)
    ignored = None
    if dense:
        if ignore_index is not None:
            ignored = (given == ignore_index).any(axis=1).reshape(volumes)
        masks = given > 0.5
    else:
        grid = given.reshape(volumes)
        if ignore_index is not None:
            ignored = grid == ignore_index
        masks = None
    members = np.array([[False, True]])
    groups = []
    for each in labels:
        if any(label >= channels for label in each):
            raise ValueError(f"classes: expected channels in [0, {channels}), got {max(each)}")
        ours = inside[:, list(each)].any(axis=1).reshape(volumes)
        if masks is not None:
            theirs = masks[:, list(each)].any(axis=1).reshape(volumes)
        else:
            known = (1,) if channels == 1 else each
            theirs = np.isin(grid, known)
        groups.append(
            Group(
                np.ascontiguousarray(ours).view(np.uint8),
                np.ascontiguousarray(theirs).view(np.uint8),
                members,
            )
        )
    return tuple(groups), names, ignored


def _float(array: Borrowed) -> np.ndarray:
    return _numbers(array).astype(np.float32, copy=False)


def _largest(numbers: np.ndarray, name: str, ignore_index: int | None = None) -> int:
    """The largest label, at least 0."""
    if not numbers.size:
        return 0
    largest = numbers.max()
    if ignore_index is not None and largest == ignore_index:
        others = numbers[numbers != ignore_index]
        largest = others.max() if others.size else 0
    if not 0 <= largest <= MOST_LABEL:
        if largest < 0:
            return 0
        raise ValueError(f"{name}: expected labels up to {MOST_LABEL}, got {largest}")
    return int(largest)


def _indices(
    numbers: np.ndarray, size: int, ignored: np.ndarray | None, name: str, out: np.ndarray
) -> None:
    """Labels as class indices; ``size`` for those that are ignored.

    Raises:
        ValueError: labels with a fraction, or outside [0, size) and not ignored.
    """
    if numbers.dtype == np.float16:
        numbers = numbers.astype(np.float32)
    fractions = current_backend().class_indices(numbers.reshape(out.shape), size, out)
    if fractions:
        plural = "label is" if fractions == 1 else "labels are"
        raise ValueError(f"{name}: expected whole numbers, but {fractions} {plural} not")
    bad = out == size
    if ignored is not None:
        bad &= ~ignored
    if bad.any():
        count = int(bad.sum())
        plural = "label is" if count == 1 else "labels are"
        first = numbers.reshape(out.shape)[bad][0]
        raise ValueError(
            f"{name}: expected labels in [0, {size}), but {count} {plural} not; the first is "
            f"{first}"
        )
    if ignored is not None:
        out[ignored] = size


def _classes(
    classes: Any, found: int, include_background: bool
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names of classes, and the labels that each unites."""
    if classes is None:
        classes = found
    if isinstance(classes, Mapping):
        names = tuple(map(str, classes))
        labels = tuple(_labels(f"classes[{name!r}]", each) for name, each in classes.items())
    elif isinstance(classes, Sequence) and not isinstance(classes, (str, bytes)):
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(
                "classes: expected a number of classes, their names, or names with labels, got "
                f"{classes!r}"
            )
        names, labels = tuple(classes), tuple((i,) for i in range(len(classes)))
        if not include_background:
            names, labels = names[1:], labels[1:]
    elif isinstance(classes, (int, np.integer)) and not isinstance(classes, bool):
        if not 1 <= classes <= MOST_LABEL + 1:
            raise ValueError(f"classes: expected a number in [1, {MOST_LABEL + 1}], got {classes}")
        first = 0 if include_background or classes == 1 else 1
        labels = tuple((i,) for i in range(first, int(classes)))
        names = tuple(str(i) for (i,) in labels)
    else:
        raise TypeError(
            f"classes: expected a number of classes, their names, or names with labels, got "
            f"{classes!r}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"classes: expected names that differ, got {list(names)}")
    return names, labels


def _labels(name: str, value: Any) -> tuple[int, ...]:
    several = value if isinstance(value, (list, tuple, set, frozenset, range)) else (value,)
    found = []
    for label in several:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise TypeError(f"{name}: expected a label or several, got {value!r}")
        if not 0 <= label <= MOST_LABEL:
            raise ValueError(f"{name}: expected labels in [0, {MOST_LABEL}], got {label}")
        found.append(int(label))
    if not found:
        raise ValueError(f"{name}: expected at least one label, got none")
    return tuple(sorted(set(found)))
