"""The longer list of losses against their formulas, written once more in PyTorch."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from support import EMULATED, assert_agree, example, finite_differences, need, need_backend, one_hot
from test_cuda_combine import combined, numbers_of, sums_of, traced, upstream_of

import fastloss as fl
from fastloss.backends import use_backend

FAR = ((0, 1, 1), (1, 0, 0.5), (1, 0.5, 0))
WEIGHT = (1.0, 2.0, 0.5)
OTHERS = ("cpu", "numba", EMULATED)


def soft_target(seed: int = 3, spatial: tuple[int, ...] = (3, 4)) -> np.ndarray:
    g = np.random.default_rng(seed).dirichlet([1, 1, 1], (2, *spatial))
    return np.ascontiguousarray(np.moveaxis(g, -1, 1))


class Sums:
    """What oracles are written with: sums over the voxels of a sample and class."""

    def __init__(self, p: Any, g: Any, m: Any, activation: str) -> None:
        self.p, self.g, self.m, self.activation = p, g, m[:, None], activation
        self.sigmoid = activation == "sigmoid"
        self.log_p, self.log_q = p.log(), (1 - p).log()

    def over(self, summand: Any) -> Any:
        return (self.m * summand).flatten(2).sum(2)

    def mean(self, summand: Any, both: bool = False) -> Any:
        """Over voxels, with sigmoid or ``both`` over classes too."""
        classes = self.p.shape[1] if self.sigmoid or both else 1
        return self.over(summand).sum() / (self.m.sum() * classes)

    def dice(self) -> Any:
        overlap, sizes = self.over(self.p * self.g), self.over(self.p + self.g)
        return (2 * overlap + 1e-5) / (sizes + 1e-5)


def log_cosh_dice(s: Sums) -> Any:
    return (1 - s.dice()).cosh().log().mean()


def exponential_logarithmic(s: Sums) -> Any:
    w = s.p.new_tensor(WEIGHT)[None, :, None, None]
    return 0.8 * ((-s.dice().log()) ** 0.3).mean() + 0.2 * s.mean(w * s.g * (-s.log_p) ** 0.6)


def sensitivity_specificity(s: Sums) -> Any:
    missed = s.over(s.g * (1 - s.p) ** 2) / (s.over(s.g) + 1e-5)
    invented = s.over((1 - s.g) * s.p**2) / (s.over(1 - s.g) + 1e-5)
    return (0.3 * missed + 0.7 * invented).mean()


def combo(s: Sums) -> Any:
    entropy = -(0.7 * s.g * s.log_p + 0.3 * (1 - s.g) * s.log_q)
    return 0.4 * s.mean(entropy, both=True) + 0.6 * (1 - s.dice()).mean()


def symmetric_cross_entropy(s: Sums) -> Any:
    if s.sigmoid:
        entropy = -(s.g * s.log_p + (1 - s.g) * s.log_q)
        return 0.5 * s.mean(entropy) + 2 * 4 * s.mean(s.p * (1 - s.g) + (1 - s.p) * s.g)
    return 0.5 * s.mean(-s.g * s.log_p) + 2 * 4 * s.mean(s.g * (1 - s.p))


def dice_semimetric(s: Sums) -> Any:
    error, sizes = s.over((s.p - s.g).abs()), s.over(s.p + s.g)
    return (1 - (sizes - error + 1e-5) / (sizes + 1e-5)).mean()


def jaccard_metric(s: Sums) -> Any:
    error, sizes = s.over((s.p - s.g).abs()), s.over(s.p + s.g)
    return (1 - (sizes - error + 1e-5) / (sizes + error + 1e-5)).mean()


def unified_focal(s: Sums, symmetric: bool = False) -> Any:
    delta, gamma = 0.6, 0.4
    right, missed = s.over(s.p * s.g), s.over((1 - s.p) * s.g)
    size = right + delta * missed + (1 - delta) * s.over(s.p * (1 - s.g))
    error = 1 - (right + 1e-5) / (size + 1e-5)
    rare = error ** (1 - gamma)
    focal = (1 - s.p) ** gamma * -s.log_p
    many = focal if symmetric else -s.log_p
    if s.sigmoid:
        rest = s.p**gamma * -s.log_q
        return 0.5 * s.mean(delta * s.g * many + (1 - delta) * (1 - s.g) * rest) + rare.mean() / 2
    first = s.p.new_tensor([1.0, 0, 0])
    if not symmetric:
        rare = rare * (1 - first) + error * first
    first = first[None, :, None, None]
    each = s.g * ((1 - delta) * first * focal + delta * (1 - first) * many)
    return 0.5 * s.mean(each) + 0.5 * rare.mean()


def divergence(s: Sums) -> Any:
    torch = need("torch")
    each = torch.xlogy(s.g, s.g) - s.g * s.log_p
    if s.sigmoid:
        each = each + torch.xlogy(1 - s.g, 1 - s.g) - (1 - s.g) * s.log_q
    return s.mean(each)


LOSSES: dict[Any, tuple[Any, Any]] = {
    "log_cosh_dice": (fl.LogCoshDice(), log_cosh_dice),
    "exponential_logarithmic": (
        fl.ExponentialLogarithmic(gamma_ce=0.6, ce_weight=WEIGHT),
        exponential_logarithmic,
    ),
    "sensitivity_specificity": (fl.SensitivitySpecificity(r=0.3), sensitivity_specificity),
    "combo": (fl.Combo(alpha=0.4, beta=0.7), combo),
    "symmetric_cross_entropy": (
        fl.SymmetricCrossEntropy(alpha=0.5, beta=2),
        symmetric_cross_entropy,
    ),
    "dice_semimetric": (fl.DiceSemimetric(), dice_semimetric),
    "jaccard_metric": (fl.DiceSemimetric(jaccard=True), jaccard_metric),
    "absolute_error": (fl.AbsoluteError(), lambda s: s.mean((s.p - s.g).abs())),
    "unified_focal": (fl.UnifiedFocal(gamma=0.4), unified_focal),
    "symmetric_unified_focal": (
        fl.UnifiedFocal(gamma=0.4, symmetric=True),
        lambda s: unified_focal(s, True),
    ),
    "kl_divergence": (fl.KLDivergence(), divergence),
}


def cases(name: str) -> Any:
    """Every activation and kind of target: the loss and its arrays."""
    for activation in ("softmax", "sigmoid", "none"):
        x, y = example(2, 3, (3, 4), activation=activation)
        m = np.random.default_rng(1).uniform(0, 2, y.shape)
        m[0, 0, 0] = 0
        for target in (y, soft_target()):
            yield fl.Loss(LOSSES[name][0], activation=activation), x, target, m


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_formula(name: str) -> None:
    torch = need("torch")
    for loss, x, target, m in cases(name):
        logits = torch.tensor(x, requires_grad=True)
        p = {"softmax": lambda t: t.softmax(1), "sigmoid": torch.sigmoid}.get(
            loss.activation, lambda t: t
        )(logits)
        g = torch.tensor(one_hot(target, 3) if target.ndim == 3 else target)
        expected = LOSSES[name][1](Sums(p, g, torch.tensor(m), loss.activation))
        expected.backward()
        right = float(expected.detach()), logits.grad.numpy()
        with use_backend("reference"):
            assert_agree(*loss.value_and_grad(x, target, m), right)
        for dtype in ("float64", "float32"):
            assert_agree(*loss.value_and_grad(x.astype(dtype), target, m), right)


@pytest.mark.parametrize("name", ["numba", EMULATED])
def test_backends_agree(name: str) -> None:
    """The C++ kernels are compared with the formulas above, the others with them here."""
    chosen = need_backend(name)
    few = ("exponential_logarithmic", "dice_semimetric", "kl_divergence", "combo")
    for loss_name in LOSSES if name == "numba" else few:
        for loss, x, target, m in cases(loss_name):
            right = loss.value_and_grad(x, target, m)
            if name == EMULATED and loss.activation == "none":
                continue
            with use_backend(chosen):
                assert_agree(*loss.value_and_grad(x, target, m), right)


def test_no_backend_loses_a_steep_slope() -> None:
    """(−log p)^γ has an infinite slope by p = 1, where the gradient by the logit is γ (1−p)^γ."""
    y = np.zeros((1, 64), int)
    for dtype, most in (("float32", 80.0), ("float64", 700.0)):
        top = np.linspace(-most, most, 64)
        for gamma in (0.1, 0.3, 1.0, 2.0):
            loss = fl.LogarithmicCrossEntropy(gamma=gamma, reduction="sum")
            x = np.stack([top, 0 * top, 0 * top - 0.5])[None].astype(dtype)
            with use_backend("reference"):
                value, gradient = loss.value_and_grad(x.astype("float64"), y)
            for name in OTHERS[:2]:
                with use_backend(need_backend(name)):
                    own, found = loss.value_and_grad(x, y)
                tolerance = 3e-5 if dtype == "float32" else 1e-12
                np.testing.assert_allclose(own, value, rtol=tolerance)
                np.testing.assert_allclose(found, gradient, rtol=tolerance, atol=1e-37)


# ------------------------------------------------------------------ distances between classes


def wasserstein(x: np.ndarray, y: np.ndarray, m: np.ndarray, weighting: str) -> np.ndarray:
    """Of every sample, voxel by voxel."""
    values = []
    for b in range(len(x)):
        e = np.exp(x[b] - x[b].max(axis=0))
        p = e / e.sum(axis=0)
        sizes = [m[b][y[b] == c].sum() for c in range(len(p))]
        right = whole = 0.0
        for place in np.ndindex(y[b].shape):
            label = y[b][place]
            far = sum(FAR[label][c] * p[(c, *place)] for c in range(len(p)))
            if weighting == "GDL":
                alpha = m[b][place] / (sizes[label] + 1)
                right, whole = right + alpha * (1 - far), whole + alpha * (2 - far)
            else:
                alpha = m[b][place] * (label > 0)
                right = right + alpha * (1 - far)
                whole = whole + 2 * alpha * (1 - far) + m[b][place] * far
        values.append(1 - (2 * right + 1e-5) / (whole + 1e-5))
    return np.array(values)[:, None]


@pytest.mark.parametrize("weighting", ["default", "GDL"])
def test_generalized_wasserstein_dice(weighting: str) -> None:
    x, y = example(2, 3, (4, 5))
    m = np.random.default_rng(1).uniform(0, 2, y.shape)
    y[0, 0] = 0
    y[1, 2, 1:3] = 255
    term = fl.GeneralizedWassersteinDice(
        distances=2 * np.array(FAR), weighting=weighting, reduction="none"
    )
    loss, upstream = fl.Loss(term, ignore_index=255), np.array([[0.5], [-2.0]])
    right = wasserstein(x, np.where(y == 255, 0, y), m * (y != 255), weighting)
    with use_backend("reference"):
        value, gradient = loss.value_and_grad(x, y, m, upstream=upstream)
    np.testing.assert_allclose(value, right, rtol=1e-12)
    slope = finite_differences(loss, x, y, m, upstream)
    np.testing.assert_allclose(gradient, slope, atol=1e-8)
    for name in OTHERS:
        with use_backend(need_backend(name)):
            for target in (y, one_hot(y, 3)):
                found = loss.value_and_grad(x, target, m, upstream=upstream)
                np.testing.assert_allclose(found[0], value, rtol=1e-12)
                np.testing.assert_allclose(found[1], gradient, atol=1e-14)


def test_distances_beside_other_terms_and_over_chunks() -> None:
    x, y = example(2, 3, (6, 5))
    term = fl.GeneralizedWassersteinDice(distances=FAR)
    loss = 0.5 * term + fl.Dice() + fl.CrossEntropy(weight=WEIGHT)
    parts = [0.5 * term, fl.Dice(), fl.CrossEntropy(weight=WEIGHT)]
    each = [part.value_and_grad(x, y) for part in parts]
    value, gradient = loss.value_and_grad(x, y)
    assert value == pytest.approx(sum(v for v, _ in each))
    np.testing.assert_allclose(gradient, sum(g for _, g in each), atol=1e-15)
    total = sum(loss.statistics(x[:, :, i : i + 2], y[:, i : i + 2]) for i in (0, 2, 4))
    assert loss.value(total) == pytest.approx(value)
    ahead = loss.fields(y, classes=3)
    assert loss(x, y, fields=ahead) == pytest.approx(value)
    # All distances 1: of a hard prediction, T is the right voxels and W the wrong ones.
    far = fl.GeneralizedWassersteinDice(distances=1 - np.eye(3), smooth_nr=0, smooth_dr=0)
    sure = 1e3 * one_hot(np.roll(y, 1, axis=2), 3)
    right = (np.roll(y, 1, axis=2) == y).reshape(2, -1)
    hits = (right & (y > 0).reshape(2, -1)).sum(axis=1)
    expected = 1 - 2 * hits / (2 * hits + (~right).sum(axis=1))
    assert far(sure, y) == pytest.approx(expected.mean())


# ------------------------------------------------------------------ gradients by the target


def by_differences(loss: Any, x: Any, g: Any, m: Any, upstream: Any, **options: Any) -> np.ndarray:
    gradient = np.empty_like(g)
    for i in np.ndindex(g.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = g.copy()
            moved[i] += step
            ends.append(np.asarray(loss(x, moved, m, **options)))
        slope = (ends[0] - ends[1]) / 2e-6
        gradient[i] = np.sum(slope if upstream is None else upstream * slope)
    return gradient


TARGETED = (
    fl.Dice(squared=True, weight=WEIGHT) + fl.Jaccard(batch=True),
    fl.Tversky(alpha=0.3, beta=0.6, gamma=0.7, include_background=False),
    fl.GeneralizedDice() + fl.GeneralizedDice(weighting="simple", weight=WEIGHT, squared=True),
    fl.MCC(reduction="none"),
    fl.CrossEntropy(weight=WEIGHT, label_smoothing=0.1) + fl.Focal(alpha=0.3) + fl.Brier(),
    fl.MeanAbsoluteError() + fl.PolyCrossEntropy() + fl.GeneralizedCrossEntropy(),
    fl.CrossEntropy(reduction="voxel") + fl.KLDivergence(reduction="voxel"),
    fl.Boundary() + fl.HausdorffDT(log=True) + fl.GeneralizedSurface() + fl.BoundaryDoU(),
    fl.PerRegion(
        fl.Dice() + fl.Focal(), weight="inverse_sqrt_volume", per_class=True, reduction="none"
    ),
    *(loss for loss, _ in LOSSES.values()),
)


@pytest.mark.parametrize("loss", TARGETED, ids=lambda loss: repr(loss)[:40])
def test_gradient_by_the_target(loss: Any) -> None:
    g = soft_target()
    for activation in ("softmax", "sigmoid"):
        x, _ = example(2, 3, (3, 4))
        whole, m = (
            fl.Loss(loss, activation=activation),
            np.random.default_rng(1).uniform(0, 2, (2, 3, 4)),
        )
        m[0, 0, 0] = 0
        fields = whole.fields(g, classes=3, dense=True) or None
        value = whole(x, g, m, fields=fields)
        upstream = np.random.default_rng(2).normal(size=np.shape(value)) if np.ndim(value) else None
        options = {"upstream": upstream, "fields": fields, "target_grad": True}
        same, gradient, by_target = whole.value_and_grad(x, g, m, **options)
        assert (same == value).all()
        right = whole.value_and_grad(x, g, m, upstream=upstream, fields=fields)[1]
        np.testing.assert_array_equal(gradient, right)
        slope = by_differences(whole, x, g, m, upstream, fields=fields)
        scale = np.abs(slope).max()
        np.testing.assert_allclose(by_target, slope, atol=1e-6 * scale)
        assert not by_target[0, :, 0, 0].any()  # of a voxel that does not count
        with use_backend("reference"):
            reference = whole.value_and_grad(x, g, m, **options)[2]
        np.testing.assert_allclose(by_target, reference, rtol=1e-9, atol=1e-12 * scale)


def test_gradient_by_the_target_through_the_weights_of_lesions() -> None:
    """A lesion that is more of a lesion is larger, and weighs less."""
    x, _ = example(2, 3, (3, 4))
    g, m = soft_target(), np.random.default_rng(1).uniform(0, 2, (2, 3, 4))
    loss = fl.PerRegion(fl.Dice() + fl.CrossEntropy(), weight="inverse_volume")
    fields = loss.fields(g, classes=3, dense=True)
    found = loss.value_and_grad(x, g, m, fields=fields, target_grad=True)[2]
    slope = by_differences(loss, x, g, m, None, fields=fields)
    np.testing.assert_allclose(found, slope, atol=1e-6 * np.abs(slope).max())


def test_gradient_by_the_target_in_every_layout_and_backend() -> None:
    x, _ = example(2, 3, (3, 4))
    g, m = soft_target(), np.random.default_rng(1).uniform(0, 2, (2, 3, 4))
    regions = np.arange(24).reshape(2, 3, 4) % 3
    loss = fl.Dice() + fl.DiceSemimetric() + fl.KLDivergence()
    for options in ({}, {"regions": regions}):
        right = loss.value_and_grad(x, g, m, target_grad=True, **options)[2]
        slope = by_differences(loss, x, g, m, None, **options)
        np.testing.assert_allclose(right, slope, atol=1e-8)
        for name in OTHERS[1:]:
            with use_backend(need_backend(name)):
                found = loss.value_and_grad(x, g, m, target_grad=True, **options)[2]
            np.testing.assert_allclose(found, right, rtol=1e-9)
    last = fl.Loss(loss, channel_axis=-1)
    moved = [np.moveaxis(a, 1, -1) for a in (x, g)]
    found = last.value_and_grad(*moved, m, target_grad=True)[2]
    right = loss.value_and_grad(x, g, m, target_grad=True)[2]
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), right, rtol=1e-12)
    mask = fl.Loss(fl.Dice(), activation="sigmoid")
    assert mask.value_and_grad(x[:, :1], g[:, 0], target_grad=True)[2].shape == (2, 3, 4)
    half = loss.value_and_grad(x, g.astype("float16"), target_grad=True)[2]
    assert half.dtype == np.float16
    buffer = x.copy()  # the gradient takes the logits' place after their last use
    found = loss.value_and_grad(buffer, g, m, out=buffer, target_grad=True)[2]
    np.testing.assert_array_equal(found, right)


def test_an_absent_class_has_the_weight_of_another() -> None:
    """In generalised Dice it follows the smallest class that is there, and so does its slope."""
    x, _ = example(2, 3, (3, 4))
    g = soft_target()
    g[0, 2] = 0
    for loss in (fl.GeneralizedDice(), fl.GeneralizedDice(weighting="simple", weight=WEIGHT)):
        found = loss.value_and_grad(x, g, target_grad=True)[2]
        slope = by_differences(loss, x, g, None, None)
        there = np.broadcast_to(g.any(axis=(2, 3), keepdims=True), g.shape)
        np.testing.assert_allclose(found[there], slope[there], atol=1e-8)


def test_targets_without_a_gradient() -> None:
    x, y = example(2, 3, (3, 4))
    for target in (y, one_hot(y, 3).astype(np.uint8)):
        with pytest.raises(ValueError, match=r"^target: expected a dense target of floating"):
            fl.Dice().value_and_grad(x, target, target_grad=True)

    for method in ("histogram", "exact"):
        ranked = fl.Dice() + fl.LovaszSoftmax(method=method)
        with pytest.raises(ValueError, match=r"^target: LovaszSoftmax chooses or ranks voxels"):
            ranked.value_and_grad(x, soft_target(), target_grad=True)

    class Own(fl.RegionTerm):
        def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
            return overlap, np.ones_like(overlap), np.zeros_like(overlap)

    with pytest.raises(TypeError, match=r"^target: the formula of Own has no derivative"):
        Own().value_and_grad(x, soft_target(), target_grad=True)


def test_autograd_differentiates_by_a_soft_target() -> None:
    torch = need("torch")
    x, _ = example(2, 3, (3, 4))
    logits = torch.tensor(x, requires_grad=True)
    g = torch.tensor(soft_target(), requires_grad=True)
    for loss in (
        fl.Dice() + fl.KLDivergence(),
        fl.DiceSemimetric(reduction="none") + 0.1 * fl.Boundary(),
    ):
        assert torch.autograd.gradcheck(loss, (logits, g), atol=1e-6)
        assert torch.autograd.gradcheck(
            lambda t, loss=loss: loss(logits.detach(), t), (g,), atol=1e-6
        )
    half = soft_target().astype(np.float32)
    half = torch.tensor(half).bfloat16().requires_grad_()
    fl.Dice()(logits.float(), half).backward()
    assert half.grad.dtype == torch.bfloat16
    found = torch.autograd.grad(fl.Dice()(logits, g), g, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        found.sum().backward()


# ------------------------------------------------------------------ distillation, neighbours


def test_distillation() -> None:
    torch = need("torch")
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 5, 6))
    weight = rng.uniform(size=(2, 5, 6))
    for temperature, activation, reduction, w in (
        (1.0, "softmax", "mean", None), (2.5, "softmax", "mean", weight),
        (2.5, "sigmoid", "mean", weight), (0.5, "softmax", "sum", None),
    ):  # fmt: skip
        s, t = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
        m = torch.ones(2, 5, 6, dtype=torch.float64) if w is None else torch.tensor(w)
        if activation == "softmax":
            g, log_p = (t / temperature).softmax(1), (s / temperature).log_softmax(1)
            each = (g * (g.log() - log_p)).sum(1)
        else:
            g, entropy = (t / temperature).sigmoid(), torch.nn.BCEWithLogitsLoss(reduction="none")
            each = (entropy(s / temperature, g) - entropy(t / temperature, g)).mean(1)
        expected = temperature**2 * (each * m).sum()
        expected = expected / m.sum() if reduction == "mean" else expected
        expected.backward()
        right, s.grad = s.grad, None
        options = {"temperature": temperature, "activation": activation, "reduction": reduction}
        value = fl.distillation_loss(s, t, w if w is None else m, **options)
        (3 * value).backward()
        torch.testing.assert_close(value, expected.detach(), check_dtype=False)
        torch.testing.assert_close(s.grad, 3 * right)
        own = fl.distillation_loss(student, teacher, w, **options)
        assert own == pytest.approx(float(expected.detach()), rel=1e-12)
    half = torch.tensor(student).bfloat16().requires_grad_()
    value = fl.distillation_loss(half, torch.tensor(teacher).half(), temperature=3)
    value.backward()
    assert (value.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)
    for error, match, arrays, options in (
        (ValueError, "teacher_logits: .*shape", (student, teacher[:1]), {}),
        (ValueError, "temperature: .* above 0", (student, teacher), {"temperature": 0}),
        (TypeError, "student_logits: .* int64", (student.astype(int), teacher), {}),
        (TypeError, "teacher_logits: .*detach", (half, half), {}),
        (ValueError, "teacher_logits: .*shape", (half, half[:1].detach()), {}),
    ):
        with pytest.raises(error, match=f"^{match}"):
            fl.distillation_loss(*arrays, **options)


def test_neighbours() -> None:
    torch, ndimage = need("torch"), need("scipy.ndimage")
    import fastloss.torch as ft

    x, y = example(2, 3, (4, 5, 6))
    y[0, 0, 0] = 7
    logits, known = torch.tensor(x, requires_grad=True), (y != 7)[:, None]
    shares = [[ndimage.uniform_filter(c, 3, mode="constant") for c in b] for b in one_hot(y, 3)]
    for distance, power in (("l1", 1), ("l2", 2)):
        module = ft.NeighborAwareCE(alpha=0.3, distance=distance, ignore_index=7)
        value = module(logits, torch.tensor(y))
        gap = (torch.tensor(np.array(shares)) - logits).abs() ** power * torch.tensor(known)
        entropy = torch.nn.functional.cross_entropy(logits, torch.tensor(y), ignore_index=7)
        expected = entropy + 0.3 * gap.sum() / (3 * known.sum())
        torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0, check_dtype=False)
        own, right = (torch.autograd.grad(v, logits)[0] for v in (value, expected))
        torch.testing.assert_close(own, right, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------ functions, modules, options


FUNCTIONS = {
    fl.log_cosh_dice_loss: fl.LogCoshDice,
    fl.exponential_logarithmic_loss: fl.ExponentialLogarithmic,
    fl.sensitivity_specificity_loss: fl.SensitivitySpecificity,
    fl.combo_loss: fl.Combo,
    fl.symmetric_cross_entropy_loss: fl.SymmetricCrossEntropy,
    fl.dice_semimetric_loss: fl.DiceSemimetric,
    fl.unified_focal_loss: fl.UnifiedFocal,
    fl.generalized_wasserstein_dice_loss: fl.GeneralizedWassersteinDice,
    fl.kl_divergence_loss: fl.KLDivergence,
}


def test_functions_and_modules_are_the_classes() -> None:
    torch = need("torch")
    import fastloss.torch as ft

    x, y = example(2, 3, (3, 4))
    logits = torch.tensor(x, requires_grad=True)
    for function, kind in FUNCTIONS.items():
        given: dict[str, Any] = {}
        if function is fl.generalized_wasserstein_dice_loss:
            given = {"distances": FAR}
        right, gradient = fl.Loss(kind(**given)).value_and_grad(x, y)
        np.testing.assert_array_equal(function(x, y, **given), right)
        value = getattr(ft, kind.__name__)(**given)(logits, torch.tensor(y))
        assert float(value.detach()) == right
        np.testing.assert_array_equal(torch.autograd.grad(value, logits)[0].numpy(), gradient)
        parameters = inspect.signature(function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        own = [
            p
            for each in kind.__mro__
            if "__init__" in vars(each)
            for p in inspect.signature(vars(each)["__init__"]).parameters.values()
        ]
        for p in own:
            if p.kind is p.KEYWORD_ONLY and p.name in defaults:
                assert defaults[p.name] == p.default, (kind, p.name)


def test_losses_run_between_the_passes_on_a_gpu() -> None:
    """The formulas, recorded as for a GPU, give what NumPy gives."""
    for loss, _ in LOSSES.values():
        whole = fl.Loss(loss)
        statistics = sums_of(whole, 2, 3)
        program = traced(whole, statistics)
        upstream = upstream_of(program.value_shape)
        value, derivatives = combined(whole, statistics, upstream)
        numbers = numbers_of(whole)
        found = program.evaluate(statistics.sums, statistics.voxels, numbers, upstream)
        np.testing.assert_allclose(found[0], value, rtol=1e-12)
        np.testing.assert_allclose(found[1], derivatives, rtol=1e-12)


def test_options_out_of_range() -> None:
    x, y = example(2, 3, (3, 4))
    for make, match in (
        (lambda: fl.LogarithmicDice(gamma=0), "gamma: .* above 0"),
        (lambda: fl.SensitivitySpecificity(r=2), r"r: .* \[0, 1\]"),
        (lambda: fl.Combo(alpha=-1), "alpha: "),
        (lambda: fl.combo_loss(x, y, alpha=2), "alpha: "),
        (lambda: fl.SymmetricCrossEntropy(log_zero=1), "log_zero: "),
        (lambda: fl.UnifiedFocal(gamma=1), "gamma: .* below 1"),
        (lambda: fl.UnifiedFocal(focal_share=2), "focal_share: "),
        (lambda: fl.GeneralizedWassersteinDice(distances=[[0, 1]]), r"distances: .*\(1, 2\)"),
        (lambda: fl.GeneralizedWassersteinDice(distances=np.zeros((2, 2))), "distances: "),
        (lambda: fl.GeneralizedWassersteinDice(distances=FAR, weighting="x"), "weighting: "),
        (lambda: fl.GeneralizedWassersteinDice(distances=np.eye(4))(x, y), "distances: "),
        (
            lambda: fl.GeneralizedWassersteinDice(distances=FAR)(x, y, regions=np.roll(y, 1, 2)),
            "regions: expected the labels",
        ),
        (
            lambda: fl.Loss(fl.GeneralizedWassersteinDice(distances=FAR), activation="sigmoid")(
                x, y
            ),
            "activation: ",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{match}"):
            make()
    with pytest.raises(TypeError, match=r"^distances: "):
        fl.GeneralizedWassersteinDice(distances="near")
