"""Label maps to measure on: a brain, a phantom, or any NIfTI file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.bench.errors import BadArgument
from fastloss.bench.phantom import phantom

BRAIN_CLASSES = ("outside", "other tissue", "grey matter", "white matter")


@dataclass(frozen=True, eq=False)
class Volume:
    """A label map (D, H, W) with labels in [0, classes)."""

    name: str
    labels: np.ndarray
    classes: int
    note: str = ""


def default_volume() -> str:
    """The MNI brain if nilearn and nibabel are installed, else the phantom."""
    return "brain" if find_spec("nilearn") and find_spec("nibabel") else "phantom"


def load_volume(name: str, size: tuple[int, int, int], classes: int | None) -> Volume:
    """A label map of this size.

    Args:
        name: "brain", "phantom" or the path of a NIfTI label map. The first and the last are
            centre-cropped to the size, and mirrored where they are smaller.
        size: three voxel counts.
        classes: the number of classes; None: as many as the volume has (phantom: 4).

    Raises:
        BadArgument: no such file or package, not a label map, or a class count that the volume
            cannot have.
    """
    if name == "phantom":
        classes = 4 if classes is None else classes
        return Volume(name, phantom(size, classes), classes)
    volume = _brain(classes) if name == "brain" else _nifti(name, classes)
    return Volume(volume.name, _fit(volume.labels, size), volume.classes, volume.note)


def _brain(classes: int | None) -> Volume:
    """The tissues of the MNI152 template, which nilearn ships: nothing is downloaded."""
    if classes not in (None, len(BRAIN_CLASSES)):
        raise BadArgument(
            "--classes",
            f"the volume 'brain' has {len(BRAIN_CLASSES)} ({', '.join(BRAIN_CLASSES)}), not "
            f"{classes}; --volume phantom takes any number",
        )
    try:
        from nilearn import datasets
    except ImportError as error:
        raise BadArgument(
            "--volume",
            f"'brain' is part of the nilearn package, which is not there ({error}); pip install "
            "'fastloss[bench]', or use --volume phantom",
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
        white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
        inside = datasets.load_mni152_brain_mask(resolution=1).get_fdata(dtype=np.float32) > 0.5
    tissues = np.stack([1 - grey - white, grey, white])
    return Volume("brain", np.where(inside, tissues.argmax(axis=0) + 1, 0).astype(np.int32), 4)


def _nifti(path: str, classes: int | None) -> Volume:
    if not Path(path).is_file():
        raise BadArgument(
            "--volume", f"expected 'brain', 'phantom' or a NIfTI file, but {path!r} is no file"
        )
    try:
        import nibabel
    except ImportError:
        raise BadArgument(
            "--volume",
            "reading a NIfTI file needs the nibabel package: pip install 'fastloss[bench]'",
        ) from None
    try:
        image: Any = nibabel.load(path)
        data = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel passes on the errors of gzip, zlib and others
        raise BadArgument("--volume", f"{path!r} cannot be read: {error}") from None
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or 0 in data.shape:
        raise BadArgument("--volume", f"{path!r}: expected 3 axes, got shape {data.shape}")
    if data.dtype.kind not in "biuf":
        raise BadArgument("--volume", f"{path!r}: expected integers, got {data.dtype}")
    if data.dtype.kind == "f":
        wrong = ~(np.isfinite(data) & (data == np.rint(data)))
        if wrong.any():
            raise BadArgument(
                "--volume",
                f"{path!r}: expected a label map of integers, but it holds {data[wrong][0]:g}",
            )
    present, labels = np.unique(data, return_inverse=True)
    found, note = present.size, ""
    if not np.array_equal(present, np.arange(found)):
        note = f"its {found} labels, {present[0]:g} to {present[-1]:g}, renumbered from 0"
    if classes is not None and classes < found:
        raise BadArgument("--classes", f"{path!r} holds {found} labels, more than {classes}")
    # A softmax over a single class is constant.
    count = max(found, 2) if classes is None else classes
    return Volume(Path(path).name, labels.reshape(data.shape).astype(np.int32), count, note)


def _fit(labels: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """The centre crop of the volume, mirrored at its faces where it is smaller than the size."""
    for axis, wanted in enumerate(size):
        have = labels.shape[axis]
        if have < wanted:
            before = (wanted - have) // 2
            pad = [(0, 0)] * 3
            pad[axis] = (before, wanted - have - before)
            labels = np.pad(labels, pad, mode="symmetric")
        elif have > wanted:
            start = (have - wanted) // 2
            labels = labels.take(range(start, start + wanted), axis=axis)
    return labels
