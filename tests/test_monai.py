"""The drop-ins for MONAI's losses agree with MONAI itself over the whole space of options."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import need, need_backend

import fastloss as fl

torch = need("torch")
monai_losses = need("monai.losses")
ours = need("fastloss.monai")

NAMES = (
    "DiceLoss",
    "MaskedDiceLoss",
    "TverskyLoss",
    "GeneralizedDiceLoss",
    "FocalLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "GeneralizedDiceFocalLoss",
    "MCCLoss",
    "SoftclDiceLoss",
    "SoftDiceclDiceLoss",
)


SMOOTHED = ("MCCLoss", "SoftclDiceLoss", "SoftDiceclDiceLoss")
SKELETONS = ("SoftclDiceLoss", "SoftDiceclDiceLoss")


class Call(NamedTuple):
    """A loss, and the arrays of one call."""

    options: dict[str, Any]
    input: np.ndarray
    target: np.ndarray
    mask: np.ndarray | None = None


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """MONAI computes some things in float32 whatever it is given: not here."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        exact = functools.partial(need("monai.networks").one_hot, dtype=torch.float64)
        for module in ("dice", "focal_loss", "tversky", "mcc_loss", "cldice"):
            stack.enter_context(mock.patch(f"monai.losses.{module}.one_hot", exact))
        yield


# --------------------------------------------------------------------------- what is drawn

SMOOTH = st.sampled_from([0.0, 1e-5, 1.0])
WEIGHT = st.floats(0.1, 3.0)
SLOPE = st.floats(0.05, 2.0)
FACTOR = st.just(0.0) | SLOPE
SHARE = st.integers(0, 64).map(lambda n: n / 64)  # exact in float32, like 1 minus it


@st.composite
def options_of(draw: Any, name: str, channels: int) -> dict[str, Any]:
    """Arguments of one of the classes; those left out have their defaults."""
    accepted = inspect.signature(getattr(monai_losses, name)).parameters
    background = draw(st.booleans())
    counted = channels if background or channels == 1 else channels - 1
    activation = draw(st.sampled_from(["sigmoid", "softmax", "other_act", None]))
    reductions = ["mean", "sum"] + ["none"] * (name != "DiceCELoss")
    ignore = st.sampled_from([None, None, *range(channels), 255, -1])
    drawn: dict[str, Any] = {
        "include_background": background,
        "squared_pred": draw(st.booleans()),
        "jaccard": draw(st.booleans()),
        "reduction": draw(st.sampled_from(reductions)),
        "smooth_nr": draw(SMOOTH),
        "smooth_dr": draw(SMOOTH),
        "batch": draw(st.booleans()),
        "soft_label": draw(st.booleans()),
        "ignore_index": draw(ignore),
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])),
        "use_softmax": draw(st.booleans()),
        "w_type": draw(st.sampled_from(["square", "simple", "uniform"])),
        "beta": draw(SLOPE),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "iter_": draw(st.integers(0, 4)),
        "smooth": draw(st.sampled_from([1e-4, 1.0])),
    }
    if name in SMOOTHED:  # whose 0 / 0 is NaN in MONAI
        drawn["smooth_dr"] = draw(st.sampled_from([1e-5, 1.0]))
    if activation is not None:
        drawn[activation] = torch.atan if activation == "other_act" else True
    drawn |= {key: draw(FACTOR) for key in accepted if key.startswith("lambda_")}
    if name == "TverskyLoss":
        drawn["alpha"] = draw(SLOPE)
    elif name == "SoftDiceclDiceLoss":
        drawn["alpha"] = draw(SHARE)
    else:
        per_channel = st.lists(SHARE, min_size=counted, max_size=counted)
        kinds = [st.none(), SHARE] + [per_channel] * (name == "FocalLoss")
        drawn["alpha"] = draw(st.one_of(kinds))
    if name == "DiceCELoss":
        weights = st.lists(WEIGHT, min_size=channels, max_size=channels)
        drawn["weight"] = draw(st.one_of(st.none(), weights.map(torch.tensor)))
    else:
        weights = st.lists(WEIGHT, min_size=counted, max_size=counted)
        kinds = [st.none(), WEIGHT] + [weights] * (counted > 1)
        drawn["weight"] = draw(st.one_of(kinds))
    return {key: value for key, value in drawn.items() if key in accepted}


