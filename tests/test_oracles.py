"""The reference backend in float64 against independent implementations and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import example, finite_differences, need, one_hot

import fastloss as fl

B, C, SPATIAL = 2, 4, (3, 5)
WEIGHT = np.array([0.5, 2.0, 0.0, 1.5])
SMOOTHING: dict[str, Any] = {"smooth_nr": 0.02, "smooth_dr": 0.05}


def compare(
    loss: Any,
    oracle: Callable[[Any], Any],
    x: np.ndarray,
    y: np.ndarray,
    w: np.ndarray | None = None,
    *,
    rtol: float = 1e-10,
) -> None:
    """Value and gradient of ``loss`` equal those of a function of torch's float64 logits."""
    torch = need("torch")
    tensor = torch.tensor(x, requires_grad=True)
    expected = oracle(tensor)
    upstream = None
    if expected.ndim:
        upstream = np.random.default_rng(9).normal(size=tuple(expected.shape))
        expected.backward(torch.tensor(upstream))
    else:
        expected.backward()
    value, gradient = loss.value_and_grad(x, y, w, upstream=upstream)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=rtol, atol=rtol / 10)
    reached = tensor.grad.numpy()
    scale = np.abs(reached).max()
    np.testing.assert_allclose(gradient, reached, rtol=rtol, atol=rtol * scale)


def soft_target(seed: int = 5) -> np.ndarray:
    g = np.random.default_rng(seed).uniform(size=(B, C, *SPATIAL))
    return g / g.sum(axis=1, keepdims=True)


def multi_label(seed: int = 6) -> np.ndarray:
    return (np.random.default_rng(seed).uniform(size=(B, C, *SPATIAL)) < 0.4).astype(np.float64)


# ------------------------------------------------------------------ torch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignore_index", [None, 1, 255, -1])
def test_cross_entropy_of_labels_as_torch(
    reduction: str, label_smoothing: float, weight: Any, ignore_index: int | None
) -> None:
    torch = need("torch")
    x, y = example(B, C, SPATIAL, seed=1)
    if ignore_index is not None:
        y[:, 1, ::2] = ignore_index
    term = fl.CrossEntropy(weight=weight, label_smoothing=label_smoothing, reduction=reduction)
    options = {
        "weight": None if weight is None else torch.tensor(weight),
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    compare(
        fl.Loss(term, ignore_index=ignore_index),
        lambda t: torch.nn.functional.cross_entropy(t, torch.tensor(y), **options),
        x,
        y,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_cross_entropy_of_soft_targets_as_torch(
    reduction: str, label_smoothing: float, weight: Any
) -> None:
    torch = need("torch")
    x, _ = example(B, C, SPATIAL, seed=2)
    g = soft_target()
    options = {
        "weight": None if weight is None else torch.tensor(weight),
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    compare(
        fl.CrossEntropy(weight=weight, label_smoothing=label_smoothing, reduction=reduction),
        lambda t: torch.nn.functional.cross_entropy(t, torch.tensor(g), **options),
        x,
        g,
    )


def test_cross_entropy_per_sample() -> None:
    torch = need("torch")
    x, y = example(B, C, SPATIAL, seed=3)

    def oracle(t: Any) -> Any:
        each = [
            torch.nn.functional.cross_entropy(t[b : b + 1], torch.tensor(y[b : b + 1]))
            for b in range(B)
        ]
        return torch.stack(each)[:, None]

    compare(fl.CrossEntropy(reduction="none"), oracle, x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT, 0.5])
def test_binary_cross_entropy_as_torch(reduction: str, label_smoothing: float, weight: Any) -> None:
    torch = need("torch")
    x, _ = example(B, C, SPATIAL, seed=4)
    g = multi_label()
    moved = torch.tensor(g * (1 - label_smoothing) + label_smoothing / 2)
    per_class = None
    if weight is not None:
        per_class = torch.tensor(np.broadcast_to(weight, C).reshape(C, 1, 1).copy())
    term = fl.CrossEntropy(weight=weight, label_smoothing=label_smoothing, reduction=reduction)
    compare(
        fl.Loss(term, activation="sigmoid"),
        lambda t: torch.nn.functional.binary_cross_entropy_with_logits(
            t, moved, weight=per_class, reduction=reduction
        ),
        x,
        g,
    )


def test_voxel_weights_as_torch() -> None:
    torch = need("torch")
    x, y = example(B, C, SPATIAL, seed=4)
    w = np.random.default_rng(2).uniform(0, 3, (B, *SPATIAL))
    m = torch.tensor(w)

    def softmax(t: Any) -> Any:
        each = torch.nn.functional.cross_entropy(
            t, torch.tensor(y), torch.tensor(WEIGHT), reduction="none"
        )
        return (each * m).sum() / (torch.tensor(WEIGHT[y]) * m).sum()

    compare(fl.CrossEntropy(weight=WEIGHT), softmax, x, y, w)

    g = multi_label()

    def sigmoid(t: Any) -> Any:
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            t, torch.tensor(g), reduction="none"
        )
        return (each * m[:, None]).sum() / (m.sum() * C)

    compare(fl.Loss(fl.CrossEntropy(), activation="sigmoid"), sigmoid, x, g, w)

    def dice(t: Any) -> Any:
        p, target = torch.softmax(t, 1), torch.tensor(one_hot(y, C))
        o, sizes = ((m[:, None] * a).sum((2, 3)) for a in (p * target, p**2 + target**2))
        return (1 - (2 * o + 0.02) / (sizes + 0.05)).mean()

    compare(fl.Dice(squared=True, **SMOOTHING), dice, x, y, w)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sigmoid_focal_as_written_in_torchvision(
    gamma: float, alpha: float | None, reduction: str
) -> None:
    torch = need("torch")
    x, _ = example(B, C, SPATIAL, seed=5)
    g = multi_label()

    def oracle(t: Any) -> Any:
        target = torch.tensor(g)
        p = torch.sigmoid(t)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(t, target, reduction="none")
        p_t = p * target + (1 - p) * (1 - target)
        loss = entropy * (1 - p_t) ** gamma
        if alpha is not None:
            loss = loss * (alpha * target + (1 - alpha) * (1 - target))
        return loss.mean() if reduction == "mean" else loss.sum()

    term = fl.Focal(gamma=gamma, alpha=alpha, reduction=reduction)
    compare(fl.Loss(term, activation="sigmoid"), oracle, x, g)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25, WEIGHT])
