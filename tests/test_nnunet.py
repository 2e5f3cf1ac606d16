"""The drop-ins for nnU-Net's losses agree with its definitions, and with nnU-Net itself."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, need, need_backend, need_gloo, python

import fastloss as fl

torch = need("torch")
ours = need("fastloss.nnunet")
functional = torch.nn.functional

WHERE = {
    "SoftDiceLoss": "dice",
    "MemoryEfficientSoftDiceLoss": "dice",
    "RobustCrossEntropyLoss": "robust_ce_loss",
    "TopKLoss": "robust_ce_loss",
    "DC_and_CE_loss": "compound_losses",
    "DC_and_topk_loss": "compound_losses",
    "DC_and_BCE_loss": "compound_losses",
}
"""The losses, and the nnU-Net module of each."""
APPLY = {
    "softmax": ours.softmax_helper_dim1,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    None: None,
}


class Call(NamedTuple):
    """A loss and the tensors of one call."""

    name: str
    options: dict[str, Any]
    x: Any
    y: Any
    mask: Any = None


# --------------------------------------------------------------------------- definitions


def dice(
    p: Any,
    y: Any,
    mask: Any = None,
    *,
    batch_dice: bool = False,
    do_bg: bool = True,
    smooth: float = 1.0,
    clip_tp: float | None = None,
    ddp: bool = False,
) -> Any:
    """The negative mean Dice of probabilities, from true and false positives and negatives."""
    g = dense(y, p)
    m = torch.ones_like(p[:, :1]) if mask is None else mask.to(p.dtype)
    axes = [*([0] if batch_dice else []), *range(2, p.ndim)]
    tp, fp, fn = ((m * a).sum(axes) for a in (p * g, p * (1 - g), (1 - p) * g))
    if clip_tp is not None:
        tp = tp.clamp(min=clip_tp)
    score = (2 * tp + smooth) / (2 * tp + fp + fn + smooth).clamp(min=1e-8)
    return -score[..., 0 if do_bg else 1 :].mean()


def dense(y: Any, p: Any) -> Any:
    if y.ndim < p.ndim:
        y = y[:, None]
    if y.shape == p.shape:
        return y.to(p.dtype)
    classes = torch.arange(p.shape[1]).reshape(-1, *[1] * (p.ndim - 2))
    return (y.long() == classes).to(p.dtype)


def cross_entropy(x: Any, y: Any, **options: Any) -> Any:
    y = y[:, 0] if y.ndim == x.ndim else y
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(x.dtype)
    return functional.cross_entropy(x, y.long(), **options)


def top_k(x: Any, y: Any, *, k: float = 10, **options: Any) -> Any:
    losses = cross_entropy(x, y, reduction="none", **options).flatten()
    return losses.sort(descending=True).values[: int(losses.numel() * k / 100)].mean()


def dc_and_ce(
    x: Any,
    y: Any,
    *,
    soft_dice_kwargs: dict[str, Any],
    ce_kwargs: dict[str, Any],
    weight_ce: float = 1.0,
    weight_dice: float = 1.0,
    ignore_label: int | None = None,
    dice_class: str = "",
    entropy: Any = cross_entropy,
) -> Any:
    mask, known = None, y
    if ignore_label is not None:
        mask = y != ignore_label
        known = y * mask
        ce_kwargs = ce_kwargs | {"ignore_index": ignore_label}
    value = weight_dice * dice(x.softmax(1), known, mask, **soft_dice_kwargs)
    if weight_ce != 0 and (mask is None or mask.any()):
        value = value + weight_ce * entropy(x, y, **ce_kwargs)
    return value


def dc_and_bce(
    x: Any,
    y: Any,
    *,
    soft_dice_kwargs: dict[str, Any],
    bce_kwargs: dict[str, Any],
    weight_ce: float = 1.0,
    weight_dice: float = 1.0,
    use_ignore_label: bool = False,
    dice_class: str = "",
) -> Any:
    mask = None
    bce_kwargs = {k: v.to(x.dtype) if torch.is_tensor(v) else v for k, v in bce_kwargs.items()}
    if use_ignore_label:
        y, mask = y[:, :-1], y[:, -1:] != 1
        each = functional.binary_cross_entropy_with_logits(
            x, y.to(x.dtype), **(bce_kwargs | {"reduction": "none"})
        )
        entropy = (each * mask).sum() / max(int(mask.sum()), 1)
    else:
        entropy = functional.binary_cross_entropy_with_logits(x, y.to(x.dtype), **bce_kwargs)
    return weight_ce * entropy + weight_dice * dice(x.sigmoid(), y, mask, **soft_dice_kwargs)


def formula(call: Call) -> Any:
    """The call's value by the definitions above."""
    options = dict(call.options)
    if call.name.endswith("SoftDiceLoss") or call.name == "SoftDiceLoss":
        function = APPLY[options.pop("apply_nonlin", None)]
        return dice(call.x if function is None else function(call.x), call.y, call.mask, **options)
    compute = {
        "RobustCrossEntropyLoss": cross_entropy,
        "TopKLoss": top_k,
        "DC_and_CE_loss": dc_and_ce,
        "DC_and_topk_loss": partial(dc_and_ce, entropy=top_k),
        "DC_and_BCE_loss": dc_and_bce,
    }[call.name]
    return compute(call.x, call.y, **options)


# --------------------------------------------------------------------------- strategies


@st.composite
def dice_options(draw: Any, name: str, background: Any = st.booleans()) -> dict[str, Any]:  # noqa: B008
    options = {
        "batch_dice": draw(st.booleans()),
        "do_bg": draw(background),
        "smooth": draw(st.sampled_from([0.0, 1e-5, 1.0])),
        "ddp": False,
    }
    if name == "SoftDiceLoss":
        options["clip_tp"] = draw(st.sampled_from([None, 0.7, 3.0]))
    return options