@st.composite
def calls(draw: Any, name: str, dtype: Any = np.float64) -> Call:
    channels = draw(st.integers(1, 4))
    options = draw(options_of(name, channels))
    least, longest = (2, 7) if name in SKELETONS else (1, 4)
    spatial = draw(st.lists(st.integers(1, longest), min_size=least, max_size=3))
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (batch, channels, *spatial)
    if name == "FocalLoss" or "sigmoid" in options or ("softmax" in options and channels > 1):
        x = 2 * rng.normal(size=shape)
    else:
        x = rng.uniform(0.05, 0.95, shape)

    kind = draw(st.sampled_from(["labels", "labels", "one-hot", "several", "soft"]))
    options["to_onehot_y"] = kind == "labels"
    present = draw(st.integers(1, channels))  # the other classes are absent
    index = options.get("ignore_index")
    labels = rng.integers(0, present, (batch, 1, *spatial))
    if channels == 1:
        labels = rng.integers(0, 2, labels.shape)
    if index is not None:
        labels[rng.random(labels.shape) < 0.3] = index
    if kind == "labels" and channels > 1:
        dtypes = ["int64", "int16", "float32"] + ["uint8"] * (index != -1)
        return _masked(draw, rng, name, Call(options, x.astype(dtype), labels), dtypes, dtype)
    if channels == 1:
        y = labels.astype(dtype) if kind != "soft" else rng.random(shape).astype(dtype)
    elif kind == "one-hot":
        y = (labels == np.arange(channels).reshape(-1, *[1] * len(spatial))).astype(dtype)
    elif kind == "several":
        y = (rng.random(shape) < 0.4).astype(dtype)
    else:
        y = rng.dirichlet(np.ones(channels), (batch, *spatial)).astype(dtype)
        y = np.moveaxis(y, -1, 1)
    # MONAI refuses integers in some formulas.
    plain = not options.get("squared_pred") and not options.get("soft_label")
    plain = plain and name not in SKELETONS
    dtypes = [np.dtype(dtype).name] + ["int16"] * (plain and kind != "soft")
    return _masked(draw, rng, name, Call(options, x.astype(dtype), y), dtypes, dtype)


def _masked(draw: Any, rng: Any, name: str, call: Call, dtypes: list[str], dtype: Any) -> Call:
    call = call._replace(target=call.target.astype(draw(st.sampled_from(dtypes))))
    if name != "MaskedDiceLoss":
        return call
    batch = draw(st.sampled_from([1, call.input.shape[0]]))
    mask = rng.random((batch, 1, *call.input.shape[2:]))
    kind = draw(st.sampled_from(["bool", "float", "fractions", "none"]))
    if kind == "none":
        return call
    return call._replace(
        mask=(mask if kind == "fractions" else mask < 0.6).astype(bool if kind == "bool" else dtype)
    )


# --------------------------------------------------------------------------- how it is compared


