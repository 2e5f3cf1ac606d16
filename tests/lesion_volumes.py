"""Volumes with lesions, for tests of losses per lesion."""

from __future__ import annotations

import numpy as np

CELLS, BLOBS = "voronoi", "components+background"
WEIGHT = {"equal": 0.0, "inverse_volume": -1.0, "inverse_sqrt_volume": -0.5}
"""Powers of a lesion's volume."""


def volume(
    seed: int, batch: int, classes: int, spatial: tuple[int, ...], density: float = 0.12
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and a label map of small lesions of which some touch."""
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(batch, classes, *spatial))
    y = rng.integers(1, max(classes, 2), (batch, *spatial))
    return x, np.where(rng.uniform(size=y.shape) < density, y, 0)


def stretches(rng: np.random.Generator, voxels: int, numbers: int, longest: int) -> np.ndarray:
    """Numbers below a limit, in stretches of 1 to ``longest`` voxels."""
    lengths = rng.integers(1, longest + 1, voxels)
    each: np.ndarray = np.repeat(rng.integers(0, numbers, voxels), lengths)[:voxels]
    return each
