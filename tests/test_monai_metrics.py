"""The drop-ins for MONAI's metrics agree with MONAI itself."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need, python

torch = need("torch")
theirs = need("monai.metrics")
panoptic = need("monai.metrics.panoptic_quality")
ours = need("fastloss.monai.metrics")

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")

CLASSES = (
    "ConfusionMatrixMetric",
    "Cumulative",
    "CumulativeIterationMetric",
    "DiceHelper",
    "DiceMetric",
    "GeneralizedDiceScore",
    "HausdorffDistanceMetric",
    "IterationMetric",
    "MeanIoU",
    "Metric",
    "PanopticQualityMetric",
    "SurfaceDiceMetric",
    "SurfaceDistanceMetric",
)
REDUCTIONS = ("none", "mean", "sum", "mean_batch", "sum_batch", "mean_channel", "sum_channel")
FEW = settings(max_examples=15)
IGNORED = (None, 0, 1, 3, -1, 7)
booleans = st.booleans()


def of_monai(name: str) -> Any:
    return getattr(theirs, name, None) or getattr(panoptic, name)


def same(own: Any, right: Any, close: float = 1e-6) -> None:
    """Equal in kind, shape, dtype and numbers."""
    if isinstance(right, (list, tuple)):
        assert len(own) == len(right)
        for pair in zip(own, right, strict=True):
            same(*pair, close)
    elif isinstance(right, torch.Tensor):
        assert own.dtype == right.dtype
        torch.testing.assert_close(own, right, rtol=close, atol=close, equal_nan=True)
    else:
        assert own == right


def masks(draw: Any, channels: int, axes: int | None = None, batch: int | None = None) -> Any:
    """A prediction and a reference of the same shape: noise or boxes; some empty, some full."""
    axes = draw(st.integers(2, 3)) if axes is None else axes
    batch = draw(st.integers(1, 2)) if batch is None else batch
    spatial = draw(st.lists(st.integers(1, 6), min_size=axes, max_size=axes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(2):
        kind = draw(st.sampled_from(["noise", "labels", "boxes"]))
        shape = (batch, channels, *spatial)
        if kind == "labels":
            one_hot = rng.integers(0, channels, (batch, 1, *spatial)) == np.arange(
                channels
            ).reshape(1, -1, *(1,) * axes)
        elif kind == "noise":
            one_hot = rng.random(shape) < rng.choice(
                [0.0, 0.1, 0.5, 1.0], (batch, channels, *(1,) * axes)
            )
        else:
            one_hot = np.zeros(shape, bool)
            for each in one_hot.reshape(-1, *spatial):
                ends = [np.sort(rng.integers(0, n + 1, 2)) for n in spatial]
                each[tuple(slice(*end) for end in ends)] = True
        found.append(torch.from_numpy(one_hot.astype(np.float32)))
    return found


def silently(call: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def heard(call: Any) -> tuple[Any, list[Any]]:
    """What a call returns, and the kinds of its warnings, with the class that each names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    # MONAI warns of an argument that it passes to a function of its own.
    caught = [w for w in caught if "always_return_as_numpy" not in str(w.message)]
    told = [" ".join(str(w.message).split(" is all 0")[0].split()) for w in caught]
    return found, [
        (w.category, t if "of class" in t else "") for w, t in zip(caught, told, strict=True)
    ]


