"""Predictions and references of any kind, brought to class indices."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import FLOATS, INTEGERS
from fastloss.backends import current_backend
from fastloss.borrowed import Borrowed, Place
from fastloss.fields import spacing_of
from fastloss.frameworks import adapter_of
from fastloss.metrics.classes import MOST_LABEL, members_of, read_classes, size_of
from fastloss.options import check_choice, check_spacing

MOST_AXES = 3
ACTIVATIONS = ("labels", "softmax", "sigmoid", "none")


class Group(NamedTuple):
    """Volumes of class indices, and the classes that are found in them."""

    prediction: Any
    """(B, z, y, x) of uint8 or uint16, in C order: an array of NumPy, or on a GPU `Volumes` of
    `fastloss.backends.cuda.metrics`."""
    reference: Any
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
    counted: Any
    """(B, z, y, x) of bool, where the groups are: voxels that count; None: all."""
    overlapping: bool = False
    """Whether the classes are masks that may overlap."""

    @property
    def batch(self) -> int:
        return len(self.groups[0].prediction)

    def here(self) -> Pair:
        """The same in CPU memory."""
        groups = tuple(Group(here(g.prediction), here(g.reference), g.members) for g in self.groups)
        counted = None if self.counted is None else here(self.counted).view(bool)
        return self._replace(groups=groups, counted=counted)


def here(volumes: Any) -> np.ndarray:
    """Volumes in CPU memory: themselves, or a copy."""
    found: np.ndarray = volumes if isinstance(volumes, np.ndarray) else volumes.numpy()
    return found


def backend_of(volumes: Any) -> Any:
    """What computes with them: the current backend; of a GPU that GPU."""
    return current_backend() if isinstance(volumes, np.ndarray) else volumes.metrics


def where(counted: Any, volumes: Any, other: Any) -> Any:
    """As `np.where`, wherever the arrays are; ``other`` may be one class index."""
    if not isinstance(volumes, np.ndarray):
        return volumes.where(counted, other)
    return np.where(counted, volumes, np.asarray(other, volumes.dtype))


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
    which = _mask(mask, (shape[0], *spatial))
    overlapping = activation in ("sigmoid", "none")
    if predicted.place is not None:
        from fastloss.metrics.on_gpu import read

        there = read(
            predicted,
            _at(predicted.place, true, reference),
            None if which is None else _at(predicted.place, which, mask),
            activation,
            classes,
            include_background,
            ignored_label,
            volumes,
            dense,
        )
        if there is not None:
            several = tuple(Group(*each) for each in there.groups)
            return Pair(several, there.names, len(spatial), spacings, there.counted, overlapping)
    predicted, true = _here(predicted, prediction), _here(true, reference)
    counted = None if which is None else _numbers(_here(which, mask)).reshape(volumes) != 0
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
    """A view, in CPU memory or on a GPU; TypeError for one that is not of numbers."""
    array = _detached(array)
    found = adapter_of(array, name).borrow(array, name)
    if found.dtype not in FLOATS and found.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, bool or floating numbers, got {found.dtype}")
    return found


def _detached(array: Any) -> Any:
    """A metric has no gradient that could be lost."""
    return array.detach() if getattr(array, "requires_grad", False) else array


def _here(found: Borrowed, array: Any) -> Borrowed:
    """In CPU memory."""
    if found.place is None:
        return found
    array = _detached(array)
    if found.dtype == "bfloat16":  # of which not every framework makes an array of NumPy
        return Borrowed(found.place.numpy(found.place.array(array, "float32")), "float32")
    return Borrowed(found.place.numpy(array), found.dtype)


def _at(place: Place, found: Borrowed, array: Any) -> Borrowed:
    """There, or else in CPU memory."""
    own = found.place
    same = type(own) is type(place) and own is not None and own.ordinal == place.ordinal
    return found if same and own is not None and own.stream == place.stream else _here(found, array)


def _numbers(array: Borrowed) -> np.ndarray:
    """The numbers as NumPy knows them."""
    if array.dtype == "bfloat16":
        found: np.ndarray = (array.array.astype(np.uint32) << 16).view(np.float32)
        return found
    if array.dtype == "bool":
        return array.array.view(np.uint8)
    return array.array


def _mask(mask: Any, shape: tuple[int, ...]) -> Borrowed | None:
    if mask is None:
        return None
    found = _borrowed(mask, "mask")
    if found.array.shape not in (shape, (shape[0], 1, *shape[1:])):
        raise ValueError(f"mask: expected shape {shape}, got {found.array.shape}")
    return found


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
        size = size_of(classes, labels, most)
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
    return (Group(indices, known, members_of(labels, size)),), names, ignored


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
