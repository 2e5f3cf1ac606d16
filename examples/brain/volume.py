"""The training brain: the MNI152 template that nilearn ships, its tissues and patches of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

CLASSES = ("other", "grey matter", "white matter")
SPACING = (1.0, 1.0, 1.0)
"""The edges of a voxel in mm."""
# The template is symmetric: a network that trains on the left hemisphere has seen the right one. A
# coronal slab has no mirror image.
HELD_OUT_MM = (-44, -12)


@dataclass(frozen=True, eq=False)
class Brain:
    """A T1 volume (left to right, back to front, bottom to top) of 1 mm voxels, and its labels."""

    image: np.ndarray
    """T1, float32, of mean 0 and variance 1 over the brain."""
    labels: np.ndarray
    """uint8: an index into `CLASSES` for each voxel."""
    held_out: slice
    """The coronal slab along the second axis that is excluded from training."""

    @property
    def parts(self) -> tuple[slice, slice]:
        """The parts behind and in front of the held-out slab, along the second axis."""
        return slice(0, self.held_out.start), slice(self.held_out.stop, self.image.shape[1])

    @property
    def largest_patch(self) -> int:
        """The longest edge of a cube that fits into both parts."""
        width, _, height = self.image.shape
        return min(width, height, *(part.stop - part.start for part in self.parts))


def load_brain() -> Brain:
    """The template's T1 and the likelier of its tissue maps, cropped to the brain. No download."""
    from nilearn import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn names the template's version at each call
        template = datasets.load_mni152_template(resolution=1)
        grey_map = datasets.load_mni152_gm_template(resolution=1)
        white_map = datasets.load_mni152_wm_template(resolution=1)
    image = template.get_fdata(dtype=np.float32)
    grey = grey_map.get_fdata(dtype=np.float32)
    white = white_map.get_fdata(dtype=np.float32)
    labels = np.stack([1 - grey - white, grey, white]).argmax(axis=0).astype(np.uint8)

    inside = image > 0
    box = tuple(
        slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(inside | (labels > 0))
    )
    image, labels, inside = image[box], labels[box], inside[box]
    image = (image - image[inside].mean()) / image[inside].std()
    first = round(float(template.affine[1, 3])) + box[1].start
    held_out = slice(HELD_OUT_MM[0] - first, HELD_OUT_MM[1] - first)
    return Brain(np.ascontiguousarray(image), np.ascontiguousarray(labels), held_out)


def planes(brain: Brain) -> list[tuple[int, int]]:
    """Axis and index of the planes to show: axial, coronal in the held-out slab, sagittal."""
    width, _, height = brain.image.shape
    held_out = (brain.held_out.start + brain.held_out.stop) // 2
    # The sagittal plane is off the middle, where the hemispheres meet.
    return [(2, height // 2), (1, held_out), (0, width // 2 - width // 8)]


class Patches:
    """Random cubes around grey and white matter outside the held-out slab, mirrored at random."""

    def __init__(self, brain: Brain, size: int, seed: int) -> None:
        self.brain = brain
        self.size = size
        self.rng = np.random.default_rng(seed)
        tissue = brain.labels > 0
        tissue[:, brain.held_out] = False
        self.centres = np.argwhere(tissue)

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels, each (count, 1, size, size, size)."""
        pairs = [self._one() for _ in range(count)]
        images, labels = (np.stack(arrays)[:, None] for arrays in zip(*pairs, strict=True))
        return images, labels

    def _one(self) -> tuple[np.ndarray, np.ndarray]:
        centre = self.centres[self.rng.integers(len(self.centres))]
        behind, front = self.brain.parts
        width, _, height = self.brain.image.shape
        limits = (slice(0, width), behind if centre[1] < behind.stop else front, slice(0, height))
        cube = []
        for middle, limit in zip(centre, limits, strict=True):
            start = int(np.clip(middle - self.size // 2, limit.start, limit.stop - self.size))
            cube.append(slice(start, start + self.size))
        flip = tuple(slice(None, None, self.rng.choice([-1, 1])) for _ in range(3))
        return self.brain.image[tuple(cube)][flip], self.brain.labels[tuple(cube)][flip]
