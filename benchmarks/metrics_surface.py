"""HD95, ASSD and NSD together: fastloss, against the tools that define them.

The reference is the phantom torso, or the liver of it; the prediction is the same, shifted by two
voxels, with a few voxels scattered through the volume, as of a young network. Spacing (1, 1, 3).
MedPy has no NSD: its time is that of HD95 and ASSD.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench.phantom import phantom

SPACING = (1.0, 1.0, 3.0)
DEMAND = "≥ 10 (5 at worst)"
LIVER = 4
Functions = dict[str, Callable[[], object]]


def cases(edge: int) -> Iterator[tuple[str, Functions, dict[str, str]]]:
    """Titles, functions (ours first), and demands by name of a peer."""
    for shape in ((edge,) * 3, (2 * edge, 2 * edge, edge * 5 // 4)):
        for classes in (2, 14):
            prediction, reference = pair(shape, classes)
            functions: Functions = {
                f"fastloss, {definition}": _ours(prediction, reference, classes, definition)
                for definition in ("deepmind", "monai", "medpy")
            }
            for name, peer in PEERS.items():
                try:
                    functions[name] = _quietly(peer, prediction, reference, classes)
                except ImportError:
                    continue
            size = "×".join(map(str, shape))
            title = f"HD95 + ASSD + NSD, C{classes} {size}"
            yield title, functions, dict.fromkeys(PEERS, DEMAND)


def pair(shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a reference, (1, *shape)."""
    reference = phantom(shape, 14).astype(np.uint8)
    if classes == 2:
        reference = (reference == LIVER).astype(np.uint8)
    prediction = np.roll(reference, 2, axis=1)
    prediction[np.random.default_rng(0).random(shape) < 2e-5] = 1
    return prediction[None], reference[None]


def _ours(
    prediction: np.ndarray, reference: np.ndarray, classes: int, definition: str
) -> Callable[[], object]:
    return lambda: fl.metrics.evaluate(
        prediction,
        reference,
        classes=classes,
        metrics=("hd95", "assd", "nsd"),
        spacing=SPACING,
        definition=definition,
    )


def _quietly(peer: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    run = peer(*arguments)

    def quiet() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()

    return quiet


def _monai(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Callable[[], object]:
    torch, monai = import_module("torch"), import_module("monai.metrics")

    def run() -> object:
        masks = [
            torch.nn.functional.one_hot(torch.from_numpy(labels).long(), classes).movedim(-1, 1)
            for labels in (prediction, reference)
        ]
        return (
            monai.compute_hausdorff_distance(*masks, percentile=95, spacing=SPACING),
            monai.compute_average_surface_distance(*masks, symmetric=True, spacing=SPACING),
            monai.compute_surface_dice(*masks, [1.0] * (classes - 1), spacing=SPACING),
        )

    return run


def _deepmind(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Callable[[], object]:
    vars(np)["Inf"] = np.inf  # which NumPy 2 removed
    tool = import_module("surface_distance")

    def run() -> object:
        for c in range(1, classes):
            found = tool.compute_surface_distances(reference[0] == c, prediction[0] == c, SPACING)
            tool.compute_robust_hausdorff(found, 95)
            tool.compute_average_surface_distance(found)
            tool.compute_surface_dice_at_tolerance(found, 1.0)
        return None

    return run


def _medpy(prediction: np.ndarray, reference: np.ndarray, classes: int) -> Callable[[], object]:
    binary = import_module("medpy.metric.binary")

    def run() -> object:
        for c in range(1, classes):
            masks = prediction[0] == c, reference[0] == c
            binary.hd95(*masks, SPACING)
            binary.assd(*masks, SPACING)
        return None

    return run


PEERS = {"MONAI": _monai, "surface-distance": _deepmind, "MedPy": _medpy}
