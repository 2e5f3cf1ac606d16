"""Centerline boundary Dice, against loops over voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import need

torch = need("torch")

import fastloss.torch as ft  # noqa: E402


def skeleton_of(v: np.ndarray, iterations: int) -> np.ndarray:
    """The soft skeleton of one volume, by SciPy's filters."""
    ndimage = need("scipy.ndimage")

    def erode(x: np.ndarray) -> np.ndarray:
        sizes = 1 + 2 * np.eye(x.ndim, dtype=int)
        each = [ndimage.minimum_filter(x, size, mode="constant", cval=np.inf) for size in sizes]
        return np.min(each, axis=0)

    def rest(x: np.ndarray) -> np.ndarray:
        return np.maximum(x - ndimage.maximum_filter(erode(x), 3, mode="constant", cval=-np.inf), 0)

    s = rest(v)
    for _ in range(iterations):
        v = erode(v)
        s = s + np.maximum(rest(v) - s * rest(v), 0)
    return s


def looped(p: np.ndarray, g: np.ndarray, iterations: int = 3, smooth: float = 1.0) -> float:
    """The value of volumes (B, *spatial), one voxel after the other."""
    distance = need("scipy.ndimage").distance_transform_edt
    sums = np.zeros((2, 2))  # of T and S: above, below
    for pair in zip(p, g, strict=True):
        skeletons = [skeleton_of(v, iterations) for v in pair]
        depths = [distance(v > 0.5) for v in pair]
        lines = [s > 0.5 for s in skeletons]
        most = [max(d[on].max(initial=0), 1) for d, on in zip(depths, lines, strict=True)]
        for i in np.ndindex(pair[0].shape):
            for t in range(2):
                v, w = pair[t][i], pair[1 - t][i]
                if not lines[t][i]:
                    continue
                thickness = depths[t][i] / most[t]
                weight = skeletons[t][i] / thickness ** (p.ndim - 2)
                there = lines[1 - t][i] * depths[1 - t][i] / most[1 - t] * w
                sums[t, 0] += weight * min(depths[1 - t][i] / most[1 - t], 1) * w
                sums[t, 1] += weight * (there if there != 0 else thickness * v)
    precision, sensitivity = (sums[:, 0] + smooth) / (sums[:, 1] + smooth)
    return float(1 - 2 * precision * sensitivity / (precision + sensitivity))


def vessels(axes: int, classes: int = 3) -> tuple[Any, Any]:
    """Logits and labels of two samples with tubes of radius 1 to 3, predicted with some faults."""
    rng = np.random.default_rng(axes)
    shape = (14, 15, 12)[:axes]
    place = np.indices(shape)
    labels = np.zeros((2, *shape), int)
    for b, (center, radius, label) in enumerate([(5, 3, 1), (8, 2, 2)]):
        squared = sum((place[i] - center) ** 2 for i in range(1, axes))
        labels[b][squared <= radius**2] = label
        labels[b][3] = np.where(np.abs(place[-1][3] - 3) <= 1, 1, labels[b][3])
    seen = np.roll(labels, 1, axis=-1)
    seen[:, 6] = 0
    x = rng.normal(size=(2, classes, *shape))
    x += 4 * np.stack([seen == c for c in range(classes)], 1)
    return torch.tensor(x), torch.tensor(labels)


def foreground(x: Any) -> np.ndarray:
    """softmax of the background and the likeliest other class."""
    return torch.softmax(torch.stack([x[:, 0], x[:, 1:].amax(1)]), 0)[1].numpy()


@pytest.mark.parametrize("axes", [2, 3])
def test_loop_over_voxels(axes: int) -> None:
    x, y = vessels(axes)
    right = looped(foreground(x), (y > 0).numpy().astype(float))
    assert 0.05 < right < 0.95
    loss = ft.CbDice(iterations=3)
    assert loss(x, y).item() == pytest.approx(right, rel=1e-6)
    assert loss(x, y[:, None].to(torch.uint8)).item() == pytest.approx(right, rel=1e-6)
    assert loss(x.float(), y).item() == pytest.approx(right, rel=1e-4)
    one = x[:, 1:].amax(1, keepdim=True) - x[:, :1]
    assert loss(one, y).item() == pytest.approx(right, rel=1e-6)
    assert ft.CbDice(iterations=2, smooth=0.1)(x, y).item() == pytest.approx(
        looped(foreground(x), (y > 0).numpy().astype(float), 2, 0.1), rel=1e-6
    )


def test_finite_differences() -> None:
    """Distances and lines do not change with the logits, but where p passes ½."""
    x, y = vessels(2)
    x.requires_grad_()
    loss = ft.CbDice(iterations=3)
    (gradient,) = torch.autograd.grad(loss(x, y), x)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        for place in np.random.default_rng(0).permutation(x.numel())[:120]:
            ends = []
            for step in (1e-5, -1e-5):
                moved = x.clone()
                moved.view(-1)[place] += step
                ends.append(loss(moved, y).item())
            slope = (ends[0] - ends[1]) / 2e-5
            assert gradient.view(-1)[place].item() == pytest.approx(slope, abs=1e-7, rel=1e-5)


def test_right_and_wrong_predictions() -> None:
    x, y = vessels(3)
    truth = 40.0 * torch.stack([y == c for c in range(3)], 1)
    assert ft.CbDice()(truth, y).item() == pytest.approx(0, abs=1e-5)
    background = 40.0 * torch.stack([y == y] + 2 * [y != y], 1)
    assert ft.CbDice()(background, y).item() > 0.9
    assert ft.CbDice()(background, torch.zeros_like(y)).item() == pytest.approx(0, abs=1e-5)
    full = ft.CbDice()(x, torch.ones_like(y))  # without a surface
    assert torch.isfinite(full)
    assert ft.CbDice()(x.half(), y).dtype == torch.float32


def test_ignored_voxels() -> None:
    """They are outside: no prediction there matters, and no label does."""
    x, y = vessels(3)
    y[:, 4:6] = 255
    loss = ft.CbDice(iterations=3, ignore_index=255)
    value = loss(x, y)
    moved = x.clone().requires_grad_()
    other = x.clone()
    other[:, 1, 4:6] += 9
    assert loss(other, y).item() == value.item()
    (gradient,) = torch.autograd.grad(loss(moved, y), moved)
    assert not gradient[:, :, 4:6].any()
    p, g = foreground(x), ((y > 0) & (y != 255)).numpy().astype(float)
    p[:, 4:6] = 0
    assert value.item() == pytest.approx(looped(p, g), rel=1e-6)


def test_what_does_not_fit_is_named() -> None:
    x, y = vessels(2)
    with pytest.raises(ValueError, match=r"logits: expected .* 2 or 3 spatial axes"):
        ft.CbDice()(x[..., 0], y[..., 0])
    with pytest.raises(ValueError, match="target: expected a label map"):
        ft.CbDice()(x, y[:, :5])
    with pytest.raises(ValueError, match="smooth: expected a number above 0"):
        ft.CbDice(smooth=0)
    with pytest.raises((ValueError, TypeError), match="iterations"):
        ft.CbDice(iterations=0)
