"""Pictures of a case: contours of reference and prediction on slices through an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastloss.distance import distance_transform
from fastloss.evaluation.files import (
    Case,
    LabelMap,
    Mismatch,
    axes_of,
    check_same_grid,
    find_image,
    read_image,
    read_label_map,
)

VIEWS = ("axial", "coronal", "sagittal")
REFERENCE, PREDICTION = (0, 200, 255), (255, 140, 0)
HEAT = (255, 60, 190)
"""Colours, told apart by people who see no red or no green, too."""
EDGE = 300
"""Pixels of the longer edge of a picture, at least."""
MARGIN = 15.0
"""Of surroundings on each side, in mm."""


class Picture(NamedTuple):
    view: str
    pixels: np.ndarray
    """(height, width, 3) of uint8."""


class Overlay(NamedTuple):
    pictures: tuple[Picture, ...]
    caption: str


def overlay(case: Case, labels: Sequence[int], images: Path | None = None) -> Overlay:
    """Three slices of a case through the voxel of a class that is farthest wrong.

    It is the wrong voxel with the largest distance to the mask that it should, or should not, be
    part of. Left is the patient's right, as radiologists have it; of a single slice there is one
    picture.

    Args:
        case: the files.
        labels: those that make up the class.
        images: a folder of grey images; without one for this case the labels are the background.

    Raises:
        Mismatch: files that cannot be read.
    """
    prediction, reference = read_label_map(case.prediction), read_label_map(case.reference)
    grey, note = _background(case, reference, images)
    turn = Turn(reference.affine, reference.voxels.ndim)
    spacing = turn.sizes(reference.spacing)
    wanted = list(labels)
    ours, theirs = (turn(np.isin(each.voxels, wanted)) for each in (prediction, reference))
    centre, caption = _farthest(ours, theirs, spacing)
    return Overlay(slices(turn(grey), ours, theirs, centre, spacing), caption + note)


class Turn:
    """Volumes of a file as radiologists see them, those of one slice as they are.

    Args:
        affine: that of the file.
        axes: how many a volume has, 2 or 3.
    """

    def __init__(self, affine: np.ndarray, axes: int) -> None:
        self.order, self.flips = ([0, 1], (1, 1)) if axes == 2 else _to_patient(affine)

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        steps = tuple(slice(None, None, step) for step in self.flips)
        found: np.ndarray = volume.transpose(self.order)[steps]
        return found

    def sizes(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """The spacing of the axes of the turned volume."""
        return tuple(spacing[axis] for axis in self.order)

    def place(self, index: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
        """Where a voxel of a volume of this shape then is."""
        turned = zip(self.order, self.flips, strict=True)
        return tuple(index[a] if step > 0 else shape[a] - 1 - index[a] for a, step in turned)


def slices(
    grey: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    centre: tuple[int, ...],
    spacing: tuple[float, ...],
    heat: np.ndarray | None = None,
    around: np.ndarray | None = None,
) -> tuple[Picture, ...]:
    """Three slices through a voxel, or the one that there is, cut to what they show.

    Args:
        grey, ours, theirs, heat: volumes as `draw` takes slices of them.
        centre: the voxel.
        spacing: of the axes.
        around: the mask that they show; by default both of ``ours`` and ``theirs``.
    """
    pictures = []
    around = ours | theirs if around is None else around
    flat = grey.ndim == 2
    for i in range(1 if flat else 3):
        axes = (0, 1) if flat else tuple(axis for axis in range(3) if axis != i)
        place: Any = tuple(slice(None) if flat or a != i else centre[a] for a in range(grey.ndim))
        box = _box(around[place], tuple(spacing[a] for a in axes), tuple(centre[a] for a in axes))
        pixels = draw(
            grey[place][box],
            ours[place][box],
            theirs[place][box],
            (spacing[axes[0]], spacing[axes[1]]),
            None if heat is None else heat[place][box],
        )
        pictures.append(Picture("in its plane" if flat else VIEWS[i], pixels))
    return tuple(pictures)


def _background(case: Case, reference: LabelMap, images: Path | None) -> tuple[np.ndarray, str]:
    """Grey in [0, 1], and a note on an image that is not shown."""
    note = ""
    if images is not None:
        path = find_image(images, case.name)
        try:
            if path is None:
                raise Mismatch("there is none")
            image = read_image(path)
            check_same_grid(image, reference, affine=False)
            return window(image.voxels), ""
        except Mismatch as error:
            reason = str(error).replace("the prediction", "the image")
            note = f" (no image: {reason})"
    return grey_of_labels(reference.voxels), note


def grey_of_labels(voxels: np.ndarray) -> np.ndarray:
    """Grey in [0, 1], another one for each label."""
    labels = voxels.astype(np.float32)
    largest = max(float(labels.max()), 1.0)
    return np.where(labels > 0, 0.25 + 0.35 * labels / largest, 0.08).astype(np.float32)


def window(image: np.ndarray) -> np.ndarray:
    """Grey from the first to the 99th percentile, of a sample of the voxels."""
    numbers = image.astype(np.float32)
    sample = numbers.ravel()[:: max(1, numbers.size // 100_000)]
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, (1, 99)) if len(sample) else (0.0, 1.0)
    scaled = (np.nan_to_num(numbers) - low) / max(high - low, 1e-12)
    found: np.ndarray = np.clip(scaled, 0, 1, out=scaled)
    return found


def _to_patient(affine: np.ndarray) -> tuple[list[int], tuple[int, ...]]:
    """How (z, y, x) becomes (superior to inferior, anterior to posterior, right to left)."""
    # Of x, y and z; the axes of an array come in the reverse order.
    directions = axes_of(affine)
    order, flips = [0, 0, 0], [1, 1, 1]
    for axis, (world, step) in enumerate(directions):
        row = 2 - world  # right-left is last, superior-inferior first
        order[row] = 2 - axis
        flips[row] = -step  # indices grow to the right, anterior or superior; rows go the other way
    return order, tuple(flips)


def _farthest(
    ours: np.ndarray, theirs: np.ndarray, spacing: Sequence[float]
) -> tuple[tuple[int, ...], str]:
    """The voxel farthest wrong, and what it is."""
    if not (ours.any() and theirs.any()):
        either = ours | theirs
        inside = distance_transform(np.pad(either, 1), spacing=tuple(spacing))
        inside = inside[(slice(1, -1),) * either.ndim]
        words = "missed: no voxel is predicted" if theirs.any() else "not in the reference"
        return _peak(inside), words if either.any() else "in neither file"
    found = []
    for one, other, words in ((ours, theirs, "too much"), (theirs, ours, "missed")):
        away = distance_transform(~other, spacing=tuple(spacing))
        away[~one] = 0
        place = _peak(away)
        found.append((float(away[place]), place, words))
    distance, place, words = max(found)
    if distance == 0:
        return place if ours[place] else _peak(ours.astype(np.float32)), "no voxel is wrong"
    return place, f"{words} by up to {distance:.3g} mm"


def _peak(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(values.argmax()), values.shape))


def _box(
    mask: np.ndarray, spacing: tuple[float, ...], centre: tuple[int, ...]
) -> tuple[slice, ...]:
    """Around a mask of two axes, with a margin."""
    found = []
    for axis in (0, 1):
        where = np.flatnonzero(mask.any(axis=1 - axis))
        low, high = (where[0], where[-1]) if len(where) else (centre[axis], centre[axis])
        margin = max(3, round(MARGIN / spacing[axis]))
        found.append(slice(max(0, int(low) - margin), int(high) + margin + 1))
    return tuple(found)


def draw(
    grey: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    spacing: tuple[float, float],
    heat: np.ndarray | None = None,
) -> np.ndarray:
    """A slice with both contours: thick that of the reference, thin that of the prediction.

    Args:
        grey: (rows, columns) in [0, 1].
        ours, theirs: masks of prediction and reference.
        spacing: of rows and columns; pixels are square.
        heat: (rows, columns) in [0, 1], laid over the grey: the colour `HEAT` where it is 1.
    """
    sizes = [n * step for n, step in zip(grey.shape, spacing, strict=True)]
    # Whole pixels for the finer axis, so that voxels are of one size.
    scale = max(1, round(EDGE / (max(sizes) / min(spacing)))) / min(spacing)
    rows, columns = (
        np.minimum((np.arange(max(1, round(size * scale))) + 0.5) / (scale * step), n - 0.5)
        for n, size, step in zip(grey.shape, sizes, spacing, strict=True)
    )
    grid = np.ix_(rows.astype(int), columns.astype(int))
    shade = np.repeat(255 * grey[grid][..., None], 3, axis=2)
    if heat is not None:
        over = heat[grid][..., None]
        shade = (1 - over) * shade + over * np.array(HEAT)
    pixels = shade.astype(np.uint8)
    edge = _contour(theirs[grid])
    pixels[_thicker(edge)] = REFERENCE
    for mask in (ours[grid], ours[grid] & ~_contour(ours[grid])):
        pixels[_contour(mask)] = PREDICTION
    return pixels


def _contour(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask beside one that is not."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    found: np.ndarray = mask & ~inner
    return found


def _thicker(mask: np.ndarray) -> np.ndarray:
    """With the pixels around."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    found = np.zeros_like(mask)
    for down in range(3):
        for right in range(3):
            found |= padded[down : down + h, right : right + w]
    return found
