"""The drop-ins for nnU-Net's losses agree with its definitions, and with nnU-Net itself."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import need, need_backend

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
"""The losses, and the module of nnU-Net that has each."""
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


# --------------------------------------------------------------------------- what is right


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
    """The negative mean Dice of probabilities from true and false positives and negatives."""
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


def top_k(x: Any, y: Any, *, k: float, **options: Any) -> Any:
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
    if mask is None or mask.any():
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


# --------------------------------------------------------------------------- what is drawn


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
        y = y.to(getattr(torch, draw(st.sampled_from(["bool", "uint8", "float32"]))))
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
            if ignored is None and channels > 1:  # a class may be ignored by one part alone
                ce["ignore_index"] = draw(st.sampled_from([-100, 0, 255]))
        if ignored is not None:
            lost = torch.tensor(rng.random(labels.shape) < draw(st.sampled_from([0.3, 1.0])))
            # Over no voxel at all only the compound loss is defined.
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


# --------------------------------------------------------------------------- how it is compared


def made(modules: Any, call: Call) -> Any:
    """The loss of this call, of classes that ``modules`` gives by name."""
    options = dict(call.options)
    if "dice_class" in options:
        options["dice_class"] = modules(options["dice_class"])
    if "apply_nonlin" in options:
        options["apply_nonlin"] = APPLY[options["apply_nonlin"]]
    for key in ("ce_kwargs", "bce_kwargs"):
        if key in options:
            options[key] = dict(options[key])  # nnU-Net writes to it
    return modules(call.name)(**options)


def our(name: str) -> Any:
    return getattr(ours, name)


def their(name: str) -> Any:
    return getattr(need(f"nnunetv2.training.loss.{WHERE[name]}"), name)


def run(function: Any, call: Call) -> tuple[Any, Any]:
    """Value, and gradient by a fixed upstream gradient."""
    x = call.x.clone().requires_grad_()
    arrays = [call.y] if call.mask is None else [call.y, call.mask]
    value = torch.as_tensor(function(x, *arrays))
    if not value.requires_grad:  # a part of weight 0, and one over no voxel
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