@st.composite
def calls(draw: Any, name: str, dtype: Any) -> Call:
    regions = name == "DC_and_BCE_loss"
    channels = draw(st.integers(1, 4))
    spatial = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    batch = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (batch, channels, *spatial)
    x = torch.tensor(2 * rng.normal(size=shape), dtype=dtype)
    labels = rng.integers(0, draw(st.integers(1, channels)), (batch, 1, *spatial))
    label_dtype = getattr(torch, draw(st.sampled_from(["int64", "int16", "uint8", "float32"])))
    background = st.booleans() if channels > 1 else st.just(True)
    factor = st.sampled_from([0.0, 0.5, 1.0, 1.7])
    options: dict[str, Any] = {}

    if name.endswith("DiceLoss"):
        options = draw(dice_options(name, background))
        options["apply_nonlin"] = draw(st.sampled_from(list(APPLY)))
        if options["apply_nonlin"] is None:
            x = x.sigmoid()
        kind = draw(st.sampled_from(["labels", "without channel", "one-hot", "soft", "bool"]))
        if channels == 1 or kind in ("soft", "bool"):
            y = torch.tensor(rng.random(shape))
            y = y < 0.4 if kind == "bool" else y
        elif kind == "one-hot":
            y = torch.tensor(labels == np.arange(channels).reshape(-1, *[1] * len(spatial))).short()
        else:
            y = torch.tensor(labels).to(label_dtype)
            y = y[:, 0] if kind == "without channel" else y
        mask = draw(st.sampled_from([None, "bool", "weights"]))
        if mask is not None:
            drawn = torch.tensor(rng.random((batch, 1, *spatial)))
            mask = drawn < 0.6 if mask == "bool" else drawn.to(dtype)
        return Call(name, options, x, y, mask)

    if regions:
        options["use_ignore_label"] = draw(st.booleans())
        bce: dict[str, Any] = {}
        for key in ("weight", "pos_weight"):
            sizes = [(1,), (channels, *[1] * len(spatial)), tuple(spatial)]
            size = draw(st.sampled_from([None, None, *sizes]))
            if size is not None:
                bce[key] = torch.tensor(rng.uniform(0.2, 2, size), dtype=dtype)
        if not options["use_ignore_label"]:
            bce["reduction"] = draw(st.sampled_from(["mean", "mean", "sum", "none"]))
        options["bce_kwargs"] = bce
        total = (batch, channels + options["use_ignore_label"], *spatial)
        y = torch.tensor(rng.random(total) < draw(st.sampled_from([0.4, 0.4, 1.0])))
        kind = draw(st.sampled_from(["bool", "uint8", "float32", "soft"]))
        soft = torch.tensor(np.where(rng.random(total) < 0.5, rng.random(total), y))
        y = soft if kind == "soft" else y.to(getattr(torch, kind))
    else:
        ce: dict[str, Any] = {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))}
        largest = name in ("TopKLoss", "DC_and_topk_loss")
        if largest:
            ce["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1]))
            least = 100 / (batch * np.prod(spatial))  # one voxel
            ce["k"] = draw(st.sampled_from([k for k in (10, 25, 62.5, 100) if k >= least]))
        else:
            ce["reduction"] = draw(st.sampled_from(["mean", "mean", "sum", "none"]))
        if draw(st.booleans()):
            ce["weight"] = torch.tensor(rng.uniform(0.2, 2, channels), dtype=dtype)
        y = torch.tensor(labels)
        ignored = draw(st.sampled_from([None, channels, 255]))
        alone = name in ("RobustCrossEntropyLoss", "TopKLoss")
        if alone:
            ce["ignore_index"] = -100 if ignored is None else ignored
        else:
            options["ignore_label"] = ignored
            if ignored is None and channels > 1:  # only one part may ignore a class
                ce["ignore_index"] = draw(st.sampled_from([-100, 0, 255]))
        if ignored is not None:
            lost = torch.tensor(rng.random(labels.shape) < draw(st.sampled_from([0.3, 1.0])))
            # Over no voxels only the compound loss is defined.
            lost.view(-1)[0] &= not alone
            y[lost] = ignored
        elif ce.get("ignore_index") == 0:
            y.view(-1)[0] = 1
        y = y.to(label_dtype)
        if alone:
            flat = not largest and draw(st.booleans())
            return Call(name, ce, x, y[:, 0] if flat else y)
        options["ce_kwargs"] = ce

    kind = "SoftDiceLoss"
    if name != "DC_and_topk_loss":
        kind = draw(st.sampled_from(["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"]))
        options["dice_class"] = kind
    options["soft_dice_kwargs"] = draw(dice_options(kind, background))
    options["weight_ce"], options["weight_dice"] = draw(factor), draw(factor)
    if options["weight_ce"] == options["weight_dice"] == 0:
        options["weight_ce"] = 1.0
    return Call(name, options, x, y)


# --------------------------------------------------------------------------- comparison


def made(modules: Any, call: Call) -> Any:
    """The loss of this call, from classes that ``modules`` gives by name."""
    options = dict(call.options)
    if "dice_class" in options:
        options["dice_class"] = modules(options["dice_class"])
    if "apply_nonlin" in options:
        options["apply_nonlin"] = APPLY[options["apply_nonlin"]]
    for key in ("ce_kwargs", "bce_kwargs"):
        if key in options:
            options[key] = dict(options[key])  # nnU-Net modifies it
    return modules(call.name)(**options)


def our(name: str) -> Any:
    return getattr(ours, name)


def their(name: str) -> Any:
    return getattr(need(f"nnunetv2.training.loss.{WHERE[name]}"), name)


def run(function: Any, call: Call) -> tuple[Any, Any]:
    """Value, and gradient with a fixed upstream gradient."""
    x = call.x.clone().requires_grad_()
    arrays = [call.y] if call.mask is None else [call.y, call.mask]
    value = torch.as_tensor(function(x, *arrays))
    if not value.requires_grad:  # one part has weight 0, the other has no voxel
        return value, torch.zeros_like(x)
    upstream = torch.linspace(0.5, 2, max(value.numel(), 1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((value * upstream.reshape(value.shape)).sum(), x)
    return value.detach(), gradient


def assert_same(result: tuple[Any, Any], expected: tuple[Any, Any], by: float) -> None:
    assert result[0].shape == expected[0].shape
    np.testing.assert_allclose(result[0], expected[0], rtol=by, atol=by)
    scale = max(float(expected[1].abs().max()), 1.0 / expected[1].numel())
    np.testing.assert_allclose(result[1], expected[1], rtol=by, atol=by * scale)


def by_formula(call: Call) -> tuple[Any, Any]:
    def compute(x: Any, *_: Any) -> Any:
        return formula(call._replace(x=x))

    return run(compute, call)


@pytest.mark.parametrize("name", WHERE)
@given(data=st.data())
def test_value_and_gradient(name: str, data: Any) -> None:
    call = data.draw(calls(name, torch.float64))
    with fl.use_backend(need_backend("cpu")):
        assert_same(run(made(our, call), call), by_formula(call), 1e-9)


@pytest.mark.parametrize("name", WHERE)
@given(data=st.data())
def test_nnunet_itself(name: str, data: Any) -> None:
    their(name)
    call = data.draw(calls(name, torch.float32))
    with fl.use_backend(need_backend("cpu")):
        assert_same(run(made(our, call), call), run(made(their, call), call), 3e-5)


@pytest.mark.parametrize("name", WHERE)
def test_signatures(name: str) -> None:
    for function in (our(name), our(name).forward):
        theirs = their(name) if function is our(name) else their(name).forward
        own, other = (inspect.signature(f).parameters for f in (function, theirs))
        assert list(own) == list(other)
        for parameter in own:
            assert own[parameter].kind == other[parameter].kind
            if parameter != "dice_class":
                assert own[parameter].default == other[parameter].default
            else:
                assert own[parameter].default.__name__ == other[parameter].default.__name__


# --------------------------------------------------------------------------- single cases

RNG = np.random.default_rng(1)
LOGITS = torch.tensor(2 * RNG.normal(size=(2, 3, 4, 5)))
LABELS = torch.tensor(RNG.integers(0, 3, (2, 1, 4, 5)))
WITH_IGNORED = torch.where(torch.tensor(RNG.random((2, 1, 4, 5)) < 0.3), 3, LABELS)
REGIONS = torch.tensor(RNG.random((2, 3, 4, 5)) < 0.4)
WITH_CHANNEL = torch.tensor(RNG.random((2, 4, 4, 5)) < 0.4)
ONE = LOGITS[:, :1].sigmoid()
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
BATCH_DICE = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}


def own_call(name: str, y: Any, x: Any = LOGITS, **options: Any) -> Call:
    for part in ("soft_dice_kwargs", "ce_kwargs", "bce_kwargs"):
        if part in inspect.signature(our(name)).parameters:
            options.setdefault(part, BATCH_DICE if part == "soft_dice_kwargs" else {})
    return Call(name, options, x, y)


class HalfDice(torch.nn.Module):
    """A Dice class that is neither ours nor nnU-Net's."""

    def __init__(self, apply_nonlin: Any, **options: Any) -> None:
        super().__init__()
        self.apply_nonlin, self.options = apply_nonlin, options

    def forward(self, x: Any, y: Any, loss_mask: Any = None) -> Any:
        assert y.max() < x.shape[1]
        return dice(self.apply_nonlin(x), y, loss_mask, **self.options) / 2


IGNORED = {"ignore_label": 3}
SMOOTHED = {"ce_kwargs": {"weight": WEIGHT, "label_smoothing": 0.1}}
PER_CHANNEL = {"bce_kwargs": {"pos_weight": WEIGHT.reshape(3, 1, 1)}}
PASSES: list[tuple[int, Call]] = [
    (1, own_call("DC_and_CE_loss", LABELS, **SMOOTHED)),
    (1, own_call("DC_and_CE_loss", WITH_IGNORED, **IGNORED)),
    (1, own_call("DC_and_CE_loss", LABELS, ce_kwargs={"ignore_index": 255})),
    (1, own_call("DC_and_CE_loss", REGIONS, weight_ce=0)),
    (2, own_call("DC_and_CE_loss", LABELS, ce_kwargs={"ignore_index": 0})),
    (1, own_call("DC_and_CE_loss", LABELS, ce_kwargs={"reduction": "none"})),
    (1, own_call("DC_and_BCE_loss", REGIONS, **PER_CHANNEL)),
    (1, own_call("DC_and_BCE_loss", WITH_CHANNEL, use_ignore_label=True)),
    (1, own_call("DC_and_BCE_loss", REGIONS, bce_kwargs={"reduction": "none"})),
    (1, own_call("DC_and_topk_loss", WITH_IGNORED, **IGNORED)),
    (1, own_call("TopKLoss", WITH_IGNORED, ignore_index=3)),
]


@pytest.mark.parametrize(("passes", "call"), PASSES)
def test_what_is_fused(passes: int, call: Call) -> None:
    """The number of passes that write a gradient; they save nothing of the size of the logits."""
    backend, kept = fl.backends.load_backend("reference"), []
    with (
        mock.patch.object(backend, "apply", wraps=backend.apply) as apply,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        x = call.x.clone().requires_grad_()
        made(our, call)(x, call.y).sum().backward()
    assert apply.call_count == passes
    if {"reduction": "none"} not in call.options.values():
        given = {t.untyped_storage().data_ptr() for t in (x, call.y)}
        large = [t for t in kept if t.numel() > x.numel() / x.shape[1]]
        assert {t.untyped_storage().data_ptr() for t in large} <= given


@pytest.mark.parametrize("call", [call for _, call in PASSES], ids=lambda c: c.name)
@pytest.mark.usefixtures("backend")
def test_backends(call: Call) -> None:
    single = call._replace(x=call.x.float())
    assert_same(run(made(our, single), single), by_formula(call), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", [PASSES[i][1] for i in (0, 5, 6, 7, 8, 9, 10)])
def test_half(call: Call, dtype: Any) -> None:
    """Half logits are computed in float32, with a gradient scaled for float16."""
    x = call.x.to(dtype)
    value, gradient = run(lambda *a: 4096 * made(our, call)(*a), call._replace(x=x))
    expected, exact = by_formula(call._replace(x=x.double()))
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    np.testing.assert_allclose(value / 4096, expected, rtol=1e-6, atol=1e-6)
    scale = float(exact.abs().max())
    np.testing.assert_allclose(gradient.double() / 4096, exact, rtol=1e-2, atol=1e-3 * scale)


@pytest.mark.parametrize(
    "call",
    [
        own_call("DC_and_CE_loss", LABELS, dice_class=HalfDice),
        own_call("DC_and_CE_loss", WITH_IGNORED, dice_class=HalfDice, **IGNORED),
        own_call("DC_and_BCE_loss", WITH_CHANNEL, dice_class=HalfDice, use_ignore_label=True),
    ],
)
def test_dice_class_of_others(call: Call) -> None:
    half = call.options | {"weight_dice": 0.5}
    with mock.patch.object(ours, "HalfDice", HalfDice, create=True):
        loss = getattr(ours, call.name)(**call.options)
    assert_same(run(loss, call), by_formula(call._replace(options=half)), 1e-9)


@pytest.mark.parametrize("function", [torch.nn.Softmax(dim=1), torch.nn.Softmax(1).forward])
def test_other_softmax(function: Any) -> None:
    call = Call("SoftDiceLoss", {"apply_nonlin": "softmax", "ddp": False}, LOGITS, LABELS)
    loss = ours.SoftDiceLoss(function, ddp=False)
    assert_same(run(loss, call), by_formula(call), 1e-9)


@pytest.mark.parametrize(
    "call",
    [
        own_call("RobustCrossEntropyLoss", LABELS, weight=WEIGHT - 1.5),
        own_call("DC_and_BCE_loss", REGIONS, bce_kwargs={"pos_weight": -WEIGHT[:1]}),
        own_call("RobustCrossEntropyLoss", LABELS[:, 0, 0, 0], LOGITS[:, :, 0, 0]),
    ],
)
def test_unusual(call: Call) -> None:
    assert_same(run(made(our, call), call), by_formula(call), 1e-9)


def test_gradient_of_the_target() -> None:
    """Only the cross-entropy has one, as nnU-Net's Dice losses give none."""
    y = torch.rand(LOGITS.shape, dtype=torch.float64, requires_grad=True)
    assert not ours.SoftDiceLoss(torch.sigmoid, ddp=False)(LOGITS, y).requires_grad
    (gradient,) = torch.autograd.grad(ours.DC_and_BCE_loss({}, BATCH_DICE)(LOGITS, y), y)
    np.testing.assert_allclose(gradient, -LOGITS / LOGITS.numel(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_top_k_is_one_voxel_at_least(smoothing: float) -> None:
    value = ours.TopKLoss(k=0.1, label_smoothing=smoothing)(LOGITS, LABELS)
    each = cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=smoothing)
    np.testing.assert_allclose(value, each.max(), rtol=1e-9)


def test_least_denominator() -> None:
    options = {"apply_nonlin": "softmax", "smooth": 0.0, "ddp": False}
    mask = torch.full((2, 1, 4, 5), 1e-11, dtype=torch.float64)
    call = Call("SoftDiceLoss", options, LOGITS, LABELS, mask)
    assert_same(run(made(our, call), call), by_formula(call), 1e-9)


def test_compiled_dice_is_fused() -> None:
    """nnU-Net's trainers compile the Dice loss inside the compound one."""
    call = PASSES[0][1]
    loss = made(our, call)
    loss.dc = torch.compile(loss.dc, backend="aot_eager")
    backend = fl.backends.load_backend("reference")
    with mock.patch.object(backend, "apply", wraps=backend.apply) as apply:
        result = run(loss, call)
    assert apply.call_count == 1
    assert_same(result, by_formula(call), 1e-9)


@pytest.mark.parametrize("call", [PASSES[i][1] for i in (1, 6, 9)], ids=lambda c: c.name)
def test_compiled(call: Call) -> None:
    """The losses compile without a graph break, for any size."""
    torch.compiler.reset()
    loss = made(our, call)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 4, 3):
        part = call._replace(x=call.x[..., :size], y=call.y[..., :size])
        assert_same(run(compiled, part), run(loss, part), 1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("call", [PASSES[i][1] for i in (1, 7, 9)], ids=lambda c: c.name)
def test_ignored_voxels_may_hold_anything(call: Call) -> None:
    ignored = call.y[:, -1:] == (1 if call.name == "DC_and_BCE_loss" else 3)
    x = call.x.masked_fill(ignored, torch.nan)
    value, gradient = run(made(our, call), call._replace(x=x))
    expected, exact = by_formula(call)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient, exact * ~ignored, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["RobustCrossEntropyLoss", "TopKLoss"])
def test_mean_over_no_voxel(name: str) -> None:
    call = own_call(name, torch.full_like(LABELS, 3), ignore_index=3)
    value, gradient = run(made(our, call), call)
    assert value == 0
    assert not gradient.any()


def test_class_weights_are_state() -> None:
    """They have nnU-Net's names, follow `load_state_dict`, and can be written in place."""
    call = own_call("DC_and_CE_loss", LABELS, ce_kwargs={"weight": WEIGHT})
    other = own_call("DC_and_CE_loss", LABELS, ce_kwargs={"weight": WEIGHT.flip(0)})
    loss = made(our, call)
    assert list(loss.state_dict()) == ["ce.weight"]
    # A compiled loss cannot read them, and has those that it was made with or that were loaded.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(compiled(LOGITS, LABELS), formula(call), rtol=1e-9)
    loss.load_state_dict(made(our, other).state_dict())
    np.testing.assert_allclose(compiled(LOGITS, LABELS), formula(other), rtol=1e-9)
    np.testing.assert_allclose(loss(LOGITS, LABELS), formula(other), rtol=1e-9)
    loss.ce.weight.copy_(WEIGHT)
    np.testing.assert_allclose(loss(LOGITS, LABELS), formula(call), rtol=1e-9)


@pytest.mark.parametrize("call", [PASSES[i][1] for i in (0, 6, 9)], ids=lambda c: c.name)
def test_copies(call: Call) -> None:
    loss = made(our, call)
    value = loss(call.x, call.y)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(again(call.x, call.y), value)


def test_options_are_not_written_to() -> None:
    ce, bce = {"label_smoothing": 0.1}, {"pos_weight": WEIGHT.reshape(3, 1, 1)}
    ours.DC_and_CE_loss({}, ce, ignore_label=3)
    ours.DC_and_topk_loss({}, {"k": 5}, ignore_label=3)
    ours.DC_and_BCE_loss(bce, {}, use_ignore_label=True)
    assert list(ce) == ["label_smoothing"]
    assert list(bce) == ["pos_weight"]


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (AssertionError, "ignore label", own_call("DC_and_CE_loss", REGIONS, **IGNORED)),
        (ValueError, "target.*label map", own_call("DC_and_CE_loss", REGIONS)),
        (ValueError, "target.*label map", own_call("DC_and_CE_loss", LABELS[:, 0])),
        (ValueError, "label.* 3", own_call("DC_and_CE_loss", LABELS + 1)),
        (ValueError, "label.* 3", own_call("RobustCrossEntropyLoss", LABELS + 1)),
        (AssertionError, "one channel", own_call("RobustCrossEntropyLoss", REGIONS)),
        (ValueError, "target.*4", own_call("DC_and_BCE_loss", REGIONS, use_ignore_label=True)),
        (ValueError, "target", own_call("DC_and_BCE_loss", LABELS)),
        (ValueError, "target.* 255$", own_call("DC_and_BCE_loss", 255 * REGIONS.byte())),
        (ValueError, "target.* 255$", own_call("SoftDiceLoss", 255 * REGIONS[:, :1].byte(), ONE)),
        (ValueError, "smooth", own_call("SoftDiceLoss", LABELS, smooth=-1.0)),
        (ValueError, "k: ", own_call("TopKLoss", LABELS, k=0)),
        (RuntimeError, "process_group", own_call("SoftDiceLoss", LABELS, batch_dice=True)),
    ],
)
def test_bad_input(error: Any, match: str, call: Call) -> None:
    with pytest.raises(error, match=match):
        getattr(ours, call.name)(**call.options)(call.x, call.y)


def test_import_needs_torch_alone() -> None:
    python("import sys, fastloss.nnunet; assert 'nnunetv2' not in sys.modules").check_returncode()


# --------------------------------------------------------------------------- deep supervision


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.0), np.array([0.6, 0.3, 0.1]), None])
def test_deep_supervision(weights: Any) -> None:
    outputs = [LOGITS[..., ::step, ::step].clone().requires_grad_() for step in (1, 2, 3)]
    targets = [LABELS[..., ::step, ::step] for step in (1, 2, 3)]
    call = PASSES[0][1]
    loss = ours.DeepSupervisionWrapper(made(our, call), weights)
    factors = (1, 1, 1) if weights is None else weights
    expected = sum(
        w * formula(call._replace(x=x, y=y))
        for w, x, y in zip(factors, outputs, targets, strict=True)
    )
    value = loss(outputs, targets)
    np.testing.assert_allclose(value.detach(), expected.detach(), rtol=1e-9)
    used = [x for w, x in zip(factors, outputs, strict=True) if w]
    for got, exact in zip(
        torch.autograd.grad(value, used), torch.autograd.grad(expected, used), strict=True
    ):
        np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-12)


