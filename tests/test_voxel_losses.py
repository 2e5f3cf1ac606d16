"""Losses of every voxel, which keep the volume's shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import BACKENDS, example, need, need_backend, one_hot
from test_backends import relayout

import fastloss as fl
from fastloss.backends import use_backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(need_backend(request.param)):
        yield request.param


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.5]])
def test_cross_entropy_as_pytorch(backend: str, smoothing: float, weight: Any) -> None:
    torch = need("torch")
    x, y = example(2, 3, (4, 5, 6))
    y[0, 0] = 7
    upstream = np.random.default_rng(1).normal(size=y.shape)
    term = fl.CrossEntropy(reduction="voxel", label_smoothing=smoothing, weight=weight)
    value, gradient = fl.Loss(term, ignore_index=7).value_and_grad(x, y, upstream=upstream)
    logits = torch.tensor(x, requires_grad=True)
    right = torch.nn.functional.cross_entropy(
        logits,
        torch.tensor(y),
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
        label_smoothing=smoothing,
        ignore_index=7,
        reduction="none",
    )
    right.backward(torch.tensor(upstream))
    assert value.shape == y.shape
    assert np.allclose(value, right.detach().numpy(), atol=1e-12)
    assert np.allclose(gradient, logits.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_binary_cross_entropy_of_every_channel(backend: str, channel_axis: int) -> None:
    torch = need("torch")
    x, y = example(2, 3, (4, 5))
    dense = one_hot(y, 3)
    upstream = np.random.default_rng(1).normal(size=x.shape)
    logits = torch.tensor(x, requires_grad=True)
    right = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor(dense), reduction="none"
    )
    right.backward(torch.tensor(upstream))
    loss = fl.Loss(
        fl.CrossEntropy(reduction="voxel"), activation="sigmoid", channel_axis=channel_axis
    )
    moved = [np.moveaxis(a, 1, channel_axis) for a in (x, dense, upstream)]
    value, gradient = loss.value_and_grad(*moved[:2], upstream=moved[2])
    assert np.allclose(np.moveaxis(value, channel_axis, 1), right.detach().numpy(), atol=1e-12)
    assert np.allclose(np.moveaxis(gradient, channel_axis, 1), logits.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    "term",
    [
        fl.CrossEntropy(reduction="voxel", label_smoothing=0.1, weight=[1.0, 2.0, 0.5]),
        fl.Focal(reduction="voxel", gamma=1.5, alpha=[0.2, 0.7, 0.5]),
        fl.Brier(reduction="voxel"),
        fl.MeanAbsoluteError(reduction="voxel", weight=0.5),
        fl.PolyCrossEntropy(reduction="voxel", epsilon=2.0),
        2.0 * fl.CrossEntropy(reduction="voxel") + fl.Focal(reduction="voxel"),
    ],
    ids=repr,
)
def test_its_sum_is_the_loss_of_the_sum(backend: str, term: Any) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        for dtype in ("float32", "float64"):
            x, y = example(2, 3, (23, 40), dtype=dtype, activation=activation)
            weight = np.random.default_rng(2).uniform(0, 2, y.shape) * (y != 1)
            loss = fl.Loss(term, activation=activation)
            summed = fl.Loss(
                *(
                    factor * type(t)(**{**options(t), "reduction": "sum"})
                    for factor, t in fl.Loss(term).terms
                ),
                activation=activation,
            )
            x = relayout(x, "channels last")
            value, gradient = loss.value_and_grad(x, y, weight)
            right = summed.value_and_grad(x, y, weight)
            tolerance = 1e-6 if dtype == "float32" else 1e-12
            assert value.dtype == x.dtype
            assert value.sum(dtype=np.float64) == pytest.approx(right[0], rel=10 * tolerance)
            assert np.linalg.norm(gradient - right[1]) <= 2 * tolerance * np.linalg.norm(right[1])
            uncounted = (
                np.broadcast_to(weight[:, None] == 0, x.shape)
                if value.ndim == x.ndim
                else weight == 0
            )
            assert (value[uncounted] == 0).all()
            shape = x.shape if activation == "sigmoid" else y.shape
            assert value.shape == shape


def options(term: fl.Term) -> dict[str, Any]:
    names = ("weight", "label_smoothing", "gamma", "alpha", "epsilon")
    return {name: getattr(term, name) for name in names if hasattr(term, name)}


def test_the_upstream_gradient_may_have_any_dtype_and_strides(backend: str) -> None:
    x, y = example(2, 3, (6, 7), dtype=np.float32)
    loss = fl.CrossEntropy(reduction="voxel")
    upstream = np.random.default_rng(0).normal(size=y.shape).astype(np.float16)
    right = loss.value_and_grad(x, y, upstream=upstream.astype(np.float64))[1]
    for layout in ("stepped", "reversed"):
        found = loss.gradient(x, y, upstream=relayout(upstream, layout))
        assert np.allclose(found, right, atol=1e-6)
    one = np.broadcast_to(np.float32(2), y.shape)
    assert np.allclose(loss.gradient(x, y, upstream=one), 2 * loss.gradient(x, y), atol=1e-6)


def test_it_adds_to_its_like_alone_and_has_no_sums() -> None:
    x, y = example(2, 3, (6,))
    loss = fl.CrossEntropy(reduction="voxel")
    with pytest.raises(ValueError, match=r"reduction: 'voxel' .* Dice does not add"):
        loss + fl.Dice()
    with pytest.raises(ValueError, match=r"statistics: .*reduction='voxel'"):
        loss.statistics(x, y)
    with pytest.raises(ValueError, match=r"upstream: expected the value's shape \(2, 6\), got"):
        loss.value_and_grad(x, y, upstream=np.ones((2, 3, 6)))
    with pytest.raises(ValueError, match=r"target: .*label"):
        loss(x, y + 1)