def run(module: Any, name: str, call: Call, seed: int = 0) -> tuple[Any, Any, list[type]]:
    """Value, gradient by a random upstream gradient, and the categories of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.tensor(call.input, requires_grad=True)
        loss = getattr(module, name)(**call.options).to(x.dtype)
        arrays = [torch.tensor(a) for a in call[2:] if a is not None]
        value = loss(x, *arrays)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), x)
    return value.detach(), gradient, sorted((w.category for w in caught), key=str)


def assert_same(name: str, call: Call, by: float) -> None:
    value, gradient, warned = run(ours, name, call)
    expected, expected_gradient, expected_warned = run(monai_losses, name, call)
    assert value.shape == expected.shape
    assert warned == expected_warned
    np.testing.assert_allclose(value, expected, rtol=by, atol=by)
    if expected.isfinite().all():
        scale = max(float(expected_gradient.abs().max()), 1.0 / expected_gradient.numel())
        np.testing.assert_allclose(gradient, expected_gradient, rtol=by, atol=by * scale)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_monai_float64(name: str, data: Any) -> None:
    call = data.draw(calls(name))
    with fl.use_backend(need_backend("cpu")), in_float64():
        assert_same(name, call, 1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_monai_float32(name: str, data: Any) -> None:
    call = data.draw(calls(name, np.float32))
    with fl.use_backend(need_backend("cpu")):
        assert_same(name, call, 2e-4 if call.options.get("gamma") == 0.5 else 3e-5)


# --------------------------------------------------------------------------- what is not drawn

LABELS = np.random.default_rng(1).integers(0, 3, (2, 1, 4, 5))
LOGITS = 2 * np.random.default_rng(2).normal(size=(2, 3, 4, 5))
SEVERAL = (np.random.default_rng(3).random(LOGITS.shape) < 0.4).astype(np.float64)
POINTS, POINT_LABELS, POINTS_SEVERAL = (a[..., 0, 0] for a in (LOGITS, LABELS, SEVERAL))
ONE_HOT: dict[str, Any] = {"to_onehot_y": True}
QUARTER = torch.tensor(0.25)
ALONG_SPACE = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)

UNUSUAL: list[tuple[str, dict[str, Any], np.ndarray, np.ndarray]] = [
    ("DiceLoss", {"smooth_nr": -0.5}, LOGITS, SEVERAL),
    ("DiceLoss", {"weight": [[1.0], [2], [3]], "batch": True}, LOGITS, SEVERAL),
    ("TverskyLoss", {"sigmoid": True, "alpha": -0.5, "beta": 2}, LOGITS, SEVERAL),
    ("FocalLoss", {"gamma": -1.0}, LOGITS, SEVERAL),
    ("FocalLoss", {"alpha": 1.5}, LOGITS, SEVERAL),
    ("FocalLoss", {"alpha": QUARTER}, LOGITS, SEVERAL),
    ("FocalLoss", {"alpha": QUARTER, "use_softmax": True}, LOGITS, SEVERAL),
    ("FocalLoss", ONE_HOT | {"reduction": "none", "ignore_index": 1}, LOGITS, LABELS),
    ("DiceCELoss", {"sigmoid": True, "weight": ALONG_SPACE}, LOGITS[:, :1], SEVERAL[:, :1]),
    ("DiceCELoss", ONE_HOT | {"softmax": True, "reduction": "sum "}, LOGITS, LABELS),
    ("GeneralizedDiceLoss", ONE_HOT | {"softmax": True, "w_type": " simple"}, LOGITS, LABELS),
    # No axis of space: MONAI then sums over all axes.
    ("DiceLoss", {"sigmoid": True}, POINTS, POINTS_SEVERAL),
    ("DiceLoss", {"batch": True, "reduction": "none"}, POINTS, POINTS_SEVERAL),
    ("DiceLoss", ONE_HOT | {"softmax": True}, POINTS, POINT_LABELS[:, 0]),
    ("FocalLoss", ONE_HOT | {"reduction": "sum"}, POINTS, POINT_LABELS),
    ("DiceFocalLoss", ONE_HOT, POINTS, POINT_LABELS),
]


@pytest.mark.parametrize(("name", "options", "x", "y"), UNUSUAL)
def test_unusual_options(name: str, options: dict[str, Any], x: np.ndarray, y: np.ndarray) -> None:
    with in_float64():
        assert_same(name, Call(options, x, y), 1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name: str) -> None:
    """As MONAI has it, whose mean over nothing is NaN; the gradient is as empty as the logits."""
    for batch in (False, True):
        for reduction in ("mean", "sum", "none"):
            if name != "DiceCELoss" or reduction != "none":
                _check_empty_batch(name, batch, reduction)


def _check_empty_batch(name: str, batch: bool, reduction: str) -> None:
    accepted = inspect.signature(getattr(monai_losses, name)).parameters
    options = ONE_HOT | {"reduction": reduction, "softmax": True, "batch": batch}
    options = {key: value for key, value in options.items() if key in accepted}
    arrays = [LOGITS[:0], LABELS[:0]]
    if name == "MaskedDiceLoss":
        arrays.append(np.ones(LABELS[:0].shape))
    results = []
    for module in (ours, monai_losses):
        x, *others = map(torch.tensor, arrays)
        value = getattr(module, name)(**options)(x.requires_grad_(), *others)
        results.append((value, *torch.autograd.grad(value.sum(), x)))
    torch.testing.assert_close(*results, equal_nan=True, check_dtype=False)