def test_deep_supervision_refuses() -> None:
    loss = ours.RobustCrossEntropyLoss()
    with pytest.raises(AssertionError, match="not 0"):
        ours.DeepSupervisionWrapper(loss, (0, 0))
    wrapper = ours.DeepSupervisionWrapper(loss, (1, 0.5))
    with pytest.raises(AssertionError, match="lists or tuples"):
        wrapper(LOGITS, LABELS)
    with pytest.raises(ValueError, match="zip"):
        wrapper([LOGITS], [LABELS])


# --------------------------------------------------------------------------- trainers

STAND_IN = {
    "training/loss/dice.py": """
        from torch import nn

        class SoftDiceLoss(nn.Module):
            def __init__(self, apply_nonlin=None, **options):
                super().__init__()
                vars(self).update(options, apply_nonlin=apply_nonlin, clip_tp=None)

        class MemoryEfficientSoftDiceLoss(nn.Module):
            def __init__(self, apply_nonlin=None, **options):
                super().__init__()
                vars(self).update(options, apply_nonlin=apply_nonlin)
    """,
    "training/loss/robust_ce_loss.py": """
        from torch import nn

        class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
            pass

        class TopKLoss(RobustCrossEntropyLoss):
            def __init__(self, weight=None, ignore_index=-100, k=10, label_smoothing=0):
                super().__init__(weight, None, ignore_index, None, "none", label_smoothing)
                self.k = k
    """,
    "training/loss/compound_losses.py": """
        import torch
        from torch import nn
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss
        from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
        from nnunetv2.utilities.helpers import softmax_helper_dim1

        class DC_and_CE_loss(nn.Module):
            def __init__(self, soft_dice_kwargs, ce_kwargs, weight_ce=1, weight_dice=1,
                         ignore_label=None, dice_class=SoftDiceLoss):
                super().__init__()
                if ignore_label is not None:
                    ce_kwargs["ignore_index"] = ignore_label
                self.weight_ce, self.weight_dice = weight_ce, weight_dice
                self.ignore_label = ignore_label
                self.ce = RobustCrossEntropyLoss(**ce_kwargs)
                self.dc = dice_class(softmax_helper_dim1, **soft_dice_kwargs)

        class DC_and_topk_loss(nn.Module):
            def __init__(self, soft_dice_kwargs, ce_kwargs, weight_ce=1, weight_dice=1,
                         ignore_label=None):
                super().__init__()
                self.weight_ce, self.weight_dice = weight_ce, weight_dice
                self.ignore_label = ignore_label
                self.ce = TopKLoss(**ce_kwargs)
                self.dc = SoftDiceLoss(softmax_helper_dim1, **soft_dice_kwargs)

        class DC_and_BCE_loss(nn.Module):
            def __init__(self, bce_kwargs, soft_dice_kwargs, weight_ce=1, weight_dice=1,
                         use_ignore_label=False, dice_class=MemoryEfficientSoftDiceLoss):
                super().__init__()
                if use_ignore_label:
                    bce_kwargs["reduction"] = "none"
                self.weight_ce, self.weight_dice = weight_ce, weight_dice
                self.use_ignore_label = use_ignore_label
                self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
                self.dc = dice_class(torch.sigmoid, **soft_dice_kwargs)
    """,
    "training/loss/deep_supervision.py": """
        from torch import nn

        class DeepSupervisionWrapper(nn.Module):
            def __init__(self, loss, weight_factors=None):
                super().__init__()
                self.loss, self.weight_factors = loss, weight_factors
    """,
    "training/nnUNetTrainer/nnUNetTrainer.py": """
        import numpy as np
        import torch
        from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        class nnUNetTrainer:
            def _build_loss(self):
                dice = {"batch_dice": self.configuration_manager.batch_dice, "smooth": 1e-5,
                        "do_bg": self.label_manager.has_regions, "ddp": self.is_ddp}
                ignore = self.label_manager.ignore_label
                if self.label_manager.has_regions:
                    loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore is not None)
                else:
                    loss = DC_and_CE_loss(dice, {}, ignore_label=ignore,
                                          dice_class=MemoryEfficientSoftDiceLoss)
                if self._do_i_compile():
                    loss.dc = torch.compile(loss.dc)
                if self.enable_deep_supervision:
                    weights = 0.5 ** np.arange(len(self._get_deep_supervision_scales()))
                    weights[-1] = 0
                    loss = DeepSupervisionWrapper(loss, weights / weights.sum())
                return loss
    """,
    "utilities/helpers.py": """
        def softmax_helper_dim1(x):
            return x.softmax(1)
    """,
}
"""A stub package with the parts of the default trainer's loss; none of it computes a loss."""


