"""Volumes that public packages carry among their tests, fetched through pip into a cache folder.

    python examples/volumes.py

They are not part of this library: TotalSegmentator's CT (Apache 2.0), whose labels are the output
of its own network, and the tumours of PyRadiomics (BSD).
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = {
    "totalsegmentator": "2.18.0",
    "pyradiomics-bhklab": "3.1.4",
}
ORGANS = "tests/reference_files/example_seg_fast/"
CT = "tests/reference_files/example_ct.nii.gz"
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

    members = {}
    with tarfile.open(package("totalsegmentator")) as archive, tempfile.TemporaryDirectory() as at:
        for member in archive:
            name = member.name.partition("/")[2]
            if name == CT or (name.startswith(ORGANS) and name.endswith(".nii.gz")):
                path = Path(at) / Path(name).name
                source = archive.extractfile(member)
                assert source is not None
                path.write_bytes(source.read())
                members[Path(name).name.removesuffix(".nii.gz")] = path
        ct = nibabel.load(members.pop("example_ct"))
        image = ct.get_fdata(dtype=np.float32).T
        labels = np.zeros(image.shape, np.uint8)
        classes = ["background"]
        for name in sorted(members):
            mask = np.asanyarray(nibabel.load(members[name]).dataobj).T > 0
            if mask.any():
                labels[mask] = len(classes)
                classes.append(name.replace("_", " "))
    d, h, w = (float(size) for size in ct.header.get_zooms()[::-1])
    return Scan(image, labels, tuple(classes), (d, h, w))


def load_tumour(site: str, number: int) -> Scan:
    """One of two patients with a tumour: of the "brain" (MR, 6.5 mm slices) or the "lung" (CT)."""
    arrays = {}
    spacing = (1.0, 1.0, 1.0)
    with tarfile.open(package("pyradiomics-bhklab")) as archive:
        for member in archive:
            for kind in ("image", "label"):
                if member.name.endswith(f"data/{site}{number}_{kind}.nrrd"):
                    source = archive.extractfile(member)
                    assert source is not None
                    arrays[kind], spacing = read_nrrd(source.read())
    mask = (arrays["label"] > 0).astype(np.uint8)
    return Scan(arrays["image"].astype(np.float32), mask, ("background", "tumour"), spacing)


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
