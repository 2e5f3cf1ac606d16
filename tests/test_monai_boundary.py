"""The drop-ins for MONAI's losses on distances agree with MONAI itself."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import need, need_backend

import fastloss as fl

torch = need("torch")
monai_losses = need("monai.losses")
ours = need("fastloss.monai")

NAMES = ("BoundaryLoss", "HausdorffDTLoss", "LogHausdorffDTLoss")
IGNORED = "single channel"


def called(loss: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The value, and its gradient under an upstream gradient of its shape."""
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{IGNORED}")
        warnings.filterwarnings("ignore", ".*has a single channel")
        value = loss(leaf, y)
    upstream = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), gradient


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_agrees_with_monai(name: str, data: Any) -> None:
    draw, channels = data.draw, data.draw(st.integers(1, 4))
    options: dict[str, Any] = {
        "include_background": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "batch": draw(st.booleans()),
        "to_onehot_y": draw(st.booleans()),
    }
    activation = draw(st.sampled_from(["sigmoid", "softmax", "other_act", None]))
    if activation is not None:
        options[activation] = torch.tanh if activation == "other_act" else True
    if name != "BoundaryLoss":
        options["alpha"] = draw(st.sampled_from([2.0, 1.0, 1.5, 0.0]))
    spatial = draw(st.lists(st.integers(1, 6), min_size=2, max_size=3))
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    double = draw(st.booleans())
    x = torch.tensor(2 * rng.normal(size=(batch, channels, *spatial)))
    x = x if double else x.float()
    labels = rng.integers(0, draw(st.integers(1, channels)), (batch, 1, *spatial))
    if channels == 1:
        labels = rng.integers(0, 2, labels.shape)
    if options["to_onehot_y"] and channels > 1:
        y = torch.tensor(labels).to(
            draw(st.sampled_from([torch.int64, torch.uint8, torch.float32]))
        )
    elif channels > 1 and draw(st.booleans()):
        y = torch.tensor(rng.random(x.shape)).to(x.dtype)
    else:
        dense = labels == np.arange(max(channels, 2)).reshape(-1, *[1] * len(spatial))
        y = torch.tensor(dense if channels > 1 else labels).to(x.dtype)
    right = called(getattr(monai_losses, name)(**options), x, y)
    with fl.use_backend(need_backend(draw(st.sampled_from(["cpu", "reference"])))):
        value, gradient = called(getattr(ours, name)(**options), x, y)
    scale = 1 + float(right[0].abs().max()) + 10 * sum(spatial) ** 2
    exact = 1e-7 if double else 4e-7
    torch.testing.assert_close(value.double(), right[0].double(), rtol=1e-5, atol=exact * scale)
    assert value.shape == right[0].shape
    error = float((gradient - right[1]).double().norm())
    assert error <= 2e-5 * float(right[1].double().norm()) + exact * scale


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    own, right = (inspect.signature(getattr(m, name)) for m in (ours, monai_losses))
    assert list(own.parameters) == list(right.parameters)
    for key, parameter in right.parameters.items():
        assert own.parameters[key].default == getattr(parameter.default, "value", parameter.default)


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_full_masks_are_finite(name: str) -> None:
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    for label in (0, 1):
        y = torch.full((2, 1, 5, 6), label)
        loss = {"softmax": True, "to_onehot_y": True, "reduction": "none"}
        value, gradient = called(getattr(ours, name)(**loss), x, y)
        right = called(getattr(monai_losses, name)(**loss), x, y)
        torch.testing.assert_close((value, gradient), right, rtol=1e-6, atol=1e-9)
        if name == "BoundaryLoss":
            assert not value.any()


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_raise_what_monai_raises(name: str) -> None:
    x, y = torch.rand(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    for module in (ours, monai_losses):
        kind = getattr(module, name)
        with pytest.raises(ValueError, match="sigmoid"):
            kind(sigmoid=True, softmax=True)
        with pytest.raises(TypeError, match="other_act"):
            kind(other_act="tanh")
        with pytest.raises(ValueError, match=r"reduction|LossReduction"):
            kind(reduction="median")
        with pytest.raises(ValueError):  # noqa: PT011  MONAI's message names no argument
            kind()(x[..., 0], y[..., 0])
        with pytest.raises(AssertionError):
            kind()(x, y[:, :2])
        with pytest.raises(AssertionError):
            kind(to_onehot_y=True)(x, y)
        with pytest.warns(UserWarning, match="include_background=False"):
            kind(include_background=False)(x[:, :1], y[:, :1])


def test_a_label_map_may_lack_its_channel_axis() -> None:
    x, y = torch.rand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    pair = [m.BoundaryLoss(softmax=True, to_onehot_y=True)(x, y) for m in (ours, monai_losses)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_the_gradient_by_a_target_is_monais() -> None:
    x, y = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    found = []
    for module in (ours, monai_losses):
        leaf = y.clone().requires_grad_()
        module.HausdorffDTLoss()(x, leaf).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_distances_of_a_subclass_are_used() -> None:
    class Constant(ours.HausdorffDTLoss):
        def distance_field(self, img: Any) -> Any:
            return torch.ones_like(img)

    x, y = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    right = 2 * ((x - y) ** 2)[:, 1:].mean()
    torch.testing.assert_close(Constant()(x, y), right)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_pickled_and_half(name: str) -> None:
    torch._dynamo.reset()
    loss = getattr(ours, name)(softmax=True, to_onehot_y=True)
    x, y = torch.randn(2, 3, 6, 7), torch.randint(0, 3, (2, 1, 6, 7))
    right = called(loss, x, y)
    fast = torch.compile(lambda a, b: loss(a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(called(fast, x, y), right)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(called(other, x, y), right)
    value, gradient = called(loss, x.half(), y)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(value, right[0], rtol=2e-2, atol=1e-2)
    assert "softmax=True" in repr(loss)
