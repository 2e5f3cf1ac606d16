"""``python -m fastloss evaluate`` on a folder of cases, beside MONAI's metrics in a loop.

    python benchmarks/metrics_evaluate.py [--cases N] [--edge N] [--monai-cases N]

The cases are phantom torsos of 14 classes, 1.5 × 1.5 × 3 mm, as compressed NIfTI files; predictions
are warped by some voxels. Both read the files and compute Dice, IoU, HD95, ASSD and NSD of 13
organs, by MONAI's definition. Ours is the whole command, start of its processes included; MONAI
takes the first cases only, and its time is that of as many as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.phantom import phantom

CLASSES = 14
SPACING = (3.0, 1.5, 1.5)  # z, y, x
METRICS = ("dice", "iou", "hd95", "assd", "nsd")
DEMAND, MOST_MEMORY = "≥ 8", "< 1536"
HEADER = ("case", "ms", "other's ms", "other", "ratio", "demand")
# A small process starts the command: one inherits the peak memory of that which forked it.
WATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
Row = tuple[str, str, str, str, str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20, help="default: 20")
    parser.add_argument("--edge", type=int, default=128, help="voxels (default: 128)")
    parser.add_argument("--monai-cases", type=int, default=4, help="default: 4")
    options = parser.parse_args()
    print(machine.machine_text(machine.machine()))
    print(table.text_table(HEADER, rows(options.cases, options.edge, options.monai_cases)))


def rows(cases: int = 20, edge: int = 128, monai_cases: int = 4) -> list[Row]:
    """Titles, milliseconds of ours and of the other, its name, the ratio and what it is to be."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder, cases, edge)
        few = min(cases, monai_cases)
        say(f"MONAI, {few} cases ...")
        seconds, theirs = run_monai(folder, few)
        other = seconds / few * cases
        for jobs in sorted({1, machine.cores()}):
            say(f"fastloss, {cases} cases, {jobs} jobs ...")
            own, memory, ours = run_ours(folder, jobs)
            title = f"{cases} cases of {CLASSES - 1} organs, {edge}³, {jobs} jobs"
            times = table.milliseconds(own), table.milliseconds(other)
            found.append((title, *times, "monai", f"{other / own:.2f}", DEMAND))
            found.append((f"{title}: MiB of a process", f"{memory:.0f}", "", "", "", MOST_MEMORY))
            say(f"the values differ by at most {difference(ours, theirs):.1e}")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_cases(folder: Path, cases: int, edge: int) -> None:
    """Predictions and references."""
    import nibabel

    labels = phantom((edge,) * 3, CLASSES).astype(np.uint8)
    affine = np.diag([*SPACING[::-1], 1.0])
    rng = np.random.default_rng(0)
    for i in range(cases):
        reference = labels[_warp(edge, rng, 4)]
        prediction = reference[_warp(edge, rng, 1.5)]
        for role, voxels in (("predictions", prediction), ("references", reference)):
            (folder / role).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(np.ascontiguousarray(voxels.T), affine)
            nibabel.save(image, folder / role / f"case_{i:03}.nii.gz")


def _warp(edge: int, rng: np.random.Generator, voxels: float) -> Any:
    """Indices along each axis, moved by a slow wave."""
    places = np.arange(edge)
    waves = [
        voxels * np.sin(2 * np.pi * (places / edge * rng.uniform(1, 3) + rng.random()))
        for _ in range(3)
    ]
    return np.ix_(*(np.clip(np.rint(places + wave), 0, edge - 1).astype(int) for wave in waves))


def run_ours(folder: Path, jobs: int) -> tuple[float, float, dict[str, Any]]:
    """Seconds, the peak memory of the largest process in MiB, and the values."""
    written = folder / "found.json"
    command = [
        *(sys.executable, "-m", "fastloss", "evaluate"),
        *(str(folder / "predictions"), str(folder / "references")),
        *("--classes", str(CLASSES), "--metrics", ",".join(METRICS), "--definition", "monai"),
        *("--jobs", str(jobs), "--json", str(written)),
    ]
    path = os.pathsep.join([str(Path(fl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", WATCH, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    seconds, memory = map(float, result.stdout.split()[-2:])
    return seconds, memory / 1024, json.loads(written.read_text(encoding="utf-8"))


def run_monai(folder: Path, cases: int) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds, and values of (cases, organs) by metric."""
    import nibabel
    import torch
    from monai import metrics
    from monai.networks.utils import one_hot

    torch.set_num_threads(machine.threads())
    organs = CLASSES - 1
    distance = {"spacing": SPACING}
    measures: dict[str, tuple[Any, dict[str, Any]]] = {
        "dice": (metrics.DiceMetric(include_background=False), {}),
        "iou": (metrics.MeanIoU(include_background=False), {}),
        "hd95": (metrics.HausdorffDistanceMetric(percentile=95), distance),
        "assd": (metrics.SurfaceDistanceMetric(symmetric=True), distance),
        "nsd": (metrics.SurfaceDiceMetric([1.0] * organs), distance),
    }
    names = sorted(path.name for path in (folder / "references").iterdir())[:cases]
    start = perf_counter()
    for name in names:
        read = []
        for role in ("predictions", "references"):
            voxels = np.asanyarray(nibabel.load(folder / role / name).dataobj).T
            read.append(one_hot(torch.from_numpy(voxels.copy())[None, None], CLASSES))
        for measure, options in measures.values():
            measure(*read, **options)
    seconds = perf_counter() - start
    return seconds, {name: measure.get_buffer().numpy() for name, (measure, _) in measures.items()}


def difference(ours: dict[str, Any], theirs: dict[str, np.ndarray]) -> float:
    """Of all values that both have, relative to those above 1."""
    largest = 0.0
    for name, values in theirs.items():
        for case, row in zip(ours["cases"], values, strict=False):
            for each, value in zip(case["metrics"].values(), row, strict=True):
                own = np.nan if each[name] is None else float(each[name])
                if np.isfinite(value) and np.isfinite(own):
                    largest = max(largest, abs(own - value) / max(1.0, abs(value)))
    return largest


if __name__ == "__main__":
    main()
