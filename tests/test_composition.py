"""Sums of losses: each term keeps the value and the cost that it has alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
from support import example, finite_differences, need, one_hot

import fastloss as fl

X, Y = example(2, 3, (300,))
PLANE, PLANE_LABELS = example(2, 3, (9, 10))
TERMS = (
    fl.Dice(),
    fl.Dice(squared=True, include_background=False),
    fl.Jaccard(batch=True),
    fl.Tversky(alpha=0.3, gamma=0.75),
    fl.GeneralizedDice(weighting="simple"),
    fl.CrossEntropy(label_smoothing=0.1),
    fl.CrossEntropy(weight=[1, 2, 3], reduction="sum"),
    fl.Focal(),
    fl.Focal(gamma=0.5, alpha=0.25),
    fl.Focal(gamma=0),
)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_sum_is_the_weighted_sum_of_its_parts(backend: str, activation: str) -> None:
    factors = np.random.default_rng(0).uniform(-1, 2, len(TERMS))
    loss = sum(float(f) * t for f, t in zip(factors, TERMS, strict=True))
    loss = fl.Loss(loss, activation=activation)
    parts = [fl.Loss(t, activation=activation).value_and_grad(X, Y) for t in TERMS]
    value, gradient = loss.value_and_grad(X, Y)
    expected = sum(f * v for f, (v, _) in zip(factors, parts, strict=True))
    expected_gradient = sum(f * g for f, (_, g) in zip(factors, parts, strict=True))
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


def test_pairs(backend: str) -> None:
    for one in range(len(TERMS)):
        for other in (0, 1, 5, 8):
            a, b = TERMS[one], TERMS[other]
            value, gradient = (a + 0.5 * b).value_and_grad(X, Y)
            (va, ga), (vb, gb) = a.value_and_grad(X, Y), b.value_and_grad(X, Y)
            assert value == pytest.approx(va + 0.5 * vb, rel=1e-12)
            np.testing.assert_allclose(gradient, ga + 0.5 * gb, rtol=1e-9, atol=1e-14)


def test_a_term_alone_is_a_loss(backend: str) -> None:
    for term in TERMS:
        loss = fl.Loss(term)
        assert term(X, Y) == loss(X, Y)
        np.testing.assert_array_equal(term.gradient(X, Y), loss.gradient(X, Y))
        assert term.value(loss.statistics(X, Y)) == loss.value(term.statistics(X, Y))


def test_ways_to_write_the_same() -> None:
    dice, entropy = fl.Dice(), fl.CrossEntropy()
    expected = fl.Loss(dice, 0.5 * entropy)(X, Y)
    for loss in (
        dice + 0.5 * entropy,
        dice + entropy * 0.5,
        fl.Loss(dice) + 0.5 * entropy,
        dice + fl.Loss(0.5 * entropy),
        fl.Loss(dice + 0.5 * entropy),
        sum([dice, 0.5 * entropy]),
        0.5 * (2 * dice + entropy),
        dice + np.float32(0.5) * fl.Loss(entropy),
        dice + 0.25 * entropy + 0.25 * entropy,
        1 * dice + 0.5 * entropy,
    ):
        assert loss(X, Y) == pytest.approx(expected, rel=1e-14)
    assert (0.5 * entropy + dice)(X, Y) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("one", [fl.Dice(), fl.Dice() + fl.Focal()])
def test_differences_and_quotients(one: Any) -> None:
    other = fl.CrossEntropy()
    a, b = one(X, Y), other(X, Y)
    for loss, value in (
        (one - other, a - b),
        (other - one, b - a),
        (-one, -a),
        (0 - one, -a),
        (one / 2, a / 2),
        (one / np.float32(4), a / 4),
        (-(2 * one - other) / 3, (b - 2 * a) / 3),
    ):
        assert isinstance(loss, fl.Loss)
        assert loss(X, Y) == pytest.approx(value, rel=1e-12)
    for zero in (0, 0.0, np.float32(0)):
        with pytest.raises(ValueError, match=r"^divisor: .* other than 0"):
            one / zero
    with pytest.raises(TypeError):
        2 / one


@pytest.mark.parametrize("one", [fl.Dice(), fl.Dice() + fl.Focal()])
def test_arrays_of_one_number(one: Any) -> None:
    torch = need("torch")
    value = one(X, Y) / 2
    for half in (
        np.array(0.5),
        np.float16(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ):
        for loss in (half * one, one * half, one / (1 / half)):
            assert isinstance(loss, fl.Loss)
            assert loss(X, Y) == pytest.approx(value, rel=1e-12)
    learned = torch.tensor(0.5, requires_grad=True)
    for product in (lambda: learned * one, lambda: one * learned):
        with pytest.raises(TypeError, match=r"^factor: .*requires a gradient.*factor\.detach"):
            product()
    with pytest.raises(TypeError, match=r"^divisor: .*requires a gradient"):
        one / learned
    for several in (np.ones(3), torch.ones(3)):
        with pytest.raises(TypeError, match=r"^factor: expected a number, got an array of shape"):
            several * one


def test_scaling_leaves_the_loss_alone() -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    before = loss(X, Y)
    doubled = 2 * loss
    assert doubled(X, Y) == pytest.approx(2 * before, rel=1e-14)
    assert loss(X, Y) == before


@pytest.mark.parametrize("factor", ["2", None, 1j, True, [1.0]])
def test_factors_that_are_no_numbers(factor: Any) -> None:
    for loss in (fl.Dice(), fl.Dice() + fl.CrossEntropy()):
        with pytest.raises(TypeError):
            factor * loss
        with pytest.raises(TypeError):
            loss * factor


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_factors_that_are_not_finite(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        factor * fl.Dice()


@pytest.mark.parametrize("other", [1, 2.0, "dice", None])
def test_summands_that_are_no_losses(other: Any) -> None:
    for loss in (fl.Dice(), fl.Dice() + fl.CrossEntropy()):
        with pytest.raises(TypeError):
            loss + other


def test_options_are_taken_over() -> None:
    loss = fl.Loss(fl.Dice(), activation="sigmoid", ignore_index=255) + fl.CrossEntropy()
    assert loss.activation == "sigmoid"
    assert loss.ignore_index == 255
    loss = 2 * (fl.CrossEntropy() + loss)
    assert loss.activation == "sigmoid"
    assert loss.ignore_index == 255
    assert fl.Loss(loss, channel_axis=-1).channel_axis == -1
    assert fl.Dice()._loss.activation == "softmax"


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("activation", "sigmoid", "softmax"),
        ("ignore_index", 255, 0),
        ("channel_axis", -1, 1),
    ],
)
def test_options_that_contradict_each_other(name: str, one: Any, other: Any) -> None:
    a, b = fl.Loss(fl.Dice(), **{name: one}), fl.Loss(fl.CrossEntropy(), **{name: other})
    with pytest.raises(ValueError, match=f"^{name}: "):
        a + b
    with pytest.raises(ValueError, match=f"^{name}: "):
        fl.Loss(a, **{name: other})
    assert getattr(a + fl.Loss(fl.CrossEntropy(), **{name: one}), name) == one


# ------------------------------------------------------------------ functions


@pytest.mark.parametrize(
    ("function", "options", "loss"),
    [
        (fl.cross_entropy_loss, {"label_smoothing": 0.1}, fl.CrossEntropy(label_smoothing=0.1)),
        (fl.cross_entropy_loss, {"weight": np.array([1, 2, 3])}, fl.CrossEntropy(weight=[1, 2, 3])),
        (fl.focal_loss, {"gamma": 1.5, "alpha": [0.1, 0.2, 0.3]},
         fl.Focal(gamma=1.5, alpha=[0.1, 0.2, 0.3])),
        (fl.dice_loss, {"squared": True, "batch": True}, fl.Dice(squared=True, batch=True)),
        (fl.dice_loss, {"reduction": "none"}, fl.Dice(reduction="none")),
        (fl.jaccard_loss, {"include_background": False}, fl.Jaccard(include_background=False)),
        (fl.tversky_loss, {"alpha": 0.3, "beta": 0.7, "gamma": 0.75},
         fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75)),
        (fl.generalized_dice_loss, {"weighting": "simple"}, fl.GeneralizedDice(weighting="simple")),
        (fl.brier_loss, {"weight": [1, 2, 3]}, fl.Brier(weight=[1, 2, 3])),
        (fl.mean_absolute_error_loss, {"reduction": "none"},
         fl.MeanAbsoluteError(reduction="none")),
        (fl.poly_cross_entropy_loss, {"epsilon": 2, "weight": 0.5},
         fl.PolyCrossEntropy(epsilon=2, weight=0.5)),
        (fl.generalized_cross_entropy_loss, {"q": 0.5, "reduction": "sum"},
         fl.GeneralizedCrossEntropy(q=0.5, reduction="sum")),
        (fl.mcc_loss, {"batch": True, "smooth_nr": 0.5}, fl.MCC(batch=True, smooth_nr=0.5)),
        (fl.boundary_loss, {"spacing": 2, "reduction": "none"},
         fl.Boundary(spacing=2, reduction="none")),
        (fl.hausdorff_dt_loss, {"alpha": 1.5, "log": True, "spacing": np.array([0.5])},
         fl.HausdorffDT(alpha=1.5, log=True, spacing=(0.5,))),
        (fl.generalized_surface_loss, {"smooth_dr": 0, "weight": [1, 2]},
         fl.GeneralizedSurface(smooth_dr=0, weight=[1, 2])),
        (fl.boundary_dou_loss, {"smooth": 0.1, "batch": True},
         fl.BoundaryDoU(smooth=0.1, batch=True)),
        (fl.dice_ce_loss, {}, fl.Dice() + fl.CrossEntropy()),
        (
            fl.dice_ce_loss,
            {"dice_factor": 0.7, "ce_factor": 1.3, "label_smoothing": 0.1, "squared": True,
             "ce_weight": [1, 2, 3], "weight": (3, 2, 1)},
            0.7 * fl.Dice(squared=True, weight=[3, 2, 1])
            + 1.3 * fl.CrossEntropy(label_smoothing=0.1, weight=[1, 2, 3]),
        ),
        (fl.dice_ce_loss, {"reduction": "none"},
         fl.Dice(reduction="none") + fl.CrossEntropy(reduction="none")),
        (
            fl.dice_focal_loss,
            {"gamma": 1, "alpha": 0.25, "focal_factor": 2.0, "include_background": False},
            fl.Dice(include_background=False) + 2.0 * fl.Focal(gamma=1, alpha=0.25),
        ),
    ],
)  # fmt: skip
def test_functions_are_the_classes(function: Any, options: Any, loss: Any) -> None:
    w = np.random.default_rng(0).uniform(size=Y.shape)
    for whole in ({}, {"activation": "sigmoid"}, {"ignore_index": 1}):
        expected = fl.Loss(loss, **whole)
        for _ in range(2):  # created, then cached
            np.testing.assert_array_equal(function(X, Y, **options, **whole), expected(X, Y))
            np.testing.assert_array_equal(function(X, Y, w, **options, **whole), expected(X, Y, w))
    last = np.ascontiguousarray(np.moveaxis(X, 1, -1))
    np.testing.assert_allclose(
        function(last, Y, channel_axis=-1, **options), loss(X, Y), rtol=1e-12
    )


OWN: dict[Any, dict[type[fl.Term], dict[str, str]]] = {
    fl.boundary_dou_loss: {fl.BoundaryDoU: {}},
    fl.boundary_loss: {fl.Boundary: {}},
    fl.brier_loss: {fl.Brier: {}},
    fl.cc_dice_ce_loss: {fl.CCDiceCE: {}},
    fl.cross_entropy_loss: {fl.CrossEntropy: {}},
    fl.dice_semimetric_loss: {fl.DiceSemimetric: {}},
    fl.dice_ce_loss: {fl.Dice: {}, fl.CrossEntropy: {"weight": "ce_weight"}},
    fl.dice_focal_loss: {fl.Dice: {}, fl.Focal: {}},
    fl.dice_loss: {fl.Dice: {}},
    fl.focal_loss: {fl.Focal: {}},
    fl.generalized_cross_entropy_loss: {fl.GeneralizedCrossEntropy: {}},
    fl.generalized_dice_loss: {fl.GeneralizedDice: {}},
    fl.generalized_surface_loss: {fl.GeneralizedSurface: {}},
    fl.hausdorff_dt_loss: {fl.HausdorffDT: {}},
    fl.jaccard_loss: {fl.Jaccard: {}},
    fl.kl_divergence_loss: {fl.KLDivergence: {}},
    fl.log_cosh_dice_loss: {fl.LogCoshDice: {}},
    fl.mcc_loss: {fl.MCC: {}},
    fl.mean_absolute_error_loss: {fl.MeanAbsoluteError: {}},
    fl.ohem_cross_entropy_loss: {fl.OHEMCrossEntropy: {}},
    fl.poly_cross_entropy_loss: {fl.PolyCrossEntropy: {}},
    fl.sensitivity_specificity_loss: {fl.SensitivitySpecificity: {}},
    fl.skeleton_recall_loss: {fl.SkeletonRecall: {}},
    fl.symmetric_cross_entropy_loss: {fl.SymmetricCrossEntropy: {}},
    fl.top_k_cross_entropy_loss: {fl.TopKCrossEntropy: {}},
    fl.tversky_loss: {fl.Tversky: {}},
}
"""The terms of each function, and its names of their options where they differ."""


def named_options(what: Any) -> dict[str, Any]:
    """The options that a function takes by name, and their defaults."""
    parameters = inspect.signature(what).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_every_function_is_listed() -> None:
    others = {  # of sums of terms, and others: see test_per_region, test_lovasz, test_longer_list
        fl.blob_loss,
        fl.combo_loss,
        fl.distillation_loss,
        fl.exponential_logarithmic_loss,
        fl.generalized_wasserstein_dice_loss,
        fl.lovasz_hinge_loss,
        fl.lovasz_softmax_loss,
        fl.unified_focal_loss,
    }
    assert set(OWN) | others == {getattr(fl, name) for name in fl.__all__ if name.endswith("_loss")}


@pytest.mark.parametrize("function", OWN, ids=lambda function: function.__name__)
def test_functions_have_the_defaults_of_the_classes(function: Any) -> None:
    given = named_options(function)
    expected = named_options(fl.Loss) | named_options(fl.Loss.__call__)
    if all(kind.makes == "" and not kind.regional for kind in OWN[function]):
        del expected["fields"]  # which these terms do not read
    for kind, names in OWN[function].items():
        term = kind()
        for option in re.findall(r"(\w+)=", repr(term)):
            measures = term.makes in ("boundary", "distance") or term.regional
            if option != "spacing" or measures:  # else of no meaning
                expected[names.get(option, option)] = getattr(term, option)
    if len(OWN[function]) > 1:
        expected |= {name: 1.0 for name in given if name.endswith("_factor")}
    assert given == expected
    x, y = X, Y
    if function is fl.skeleton_recall_loss:
        need("skimage")
        x, y = PLANE, PLANE_LABELS
    np.testing.assert_array_equal(function(x, y), sum(kind() for kind in OWN[function])(x, y))


def test_functions_take_fields() -> None:
    loss = fl.HausdorffDT(spacing=(2, 1)) + fl.GeneralizedSurface(spacing=(2, 1))
    fields = loss.fields(PLANE_LABELS, classes=3, spacing=(2, 1))
    both = fl.hausdorff_dt_loss(PLANE, PLANE_LABELS, spacing=(2, 1), fields=fields)
    both += fl.generalized_surface_loss(PLANE, PLANE_LABELS, fields=fields)
    np.testing.assert_allclose(both, loss(PLANE, PLANE_LABELS, fields=fields), rtol=1e-12)
    with pytest.raises(ValueError, match=r"^fields: the terms of this loss read 'boundary', got "):
        fl.boundary_loss(PLANE, PLANE_LABELS, fields=fields)
    with pytest.raises(ValueError, match=r"^spacing: expected 2 numbers"):
        fl.boundary_loss(PLANE, PLANE_LABELS, spacing=(1, 2, 3))


def test_functions_read_what_changes_in_place() -> None:
    factor, weight = np.array(0.5), np.array([1.0, 2.0, 3.0])
    first = fl.dice_ce_loss(X, Y, ce_factor=factor, ce_weight=weight)
    factor[()], weight[0] = 2.0, 5.0
    expected = fl.Dice() + 2.0 * fl.CrossEntropy(weight=[5, 2, 3])
    assert fl.dice_ce_loss(X, Y, ce_factor=factor, ce_weight=weight) == expected(X, Y) != first


def test_functions_do_not_confuse_equal_options() -> None:
    """1, 1.0 and True are equal as dictionary keys."""
    by_number = fl.cross_entropy_loss(X, Y, weight=1)
    assert by_number == fl.cross_entropy_loss(X, Y)
    assert fl.cross_entropy_loss(X, Y, weight=[1, 2, 3]) != by_number
    changing = np.array([1.0, 2, 3])
    first = fl.cross_entropy_loss(X, Y, weight=changing)
    changing[0] = 5
    assert fl.cross_entropy_loss(X, Y, weight=changing) != first


# ------------------------------------------------------------------ objects


def test_repr_shows_what_would_make_it_again() -> None:
    loss = fl.Loss(
        fl.Dice(include_background=False) + 0.5 * fl.CrossEntropy(label_smoothing=0.1),
        activation="sigmoid",
        ignore_index=255,
    )
    again = eval(repr(loss), vars(fl))
    assert repr(again) == repr(loss)
    for part in ("Dice(", "include_background=False", "0.5 * CrossEntropy(", "ignore_index=255"):
        assert part in repr(loss)
    for term in TERMS:
        term(X, Y)  # fills caches that repr should not show
        assert repr(term).startswith(type(term).__name__ + "(")
        assert "_loss" not in repr(term)


@pytest.mark.parametrize("term", [*TERMS, fl.Dice() + 0.5 * fl.CrossEntropy(weight=[1, 2, 3])])
@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(term: Any, used: bool) -> None:
    term = copy.deepcopy(term)
    expected = fl.Loss(term)(X, Y)
    if used:
        term(X, Y)
    for again in (copy.copy(term), copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert repr(again) == repr(term)
        assert again(X, Y) == expected


def test_losses_do_not_follow_their_arguments() -> None:
    weight = np.array([1.0, 2.0, 3.0])
    loss = fl.CrossEntropy(weight=weight)
    before = loss(X, Y)
    weight[:] = [9, 1, 1]
    assert loss(X, Y) == before
    with pytest.raises(ValueError, match="read-only"):
        loss.weight[0] = 9


# ------------------------------------------------------------------ custom terms


class LogCoshDice(fl.RegionTerm):
    """log cosh of the Dice loss (Jadon 2020), as a user would add it."""

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = predicted + reference + self.smooth_dr
        dice = (2 * overlap + self.smooth_nr) / total
        slope = np.tanh(1 - dice)
        return np.log(np.cosh(1 - dice)), -2 * slope / total, slope * dice / total


class FowlkesMallows(fl.RegionTerm):
    """1 − O / √(P G): another form of formula, with its own option."""

    def __init__(self, *, power: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.power = power

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        root = np.sqrt(predicted * reference) + self.smooth_dr
        index = (overlap + self.smooth_nr) / root
        outer = self.power * index ** (self.power - 1)
        by_predicted = index / root * 0.5 * reference / np.sqrt(predicted * reference)
        return 1 - index**self.power, -outer / root, outer * by_predicted


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "term",
    [
        LogCoshDice(),
        LogCoshDice(squared=True, weight=[1, 2, 3]),
        LogCoshDice(batch=True, include_background=False),
        FowlkesMallows(),
        FowlkesMallows(power=1.5, reduction="sum"),
    ],
)
def test_a_term_of_ones_own(backend: str, term: fl.RegionTerm, activation: str) -> None:
    x, y = example(2, 3, (7,))
    for target in (y, one_hot(y, 3)):
        for loss in (term, 0.5 * term + fl.CrossEntropy() + fl.Dice(squared=True)):
            loss = fl.Loss(loss, activation=activation)
            np.testing.assert_allclose(
                loss.gradient(x, target), finite_differences(loss, x, target), rtol=1e-6, atol=2e-8
            )


def test_a_term_of_ones_own_is_an_object_like_the_others() -> None:
    term = FowlkesMallows(power=1.5, batch=True)
    assert "power=1.5" in repr(term)
    assert "batch=True" in repr(term)
    assert pickle.loads(pickle.dumps(term))(X, Y) == term(X, Y)
    total = sum(term.statistics(X[..., s], Y[..., s]) for s in (slice(50), slice(50, None)))
    assert term.value(total) == pytest.approx(term(X, Y), rel=1e-12)
    with pytest.raises(ValueError, match=r"^reduction: "):
        FowlkesMallows(reduction="median")


def test_a_term_without_a_formula() -> None:
    class Empty(fl.RegionTerm):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define formula"):
        Empty()(X, Y)
