"""Brains: the MNI152 template that nilearn ships, bent, blurred by noise, another in each case."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from fastloss.compare.data import BadData, Volume, normalised
from fastloss.compare.phantom import waves

CLASSES = ("background", "grey matter", "white matter")
RESOLUTION = 3
"""Edge of a voxel in mm."""
BEND = 7.0
"""mm by which a point moves, about."""
NOISE = 0.08


@dataclass(frozen=True)
class Brain:
    """Cases of one anatomy: what differs is its shape, the bias field and the noise."""

    cases: int = 12
    seed: int = 0
    channels: int = 1
    classes: tuple[str, ...] = CLASSES
    problems: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"brain{i:03d}" for i in range(self.cases))

    def load(self, name: str) -> Volume:
        image, labels = _brain([self.seed, self.names.index(name)])
        return Volume(name, normalised(image)[None], labels, (float(RESOLUTION),) * 3)

    def describe(self) -> dict[str, Any]:
        return {"kind": "brain", "cases": self.cases, "seed": self.seed}


def check_packages() -> None:
    """BadData: nilearn or nibabel is not installed."""
    for package in ("nilearn", "nibabel"):
        if not find_spec(package):
            raise BadData(
                f"--data brain needs the package {package}: pip install 'fastloss[bench]'; "
                "--data phantom needs none"
            )


@lru_cache(maxsize=1)
def _template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1 from 0 to 1, grey and white matter; axes from bottom to top, back to front, right."""
    from nilearn import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the template's version at each call
        images = [
            load(resolution=RESOLUTION)
            for load in (
                datasets.load_mni152_template,
                datasets.load_mni152_gm_template,
                datasets.load_mni152_wm_template,
            )
        ]
    t1, grey, white = (image.get_fdata(dtype=np.float32).T for image in images)
    box = tuple(
        slice(max(0, int(where.min()) - 2), int(where.max()) + 3) for where in np.nonzero(t1 > 0)
    )
    return t1[box] / max(float(t1.max()), 1e-6), grey[box], white[box]


def _brain(seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """An image and its label map, (D, H, W)."""
    from scipy.ndimage import map_coordinates  # nilearn needs scipy, too

    rng = np.random.default_rng(seed)
    parts = _template()
    shape = parts[0].shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)
    mm = grid * RESOLUTION
    bend = BEND / RESOLUTION * np.stack([waves(rng, mm, 110.0) for _ in range(3)])
    middle = np.array(shape).reshape(3, 1, 1, 1) / 2
    size = rng.uniform(0.93, 1.07, (3, 1, 1, 1))
    places = (grid - middle) * size + middle + bend
    t1, grey, white = (map_coordinates(part, places, order=1, mode="constant") for part in parts)
    labels = np.stack([1 - grey - white, grey, white]).argmax(axis=0).astype(np.uint8)
    image = t1 * (1 + 0.15 * waves(rng, mm, 200.0)) + rng.normal(0, NOISE, shape)
    return image.astype(np.float32), labels