@pytest.fixture
def nnunet(tmp_path: Path) -> Iterator[Path]:
    """The folder of a stand-in for nnU-Net, which is imported in its place during a test."""
    for name, text in STAND_IN.items():
        file = tmp_path / "nnunetv2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in (*file.parents[: name.count("/")], file.parent):
            (folder / "__init__.py").touch()
        file.write_text(textwrap.dedent(text))

    def take() -> dict[str, Any]:
        names = [n for n in sys.modules if n.partition(".")[0] == "nnunetv2"]
        return {n: sys.modules.pop(n) for n in [*names, TRAINER] if n in sys.modules}

    held = take()
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.path.remove(str(tmp_path))
    take()
    sys.modules.update(held)


TRAINER = "fastloss.nnunet.trainer"


def trainer(kind: Any, *, regions: bool, ignore: int | None, compiled: bool = False) -> Any:
    """A trainer with the attributes that `_build_loss` reads."""
    made = object.__new__(kind)
    made.label_manager = SimpleNamespace(has_regions=regions, ignore_label=ignore)
    made.configuration_manager = SimpleNamespace(batch_dice=True)
    made.is_ddp, made.enable_deep_supervision, made.device = False, True, torch.device("cpu")
    made._get_deep_supervision_scales = lambda: [1, 0.5, 0.25]
    made._do_i_compile = lambda: compiled
    return made


