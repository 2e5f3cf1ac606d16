"""Lesions beside their peers, all in one run, as a table.

    python benchmarks/metrics_lesions.py [--repeats N] [--quick]

The reference has 60 balls, the prediction most of them moved, and some of its own. Functions take
turns; figures are medians. Peers that are not installed (cc3d, scipy, panoptica, surface-distance)
are left out, by name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave

Case = tuple[str, dict[str, Callable[[], object]], dict[str, str]]
"""A title, functions by name with our own first, and by name what the ratio is to be."""
SPACING = (1.0, 1.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="samples of each (default: 3)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    found = list(rows(64 if options.quick else 128, options.repeats))
    print(table.text_table(("case", "ms", "other's ms", "other", "ratio", "demand"), found))


def rows(edge: int = 128, repeats: int = 3) -> Iterator[tuple[str, ...]]:
    """One for each peer of each case, in the order of the columns that `main` prints."""
    for title, functions, demands in cases(edge):
        print(f"{title} ...", file=sys.stderr, flush=True)
        seconds = interleave({name: Timed(call) for name, call in functions.items()}, repeats)
        own = next(iter(functions))
        for name, demand in demands.items():
            if name in seconds:
                figures = (table.milliseconds(seconds[own]), table.milliseconds(seconds[name]))
                yield title, *figures, name, f"{seconds[name] / seconds[own]:.2f}", demand


def cases(edge: int) -> Iterator[Case]:
    prediction, reference = lesions(edge)
    size = f"60 lesions, {edge}³"
    numbers = fl.components(reference[None]).numbers[0]
    yield _case(f"components, {size}", lambda: fl.components(reference[None]), "", cc3d=lambda m: (
        lambda: m.connected_components(reference, connectivity=26)))  # fmt: skip

    def nearest(cc3d: Any) -> Callable[[], object]:
        transform = import_module("scipy.ndimage").distance_transform_edt

        def run() -> object:
            found = cc3d.connected_components(reference, connectivity=26)
            places = transform(found == 0, SPACING, return_distances=False, return_indices=True)
            return found[tuple(places)]

        return run

    yield _case(f"components and the nearest, {size}", lambda: fl.voronoi(
        fl.components(reference[None]), spacing=SPACING), "≥ 4", cc3d=nearest)  # fmt: skip

    def ours(*metrics: str) -> Callable[[], object]:
        batch = prediction[None], reference[None]
        return lambda: fl.metrics.evaluate(*batch, metrics=metrics, classes=2, spacing=SPACING)

    yield _case(f"PQ, SQ, RQ, {size}", ours("pq", "sq", "rq"), "≥ 10", panoptica=lambda m: (
        _panoptica(m, prediction, reference)))  # fmt: skip
    yield _case(f"BraTS's Dice and HD95, {size}", ours("lesion_dice", "lesion_hd95"), "≥ 10",
                surface_distance=lambda m: lambda: brats(m, prediction, reference))  # fmt: skip
    everything = [m for m, metric in fl.metrics.METRICS.items() if metric.family == "lesion"]
    yield _case(f"all lesion metrics, {size}", ours(*everything), "≥ 10",
                surface_distance=lambda m: lambda: brats(m, prediction, reference))  # fmt: skip
    assert numbers.max() >= 50


def _case(title: str, own: Callable[[], object], demand: str, **peers: Any) -> Case:
    functions = {"fastloss": own}
    for name, make in peers.items():
        vars(np)["Inf"] = np.inf  # surface-distance reads it, and NumPy 2 has not
        try:
            functions[name] = make(import_module(name))
        except (ImportError, NameError) as error:  # panoptica without plotly: a NameError
            print(f"{name}: {error}", file=sys.stderr)
    return title, functions, dict.fromkeys(peers, demand)


def lesions(edge: int, count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a reference: balls of radius 2 to 6 at 128³."""
    random = np.random.default_rng(seed)
    masks = np.zeros((2, edge, edge, edge), np.uint8)
    for i in range(count + count // 6):
        centre = random.integers(0, edge, 3)
        radius = random.uniform(2, 6) * edge / 128
        moved = centre + random.integers(-1, 2, 3)
        if i < count:
            _ball(masks[1], centre, radius)
        if i >= count // 10:
            _ball(masks[0], moved, radius * random.uniform(0.8, 1.2))
    return masks[0], masks[1]


def _ball(mask: np.ndarray, centre: np.ndarray, radius: float) -> None:
    low = np.maximum(centre - int(radius) - 1, 0)
    high = np.minimum(centre + int(radius) + 2, mask.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    places = np.indices(high - low) + (low - centre)[:, None, None, None]
    mask[box] |= (places**2).sum(0) <= radius**2


def _panoptica(module: Any, prediction: np.ndarray, reference: np.ndarray) -> Callable[[], object]:
    evaluator = module.Panoptica_Evaluator(
        expected_input=module.InputType.SEMANTIC,
        instance_approximator=module.ConnectedComponentsInstanceApproximator(),
        instance_matcher=module.NaiveThresholdMatching(matching_threshold=0.5),
        instance_metrics=[module.Metric.IOU],
        global_metrics=[],
        verbose=False,
        log_times=False,
    )

    def run() -> object:
        found = next(iter(evaluator.evaluate(prediction, reference).values()))
        return found.pq, found.sq, found.rq

    return run


def brats(module: Any, prediction: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The lesion-wise scores as BraTS 2023 describes them: a loop over whole volumes."""
    ndimage = import_module("scipy.ndimage")
    label = import_module("cc3d").connected_components
    near = ndimage.generate_binary_structure(3, 2)
    ours = label(prediction, connectivity=26)
    merged = label(ndimage.binary_dilation(reference, near, iterations=3), connectivity=26)
    scores, distances, touched = [], [], set()
    for lesion in range(1, int(merged.max()) + 1):
        true = (reference > 0) & (merged == lesion)
        grown = ndimage.binary_dilation(true, near, iterations=3)
        touching = np.unique(ours[grown])
        touching = touching[touching > 0]
        touched |= set(touching.tolist())
        predicted = np.isin(ours, touching)
        if true.sum() <= 50:
            continue
        scores.append(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
        found = module.compute_surface_distances(true, predicted, SPACING)
        distances.append(min(module.compute_robust_hausdorff(found, 95), 374.0))
    extra = int(ours.max()) - len(touched)
    total = len(scores) + extra
    return sum(scores) / total, (sum(distances) + 374 * extra) / total


if __name__ == "__main__":
    main()
