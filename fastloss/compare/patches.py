"""Random patches of the training cases: the same in every training of a seed and fold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastloss.compare.data import Volume

ON_A_CLASS = 0.67
"""The share of patches around a voxel of a class that is drawn, each class as often."""
MOST_CENTRES = 20_000
"""How many voxels of a class are kept to draw from."""


class Patches:
    """Batches of patches of given volumes.

    Grey values are scaled and shifted, and noise is added. No patch is mirrored: a left organ would
    become a right one. Nothing that is drawn depends on the loss or the network.

    Args:
        volumes: the cases; those smaller than a patch are continued by their edges.
        patch: the size.
        batch: patches in a batch.
        seed: numbers that tell this stream of patches from others.
        classes: how many there are, the background among them.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        patch: tuple[int, int, int],
        batch: int,
        seed: Sequence[int],
        classes: int,
    ) -> None:
        self.patch, self.batch = patch, batch
        self.rng = np.random.default_rng(list(seed))
        self.volumes = [_at_least(volume, patch) for volume in volumes]
        self.centres = [_centres(volume.labels, classes) for volume in self.volumes]

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, channels, *patch) of float32 and labels (B, *patch) of int64."""
        pairs = [self._one() for _ in range(self.batch)]
        images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        return images, labels.astype(np.int64)

    def _one(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        number = int(rng.integers(len(self.volumes)))
        volume, centres = self.volumes[number], self.centres[number]
        shape = volume.labels.shape
        if centres and rng.random() < ON_A_CLASS:
            points = centres[rng.integers(len(centres))]
            middle = np.array(np.unravel_index(points[rng.integers(len(points))], shape))
            starts = middle - rng.integers(0, self.patch, 3)
        else:
            starts = np.array(
                [rng.integers(0, n - p + 1) for n, p in zip(shape, self.patch, strict=True)]
            )
        starts = np.clip(starts, 0, np.array(shape) - self.patch)
        box = tuple(slice(int(a), int(a) + n) for a, n in zip(starts, self.patch, strict=True))
        image, labels = volume.image[:, box[0], box[1], box[2]], volume.labels[box]
        size = (len(image), 1, 1, 1)
        scale, shift = rng.uniform(0.85, 1.15, size), rng.uniform(-0.1, 0.1, size)
        noise = rng.normal(0, rng.uniform(0, 0.1), image.shape)
        return (image * scale + shift + noise).astype(np.float32), labels


def _at_least(volume: Volume, patch: tuple[int, int, int]) -> Volume:
    widths = [(0, max(0, n - have)) for n, have in zip(patch, volume.labels.shape, strict=True)]
    if not any(after for _, after in widths):
        return volume
    return volume._replace(
        image=np.pad(volume.image, [(0, 0), *widths], mode="edge"),
        labels=np.pad(volume.labels, widths, mode="edge"),
    )


def _centres(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """For each class but the background that is there, where its voxels lie, or many of them."""
    flat = labels.ravel()
    found = [np.flatnonzero(flat == index) for index in range(1, classes)]
    return [where[:: 1 + len(where) // MOST_CENTRES] for where in found if len(where)]