TRAINED: list[tuple[bool, int | None, Any]] = [
    (False, None, LABELS),
    (False, 3, WITH_IGNORED),
    (True, None, REGIONS),
    (True, 3, WITH_CHANNEL),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("regions", "ignore", "y"), TRAINED)
@pytest.mark.usefixtures("nnunet")
def test_trainer(regions: bool, ignore: int | None, y: Any, compiled: bool) -> None:
    kind = importlib.import_module(TRAINER).nnUNetTrainerFastloss
    loss = trainer(kind, regions=regions, ignore=ignore, compiled=compiled)._build_loss()
    assert type(loss.loss).__module__.startswith("fastloss.")
    dice_options = BATCH_DICE | {"do_bg": regions}
    if regions:
        options: dict[str, Any] = {"use_ignore_label": ignore is not None}
        call = own_call("DC_and_BCE_loss", y, soft_dice_kwargs=dice_options, **options)
    else:
        options = {"ignore_label": ignore}
        call = own_call("DC_and_CE_loss", y, soft_dice_kwargs=dice_options, **options)
    outputs, targets = ([a[..., ::n] for n in (1, 2, 3)] for a in (LOGITS, y))
    backend = fl.backends.load_backend("reference")
    with mock.patch.object(backend, "reduce", wraps=backend.reduce) as reduce:
        value = loss(outputs, targets)
    assert reduce.call_count == 2  # one for each output of nonzero weight
    each = [formula(call._replace(x=a, y=b)) for a, b in zip(outputs, targets, strict=True)]
    np.testing.assert_allclose(value, (2 * each[0] + each[1]) / 3, rtol=1e-9)


