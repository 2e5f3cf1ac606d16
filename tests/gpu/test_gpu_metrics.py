"""Metrics on a GPU: those of the processor, by tensors and CuPy's arrays, on any stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_support import FLOATS, need_torch_gpu, torch
from support import need
from test_gpu_distance import blobs

from fastloss.metrics import evaluate, surface_distances

METRICS = ("dice", "mcc", "hausdorff", "hd95", "assd", "nsd", "surface_precision")


def assert_same(found: Any, true: Any) -> None:
    for name in METRICS:
        np.testing.assert_allclose(found[name], true[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("definition", ["deepmind", "monai"])
@pytest.mark.parametrize("shape", [(2, 40, 50, 70), (2, 130, 67)])
def test_scores_and_label_maps(shape: tuple[int, ...], definition: str) -> None:
    need_torch_gpu()
    y = torch.from_numpy(blobs(shape, 4).astype(np.int64))
    x = torch.nn.functional.one_hot(y.roll(2, 1), 4).movedim(-1, 1).float()
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 4
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.99
    options: Any = {
        "metrics": METRICS,
        "definition": definition,
        "spacing": (2.5, 0.8, 0.7)[-(len(shape) - 1) :],
        "tolerance": 0.8,
        "classes": {"one": 1, "all": (1, 2, 3)},
        "ignore_index": 3,
    }
    for dtype in FLOATS:
        scores = x.to(getattr(torch, dtype))
        true = evaluate(scores.float() if dtype == "bfloat16" else scores, y, mask=mask, **options)
        assert_same(evaluate(scores.cuda(), y.cuda(), mask=mask.cuda(), **options), true)
    last = scores.cuda().movedim(1, -1).contiguous().movedim(-1, 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        late = last.clone()
        found = evaluate(late, y, mask=mask, **options)
    assert_same(found, true)
    labels = scores.argmax(1)
    options["activation"] = "labels"
    true = evaluate(labels, y, **options)
    for form in (labels.cuda(), labels.cuda().byte(), labels.cuda().half()):
        assert_same(evaluate(form, y.cuda(), **options), true)


@pytest.mark.parametrize("classes", [2, 110, 111, 400])
def test_counts(classes: int) -> None:
    need_torch_gpu()
    y = torch.randint(classes, (2, 37, 41), generator=torch.Generator().manual_seed(0))
    p = torch.where(torch.rand(y.shape) < 0.5, y, y.flip(1))
    options: Any = {"classes": classes, "metrics": ("dice", "mcc"), "include_background": True}
    found, true = evaluate(p.cuda(), y.cuda(), **options), evaluate(p, y, **options)
    for name in ("dice", "mcc"):
        np.testing.assert_array_equal(found[name], true[name])


def test_distances_by_cupy() -> None:
    cupy = need("cupy")
    y = blobs((1, 30, 31, 32), 3)
    p = np.roll(y, 3, 2)
    spacing = (0.3, 0.7, 0.1)
    found = surface_distances(cupy.asarray(p), cupy.asarray(y), spacing=spacing)[0]
    for each, true in zip(found, surface_distances(p, y, spacing=spacing)[0], strict=True):
        for here, there in zip(each[:2], true[:2], strict=True):
            np.testing.assert_allclose(here.distances, there.distances, rtol=1e-12)
