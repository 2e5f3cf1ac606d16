"""Label maps in NIfTI files: reading them, and which prediction belongs to which reference."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ENDINGS = (".nii.gz", ".nii")
GRID_TOLERANCE = 0.1
"""How far two grids may lie apart, in voxels: headers round directions and origins."""
SPACING_TOLERANCE = 1e-3
"""By how much spacings may differ, relative."""


class Mismatch(ValueError):
    """A file, or a pair of files, that cannot be evaluated; the message is one line."""


class LabelMap(NamedTuple):
    """The voxels of a file, and where they lie."""

    voxels: np.ndarray
    """(z, y, x), or (y, x) of a file with a single slice; in C order."""
    spacing: tuple[float, ...]
    """Of the same axes, in the unit of the file: mm."""
    affine: np.ndarray
    """(4, 4): indices (x, y, z, 1) to coordinates that grow to the right, to the front and up."""


class Case(NamedTuple):
    """A prediction and its reference."""

    name: str
    prediction: Path
    reference: Path


class Matched(NamedTuple):
    """The cases of two folders, and the lines on files without a partner."""

    cases: tuple[Case, ...]
    problems: tuple[tuple[str, str], ...]
    """Names and what is wrong with them."""


def match(predictions: str | Path, references: str | Path) -> Matched:
    """Pairs of files: the two given, or those of two folders with the same name.

    Names are those of NIfTI files without ".nii" or ".nii.gz".

    Raises:
        Mismatch: a path that is not there, a file beside a folder, or a folder without NIfTI files.
    """
    predictions, references = Path(predictions), Path(references)
    for role, path in (("PREDICTIONS", predictions), ("REFERENCES", references)):
        if not path.exists():
            raise Mismatch(f"{role}: no such file or folder: {str(path)!r}")
    if predictions.is_dir() != references.is_dir():
        file, folder = sorted((predictions, references), key=Path.is_dir)
        raise Mismatch(f"expected two files or two folders, got {str(file)!r} and {str(folder)!r}")
    if not predictions.is_dir():
        return Matched((Case(stem(references), predictions, references),), ())
    ours, problems = _in_folder(predictions, "prediction")
    theirs, more = _in_folder(references, "reference")
    problems += more
    for role, path, found in (
        ("PREDICTIONS", predictions, ours),
        ("REFERENCES", references, theirs),
    ):
        if not found:
            raise Mismatch(f"{role}: no NIfTI file in {str(path)!r}")
    problems += [(name, "no prediction") for name in theirs if name not in ours]
    problems += [(name, "no reference") for name in ours if name not in theirs]
    cases = tuple(Case(name, ours[name], theirs[name]) for name in sorted(theirs) if name in ours)
    return Matched(cases, tuple(sorted(problems)))


def stem(path: Path) -> str:
    """The name without its ending."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name


def _in_folder(folder: Path, role: str) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if not path.name.lower().endswith(ENDINGS) or path.name.startswith("."):
            continue
        name = stem(path)
        if name in found:
            problems.append((name, f"two {role}s: {found[name].name} and {path.name}"))
        found[name] = path
    for name, _ in problems:
        found.pop(name, None)
    return found, problems


def find_image(folder: Path, name: str) -> Path | None:
    """The image of a case: by its name, or as nnU-Net names its first channel."""
    for each in (name, f"{name}_0000"):
        for ending in ENDINGS:
            path = folder / f"{each}{ending}"
            if path.is_file():
                return path
    return None


def check_reader() -> None:
    """ImportError: neither nibabel nor SimpleITK is installed."""
    if not (find_spec("nibabel") or find_spec("SimpleITK")):
        raise ImportError(
            "reading NIfTI files needs the nibabel package (or SimpleITK): pip install "
            "'fastloss[evaluate]'"
        )


def read_label_map(path: str | Path) -> LabelMap:
    """A label map of two or three axes.

    Axes of size 1 after the third are left out; so is the third one: a file of a single slice is
    measured in its plane.

    Raises:
        Mismatch: a file that cannot be read, has other axes, or holds labels that are negative or
            no integers.
        ImportError: neither nibabel nor SimpleITK is installed.
    """
    found = read_image(path)
    voxels = found.voxels
    if voxels.dtype.kind not in "biuf":
        raise Mismatch(f"{path}: expected labels, got {voxels.dtype}")
    if voxels.dtype.kind == "f":
        whole = np.empty(voxels.shape, np.int32)
        for part, out in zip(voxels, whole, strict=True):
            with np.errstate(invalid="ignore"):
                out[...] = part
            if not np.array_equal(part, out):
                first = part[part != out].flat[0]
                raise Mismatch(f"{path}: expected labels, but it holds {first:g}")
        voxels = whole
    if voxels.dtype.kind in "if" and voxels.size and voxels.min() < 0:
        raise Mismatch(f"{path}: expected labels of at least 0, but it holds {voxels.min()}")
    if voxels.dtype == bool:
        voxels = voxels.view(np.uint8)
    return found._replace(voxels=voxels)


