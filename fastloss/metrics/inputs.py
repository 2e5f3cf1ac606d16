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
    """Which indices make up each class, (classes, indices) of bool. The last index is that of no
    class: of voxels that `Pair.counted` leaves out, where the reference has it."""


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
    overlapping: bool = False
    """Whether the classes are masks that may overlap."""

    @property
    def batch(self) -> int:
        return len(self.groups[0].prediction)


def read_pair(
    prediction: Any,
    reference: Any,
    *,
    classes: Any = None,
    include_background: bool | None = None,
    activation: str | None = None,
    ignore_index: int | None = None,
    mask: Any = None,
    spacing: Any = None,
) -> Pair:
    """See `fastloss.metrics.evaluate` for the arguments and errors."""
    predicted, true = _borrowed(prediction, "prediction"), _borrowed(reference, "reference")
    if activation is None:
        activation = "labels" if _alike(predicted.array.shape, true.array.shape) else "softmax"
    check_choice("activation", activation, ACTIVATIONS)
    ignored_label = _ignored_label(ignore_index)
    sizes = check_spacing(spacing)
    shape = predicted.array.shape
    if activation == "labels":
        spatial, dense = _space_of_labels(shape, true.array.shape, sizes), False
    else:
        spatial, dense = _space_of_scores(shape, true.array.shape, activation)
    grid = (*(1,) * (MOST_AXES - len(spatial)), *spatial)
    spacings = (*(1.0,) * (MOST_AXES - len(spatial)), *spacing_of(sizes, len(spatial)))
    volumes = (shape[0], *grid)
    counted = _counted(mask, volumes, (shape[0], *spatial))
    overlapping = activation in ("sigmoid", "none")
    if overlapping:
        groups, names, ignored = _masks(
            predicted, true, activation, classes, include_background, ignored_label, volumes, dense
        )
    else:
        scores = activation == "softmax"
        groups, names, ignored = _label_maps(
            predicted,
            true,
            scores,
            classes,
            bool(include_background),
            ignored_label,
            volumes,
            dense,
        )
    if ignored is not None:
        counted = ~ignored if counted is None else counted & ~ignored
    return Pair(groups, names, len(spatial), spacings, counted, overlapping)