def test_softmax_focal_by_its_formula(gamma: float, alpha: Any) -> None:
    torch = need("torch")
    x, y = example(B, C, SPATIAL, seed=6)
    per_class = torch.tensor(np.broadcast_to(1.0 if alpha is None else alpha, C).copy())

    def oracle(t: Any) -> Any:
        log_p = torch.log_softmax(t, 1).gather(1, torch.tensor(y)[:, None])[:, 0]
        return (-per_class[torch.tensor(y)] * (1 - log_p.exp()) ** gamma * log_p).mean()

    compare(fl.Focal(gamma=gamma, alpha=alpha), oracle, x, y)


# ------------------------------------------------------------------ MONAI


def monai_losses() -> Any:
    return need("monai.losses")


def onehot_tensor(y: np.ndarray) -> Any:
    return need("torch").tensor(one_hot(y, C))


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dice_as_monai(
    include_background: bool, squared: bool, batch: bool, weight: Any, reduction: str
) -> None:
    losses, torch = monai_losses(), need("torch")
    x, y = example(B, C, SPATIAL, seed=7)
    if weight is not None and not include_background:
        weight = weight[1:]
    shared = {
        "include_background": include_background,
        "batch": batch,
        "reduction": reduction,
        **SMOOTHING,
    }
    oracle = losses.DiceLoss(
        softmax=True,
        squared_pred=squared,
        weight=None if weight is None else torch.tensor(weight),
        **shared,
    )
    compare(
        fl.Dice(squared=squared, weight=weight, **shared),
        lambda t: oracle(t, onehot_tensor(y)),
        x,
        y,
    )


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_jaccard_as_monai(batch: bool, squared: bool) -> None:
    losses = monai_losses()
    x, y = example(B, C, SPATIAL, seed=8)
    # MONAI writes the index as 2 O / 2 U, and adds its smoothing to that.
    oracle = losses.DiceLoss(
        softmax=True,
        jaccard=True,
        squared_pred=squared,
        batch=batch,
        smooth_nr=0.04,
        smooth_dr=0.1,
    )
    term = fl.Jaccard(batch=batch, squared=squared, **SMOOTHING)
    compare(term, lambda t: oracle(t, onehot_tensor(y)), x, y)