def read_image(path: str | Path) -> LabelMap:
    """A volume of any numbers, as `read_label_map` has it. Mismatch, ImportError: as there."""
    check_reader()
    read = _by_nibabel if find_spec("nibabel") else _by_simpleitk
    try:
        voxels, spacing, affine = read(str(path))
    except Exception as error:  # those of gzip, zlib and the readers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mismatch(f"{path}: cannot be read: {reason}") from None
    while voxels.ndim > 2 and voxels.shape[0] == 1:
        voxels, spacing = voxels[0], spacing[1:]
    if voxels.ndim not in (2, 3) or not voxels.size:
        shape = voxels.shape[::-1]
        raise Mismatch(f"{path}: expected two or three axes, got shape {shape}")
    if not all(np.isfinite(each) and each > 0 for each in spacing):
        raise Mismatch(f"{path}: expected voxel sizes above 0, got {spacing[::-1]}")
    return LabelMap(np.ascontiguousarray(voxels), spacing[-voxels.ndim :], affine)


def _by_nibabel(path: str) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    import nibabel

    image: Any = nibabel.load(path)
    voxels = np.asanyarray(image.dataobj).T
    spacing = tuple(float(size) for size in image.header.get_zooms()[::-1])
    return voxels, spacing, np.array(image.affine, float)


def _by_simpleitk(path: str) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    import SimpleITK

    image: Any = SimpleITK.ReadImage(path)
    voxels = SimpleITK.GetArrayFromImage(image)
    sizes = np.array(image.GetSpacing())
    n = len(sizes)
    affine = np.eye(4)
    inner = min(n, 3)
    directions = np.array(image.GetDirection()).reshape(n, n)
    affine[:inner, :inner] = (directions * sizes)[:inner, :inner]
    affine[:inner, 3] = image.GetOrigin()[:inner]
    affine[:2] *= -1  # its coordinates grow to the left and to the back
    return voxels, tuple(float(size) for size in sizes[::-1]), affine


def check_same_grid(prediction: LabelMap, reference: LabelMap, *, affine: bool = True) -> None:
    """Mismatch: the two differ in shape, spacing, orientation or place.

    Args:
        affine: whether orientation and place are compared.
    """
    shapes = [each.voxels.shape[::-1] for each in (prediction, reference)]
    if shapes[0] != shapes[1]:
        raise Mismatch(f"the prediction has shape {shapes[0]}, the reference {shapes[1]}")
    sizes = [each.spacing[::-1] for each in (prediction, reference)]
    if not np.allclose(sizes[0], sizes[1], rtol=SPACING_TOLERANCE, atol=0):
        shown = ["×".join(f"{size:.5g}" for size in each) for each in sizes]
        raise Mismatch(f"the prediction has spacing {shown[0]} mm, the reference {shown[1]} mm")
    if not affine:
        return
    codes = [orientation(each.affine) for each in (prediction, reference)]
    if codes[0] != codes[1]:
        raise Mismatch(f"the prediction has axes {codes[0]}, the reference {codes[1]}")
    ends = np.array([*shapes[0], *(1,) * (3 - len(shapes[0]))]) - 1
    corners = np.array([[*(ends * part), 1] for part in np.ndindex(2, 2, 2)])
    apart = corners @ (prediction.affine - reference.affine).T
    farthest = float(np.linalg.norm(apart[:, :3], axis=1).max())
    if farthest > GRID_TOLERANCE * min(sizes[1]):
        raise Mismatch(
            f"the headers place the prediction's voxels up to {farthest:.3g} mm from the "
            "reference's (--ignore-affine compares them by index)"
        )


def orientation(affine: np.ndarray) -> str:
    """Where the axes x, y and z point: "RAS" is right, anterior, superior."""
    return "".join("IPL-RAS"[3 + step * (axis + 1)] for axis, step in axes_of(affine))


def axes_of(affine: np.ndarray) -> list[tuple[int, int]]:
    """For each of x, y and z: which of right, anterior and superior it is, and 1 or −1.

    Of oblique axes the best assignment, each direction once.
    """
    directions = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    left = np.abs(directions)
    found: list[tuple[int, int]] = [(0, 1)] * 3
    for _ in range(3):
        world, axis = np.unravel_index(int(left.argmax()), (3, 3))
        found[int(axis)] = int(world), 1 if directions[world, axis] >= 0 else -1
        left[world] = left[:, axis] = -1
    return found
