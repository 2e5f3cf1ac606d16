"""One input for all implementations: labels, and logits like a network's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.bench.errors import BadArgument
from fastloss.bench.phantom import phantom
from fastloss.bench.volumes import Volume, load_volume

DTYPES = ("float32", "float16", "bfloat16", "float64")

SIZES: dict[str, tuple[int, int, int]] = {
    "B2C2-96": (2, 2, 96),
    "B1C4-128": (1, 4, 128),
    "B1C14-128": (1, 14, 128),
    "B1C105-64": (1, 105, 64),
}
"""Batch, classes and edge of the volumes of the comparison."""


@dataclass(frozen=True)
class Spec:
    """The description of a case without its arrays, for lists of cases and rows of reports.

    The shape is (B, C, D, H, W), the layout "contiguous" or "channels_last". The target is the
    dtype of a label map, or that of dense targets after "dense ".
    """

    volume: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    target: str = "uint8"
    device: str = "cpu"

    @property
    def count(self) -> int:
        """The number of logits."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the logits."""
        return self.count * {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def title(self) -> str:
        batch, classes, *size = self.shape
        parts = [f"B{batch} C{classes} {size_text(tuple(size))}", self.dtype]
        if self.layout != "contiguous":
            parts.append("channels-last")
        if self.target != "uint8":
            parts.append(self.target if " " in self.target else f"{self.target} labels")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Case:
    """Logits, and a target for them: NumPy arrays, or tensors on the spec's device.

    The target is a label map (B, D, H, W) in the smallest unsigned dtype, or dense (B, C, D, H,
    W); the peers take only label maps.
    """

    spec: Spec
    logits: Any
    target: Any

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def classes(self) -> int:
        return self.spec.shape[1]

    @property
    def count(self) -> int:
        """The number of logits."""
        return self.spec.count

    @property
    def nbytes(self) -> int:
        """The bytes of the logits."""
        return self.spec.nbytes


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
    """Logits that favour the right class, uncertain at its borders and wrong now and then.

    Every sample shows the same volume, every other one mirrored, with independent noise.
    """
    classes, size = volume.classes, volume.labels.shape
    rng = np.random.default_rng(seed)
    logits = np.empty((batch, classes, *size), numpy_dtype(dtype))
    labels = np.empty((batch, *size), np.min_scalar_type(classes - 1))
    # Noise with a correlation length of about 8 voxels errs in patches, as networks do.
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
    spec = Spec(volume.name, logits.shape, dtype, target=labels.dtype.name)
    return Case(spec, logits, labels)


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


def device_case(spec: Spec, seed: int = 0) -> Case:
    """Tensors of this spec, of the phantom, made on its device.

    Logits favour the label, with noise. They are simpler than those of `make_case`, which would
    take minutes to fill a GPU.
    """
    import torch

    batch, classes, *spatial = spec.shape
    device = torch.device(spec.device)
    one = _phantom_labels(tuple(spatial), classes).to(device)
    labels = torch.stack([one if b % 2 == 0 else one.flip(0) for b in range(batch)])
    generator = torch.Generator(device).manual_seed(seed)
    last = spec.layout == "channels_last"
    logits = torch.empty(
        spec.shape,
        dtype=getattr(torch, spec.dtype),
        device=device,
        memory_format=torch.channels_last_3d if last else torch.contiguous_format,
    )
    for b in range(batch):  # a sample at a time, to save memory
        sample = torch.randn((classes, *spatial), generator=generator, device=device)
        favoured = torch.full((1, *spatial), 4.0, device=device)
        sample.scatter_add_(0, labels[b].long()[None], favoured)
        logits[b] = sample
    return Case(spec, logits, labels.to(getattr(torch, spec.target)))


@lru_cache(maxsize=4)
def _phantom_labels(size: tuple[int, int, int], classes: int) -> Any:
    import torch

    return torch.from_numpy(phantom(size, classes).astype("uint8"))


def with_dtype(case: Case, dtype: str) -> Case:
    """The same logits in another dtype."""
    spec = replace(case.spec, dtype=dtype)
    return replace(case, spec=spec, logits=case.logits.astype(numpy_dtype(dtype)))


def with_label_dtype(case: Case, dtype: str) -> Case:
    """The same label map in another dtype."""
    spec = replace(case.spec, target=dtype)
    return replace(case, spec=spec, target=case.target.astype(dtype))


def channels_last(case: Case) -> Case:
    """The same logits in channels-last layout."""
    memory = np.ascontiguousarray(np.moveaxis(case.logits, 1, -1))
    spec = replace(case.spec, layout="channels_last")
    return replace(case, spec=spec, logits=np.moveaxis(memory, -1, 1))


def dense(case: Case, dtype: str = "float32") -> Case:
    """The same target, one-hot."""
    target = np.empty(case.logits.shape, numpy_dtype(dtype))
    for c in range(case.classes):
        target[:, c] = case.target == c
    return replace(case, spec=replace(case.spec, target=f"dense {dtype}"), target=target)


def save_case(case: Case, folder: Path) -> None:
    """Write a case for `load_case` in another process."""
    logits = case.logits.view(np.uint16) if case.dtype == "bfloat16" else case.logits
    np.save(folder / "logits.npy", logits)
    np.save(folder / "target.npy", case.target)
    (folder / "spec.json").write_text(json.dumps(asdict(case.spec)), encoding="utf-8")


def load_case(folder: Path) -> Case:
    found = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    spec = Spec(**found | {"shape": tuple(found["shape"])})
    logits = np.load(folder / "logits.npy")
    if spec.dtype == "bfloat16":
        logits = logits.view(numpy_dtype(spec.dtype))
    return Case(spec, logits, np.load(folder / "target.npy"))


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