@pytest.mark.parametrize("batch", [False, True])
def test_matthews_correlation_as_monai(batch: bool) -> None:
    losses = monai_losses()
    x, y = example(B, C, SPATIAL, seed=8)
    oracle = losses.MCCLoss(softmax=True, batch=batch, smooth_nr=0.5, smooth_dr=2.0)
    term = fl.MCC(batch=batch, smooth_nr=0.5, smooth_dr=2.0)
    compare(term, lambda t: oracle(t, onehot_tensor(y)), x, y)


@pytest.mark.parametrize("term", ["dice", "jaccard", "tversky"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sigmoid_regions_as_monai(term: str, reduction: str) -> None:
    losses, torch = monai_losses(), need("torch")
    x, _ = example(B, C, SPATIAL, seed=9)
    g = multi_label()
    # For multi-label targets MONAI's forms equal those of soft labels of 0 and 1.
    if term == "tversky":
        oracle = losses.TverskyLoss(
            sigmoid=True, alpha=0.3, beta=0.6, reduction=reduction, **SMOOTHING
        )
        ours: fl.Term = fl.Tversky(alpha=0.3, beta=0.6, reduction=reduction, **SMOOTHING)
    elif term == "dice":
        oracle = losses.DiceLoss(sigmoid=True, reduction=reduction, **SMOOTHING)
        ours = fl.Dice(reduction=reduction, **SMOOTHING)
    else:
        oracle = losses.DiceLoss(
            sigmoid=True, jaccard=True, reduction=reduction, smooth_nr=0.04, smooth_dr=0.1
        )
        ours = fl.Jaccard(reduction=reduction, **SMOOTHING)

    def flat(t: Any) -> Any:
        value = oracle(t, torch.tensor(g))
        return value.reshape(B, C) if reduction == "none" else value

    compare(fl.Loss(ours, activation="sigmoid"), flat, x, g)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tversky_as_monai(include_background: bool, batch: bool, reduction: str) -> None:
    losses = monai_losses()
    x, y = example(B, C, SPATIAL, seed=10)
    shared = {
        "include_background": include_background,
        "batch": batch,
        "reduction": reduction,
        "alpha": 0.3,
        "beta": 0.7,
        **SMOOTHING,
    }
    oracle = losses.TverskyLoss(softmax=True, **shared)
    compare(fl.Tversky(**shared), lambda t: oracle(t, onehot_tensor(y)), x, y)


@pytest.mark.parametrize("weighting", ["square", "simple", "uniform"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("absent", [False, True])
def test_generalized_dice_as_monai(
    weighting: str, batch: bool, include_background: bool, absent: bool
) -> None:
    losses = monai_losses()
    x, y = example(B, C, SPATIAL, seed=11)
    if absent:
        y[y == 2] = 1
    shared = {"include_background": include_background, "batch": batch, **SMOOTHING}
    oracle = losses.GeneralizedDiceLoss(softmax=True, w_type=weighting, **shared)
    # MONAI computes the weights in float32.
    compare(
        fl.GeneralizedDice(weighting=weighting, **shared),
        lambda t: oracle(t, onehot_tensor(y)),
        x,
        y,
        rtol=2e-6,
    )


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_dice_and_cross_entropy_as_monai(
    include_background: bool, label_smoothing: float, weight: Any
) -> None:
    losses, torch = monai_losses(), need("torch")
    x, y = example(B, C, SPATIAL, seed=12)
    oracle = losses.DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        include_background=include_background,
        label_smoothing=label_smoothing,
        lambda_dice=0.7,
        lambda_ce=1.3,
        weight=None if weight is None else torch.tensor(weight),
        **SMOOTHING,
    )
    dice_weight = weight if weight is None or include_background else weight[1:]
    dice = fl.Dice(include_background=include_background, weight=dice_weight, **SMOOTHING)
    loss = 0.7 * dice + 1.3 * fl.CrossEntropy(weight=weight, label_smoothing=label_smoothing)
    compare(loss, lambda t: oracle(t, torch.tensor(y)[:, None]), x, y)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_as_monai(gamma: float) -> None:
    losses, torch = monai_losses(), need("torch")
    x, y = example(B, C, SPATIAL, seed=13)
    # MONAI's mean runs over the zeros of the other classes too; and it computes in float32.
    softmax = losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)
    compare(
        fl.Focal(gamma=gamma),
        lambda t: C * softmax(t, torch.tensor(y)[:, None]),
        x,
        y,
        rtol=2e-5,
    )
    sigmoid = losses.FocalLoss(gamma=gamma, alpha=0.3)
    g = multi_label()
    compare(
        fl.Loss(fl.Focal(gamma=gamma, alpha=0.3), activation="sigmoid"),
        lambda t: sigmoid(t, torch.tensor(g)),
        x,
        g,
        rtol=2e-5,
    )


# ------------------------------------------------------------------ finite differences

TERMS = {
    "cross entropy": fl.CrossEntropy(weight=WEIGHT),
    "smoothed cross entropy": fl.CrossEntropy(label_smoothing=0.2, weight=WEIGHT),
    "focal": fl.Focal(gamma=1.5, alpha=[0.3, 0.7, 0.0, 1.0]),
    "focal below 1": fl.Focal(gamma=0.5),
    "dice": fl.Dice(weight=WEIGHT),
    "squared dice": fl.Dice(squared=True, include_background=False),
    "batch dice": fl.Dice(batch=True, reduction="sum"),
    "jaccard": fl.Jaccard(),
    "squared jaccard": fl.Jaccard(squared=True),
    "tversky": fl.Tversky(alpha=0.3, beta=0.7),
    "focal tversky": fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75),
    "focal tversky above 1": fl.Tversky(gamma=4 / 3, batch=True, include_background=False),
    "squared tversky": fl.Tversky(alpha=0.2, squared=True),
    "generalized dice": fl.GeneralizedDice(weight=WEIGHT),
    "generalized batch dice": fl.GeneralizedDice(weighting="simple", batch=True),
    "squared generalized dice": fl.GeneralizedDice(weighting="uniform", squared=True),
    "matthews correlation": fl.MCC(weight=WEIGHT, smooth_nr=0.1),
    "batch matthews correlation": fl.MCC(batch=True, include_background=False, smooth_dr=0),
    "sum of terms": 0.5 * fl.Dice() + 2 * fl.CrossEntropy() + fl.Focal(gamma=3),
}


@pytest.mark.parametrize(
    ("kind", "weighted"),
    [("labels", False), ("labels", True), ("soft", True), ("multi-label", False)],
)
@pytest.mark.parametrize("name", TERMS)
def test_gradient_by_finite_differences(name: str, kind: str, weighted: bool) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        spatial = (3, 2)
        x, y = example(2, C, spatial, seed=14, activation=activation)
        rng = np.random.default_rng(15)
        target = {
            "labels": y,
            "soft": rng.dirichlet(np.ones(C), (2, *spatial)).transpose(0, 3, 1, 2),
            "multi-label": (rng.uniform(size=x.shape) < 0.5).astype(float),
        }[kind]
        w = rng.uniform(0, 2, (2, *spatial)) * (rng.uniform(size=(2, *spatial)) < 0.8)
        loss = fl.Loss(TERMS[name], activation=activation)
        gradient = loss.gradient(x, target, w if weighted else None)
        expected = finite_differences(loss, x, target, w if weighted else None)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("ignore_index", [1, 255, -1])
def test_gradient_with_ignored_voxels_by_finite_differences(
    activation: str, dense: bool, ignore_index: int
) -> None:
    x, y = example(2, C, (5,), seed=16, activation=activation)
    y[:, 2] = ignore_index
    target = one_hot(y, C) if dense else y
    if dense and ignore_index != 1:
        target[:, :, 2] = ignore_index
    loss = fl.Loss(
        fl.Dice(), fl.CrossEntropy(), fl.Focal(), activation=activation, ignore_index=ignore_index
    )
    gradient = loss.gradient(x, target)
    assert not gradient[:, :, 2].any()
    np.testing.assert_allclose(gradient, finite_differences(loss, x, target), rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("ignore_index", [0, 2, 255])
def test_ignored_voxels_are_as_if_cut_out(dense: bool, ignore_index: int) -> None:
    x, y = example(1, C, (12,), seed=17)
    y[:, 4:7] = ignore_index
    target = one_hot(y, C) if dense else y
    if dense and ignore_index == 255:
        target[:, :, 4:7] = 255
    keep = (y != ignore_index)[0]
    terms = (
        fl.Dice(squared=True),
        fl.Dice(),
        fl.CrossEntropy(label_smoothing=0.1),
        fl.Focal(),
    )
    loss, plain = fl.Loss(*terms, ignore_index=ignore_index), fl.Loss(*terms)
    value, gradient = loss.value_and_grad(x, target)
    cut = plain.value_and_grad(x[..., keep], target[..., keep])
    assert value == pytest.approx(cut[0], rel=1e-12)
    np.testing.assert_allclose(gradient[..., keep], cut[1], rtol=1e-12, atol=1e-16)
    assert not gradient[..., ~keep].any()
