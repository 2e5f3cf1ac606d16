"""Dice + cross-entropy of logits on disk that need not fit into memory: Zarr in, Zarr out.

    python examples/dask_zarr.py [--classes N] [--edge N] [--chunk N] [--folder DIR]

It needs `pip install 'fastloss[dask]' zarr`. Random logits and labels are written chunk by chunk;
then value and gradient are computed, with the memory that the process took at most.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np

import fastloss as fl
import fastloss.dask


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--edge", type=int, default=256, help="voxels (default: 256)")
    parser.add_argument("--chunk", type=int, default=64, help="voxels of a chunk (default: 64)")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(options.folder or Path(temporary), options.classes, options.edge, options.chunk)


def run(folder: Path, classes: int, edge: int, chunk: int) -> None:
    space, part = (edge,) * 3, (chunk,) * 3
    random = da.random.default_rng(0)
    logits = random.normal(size=(1, classes, *space), chunks=(1, classes, *part))
    labels = random.integers(0, classes, size=(1, *space), chunks=(1, *part))
    logits.astype(np.float32).to_zarr(str(folder / "logits"))
    labels.astype(np.uint8).to_zarr(str(folder / "labels"))

    logits, labels = (da.from_zarr(str(folder / name)) for name in ("logits", "labels"))
    loss = fl.Dice() + fl.CrossEntropy()
    start, written = time.perf_counter(), _peak()
    print(f"value {fastloss.dask.value(loss, logits, labels):.6f}")
    fastloss.dask.gradient(loss, logits, labels).to_zarr(str(folder / "gradient"))
    print(f"value and gradient of {logits.nbytes / 1e9:.2f} GB of logits:")
    print(f"{time.perf_counter() - start:.1f} s, at most {_peak():.0f} MB in memory")
    print(f"({written:.0f} MB when the logits were written)")


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    with dask.config.set(num_workers=2):
        main()