def _alike(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether these are the shapes of two label maps: the same but for a channel axis of one."""
    return other in (shape, _without_channel(shape)) or _without_channel(other) == shape


def _without_channel(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (shape[0], *shape[2:]) if len(shape) > 2 and shape[1] == 1 else None


def _space_of_labels(
    shape: tuple[int, ...], other: tuple[int, ...], spacing: Any
) -> tuple[int, ...]:
    if not _alike(shape, other):
        raise ValueError(
            f"reference: expected shape {shape}, that of the prediction, but for a channel axis of "
            f"one, got {other}"
        )
    spatial = min(shape, other, key=len)[1:]
    channel = shape == other and _without_channel(shape) is not None
    if channel and not (isinstance(spacing, tuple) and len(spacing) >= len(spatial)):
        spatial = spatial[1:]  # unless there is a spacing along that axis
    if not 1 <= len(spatial) <= MOST_AXES:
        raise ValueError(
            f"prediction: expected a label map (batch, *spatial) with one to {MOST_AXES} spatial "
            f"axes, got shape {shape}; scores of classes or masks need activation="
        )
    return spatial


def _space_of_scores(
    shape: tuple[int, ...], other: tuple[int, ...], activation: str
) -> tuple[tuple[int, ...], bool]:
    """The spatial axes, and whether the reference is dense."""
    spatial = shape[2:]
    if not 1 <= len(spatial) <= MOST_AXES:
        raise ValueError(
            f"prediction: expected (batch, classes, *spatial) with one to {MOST_AXES} spatial "
            f"axes, got shape {shape}"
        )
    least = 2 if activation == "softmax" else 1
    if shape[1] < least:
        hint = "; one channel is a mask: activation='sigmoid' or 'none'" if shape[1] else ""
        raise ValueError(
            f"prediction: expected at least {least} channels for activation={activation!r}, got "
            f"shape {shape}{hint}"
        )
    dense = other == shape
    if not dense and other not in ((shape[0], *spatial), (shape[0], 1, *spatial)):
        raise ValueError(
            f"reference: expected shape {(shape[0], *spatial)} or {shape} for a prediction of "
            f"shape {shape}, got {other}"
        )
    return spatial, dense


def _ignored_label(ignore_index: Any) -> int | None:
    if ignore_index is None:
        return None
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"ignore_index: expected an integer or None, got {ignore_index!r}")
    return int(ignore_index)


def _borrowed(array: Any, name: str) -> Borrowed:
    """A view in CPU memory; TypeError for one that is not of numbers."""
    if getattr(array, "requires_grad", False):
        array = array.detach()  # a metric has no gradient that could be lost
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
    """One class for each voxel."""
    given = None if dense else _numbers(true)
    if scores:
        if predicted.dtype not in FLOATS:
            raise TypeError(f"prediction: expected floating scores, got {predicted.dtype}")
        size = predicted.array.shape[1]
        names, labels = read_classes(classes, size, include_background, channels=size)
    else:
        numbers = _numbers(predicted)
        assert given is not None
        most = max(_largest(numbers, "prediction"), _largest(given, "reference", ignore_index), 1)
        names, labels = read_classes(classes, 1 + most, include_background)
        if classes is None or isinstance(classes, Mapping):
            size = 1 + max(most, *(label for each in labels for label in each))
        else:
            size = len(classes) if isinstance(classes, Sequence) else int(classes)
    if size > MOST_LABEL + 1:
        raise ValueError(f"classes: expected labels up to {MOST_LABEL}, got {size - 1}")
    if scores:
        indices = _likeliest(predicted, volumes)
    else:
        hint = "; scores need activation=" if predicted.dtype in FLOATS else ""
        indices = _indices(numbers, size, None, "prediction", volumes, hint)
    ignored = None
    if given is not None:
        grid = given.reshape(volumes)
        if ignore_index is not None:
            ignored = grid == ignore_index
        known = _indices(grid, size, ignored, "reference", volumes)
    else:
        known = _likeliest(true, volumes)
        if ignore_index is not None:
            if 0 <= ignore_index < size:
                ignored = known == ignore_index
            else:
                ignored = (_numbers(true) == ignore_index).any(axis=1).reshape(volumes)
            known[ignored] = size
    members = np.zeros((len(labels), size + 1), bool)
    for row, each in zip(members, labels, strict=True):
        row[list(each)] = True
    return (Group(indices, known, members),), names, ignored


def _likeliest(scores: Borrowed, volumes: tuple[int, ...]) -> np.ndarray:
    """The class of the largest score, of uint8 or uint16."""
    array, dtype = scores.array, scores.dtype
    if dtype not in FLOATS:
        array, dtype = _numbers(scores).astype(np.float32), "float32"
    size = array.shape[1]
    found = np.empty(volumes, np.uint8 if size < 256 else np.uint16)
    current_backend().likeliest(array.reshape(volumes[0], size, *volumes[1:]), dtype, found)
    return found


def _masks(
    predicted: Borrowed,
    true: Borrowed,
    activation: str,
    classes: Any,
    include_background: bool | None,
    ignore_index: int | None,
    volumes: tuple[int, ...],
    dense: bool,
) -> _Read:
    """Channels that are masks, each for itself."""
    channels = predicted.array.shape[1]
    first = include_background is None or include_background or channels == 1
    names, labels = read_classes(classes, channels, first, channels=channels)
    numbers, threshold = _numbers(predicted), 0 if activation == "sigmoid" else 0.5
    given = _numbers(true)
    ignored = None
    if dense:
        if ignore_index is not None:
            ignored = (given == ignore_index).any(axis=1).reshape(volumes)
    else:
        grid = given.reshape(volumes)
        if ignore_index is not None:
            ignored = grid == ignore_index
        # The mask of a single channel is label 1.
        known = _indices(grid, max(channels, 2), ignored, "reference", volumes)
    members = np.array([[False, True, False]])
    groups = []
    for each in labels:
        ours = np.zeros(volumes, bool)
        for channel in each:
            ours |= (numbers[:, channel] > threshold).reshape(volumes)
        theirs = np.zeros(volumes, bool)
        for channel in each:
            if dense:
                theirs |= (given[:, channel] > 0.5).reshape(volumes)
            else:
                theirs |= known == (1 if channels == 1 else channel)
        groups.append(Group(ours.view(np.uint8), theirs.view(np.uint8), members))
    return tuple(groups), names, ignored


def _largest(numbers: np.ndarray, name: str, ignore_index: int | None = None) -> int:
    """The largest label, at least 0."""
    if not numbers.size:
        return 0
    largest = numbers.max().item()
    if ignore_index is not None and largest == ignore_index:
        others = numbers[numbers != ignore_index]
        largest = others.max().item() if others.size else 0
    if not 0 <= largest <= MOST_LABEL:
        if largest < 0:
            return 0
        raise ValueError(f"{name}: expected labels up to {MOST_LABEL}, got {largest}")
    return int(largest)


def _indices(
    numbers: np.ndarray,
    size: int,
    ignored: np.ndarray | None,
    name: str,
    volumes: tuple[int, ...],
    hint: str = "",
) -> np.ndarray:
    """Labels as class indices, of uint8 or uint16; ``size`` for those that are ignored.

    They are the labels themselves where those are class indices already.

    Raises:
        ValueError: labels with a fraction, or outside [0, size) and not ignored.
    """
    numbers = numbers.reshape(volumes)
    dtype = np.dtype(np.uint8 if size < 256 else np.uint16)
    as_they_are = ignored is None and numbers.dtype == dtype and numbers.flags.c_contiguous
    if as_they_are and _below(numbers, size):
        return numbers
    if numbers.dtype == np.float16:
        numbers = numbers.astype(np.float32)
    found = np.empty(volumes, dtype)
    fractions = current_backend().class_indices(numbers, size, found)
    if fractions:
        plural = "label is" if fractions == 1 else "labels are"
        raise ValueError(f"{name}: expected whole numbers, but {fractions} {plural} not{hint}")
    if ignored is not None:
        found[ignored] = size
    if _below(found, size):
        return found
    bad = found == size
    if ignored is not None:
        bad &= ~ignored
    if bad.any():
        count = int(bad.sum())
        plural = "label is" if count == 1 else "labels are"
        first = numbers[bad][0]
        raise ValueError(
            f"{name}: expected labels in [0, {size}), but {count} {plural} not; the first is "
            f"{first}"
        )
    return found


def _below(indices: np.ndarray, size: int) -> bool:
    return not indices.size or bool(indices.max() < size)


def read_classes(
    classes: Any, found: int, include_background: bool, channels: int | None = None
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names of classes, and the labels that each unites.

    Args:
        found: how many there are where ``classes`` does not say.
        channels: how many there must be.
    """
    if classes is None:
        classes = found
    if isinstance(classes, Mapping):
        names = tuple(map(str, classes))
        labels = tuple(_labels(f"classes[{name!r}]", each) for name, each in classes.items())
        for name, each in zip(names, labels, strict=True):
            if channels is not None and each[-1] >= channels:
                raise ValueError(
                    f"classes[{name!r}]: expected labels in [0, {channels}), the channels of the "
                    f"prediction, got {each[-1]}"
                )
    elif isinstance(classes, Sequence) and not isinstance(classes, (str, bytes)):
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(
                "classes: expected a number of classes, their names, or names with labels, got "
                f"{classes!r}"
            )
        first = _first(len(classes), include_background, channels)
        names, labels = tuple(classes)[first:], tuple((i,) for i in range(first, len(classes)))
    elif isinstance(classes, (int, np.integer)) and not isinstance(classes, bool):
        if not 1 <= classes <= MOST_LABEL + 1:
            raise ValueError(f"classes: expected a number in [1, {MOST_LABEL + 1}], got {classes}")
        first = _first(int(classes), include_background, channels)
        labels = tuple((i,) for i in range(first, int(classes)))
        names = tuple(str(i) for (i,) in labels)
    else:
        raise TypeError(
            f"classes: expected a number of classes, their names, or names with labels, got "
            f"{classes!r}"
        )
    if not names:
        raise ValueError(f"classes: expected at least one class, got {classes!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"classes: expected names that differ, got {list(names)}")
    return names, labels


def _first(number: int, include_background: bool, channels: int | None) -> int:
    """The first class that is evaluated, of so many."""
    if channels is not None and number != channels:
        raise ValueError(
            f"classes: expected {channels}, one for each channel of the prediction, got {number}"
        )
    return 0 if include_background or number == 1 else 1


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
