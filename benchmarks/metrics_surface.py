"""HD95, ASSD and NSD together: fastloss by each definition, against the tools that define them.

The reference is the phantom torso, the prediction the same shifted by two voxels, with a few voxels
of the first organ scattered through the volume. Spacing (1, 1, 3).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fastloss.bench.phantom import phantom
from fastloss.metrics import evaluate

SPACING = (1.0, 1.0, 3.0)
CASES = (((128, 128, 128), 2), ((128, 128, 128), 14), ((256, 256, 160), 2), ((256, 256, 160), 14))


def pair(shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a reference, (1, *shape)."""
    reference = phantom(shape, 14).astype(np.uint8)
    if classes == 2:
        reference = (reference == 4).astype(np.uint8)  # the liver
    prediction = np.roll(reference, 2, axis=1)
    scattered = np.random.default_rng(0).random(shape) < 2e-5
    prediction[scattered] = 1
    return prediction[None], reference[None]


def ours(prediction: np.ndarray, reference: np.ndarray, classes: int, definition: str) -> Any:
    return evaluate(
        prediction,
        reference,
        classes=classes,
        metrics=("hd95", "assd", "nsd"),
        spacing=SPACING,
        definition=definition,
    )


def monai(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Any:
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    masks = [
        torch.nn.functional.one_hot(torch.from_numpy(labels).long(), classes).movedim(-1, 1)
        for labels in (prediction, reference)
    ]
    return (
        compute_hausdorff_distance(*masks, percentile=95, spacing=SPACING),
        compute_average_surface_distance(*masks, symmetric=True, spacing=SPACING),
        compute_surface_dice(*masks, [1.0] * (classes - 1), spacing=SPACING),
    )


def deepmind(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Any:
    np.inf = np.inf  # type: ignore[attr-defined]  # which NumPy 2 removed
    import surface_distance as tool

    for c in range(1, classes):
        found = tool.compute_surface_distances(reference[0] == c, prediction[0] == c, SPACING)
        tool.compute_robust_hausdorff(found, 95)
        tool.compute_average_surface_distance(found)
        tool.compute_surface_dice_at_tolerance(found, 1.0)


def medpy(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Any:
    """MedPy has no NSD: HD95 and ASSD alone."""
    from medpy.metric import binary

    for c in range(1, classes):
        masks = prediction[0] == c, reference[0] == c
        binary.hd95(*masks, SPACING)
        binary.assd(*masks, SPACING)


PEERS: dict[str, Callable[..., Any]] = {"monai": monai, "deepmind": deepmind, "medpy": medpy}


def rows(repeats: int = 3) -> list[dict[str, Any]]:
    """One for each case: milliseconds of each, and how many times faster than the fastest peer."""
    found = []
    for shape, classes in CASES:
        arrays = pair(shape, classes)
        row: dict[str, Any] = {"case": f"{'x'.join(map(str, shape))} C{classes}"}
        for definition in ("deepmind", "monai", "medpy"):
            row[f"fastloss {definition}"] = _time(repeats, ours, *arrays, classes, definition)
        for name, peer in PEERS.items():
            row[name] = _time(1, peer, *arrays, classes)
        fastest = min(row[name] for name in PEERS)
        row["ratio"] = fastest / row["fastloss deepmind"]
        found.append(row)
    return found


def _time(repeats: int, function: Callable[..., Any], *arguments: Any) -> float:
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*arguments) if repeats > 1 else None
        for _ in range(repeats):
            start = time.perf_counter()
            function(*arguments)
            times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


if __name__ == "__main__":
    for row in rows():
        print("  ".join(f"{k}: {v:.4g}" if isinstance(v, float) else v for k, v in row.items()))
