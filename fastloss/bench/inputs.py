"""One input to all implementations: labels, and logits as a network might give them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.bench.errors import BadArgument
from fastloss.bench.volumes import Volume, load_volume

DTYPES = ("float32", "float16", "bfloat16", "float64")

SIZES: dict[str, tuple[int, int, int]] = {
    "B2C2-96": (2, 2, 96),
    "B1C4-128": (1, 4, 128),
    "B1C14-128": (1, 14, 128),
    "B1C105-64": (1, 105, 64),
}
"""Batch, classes and edge of the volumes that the library is compared on."""


@dataclass(frozen=True, eq=False)
class Case:
    """Logits (B, C, D, H, W) of the named dtype, and a target for them.

    The target is a label map (B, D, H, W) in the smallest unsigned dtype, or dense (B, C, D, H,
    W); the peers take label maps alone.
    """

    volume: str
    logits: np.ndarray
    target: np.ndarray
    dtype: str

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def count(self) -> int:
        """The number of logits."""
        return int(self.logits.size)

    @property
    def nbytes(self) -> int:
        """The bytes of the logits."""
        return int(self.logits.nbytes)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of this name; bfloat16 is that of the ml_dtypes package."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise BadArgument(
            "--dtype", "bfloat16 arrays need the ml_dtypes package: pip install ml_dtypes"
        ) from None
    dtype: np.dtype[Any] = np.dtype(bfloat16)
    return dtype


def make_case(volume: Volume, *, batch: int = 1, dtype: str = "float32", seed: int = 0) -> Case:
    """Logits that favour the right class, unsure at its borders and now and then wrong.

    Every sample shows the same volume, every other one mirrored, with noise of its own.
    """
    classes, size = volume.classes, volume.labels.shape
    rng = np.random.default_rng(seed)
    logits = np.empty((batch, classes, *size), numpy_dtype(dtype))
    labels = np.empty((batch, *size), np.min_scalar_type(classes - 1))
    # Noise that varies over about 8 voxels errs in patches, as networks do.
    upsample = [_linear_interpolation(n, n // 8 + 2) for n in size]
    for b in range(batch):
        labels[b] = volume.labels[:: -1 if b % 2 else 1]
        for c in range(classes):
            score = rng.standard_normal([m.shape[1] for m in upsample], np.float32) * 1.5
            for matrix in upsample:
                score = np.tensordot(score, matrix, axes=(0, 1))
            score += 0.5 * rng.standard_normal(size, np.float32)
            score += 7 * _blur((labels[b] == c).astype(np.float32)) - 2
            logits[b, c] = score
    return Case(volume.name, logits, labels, dtype)


def phantom_case(
    size: int | tuple[int, int, int],
    classes: int,
    *,
    batch: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> Case:
    """The phantom of this size, as a case."""
    edges = (size, size, size) if isinstance(size, int) else size
    volume = load_volume("phantom", edges, classes)
    return make_case(volume, batch=batch, dtype=dtype, seed=seed)


def with_dtype(case: Case, dtype: str) -> Case:
    """The same logits in another dtype."""
    return replace(case, logits=case.logits.astype(numpy_dtype(dtype)), dtype=dtype)


def with_label_dtype(case: Case, dtype: str) -> Case:
    """The same label map in another dtype."""
    return replace(case, target=case.target.astype(dtype))


def channels_last(case: Case) -> Case:
    """The same logits, with the classes of a voxel side by side in memory."""
    memory = np.ascontiguousarray(np.moveaxis(case.logits, 1, -1))
    return replace(case, logits=np.moveaxis(memory, -1, 1))


def dense(case: Case, dtype: str = "float32") -> Case:
    """The same target, one-hot."""
    target = np.empty(case.logits.shape, numpy_dtype(dtype))
    for c in range(case.classes):
        target[:, c] = case.target == c
    return replace(case, target=target)


def save_case(case: Case, folder: Path) -> None:
    """Write a case where `load_case` of another process finds it."""
    logits = case.logits.view(np.uint16) if case.dtype == "bfloat16" else case.logits
    np.save(folder / "logits.npy", logits)
    np.save(folder / "target.npy", case.target)
    (folder / "case.txt").write_text(f"{case.dtype}\n{case.volume}", encoding="utf-8")


def load_case(folder: Path) -> Case:
    dtype, volume = (folder / "case.txt").read_text(encoding="utf-8").split("\n", 1)
    logits = np.load(folder / "logits.npy")
    if dtype == "bfloat16":
        logits = logits.view(numpy_dtype(dtype))
    return Case(volume, logits, np.load(folder / "target.npy"), dtype)


def size_text(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size)) if len(set(size)) > 1 or prod(size) == 1 else f"{size[0]}³"


def _linear_interpolation(fine: int, coarse: int) -> np.ndarray:
    """The matrix (fine, coarse) that resamples an axis."""
    position = np.linspace(0, coarse - 1.001, fine)
    left = position.astype(int)
    matrix = np.zeros((fine, coarse), np.float32)
    matrix[np.arange(fine), left] = 1 - (position - left)
    matrix[np.arange(fine), left + 1] = position - left
    return matrix


def _blur(field: np.ndarray) -> np.ndarray:
    """The mean over 3 voxels along every axis."""
    for axis in range(field.ndim):
        source = np.moveaxis(field, axis, 0)
        total = source.copy()
        total[1:] += source[:-1]
        total[:-1] += source[1:]
        field = np.moveaxis(total, 0, axis) / np.float32(3)
    return field
