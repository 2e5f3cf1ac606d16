"""Distances on a GPU, against SciPy's; they stay there, and the host does not wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_support import need_torch_gpu, to_numpy, torch
from support import need
from test_gpu_streams import no_waiting

import fastloss as fl
from fastloss.distance import signed_of_masks

ndimage = need("scipy.ndimage")
SPACING = (2.5, 0.8, 0.7)


def blobs(shape: tuple[int, ...], classes: int, seed: int = 0) -> np.ndarray:
    """Labels whose last class is absent."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), (0, *(3,) * (len(shape) - 1)))
    parts = np.quantile(smooth, np.linspace(0, 1, classes)[1:-1])
    return np.digitize(smooth, parts).astype(np.uint8)


def signed(labels: np.ndarray, classes: int, spacing: Any, limit: float) -> np.ndarray:
    """By the convention "exact"."""
    maps = []
    for sample in labels:
        for c in range(classes):
            mask = sample == c
            one = np.full(mask.shape, np.inf)
            if mask.any():
                inside, outside = (
                    ndimage.distance_transform_edt(m, sampling=spacing) for m in (mask, ~mask)
                )
                one = np.where(mask, -inside, outside)
            maps.append(np.clip(one, -limit, limit))
    return np.reshape(maps, (len(labels), classes, *labels.shape[1:]))


@pytest.mark.parametrize("limit", [None, 6.0])
@pytest.mark.parametrize("shape", [(2, 40, 50, 70), (2, 130, 67), (3, 1500), (1, 1, 64, 20)])
def test_against_scipy(shape: tuple[int, ...], limit: float | None) -> None:
    need_torch_gpu()
    labels = blobs(shape, 4)
    given = torch.from_numpy(labels).cuda()
    spacing = SPACING[-(len(shape) - 1) :]
    expected = signed(labels, 4, spacing, np.inf if limit is None else limit)
    options: Any = {"spacing": spacing, "convention": "exact", "max_distance": limit}
    for dtype in ("float32", "float16"):
        tolerance = 2e-6 if dtype == "float32" else 1e-3
        for form in (given, given.long(), given.half().movedim(0, -1).contiguous().movedim(-1, 0)):
            found = fl.signed_distance(form, 4, dtype=dtype, **options)
            assert found.device == given.device
            assert found.dtype == getattr(torch, dtype)
            np.testing.assert_allclose(to_numpy(found), expected, tolerance, tolerance)
        masks = given[:, None] == torch.arange(4, device="cuda").view(4, *[1] * (len(shape) - 1))
        again = signed_of_masks(masks, dtype=dtype, **options)
        assert torch.equal(again, found)
    found = fl.distance_transform(given, spacing=spacing, batch_axes=1)
    right = [ndimage.distance_transform_edt(sample, sampling=spacing) for sample in labels]
    np.testing.assert_allclose(to_numpy(found), right, 2e-6, 2e-6)


def test_outputs() -> None:
    need_torch_gpu()
    labels = torch.from_numpy(blobs((2, 20, 21, 22), 4)).cuda()
    expected = fl.signed_distance(labels, 4)
    last = torch.empty(2, 20, 21, 22, 4, device="cuda").movedim(-1, 1)
    for out in (torch.empty_like(expected), last):
        assert fl.signed_distance(labels, 4, out=out) is out
        assert torch.equal(out, expected)
    with pytest.raises(TypeError, match=r"^out: .* CUDA device 0, .* CPU memory"):
        fl.signed_distance(labels, 4, out=expected.cpu())


def test_the_host_does_not_wait() -> None:
    need_torch_gpu()
    labels = torch.from_numpy(blobs((2, 20, 21, 22), 4)).cuda().float()
    expected = fl.signed_distance(labels, 4)  # compiles
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), no_waiting():
        late = labels.clone()
        found = fl.signed_distance(late, 4)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_captured_in_a_graph() -> None:
    need_torch_gpu()
    labels = torch.from_numpy(blobs((1, 20, 21, 22), 4)).cuda()
    fl.signed_distance(labels, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fl.signed_distance(labels, 4)
    for seed in (1, 2):
        labels.copy_(torch.from_numpy(blobs((1, 20, 21, 22), 4, seed)))
        graph.replay()
        assert torch.equal(found, fl.signed_distance(labels, 4))


def test_cupy() -> None:
    cupy = need("cupy")
    labels = blobs((2, 20, 21, 22), 4)
    found = fl.signed_distance(cupy.asarray(labels), 4, convention="exact")
    assert isinstance(found, cupy.ndarray)
    np.testing.assert_allclose(to_numpy(found), signed(labels, 4, None, np.inf), 2e-6, 2e-6)


TERMS = {
    "boundary": fl.Boundary(spacing=SPACING),
    "hausdorff": fl.HausdorffDT(alpha=1.5, spacing=SPACING),
    "surface": fl.GeneralizedSurface(spacing=SPACING),
    "boundary over union": fl.BoundaryDoU(),
}


@pytest.mark.parametrize("ignore", [None, 1, 255])
@pytest.mark.parametrize("name", TERMS)
def test_fields_that_terms_make(name: str, ignore: int | None) -> None:
    """As on the CPU, and the host does not wait."""
    need_torch_gpu()
    loss = fl.Loss(TERMS[name], fl.Dice(), ignore_index=ignore)
    labels = torch.from_numpy(blobs((2, 20, 21, 22), 4))
    labels[:, :3, :4] = ignore or 0
    x = torch.randn(2, 4, 20, 21, 22, generator=torch.Generator().manual_seed(0))
    here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()
    expected = loss(here, labels)
    expected.backward()
    target = labels.cuda()
    loss(there, target).backward()  # compiles
    fields = loss.fields(target, classes=4, dtype="float16")
    there.grad = None
    with no_waiting():
        value = loss(there, target)
        value.backward()
        again = loss.fields(target, classes=4, dtype="float16")
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(again[key], fields[key]) for key in fields)