def agree(
    name: str, made: dict[str, Any], calls: list[Any], close: float = 1e-6, **more: Any
) -> None:
    """The metric of this name, over several batches."""
    metrics = [getattr(m, name)(**made) for m in (ours, theirs)]
    for arguments in calls:
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        (own, told), (right, said) = (heard(partial(m, *arguments, **more)) for m in metrics)
        same(own, right, close)
        assert told == said
        for a, b in zip(arguments, before, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    same(metrics[0].get_buffer(), metrics[1].get_buffer(), close)
    assert len(metrics[0]) == len(metrics[1])
    for reduction in (None, *REDUCTIONS):
        if name == "GeneralizedDiceScore":
            same(metrics[0].aggregate(), metrics[1].aggregate(), close)
        else:
            same(*(m.aggregate(reduction=reduction) for m in metrics), 10 * close)
    metrics[0].reset()
    assert metrics[0].get_buffer() is None
    assert len(metrics[0]) == 0


def listed(draw: Any, pair: Any) -> Any:
    """A batch, or as a list of samples."""
    return [list(t) for t in pair] if draw(booleans) else pair


# ---------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name", CLASSES)
def test_signature_of_class(name: str) -> None:
    own, right = getattr(ours, name), of_monai(name)
    for member in ("__init__", "__call__", "aggregate", "reset", "get_buffer", "extend", "append"):
        if hasattr(right, member):
            pair = [inspect.signature(getattr(c, member)).parameters for c in (own, right)]
            assert list(pair[0]) == list(pair[1])
            for key in pair[1]:
                assert pair[0][key].kind == pair[1][key].kind
                assert pair[0][key].default == pair[1][key].default


@pytest.mark.parametrize("name", [n for n in ours.__all__ if n not in CLASSES])
def test_signature_of_function(name: str) -> None:
    pair = [inspect.signature(f).parameters for f in (getattr(ours, name), of_monai(name))]
    assert list(pair[0]) == list(pair[1])
    for key in pair[1]:
        assert pair[0][key].kind == pair[1][key].kind
        assert pair[0][key].default == pair[1][key].default


# ---------------------------------------------------------------------- overlap

DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int64)


@FEW
@given(data=st.data())
def test_dice_of_masks(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    made = {
        "include_background": draw(booleans),
        "ignore_empty": draw(booleans),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "get_not_nans": draw(booleans),
    }
    # The dtype of MONAI's NaN for a reference of float64 is float32.
    dtypes = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES[:1] + DTYPES[2:]))
    calls = []
    for _ in range(2):
        p, g = masks(draw, channels)
        if draw(booleans):
            p = 3 * p - (p > 0) * torch.rand(p.shape)  # what is not 0 is inside
        if draw(booleans):
            g = g * torch.rand(g.shape)  # soft
        calls.append(listed(draw, (p.to(dtypes[0]), g.to(dtypes[1]))))
    for index in IGNORED:
        agree("DiceMetric", {**made, "ignore_index": index}, calls)


@FEW
@given(data=st.data())
def test_dice_of_label_maps(data: Any) -> None:
    draw, classes = data.draw, data.draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, 1, *draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    kinds = [draw(st.sampled_from((*DTYPES, torch.float16, torch.bool))) for _ in range(2)]
    p, g = (torch.from_numpy(rng.integers(0, classes + 1, shape)).to(kind) for kind in kinds)
    if draw(booleans):
        p = p.float() + 0.5 * torch.from_numpy(rng.integers(0, 2, shape))  # in no class
    if draw(booleans):
        g = torch.cat([g == c for c in range(classes)], 1).float()
    made = {
        "num_classes": classes,
        "include_background": draw(booleans),
        "ignore_empty": draw(booleans),
        "reduction": "mean_batch",
        "return_with_label": draw(st.sampled_from([False, True, ["a", "b", "c", "d"]])),
    }
    for index in (*IGNORED, 255):
        pair = [m.DiceMetric(**made, ignore_index=index) for m in (ours, theirs)]
        same(*(metric(p, g) for metric in pair))
        own, right = (metric.aggregate() for metric in pair)
        if isinstance(right, dict):
            assert list(own) == list(right)
            assert own == pytest.approx(right, abs=2e-4)
        else:
            same(own, right)


