"""Volumes that public packages carry among their tests, fetched through pip into a cache folder.

    python examples/volumes.py

They are not part of this library: TotalSegmentator's CT (Apache 2.0), whose labels are the output
of its own network, and the tumours of PyRadiomics (BSD).
"""

from __future__ import annotations

import ast
import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = {
    "totalsegmentator": "2.18.0",
    "pyradiomics-bhklab": "3.1.4",
}
CT = "tests/reference_files/example_ct.nii.gz"
ORGANS = "tests/reference_files/example_seg_fast_force_split.nii.gz"
NAMES = "totalsegmentator/map_to_binary.py"
SITES = ("brain", "lung")


class Scan(NamedTuple):
    """An image and what is in it."""

    image: np.ndarray
    """(D, H, W) of float32: from feet to head, back to front or front to back, side to side."""
    labels: np.ndarray
    """(D, H, W) of uint8; 0 is the background."""
    classes: tuple[str, ...]
    spacing: tuple[float, float, float]
    """mm, of D, H and W."""


def cache() -> Path:
    """The folder that packages are kept in: FASTLOSS_EXAMPLES, or one in the user's cache."""
    given = os.environ.get("FASTLOSS_EXAMPLES")
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(given) if given else root / "fastloss-examples"


def package(name: str) -> Path:
    """The source distribution of a package, which pip downloads the first time.

    Raises:
        RuntimeError: pip cannot; the message has its last line.
    """
    version = PACKAGES[name]
    folder = cache()
    pattern = f"{name.replace('-', '[-_]')}-{version}.tar.gz"
    found = list(folder.glob(pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {name} {version} with pip into {folder} ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", name, "--dest", str(folder), f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(folder.glob(pattern))
        if not found:
            last = (done.stderr.strip().splitlines() or ["no more is known"])[-1]
            raise RuntimeError(f"pip could not download {name} {version}: {last}")
    return found[0]


def load_organs() -> Scan:
    """A CT of the trunk at 3 mm, 112 × 101 × 122 voxels, with the organs that are in it."""
    import nibabel

    content = _members(package("totalsegmentator"), (CT, ORGANS, NAMES))
    with tempfile.TemporaryDirectory() as at:
        images = []
        for name in (CT, ORGANS):
            path = Path(at) / Path(name).name
            path.write_bytes(content[name])
            images.append(nibabel.load(path))
        image, numbers = (np.asanyarray(each.dataobj).T for each in images)
    names = _organ_names(content[NAMES].decode("utf-8"))
    present, labels = np.unique(numbers, return_inverse=True)
    classes = ["background", *(names[int(number)].replace("_", " ") for number in present[1:])]
    labels = labels.reshape(numbers.shape).astype(np.uint8)
    d, h, w = (float(size) for size in images[0].header.get_zooms()[::-1])
    return Scan(image.astype(np.float32), labels, tuple(classes), (d, h, w))


def _members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The content of some files of an archive, by their path below its one folder."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            source = archive.extractfile(member) if name in names else None
            if source is not None:
                found[name] = source.read()
    return found


def _organ_names(module: str) -> dict[int, str]:
    """The table of classes in the text of a module, which is read and not run."""
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign) and "class_map" in (
            getattr(t, "id", "") for t in node.targets
        ):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if ast.literal_eval(key) == "total":
                    return dict(ast.literal_eval(value))
    raise ValueError("the package has no class_map with a table called total")


def load_tumour(site: str, number: int) -> Scan:
    """One of two patients with a tumour: of the "brain" (MR, 6.5 mm slices) or the "lung" (CT)."""
    paths = {kind: f"data/{site}{number}_{kind}.nrrd" for kind in ("image", "label")}
    content = _members(package("pyradiomics-bhklab"), tuple(paths.values()))
    arrays = {kind: read_nrrd(content[path]) for kind, path in paths.items()}
    image, spacing = arrays["image"]
    mask = (arrays["label"][0] > 0).astype(np.uint8)
    return Scan(image.astype(np.float32), mask, ("background", "tumour"), spacing)


def read_nrrd(content: bytes) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The voxels (D, H, W) and spacing of an NRRD file with three axes, raw or gzip.

    Raises:
        ValueError: a file of another kind.
    """
    header, gap, rest = content.partition(b"\n\n")
    fields = dict(
        line.split(": ", 1)
        for line in header.decode("ascii", "replace").splitlines()
        if ": " in line and not line.startswith("#")
    )
    kinds = {"short": "i2", "int": "i4", "uchar": "u1", "unsigned char": "u1", "float": "f4"}
    kind, encoding = kinds.get(fields.get("type", "")), fields.get("encoding")
    if not content.startswith(b"NRRD") or not gap or kind is None:
        raise ValueError(f"expected an NRRD file of numbers, got type {fields.get('type')!r}")
    if encoding in ("gzip", "gz"):
        try:
            rest = gzip.decompress(rest)
        except (OSError, zlib.error) as error:
            raise ValueError(f"its gzip is broken: {error}") from None
    elif encoding != "raw":
        raise ValueError(f"expected the encoding raw or gzip, got {encoding!r}")
    order = ">" if fields.get("endian") == "big" else "<"
    w, h, d = (int(size) for size in fields["sizes"].split())
    voxels = np.frombuffer(rest, np.dtype(kind).newbyteorder(order), w * h * d)
    directions = [
        [float(part) for part in each.strip("()").split(",")]
        for each in fields["space directions"].split()
    ]
    x, y, z = (float(np.linalg.norm(each)) for each in directions)
    return voxels.reshape(d, h, w).astype(np.dtype(kind)), (z, y, x)


if __name__ == "__main__":
    organs = load_organs()
    print(f"CT {organs.image.shape}, {organs.spacing} mm, {len(organs.classes) - 1} organs")
    for site in SITES:
        for number in (1, 2):
            scan = load_tumour(site, number)
            size = np.round(scan.spacing, 2).tolist()
            count = int(scan.labels.sum())
            print(f"{site} {number} {scan.image.shape}, {size} mm, a tumour of {count} voxels")