@pytest.mark.parametrize(("regions", "ignore", "y"), TRAINED)
def test_trainer_of_nnunet_itself(regions: bool, ignore: int | None, y: Any) -> None:
    need("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    kind = importlib.import_module(TRAINER).nnUNetTrainerFastloss
    own, theirs = (
        trainer(k, regions=regions, ignore=ignore)._build_loss() for k in kind.__mro__[::2][:2]
    )
    outputs, targets = ([a[..., ::n] for n in (1, 2, 3)] for a in (LOGITS, y))
    assert type(theirs).__module__.startswith("nnunetv2.")
    np.testing.assert_allclose(own(outputs, targets), theirs(outputs, targets), rtol=1e-5)


@pytest.mark.usefixtures("nnunet")
def test_from_nnunet() -> None:
    """Options and parts are kept, and custom parts are left as they are."""
    losses = importlib.import_module("nnunetv2.training.loss.compound_losses")
    dice_options = {"batch_dice": True, "do_bg": False, "smooth": 0.5, "ddp": False}
    given = losses.DC_and_topk_loss(dice_options, {"k": 30, "ignore_index": 3}, 0.5, 2, 3)
    given.dc.clip_tp = 8.0
    call = own_call(
        "DC_and_topk_loss",
        WITH_IGNORED,
        soft_dice_kwargs=dice_options | {"clip_tp": 8.0},
        ce_kwargs={"k": 30},
        weight_ce=0.5,
        weight_dice=2,
        **IGNORED,
    )
    assert_same(run(ours.from_nnunet(given), call), by_formula(call), 1e-9)
    weight = WEIGHT.flip(0)
    given = losses.RobustCrossEntropyLoss(weight, label_smoothing=0.2, reduction="sum")
    options = {"weight": weight, "label_smoothing": 0.2, "reduction": "sum"}
    call = own_call("RobustCrossEntropyLoss", LABELS, **options)
    assert_same(run(ours.from_nnunet(given), call), by_formula(call), 1e-9)
    given = losses.DC_and_BCE_loss(PER_CHANNEL["bce_kwargs"], dice_options)
    call = own_call("DC_and_BCE_loss", REGIONS, soft_dice_kwargs=dice_options, **PER_CHANNEL)
    compiled = torch.compile(ours.from_nnunet(given), fullgraph=True, backend="aot_eager")
    backend = fl.backends.load_backend("reference")
    with mock.patch.object(backend, "apply", wraps=backend.apply) as apply:
        assert_same(run(compiled, call), by_formula(call), 1e-9)
    assert apply.call_count == 1
    given = losses.DC_and_CE_loss(dice_options, {}, dice_class=HalfDice)
    assert ours.from_nnunet(given).dc is given.dc
    own = ours.SoftDiceLoss()
    assert ours.from_nnunet(own) is own
    with pytest.raises(TypeError, match="HalfDice"):
        ours.from_nnunet(given.dc)


@pytest.mark.usefixtures("nnunet")
def test_dice_class_of_nnunet() -> None:
    """A trainer may import only the compound loss from here, with nnU-Net's Dice class."""
    theirs = importlib.import_module("nnunetv2.training.loss.dice").MemoryEfficientSoftDiceLoss
    loss = ours.DC_and_CE_loss(BATCH_DICE, {}, dice_class=theirs)
    assert type(loss.dc) is ours.MemoryEfficientSoftDiceLoss


def test_three_lines_install_the_trainer(nnunet: Path, tmp_path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(Path(ours.__path__[0], "trainer.py").read_text()))
    assert docstring is not None
    lines = re.search(r"::\n\n((?:    .*\n)+)", docstring)
    assert lines is not None
    find = "import sys; sys.path += sys.argv[1:]; import fused; print(fused.nnUNetTrainerFastloss)"
    path = os.pathsep.join([str(nnunet), str(ROOT)])
    shown = subprocess.run(
        ["sh", "-ec", lines[1] + f'"{sys.executable}" -c "{find}" "$nnUNet_extTrainer"'],
        env=os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "nnUNetTrainerFastloss" in shown


def test_nnunet_finds_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # its kernels need another build of PyTorch
        asks = "dynamic_network_architectures.architectures.primus"  # for other trainers' networks
        monkeypatch.setitem(sys.modules, asks, mock.MagicMock())
    objects = need("nnunetv2.utilities.find_objects")
    (tmp_path / "fused.py").write_text(f"from {TRAINER} import nnUNetTrainerFastloss\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    found = objects.recursive_find_trainer_class_by_name("nnUNetTrainerFastloss")
    assert found is importlib.import_module(TRAINER).nnUNetTrainerFastloss


# --------------------------------------------------------------------------- two ranks

TWO_RANKS = [
    own_call(name, y, soft_dice_kwargs=BATCH_DICE | {"ddp": True}, **options)
    for name, y, options in (
        ("DC_and_CE_loss", LABELS, {"dice_class": "MemoryEfficientSoftDiceLoss"}),
        ("DC_and_CE_loss", WITH_IGNORED, IGNORED),
        ("DC_and_BCE_loss", WITH_CHANNEL, {"use_ignore_label": True}),
        ("DC_and_topk_loss", WITH_IGNORED, IGNORED),
    )
]


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    fl.set_num_threads(1)
    results: dict[Any, Any] = {}
    for i, call in enumerate(TWO_RANKS):
        own = call._replace(x=call.x[rank : rank + 1], y=call.y[rank : rank + 1])
        results[i, "eager"] = run(made(our, own), own)
        if i == 0:
            results[i, "compiled"] = run(torch.compile(made(our, own), backend="aot_eager"), own)
        with contextlib.suppress(ImportError):
            importlib.import_module("nnunetv2.training.loss.compound_losses")
            results[i, "nnU-Net"] = run(made(their, own), own)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # a rank that exits early can crash the other
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of each of two processes, for all cases."""
    need_gloo()
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("i", "how"),
    [(0, "compiled"), *((i, how) for i in range(len(TWO_RANKS)) for how in ("eager", "nnU-Net"))],
)
def test_two_ranks(ranks: Any, i: int, how: str) -> None:
    """The Dice of the joined batch, the cross-entropy of each rank, the gradient to be averaged."""
    if how == "nnU-Net":
        their("DC_and_CE_loss")
    call = TWO_RANKS[i]
    leaf = call.x.clone().requires_grad_()

    def part(samples: slice, **weights: float) -> Any:
        options = call.options | weights
        return formula(call._replace(x=leaf[samples], y=call.y[samples], options=options))

    joined = part(slice(0, 2), weight_ce=0.0)
    own = [part(slice(r, r + 1), weight_dice=0.0) for r in range(2)]
    (gradient,) = torch.autograd.grad(joined + (own[0] + own[1]) / 2, leaf)
    for rank, results in enumerate(ranks):
        value, got = results[i, how]
        by = 1e-5 if how == "nnU-Net" else 1e-9
        np.testing.assert_allclose(value, (joined + own[rank]).detach(), rtol=by)
        upstream = 0.5  # that of `run`
        exact = gradient[rank : rank + 1] * 2 * upstream
        np.testing.assert_allclose(got, exact, rtol=by, atol=by * float(exact.abs().max()))


@pytest.mark.slow
def test_two_ranks_without_ignored_voxels_are_one_process(ranks: Any) -> None:
    call = TWO_RANKS[0]
    value, gradient = by_formula(call)
    got = [results[0, "eager"] for results in ranks]
    np.testing.assert_allclose((got[0][0] + got[1][0]) / 2, value, rtol=1e-9)
    np.testing.assert_allclose(torch.cat([g for _, g in got]) / 2, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", sorted(WHERE))
def test_empty_batch(name: str, batch_dice: bool) -> None:
    """The cross-entropy of nothing is 0, and the Dice of a batch of nothing is perfect."""
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    first, second = (options, {}) if name != "DC_and_BCE_loss" else ({}, options)
    if name.startswith("DC"):
        loss = getattr(ours, name)(first, second)
    else:
        loss = getattr(ours, name)(**options if "Dice" in name else {})
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = loss(x, torch.zeros(0, 3 if name == "DC_and_BCE_loss" else 1, 4, 4))
    value.backward()
    dice = batch_dice and ("Dice" in name or name.startswith("DC"))
    assert value.item() == pytest.approx(-1 if dice else 0)
    assert x.grad.shape == x.shape


def plain_dice(apply_nonlin: Any) -> Any:
    """A Dice class that is not ours, so that its parts are not fused."""
    return lambda x, y, loss_mask: (apply_nonlin(x)[:, :1] * loss_mask).mean()


@pytest.mark.parametrize("name", ["fused", "other dice", "top-k", "regions"])
@pytest.mark.filterwarnings("ignore")
def test_traced(name: str) -> None:
    """A trace also computes other labels than its example's, and none that count."""
    options = {"batch_dice": True, "smooth": 1e-5, "ddp": False}
    loss = {
        "fused": lambda: ours.DC_and_CE_loss(options, {}, ignore_label=2),
        "other dice": lambda: ours.DC_and_CE_loss({}, {}, ignore_label=2, dice_class=plain_dice),
        "top-k": lambda: ours.DC_and_topk_loss(options, {"k": 50}, ignore_label=2),
        "regions": lambda: ours.DC_and_BCE_loss({}, options, use_ignore_label=True),
    }[name]()
    channels = 3 if name == "regions" else 1
    generator = torch.Generator().manual_seed(0)

    def arrays(batch: int, size: int, low: int) -> tuple[Any, Any]:
        x = torch.randn(batch, channels - 1 if channels == 3 else 3, size, 4, generator=generator)
        labels = torch.randint(low, 3, (batch, channels, size, 4), generator=generator)
        return x, labels if channels == 1 else (labels > 1).long()

    traced = torch.jit.trace(loss, arrays(2, 4, 0))
    for batch, size, low in ((2, 4, 0), (3, 5, 0), (2, 4, 2)):
        x, y = arrays(batch, size, low)
        torch.testing.assert_close(traced(x, y), loss(x, y))
    smooth = ours.DC_and_topk_loss(options, {"k": 50, "label_smoothing": 0.1})
    if name == "top-k":
        with pytest.raises(RuntimeError, match=r"^label_smoothing: torch\.jit\.trace"):
            torch.jit.trace(smooth, arrays(2, 4, 0))


class Spread(torch.nn.Module):
    """A user's custom loss."""

    def forward(self, input: Any, target: Any, loss_mask: Any = None) -> Any:
        return input.var() + target.float().mean()


def hook(part: str, kind: str) -> Any:
    halves: dict[str, Any] = {
        "forward_pre": lambda module, given: (given[0] / 2, *given[1:]),
        "forward": lambda module, given, value: value / 2,
        "full_backward_pre": lambda module, gradients: (gradients[0] / 2,),
        "full_backward": lambda module, inner, outer: (inner[0] / 2, *inner[1:]),
    }
    return lambda loss: getattr(getattr(loss, part), f"register_{kind}_hook")(halves[kind])


def attribute(path: str, value: Any) -> Any:
    part, name = path.split(".")
    return lambda loss: setattr(getattr(loss, part), name, value)


CHANGES: dict[str, Any] = {
    f"{part} hook {kind}": hook(part, kind)
    for part in ("dc", "ce")
    for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward")
}
CHANGES |= {
    "dc module": lambda loss: setattr(loss, "dc", Spread()),
    "ce module": lambda loss: setattr(loss, "ce", Spread()),
    "dc forward": attribute("dc.forward", lambda x, y, loss_mask: x.var()),
    "ce forward": attribute("ce.forward", lambda x, y: x.var() + y.float().mean()),
    "smooth": attribute("dc.smooth", 3.0),
    "background": attribute("dc.do_bg", False),
    "activation": attribute("dc.apply_nonlin", torch.square),
    "ignore_index": attribute("ce.ignore_index", 1),
    "label_smoothing": attribute("ce.label_smoothing", 0.2),
    "k": attribute("ce.k", 80),
    "weight": attribute("ce.weight", torch.tensor([1.0, 3, 2])),
    "pos_weight": attribute("ce.pos_weight", torch.tensor(2.0)),
    "reduction": attribute("ce.reduction", "sum"),
}


@pytest.mark.parametrize("name", ["DC_and_CE_loss", "DC_and_topk_loss", "DC_and_BCE_loss"])
@pytest.mark.parametrize("ignore", [False, True])
def test_changed_parts(name: str, ignore: bool) -> None:
    """Changes of a user to a part of a sum have the effect that they have in nnU-Net."""
    compound = need("nnunetv2.training.loss.compound_losses")
    options: dict[str, Any] = {"smooth": 1e-5, "ddp": False}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    if name == "DC_and_BCE_loss":
        arguments: Any = ({}, options, 1, 1, ignore)
        y = (torch.rand(2, 3 + ignore, 4, 5, generator=generator) < 0.4).float()
        left_out = {"ignore_index", "label_smoothing", "k"} | ({"reduction"} if ignore else set())
        left_out.add("weight")  # along the last axis
    else:
        arguments = (options, {"k": 40} if "topk" in name else {}, 1, 1, 2 if ignore else None)
        y = torch.randint(0, 3, (2, 1, 4, 5), generator=generator)
        left_out = {"pos_weight"} | ({"reduction"} if "topk" in name else set())
    for label, change in CHANGES.items():
        if label in left_out:
            continue
        theirs = getattr(compound, name)(*copy.deepcopy(arguments))
        change(theirs)
        own = getattr(ours, name)(*copy.deepcopy(arguments))
        change(own)
        results = []
        for loss in (theirs, own, ours.from_nnunet(theirs)):
            leaf = x.clone().requires_grad_()
            value = loss(leaf, y)
            results.append((value, *torch.autograd.grad(value, leaf)))
        for result in results[1:]:
            torch.testing.assert_close(
                result, results[0], rtol=1e-5, atol=1e-6, msg=lambda text, at=label: f"{at}: {text}"
            )


def test_hooks_of_a_converted_loss() -> None:
    theirs = need("nnunetv2.training.loss.dice").SoftDiceLoss(torch.sigmoid, ddp=False)
    handle = theirs.register_forward_hook(lambda module, given, value: value * 3)
    x, y = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    own = ours.from_nnunet(theirs)
    torch.testing.assert_close(own(x, y), theirs(x, y))
    handle.remove()
    torch.testing.assert_close(own(x, y), theirs(x, y))