@FEW
@given(data=st.data())
def test_dice_of_scores(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, channels, *draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scores = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    labels = torch.from_numpy(rng.integers(0, channels, (2, 1, *shape[2:])))
    one_hot = torch.cat([labels == c for c in range(channels)], 1).float()
    made = {
        "include_background": draw(st.sampled_from([None, True, False])),
        "threshold": draw(booleans),
        "activate": draw(booleans),
        "apply_argmax": draw(st.sampled_from([None, True])),
        "num_classes": draw(st.sampled_from([None, channels])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    target = one_hot if draw(booleans) else labels
    same(*(m.DiceHelper(**made)(scores, target) for m in (ours, theirs)))


@FEW
@given(data=st.data())
def test_dice_of_components(data: Any) -> None:
    draw = data.draw
    p, g = (torch.cat([1 - t, t], 1) for t in masks(draw, 1))
    made = {"per_component": True, "ignore_empty": draw(booleans)}
    same(*(silently(lambda m=m: m.compute_dice(p, g, **made)) for m in (ours, theirs)))


@FEW
@given(data=st.data())
def test_iou(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    made = {
        "include_background": draw(booleans),
        "ignore_empty": draw(booleans),
        "get_not_nans": draw(booleans),
    }
    dtype = draw(st.sampled_from(DTYPES))
    calls = [listed(draw, [t.to(dtype) for t in masks(draw, channels)]) for _ in range(2)]
    for index in IGNORED:
        agree("MeanIoU", {**made, "ignore_index": index}, calls)
    p, g = (torch.rand(2, channels, 3, 4) for _ in range(2))
    same(*(m.compute_iou(p, g, made["include_background"]) for m in (ours, theirs)))


@FEW
@given(data=st.data())
def test_generalized_dice(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    made = {
        "include_background": draw(booleans),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "weight_type": draw(st.sampled_from(["square", "simple", "uniform"])),
    }
    dtype = draw(st.sampled_from(DTYPES))
    calls = [listed(draw, [t.to(dtype) for t in masks(draw, channels)]) for _ in range(2)]
    for index in IGNORED:
        agree("GeneralizedDiceScore", {**made, "ignore_index": index}, calls)


@FEW
@given(data=st.data())
def test_confusion(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    confusion = inspect.getmodule(ours.get_confusion_matrix)
    names = [n for short, others in confusion.NAMES.items() for n in (short, *others)]
    made = {
        "include_background": draw(booleans),
        "metric_name": draw(st.lists(st.sampled_from(names), min_size=1, max_size=6)),
        "compute_sample": draw(booleans),
        "get_not_nans": draw(booleans),
    }
    if draw(booleans):  # decisions
        calls = [[t.reshape(-1, channels) for t in masks(draw, channels)]]
    else:
        calls = [listed(draw, masks(draw, channels)) for _ in range(2)]
    for index in IGNORED:
        agree("ConfusionMatrixMetric", {**made, "ignore_index": index}, calls)


def test_names_of_confusion_metrics() -> None:
    confusion = inspect.getmodule(ours.get_confusion_matrix)
    counts = torch.tensor([[3.0, 1, 5, 2], [0, 0, 4, 0], [0, 3, 0, 1], [4, 0, 0, 0]])
    for short, others in confusion.NAMES.items():
        for name in (short, *others, others[0].replace("_", " ").upper()):
            same(*(m.compute_confusion_matrix_metric(name, counts) for m in (ours, theirs)))
            same(*(m.compute_confusion_matrix_metric(name, counts[0]) for m in (ours, theirs)))


def test_masks_of_bool() -> None:
    p, g = (torch.rand(1, 3, 40, 50) < 0.3 for _ in range(2))
    for index in (None, 1, 9):
        for name in ("compute_dice", "compute_iou", "compute_generalized_dice"):
            own = getattr(ours, name)(p, g, ignore_index=index)
            same(own, getattr(theirs, name)(p.float(), g.float(), ignore_index=index))
        own = ours.get_confusion_matrix(p, g, ignore_index=index)
        same(own, theirs.get_confusion_matrix(p.float(), g.float(), ignore_index=index))


def test_many_voxels_in_any_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    p, g = ((torch.rand(1, 2, 70, 40, 50, generator=generator) < 0.3).float() for _ in range(2))
    for arrays in (
        (p, g),
        (p.to(memory_format=torch.channels_last_3d), g),
        (p.transpose(2, 4), g.transpose(2, 4)),
        (p, g * 0.5),
    ):
        same(*(m.compute_iou(*arrays) for m in (ours, theirs)), 1e-5)
        same(*(m.compute_dice(*arrays) for m in (ours, theirs)), 1e-5)
        same(*(m.get_confusion_matrix(p, g) for m in (ours, theirs)))


def test_half_types_do_not_overflow() -> None:
    ones = torch.ones(1, 1, 300, 300)
    for dtype in (torch.float16, torch.bfloat16):
        same(ours.compute_iou(ones.to(dtype), ones.to(dtype)), torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 0, 3)])
def test_without_samples_or_voxels(shape: Any) -> None:
    empty = torch.zeros(shape)
    for name in ("compute_iou", "compute_generalized_dice"):
        same(*(getattr(m, name)(empty, empty) for m in (ours, theirs)))


def test_tensors_on_a_device(monkeypatch: Any) -> None:
    """The path of tensors that are not in CPU memory, with such that say they are not."""
    p, g = ((torch.rand(2, 3, 20, 30) < 0.3).float() for _ in range(2))
    labels = g.argmax(1, keepdim=True)
    calls = [
        ("compute_dice", {"y_pred": p, "y": g}),
        ("compute_dice", {"y_pred": p * 0.7, "y": g * 0.5}),
        ("compute_dice", {"y_pred": p, "y": g, "ignore_index": 1}),
        ("compute_dice", {"y_pred": labels, "y": labels, "num_classes": 3, "ignore_index": 2}),
        ("compute_iou", {"y_pred": p, "y": g, "ignore_index": 9}),
        ("get_confusion_matrix", {"y_pred": p, "y": g}),
        ("compute_hausdorff_distance", {"y_pred": p, "y": g}),
        (
            "compute_average_surface_distance",
            {"y_pred": p, "y": torch.cat([labels == c for c in range(3)], 1).float()},
        ),
    ]
    right = [silently(partial(getattr(theirs, name), **arguments)) for name, arguments in calls]
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    own = [silently(partial(getattr(ours, name), **arguments)) for name, arguments in calls]
    monkeypatch.undo()
    for pair in zip(own, right, strict=True):
        same(*pair, 1e-5)


# ---------------------------------------------------------------------- surfaces

spacings = st.sampled_from([None, 1.0, 0.7, 2, "each", "samples"])
METRICS = ("euclidean", "euclidean", "chessboard", "taxicab")


def spacing_for(draw: Any, shape: Any) -> Any:
    chosen = draw(spacings)
    if not isinstance(chosen, str):
        return chosen
    sizes = [3.0, 0.9, 1.3][: len(shape) - 2]
    return sizes if chosen == "each" else [sizes[::-1]] * shape[0]


@FEW
@given(data=st.data())
def test_hausdorff(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 3))
    made = {
        "include_background": draw(booleans),
        "distance_metric": draw(st.sampled_from(METRICS)),
        "percentile": draw(st.sampled_from([None, 95, 50.0, 100, 0])),
        "directed": draw(booleans),
        "get_not_nans": draw(booleans),
    }
    p, g = masks(draw, channels)
    spacing = spacing_for(draw, p.shape)
    for index in IGNORED:
        agree(
            "HausdorffDistanceMetric",
            {**made, "ignore_index": index},
            [(p, g)],
            1e-5,
            spacing=spacing,
        )
    made.pop("get_not_nans")
    functions = [m.compute_hausdorff_distance for m in (ours, theirs)]
    p, g = (p.numpy(), g.numpy()) if draw(booleans) else (p.bool(), g.long())
    for index in (None, 1):
        options = {**made, "ignore_index": index, "spacing": spacing}
        (own, told), (right, said) = (heard(partial(f, p, g, **options)) for f in functions)
        same(own, right, 1e-5)
        assert told == said


@FEW
@given(data=st.data())
def test_average_surface_distance(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 3))
    made = {
        "include_background": draw(booleans),
        "distance_metric": draw(st.sampled_from(METRICS)),
        "symmetric": draw(booleans),
        "get_not_nans": draw(booleans),
    }
    p, g = masks(draw, channels)
    spacing = spacing_for(draw, p.shape)
    for index in IGNORED:
        agree(
            "SurfaceDistanceMetric",
            {**made, "ignore_index": index},
            [(p, g)],
            1e-5,
            spacing=spacing,
        )
    made.pop("get_not_nans")
    functions = [m.compute_average_surface_distance for m in (ours, theirs)]
    for index in (None, 1):
        options = {**made, "ignore_index": index, "spacing": spacing}
        (own, told), (right, said) = (heard(partial(f, p, g, **options)) for f in functions)
        same(own, right, 1e-5)
        assert told == said


@settings(max_examples=20)
@given(data=st.data())
def test_surface_dice(data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 3))
    background = draw(booleans)
    p, g = masks(draw, channels)
    spacing = spacing_for(draw, p.shape)
    subvoxels = draw(booleans)
    if subvoxels and isinstance(spacing, (int, float)):
        spacing = [spacing] * (p.ndim - 2)  # MONAI takes no number here
    counted = channels - int(not background and channels > 1)
    # Distances that occur: whether they are within the tolerance depends on their rounding.
    tolerances = st.sampled_from([0, 0.9, 1.0, 1.3, 2**0.5, 3.0, (0.81 + 1.69) ** 0.5, 50])
    made = {
        "class_thresholds": draw(st.lists(tolerances, min_size=counted, max_size=counted)),
        "include_background": background,
        "distance_metric": draw(st.sampled_from(METRICS)),
        "use_subvoxels": subvoxels,
        "get_not_nans": draw(booleans),
    }
    for index in IGNORED:
        agree("SurfaceDiceMetric", {**made, "ignore_index": index}, [(p, g)], 1e-5, spacing=spacing)


def test_a_distance_at_the_tolerance_is_within() -> None:
    """√2 in float32 is below √2, and both sides are rounded."""
    p, g = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    p[..., 1, 1] = g[..., 2, 2] = 1
    for spacing in (1.0, 0.1, 1.7, 0.3):
        options = {"class_thresholds": [spacing * 2**0.5], "include_background": True}
        pair = [m.compute_surface_dice(p, g, spacing=spacing, **options) for m in (ours, theirs)]
        same(*pair)
        assert pair[0] == 1


def test_percentile_of_one_empty_mask_is_unknown() -> None:
    p, g = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    g[:, :, 1:3] = 1
    p[1] = g[1]
    made = {"include_background": True, "percentile": 95}
    agree("HausdorffDistanceMetric", made, [(p, g)])


def test_lines_and_a_list_of_volumes_of_several_sizes() -> None:
    line = torch.zeros(1, 1, 12)
    line[..., 3:6] = 1
    for metric in ("euclidean", "taxicab"):
        made = {"include_background": True, "distance_metric": metric}
        agree("HausdorffDistanceMetric", made, [(line, line.roll(3, 2))])
    volumes = [(torch.rand(2, n, 5, 6) < 0.3).float() for n in (3, 4, 5)]
    others = [(torch.rand(v.shape) < 0.3).float() for v in volumes]
    for name in ("SurfaceDistanceMetric", "MeanIoU"):
        agree(name, {}, [(volumes, others)], 1e-5)


def test_bodies() -> None:
    """Bodies of some size, disjoint and not, whose classes the kernels find in one label map."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (20, 18, 22)), indexing="ij"))
    centres = torch.tensor([[8, 8, 8], [12, 9, 15], [9, 10, 11]])
    for radius in (3, 5):
        distance = ((grid[None] - centres[:, :, None, None, None]) ** 2).sum(1)
        g = (distance < radius**2).float()[None]
        p = g.roll((1, -1, 2), (2, 3, 4))
        options = {"include_background": True, "spacing": (2.0, 0.8, 1.1)}
        for name, more in [
            ("compute_hausdorff_distance", {"percentile": 95}),
            ("compute_average_surface_distance", {"symmetric": True}),
            ("compute_surface_dice", {"class_thresholds": [1, 1.6, 2]}),
            ("compute_surface_dice", {"class_thresholds": [1, 1.6, 2], "use_subvoxels": True}),
        ]:
            same(*(getattr(m, name)(p, g, **options, **more) for m in (ours, theirs)), 1e-5)


# ---------------------------------------------------------------------- instances


@FEW
@given(data=st.data())
def test_panoptic_quality(data: Any) -> None:
    draw, classes = data.draw, data.draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, *draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    ids = rng.choice([0, 1, 2, 3, 7, 1000], (2, *shape))
    ids[1] = np.where(rng.random(shape) < 0.7, ids[0], ids[1])
    kinds = rng.integers(0, classes + 1, shape), rng.integers(0, classes + 1, shape)
    kinds = kinds[0], np.where(rng.random(shape) < 0.8, *kinds)
    p, g = (
        torch.from_numpy(np.stack([i, k], 1)).to(draw(st.sampled_from([torch.int32, torch.int64])))
        for i, k in zip(ids, kinds, strict=True)
    )
    made = {
        "num_classes": classes,
        "metric_name": draw(st.sampled_from(["pq", "SQ", ("pq", "segmentation quality", "rq")])),
        "match_iou_threshold": draw(st.sampled_from([0.5, 0.2, 0.6])),
        "return_confusion_matrix": draw(booleans),
    }
    agree("PanopticQualityMetric", made, [listed(draw, (p, g))])
    for output in (True, False):
        options = {
            "metric_name": draw(st.sampled_from(["pq", "sq", "rq"])),
            "match_iou_threshold": made["match_iou_threshold"],
            "output_confusion_matrix": output,
        }
        pair = [
            f(p[0, 0], g[0, 0], **options)
            for f in (ours.compute_panoptic_quality, theirs.compute_panoptic_quality)
        ]
        same(*pair)
        if output:
            same(ours.compute_mean_iou(pair[0]), panoptic.compute_mean_iou(pair[1]))


# ---------------------------------------------------------------------- what holds for all


@FEW
@given(data=st.data())
def test_reduction(data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    numbers = rng.normal(size=shape)
    numbers[rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = np.nan
    f = torch.from_numpy(numbers).to(draw(st.sampled_from([torch.float32, torch.float64])))
    for reduction in REDUCTIONS:
        same(*(m.do_metric_reduction(f.clone(), reduction) for m in (ours, theirs)))


def test_buffers() -> None:
    class Kept(ours.Cumulative):  # type: ignore[name-defined,misc]
        def aggregate(self) -> Any:
            return self.get_buffer()

    class Right(theirs.Cumulative):  # type: ignore[name-defined,misc]
        def aggregate(self) -> Any:
            return self.get_buffer()

    for made in (lambda c: c.append(1), lambda c: c.extend([2, 3], torch.ones(3, 2))):
        pair = Kept(), Right()
        for each in pair:
            made(each)
            made(each)
        same(pair[0].aggregate(), pair[1].aggregate())
        assert len(pair[0]) == len(pair[1])
        pair[0].aggregate()[0].zero_()  # a copy
        same(pair[0].aggregate(), pair[1].aggregate())
    for each in (Kept(), Right()):
        with pytest.raises(TypeError):
            each.extend(3)
        each.append(torch.ones(2), 1)
        each.append(torch.ones(3), 1)
        with pytest.raises(TypeError, match="unable to sync"):
            each.get_buffer()
    with pytest.raises(TypeError):
        ours.CumulativeIterationMetric()
    assert str(ours.DiceMetric()) == "DiceMetric"


def test_copies_and_pickles() -> None:
    p = (torch.rand(1, 2, 4, 4) < 0.5).float()
    for name in ("DiceMetric", "HausdorffDistanceMetric", "ConfusionMatrixMetric"):
        metric = getattr(ours, name)()
        metric(p, p)
        for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            same(other.aggregate(), metric.aggregate())


P = torch.ones(1, 2, 4, 4)
BAD: list[tuple[str, dict[str, Any], tuple[Any, ...], dict[str, Any]]] = [
    ("DiceMetric", {}, (P[0, 0], P[0, 0]), {}),
    ("DiceMetric", {}, (np.ones((1, 2, 3, 3)), P), {}),
    ("DiceMetric", {"per_component": True}, (P, P[:, :1]), {}),
    ("MeanIoU", {}, (P[0, 0], P[0, 0]), {}),
    ("MeanIoU", {}, (P, P[..., :3]), {}),
    ("GeneralizedDiceScore", {}, (P[0, 0], P[0, 0]), {}),
    ("GeneralizedDiceScore", {}, (P, P[..., :3]), {}),
    ("ConfusionMatrixMetric", {}, (P[0, 0, 0], P[0, 0, 0]), {}),
    ("ConfusionMatrixMetric", {}, (P, P[..., :3]), {}),
    ("HausdorffDistanceMetric", {}, (P[0, 0], P[0, 0]), {}),
    ("HausdorffDistanceMetric", {}, (P, P[..., :3]), {}),
    ("HausdorffDistanceMetric", {"percentile": 101}, (P, P), {}),
    ("HausdorffDistanceMetric", {"distance_metric": "manhattan"}, (P, P), {}),
    ("HausdorffDistanceMetric", {}, (P, P), {"spacing": [1.0]}),
    ("HausdorffDistanceMetric", {}, (P, P), {"spacing": [[1.0, 1.0]] * 2}),
    ("HausdorffDistanceMetric", {}, (P, P), {"spacing": [[1.0]]}),
    ("HausdorffDistanceMetric", {}, (P, P), {"spacing": "1"}),
    ("SurfaceDistanceMetric", {}, (P[0, 0], P[0, 0]), {}),
    ("SurfaceDistanceMetric", {}, (P, P[..., :3]), {}),
    ("SurfaceDiceMetric", {"class_thresholds": [1.0]}, (P[0], P[0]), {}),
    ("SurfaceDiceMetric", {"class_thresholds": [1.0]}, (P, P[..., :3]), {}),
    ("SurfaceDiceMetric", {"class_thresholds": [1.0, 1.0]}, (P, P), {}),
    ("SurfaceDiceMetric", {"class_thresholds": [-1.0]}, (P, P), {}),
    ("SurfaceDiceMetric", {"class_thresholds": [np.inf]}, (P, P), {}),
    ("PanopticQualityMetric", {"num_classes": 1}, (P, P[..., :3]), {}),
    ("PanopticQualityMetric", {"num_classes": 1}, (P[:, :1], P[:, :1]), {}),
    ("PanopticQualityMetric", {"num_classes": 1}, (P[..., 0], P[..., 0]), {}),
    ("PanopticQualityMetric", {"num_classes": 1, "match_iou_threshold": 0}, (P, P), {}),
]


@pytest.mark.parametrize(("name", "made", "arguments", "more"), BAD)
def test_bad_input(name: str, made: Any, arguments: Any, more: Any) -> None:
    for module in (theirs, ours):
        with pytest.raises(ValueError, match=r".+"):
            getattr(module, name)(**made)(*arguments, **more)


def test_bad_options() -> None:
    for m in (theirs, ours):
        for make in (
            lambda m=m: m.GeneralizedDiceScore(reduction="bogus"),
            lambda m=m: m.GeneralizedDiceScore(weight_type="bogus"),
            lambda m=m: m.DiceHelper(reduction="bogus")(P, P),
            lambda m=m: m.DiceMetric().aggregate(),
            lambda m=m: m.compute_confusion_matrix_metric("tpr", torch.ones(3)),
            lambda m=m: m.compute_panoptic_quality(P[0, 0], P[0, 0], metric_name="bogus"),
        ):
            with pytest.raises(ValueError, match=r".+"):
                make()
        with pytest.raises(NotImplementedError):
            m.compute_confusion_matrix_metric("bogus", torch.ones(1, 4))
        with pytest.warns(FutureWarning):
            assert m.DiceHelper(sigmoid=True).threshold
        with pytest.warns(FutureWarning):
            assert not m.DiceHelper(softmax=False).apply_argmax
        metric = m.GeneralizedDiceScore()
        metric(P, P)
        with pytest.warns(FutureWarning):
            assert metric.aggregate("sum") == 1
        with pytest.warns(UserWarning, match="compute_sample"):
            m.ConfusionMatrixMetric(compute_sample=True)(P[:, :, 0, 0], P[:, :, 0, 0])


def test_warnings_name_the_line_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="the prediction of class 1 is all 0") as caught:
        ours.HausdorffDistanceMetric()(0 * P, P)
    assert caught[0].filename == __file__


def test_needs_neither_monai_nor_scipy() -> None:
    code = """
import sys
sys.modules["monai"] = sys.modules["scipy"] = None
import torch
from fastloss.monai import metrics
p = torch.ones(1, 2, 4, 4)
assert metrics.HausdorffDistanceMetric()(p, p) == 0
assert metrics.DiceMetric()(p, p).tolist() == [[1, 1]]
try:
    metrics.compute_hausdorff_distance(p, p, distance_metric="taxicab")
except ImportError as error:
    print(error)
"""
    assert "pip install scipy" in python(code).stdout


RANKS = """
import sys, torch
import torch.distributed as dist
from fastloss.monai.metrics import DiceMetric
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(rank)
metric = DiceMetric(reduction="none")
found = metric((torch.rand(2 + rank, 3, 5, 5) < 0.5), torch.rand(2 + rank, 3, 5, 5) < 0.5)
everything = metric.aggregate()
assert everything.shape == (5, 3) and len(metric) == 5
assert torch.equal(everything[2:] if rank else everything[:2], found)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_gathers_over_ranks(tmp_path: Any) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path / "store")])
        for rank in range(2)
    ]
    assert [process.wait(timeout=100) for process in started] == [0, 0]
