"""The formulas of terms on given sums: absent classes, samples without voxels, and derivatives.

No kernel runs here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fastloss as fl
from fastloss.request import make_request
from fastloss.statistics import Statistics

REGIONS = {
    "dice": fl.Dice(),
    "dice without smoothing": fl.Dice(smooth_nr=0, smooth_dr=0),
    "squared dice": fl.Dice(squared=True),
    "batch dice": fl.Dice(batch=True),
    "dice without background": fl.Dice(include_background=False),
    "jaccard": fl.Jaccard(),
    "jaccard without smoothing": fl.Jaccard(smooth_nr=0, smooth_dr=0),
    "tversky": fl.Tversky(alpha=0.3, beta=0.7),
    "focal tversky": fl.Tversky(gamma=0.75),
    "generalized dice": fl.GeneralizedDice(),
    "simple generalized dice": fl.GeneralizedDice(weighting="simple"),
    "batch generalized dice": fl.GeneralizedDice(batch=True, smooth_nr=0, smooth_dr=0),
}
VOXELWISE = {
    "cross entropy": fl.CrossEntropy(),
    "weighted cross entropy": fl.CrossEntropy(weight=2.0),
    "smoothed cross entropy": fl.CrossEntropy(label_smoothing=0.1),
    "focal": fl.Focal(),
    "focal below 1": fl.Focal(gamma=0.5, alpha=0.25),
    "brier": fl.Brier(),
    "mean absolute error": fl.MeanAbsoluteError(weight=0.5),
    "poly cross entropy": fl.PolyCrossEntropy(epsilon=2.0),
    "generalized cross entropy": fl.GeneralizedCrossEntropy(),
}
TERMS = {**REGIONS, **VOXELWISE}
ACTIVATIONS = ("softmax", "sigmoid", "none")
KINDS = [(activation, dense) for activation in ACTIVATIONS for dense in (False, True)]
OF_ONE_CLASS = [name for name in TERMS if name != "dice without background"]
RANGES = {"overlap": (1.0, 4.0), "reference": (6.0, 9.0), "predicted": (5.0, 8.0)}
VOXELS = 40.0


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def crafted(
    term: fl.Term,
    activation: str = "softmax",
    *,
    batch: int = 2,
    classes: int = 3,
    dense: bool = False,
    regions: int = 0,
    **given: Any,
) -> Statistics:
    """The sums that this term reads, without arrays: random ones, or those given by name."""
    rng = np.random.default_rng(0)
    request = make_request(activation, dense, None, frozenset(term.requires))
    rows = batch * max(regions, 1)
    sums = rng.uniform(1.0, 5.0, (len(request.sums), rows, classes))
    voxels = np.full(rows, VOXELS)
    for name, (low, high) in RANGES.items():
        numbers = rng.uniform(low, high, (rows, classes))
        fill(request, sums, name, numbers)
        if name != "overlap":
            fill(request, sums, f"{name}_squared", numbers)
    for key, numbers in given.items():
        fill(request, sums, key, np.asarray(numbers, float))
    return Statistics(request, sums, voxels, np.dtype(np.float64), regions=regions)


def fill(request: Any, sums: np.ndarray, key: str, numbers: np.ndarray) -> None:
    try:
        place = request.index[key]
    except KeyError:  # not read by this term
        return
    sums[place] = numbers


def empty(statistics: Statistics, rows: Any = slice(None)) -> Statistics:
    """The same sums without a voxel in these rows."""
    sums, voxels = statistics.sums.copy(), statistics.voxels.copy()
    sums[:, rows], voxels[rows] = 0.0, 0.0
    return replace(statistics, sums=sums, voxels=voxels)


def absent(statistics: Statistics, column: int) -> Statistics:
    """The same sums where the target has no voxel of this class."""
    sums = statistics.sums.copy()
    for place, total in enumerate(statistics.request.sums):
        if total.weight in ("target", "target_squared"):
            sums[place, :, column] = 0.0
    return replace(statistics, sums=sums)


def alone(term: fl.Term, statistics: Statistics) -> tuple[Any, dict[Any, np.ndarray]]:
    """The value, and the derivatives by the sums."""
    value, pullback = term.combine(statistics)
    derivatives = {key: np.asarray(d) for key, d in pullback(np.ones(np.shape(value))).items()}
    assert np.isfinite(value).all()
    assert all(np.isfinite(d).all() for d in derivatives.values())
    return value, derivatives


def assert_derivatives(term: fl.Term, statistics: Statistics) -> None:
    """The derivative by each sum equals central differences of the value."""
    _, derivatives = alone(term, statistics)
    step = 1e-5
    for key, derivative in derivatives.items():
        place = statistics.request.index[key]
        shape = statistics.sums.shape[1:]
        expected = np.empty(shape)
        for i in np.ndindex(shape):
            ends = []
            for sign in (1, -1):
                sums = statistics.sums.copy()
                sums[(place, *i)] += sign * step
                ends.append(np.sum(term.combine(replace(statistics, sums=sums))[0]))
            expected[i] = (ends[0] - ends[1]) / (2 * step)
        own = np.broadcast_to(derivative, shape)
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("name", TERMS)
def test_derivatives_by_the_sums_are_those_of_finite_differences(name: str) -> None:
    term = TERMS[name]
    for activation, dense in KINDS:
        statistics = crafted(term, activation, dense=dense)
        assert_derivatives(term, statistics)
        assert_derivatives(term, absent(statistics, 1))
        assert_derivatives(term, crafted(term, activation, dense=dense, batch=1, classes=2))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", TERMS)
def test_derivatives_of_other_reductions_are_those_of_finite_differences(
    name: str, reduction: str
) -> None:
    term = TERMS[name].with_options({"reduction": reduction})
    assert_derivatives(term, crafted(term))


@pytest.mark.parametrize("name", REGIONS)
def test_derivatives_by_the_sums_of_regions_are_those_of_finite_differences(name: str) -> None:
    term = REGIONS[name]
    assert_derivatives(term, crafted(term, regions=2))


# ------------------------------------------------------------------ absent classes


def test_an_absent_class_that_is_predicted_costs_all_but_the_smoothing() -> None:
    options: Any = {"smooth_nr": 0.5, "smooth_dr": 0.25, "reduction": "none"}
    sizes: Any = {"predicted": [[4.0, 3.0, 0.0]], "predicted_squared": [[4.0, 3.0, 0.0]]}
    for term, share in (
        (fl.Dice(**options), 1.0),
        (fl.Dice(squared=True, **options), 1.0),
        (fl.Jaccard(**options), 1.0),
        (fl.Tversky(alpha=0.3, beta=0.7, **options), 0.3),
    ):
        statistics = absent(crafted(term, batch=1, **sizes), 1)
        value, _ = alone(term, statistics)
        assert value[0, 1] == pytest.approx(1 - 0.5 / (share * 3.0 + 0.25), rel=1e-14)


@pytest.mark.parametrize("squared", [False, True])
def test_a_class_that_is_neither_predicted_nor_there_costs_nothing_without_smoothing(
    squared: bool,
) -> None:
    for kind in (fl.Dice, fl.Jaccard, fl.Tversky):
        term = kind(smooth_nr=0, smooth_dr=0, squared=squared, reduction="none")
        statistics = crafted(term)
        statistics.sums[:, :, 2] = 0.0
        value, derivatives = alone(term, statistics)
        assert (value[:, 2] == 0).all()
        assert (value[:, :2] > 0).all()
        assert all((d[:, 2] == 0).all() for d in derivatives.values())


def test_a_class_that_is_neither_predicted_nor_there_costs_all_with_smooth_dr_alone() -> None:
    term = fl.Dice(smooth_nr=0, reduction="none")
    statistics = crafted(term)
    statistics.sums[:, :, 2] = 0.0
    assert (alone(term, statistics)[0][:, 2] == 1).all()


@pytest.mark.parametrize(("weighting", "exponent"), [("square", 2), ("simple", 1), ("uniform", 0)])
def test_generalized_dice_weighs_an_absent_class_as_the_smallest_that_is_there(
    weighting: str, exponent: int
) -> None:
    term = fl.GeneralizedDice(weighting=weighting, smooth_nr=0, smooth_dr=0)
    overlap, predicted, reference = [2.0, 0.0, 1.0], [3.0, 2.0, 2.0], [8.0, 0.0, 4.0]
    statistics = crafted(
        term, batch=1, overlap=[overlap], predicted=[predicted], reference=[reference]
    )
    weight = np.array([8.0, 4.0, 4.0]) ** -exponent
    expected = 1 - 2 * weight @ overlap / (weight @ predicted + weight @ reference)
    assert alone(term, statistics)[0] == pytest.approx(expected, rel=1e-14)


def test_generalized_dice_weighs_all_classes_alike_where_none_is_there() -> None:
    term = fl.GeneralizedDice(smooth_nr=0.5, smooth_dr=0.25)
    statistics = crafted(term, batch=1, overlap=0, reference=0, predicted=[[1.0, 2.0, 3.0]])
    assert alone(term, statistics)[0] == pytest.approx(1 - 0.5 / 6.25, rel=1e-14)


def test_focal_tversky_has_no_slope_at_a_perfect_agreement() -> None:
    term = fl.Tversky(gamma=0.75)
    value, derivatives = alone(term, crafted(term, overlap=5, predicted=5, reference=5))
    assert value == 0
    assert not any(d.any() for d in derivatives.values())


def test_an_absent_class_counts_for_nothing_in_a_voxelwise_loss_of_labels() -> None:
    for term in (fl.CrossEntropy(weight=[1, 2, 3]), fl.Focal(), fl.GeneralizedCrossEntropy()):
        statistics = absent(crafted(term), 2)
        (total,) = (t for t in statistics.request.sums if t.function != "one")
        weight = np.array([1, 2, 0]) if isinstance(term, fl.CrossEntropy) else np.ones(3)
        count = (statistics["reference"] * weight).sum()
        count = count if isinstance(term, fl.CrossEntropy) else 2 * VOXELS
        expected = (statistics[total] * weight).sum() / count
        assert alone(term, statistics)[0] == pytest.approx(expected, rel=1e-14)


# ------------------------------------------------------------------ weights of 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "kind", [fl.CrossEntropy, fl.Brier, fl.MeanAbsoluteError, fl.PolyCrossEntropy]
)
def test_a_class_of_weight_0_counts_for_nothing_even_if_its_sum_is_infinite(
    kind: Any, activation: str
) -> None:
    term = kind(weight=[1.0, 0.0, 2.0])
    statistics = crafted(term, activation)
    value, _ = alone(term, statistics)
    for place, total in enumerate(statistics.request.sums):
        if total.function != "one":
            statistics.sums[place, :, 1] = np.inf
    assert term.combine(statistics)[0] == value


def test_a_mean_whose_weights_are_all_0_is_0() -> None:
    for weight in (0.0, [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]):
        term = fl.CrossEntropy(weight=weight)
        statistics = crafted(term, reference=[[9.0, 0.0, 0.0]] * 2, cross_entropy=[[3, 0, 0]] * 2)
        value, derivatives = alone(term, statistics)
        assert value == 0
        assert not np.any(derivatives["cross_entropy"])


# ------------------------------------------------------------------ empty samples


@pytest.mark.parametrize("name", TERMS)
def test_no_voxel_costs_nothing(name: str) -> None:
    term = TERMS[name]
    for activation, dense in KINDS:
        statistics = empty(crafted(term, activation, dense=dense))
        assert alone(term, statistics)[0] == pytest.approx(0, abs=1e-12)
        none = crafted(term, activation, dense=dense, batch=0)
        assert alone(term, none)[0] == pytest.approx(0, abs=1e-12)
        one = empty(crafted(term, activation, dense=dense, batch=1, classes=2))
        assert alone(term, one)[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", VOXELWISE)
def test_a_sample_without_voxels_has_the_mean_0_and_changes_no_other(name: str) -> None:
    mean, each = VOXELWISE[name], VOXELWISE[name].with_options({"reduction": "none"})
    for activation, dense in KINDS:
        full = crafted(each, activation, dense=dense)
        values, derivatives = alone(each, empty(full, 1))
        assert values.shape == (2, 1)
        assert values[1] == 0
        assert values[0] == alone(each, full)[0][0] > 0
        for derivative in derivatives.values():
            assert not np.broadcast_to(derivative, (2, 3))[1].any()
        # The mean over both samples equals the mean over the other's voxels.
        assert alone(mean, empty(full, 1))[0] == pytest.approx(values[0, 0], rel=1e-14)


@pytest.mark.parametrize("name", [n for n in REGIONS if not n.startswith("batch")])
def test_a_region_without_voxels_is_left_out_of_the_mean_and_has_the_value_0(name: str) -> None:
    mean, each = REGIONS[name], REGIONS[name].with_options({"reduction": "none"})
    full = crafted(mean, regions=2)
    values = alone(each, full)[0]
    # Rows 1 and 3 are the second regions of both samples; the sums of an empty row must not count.
    voxels = np.array([VOXELS, 0.0, VOXELS, VOXELS])
    three = replace(full, voxels=voxels)
    kept = np.array([0, 2, 3])
    own = alone(each, three)[0]
    assert (own[1] == 0).all()
    np.testing.assert_array_equal(own[kept], values[kept])
    value, derivatives = alone(mean, three)
    assert value == pytest.approx(values[kept].mean(), rel=1e-14)
    assert all((d[1] == 0).all() for d in derivatives.values())
    assert alone(mean, replace(full, voxels=0 * voxels))[0] == 0


@pytest.mark.parametrize("name", [n for n in REGIONS if n.startswith("batch")])
def test_a_region_without_voxels_in_any_sample_is_left_out_of_the_mean(name: str) -> None:
    term = REGIONS[name]
    full = crafted(term, regions=2)
    each = alone(term.with_options({"reduction": "none"}), full)[0]
    voxels = np.array([VOXELS, 0.0, VOXELS, VOXELS])  # region 1 exists in the second sample
    assert alone(term, replace(full, voxels=voxels))[0] == pytest.approx(each.mean(), rel=1e-14)
    value, derivatives = alone(term, replace(full, voxels=voxels * [1, 0, 1, 0]))
    assert value == pytest.approx(each[0].mean(), rel=1e-14)
    assert all((d[1::2] == 0).all() for d in derivatives.values())


# ------------------------------------------------------------------ one class


@pytest.mark.parametrize("name", OF_ONE_CLASS)
def test_one_class_of_probability_1_costs_nothing(name: str) -> None:
    """As in a softmax over one class."""
    term = TERMS[name]
    statistics = crafted(term, classes=1)
    for place, total in enumerate(statistics.request.sums):
        nothing = total.function not in ("one", "p", "p_squared")  # logs of 1, and 1 − 1
        statistics.sums[place] = 0.0 if nothing else VOXELS
    assert alone(term, statistics)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", OF_ONE_CLASS)
def test_derivatives_of_one_class_are_those_of_finite_differences(name: str) -> None:
    for activation in ("sigmoid", "none"):
        assert_derivatives(TERMS[name], crafted(TERMS[name], activation, classes=1, dense=True))


# ------------------------------------------------------------------ a whole loss


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_loss_of_all_terms_is_the_sum_of_their_values(activation: str) -> None:
    loss = fl.Loss(*TERMS.values(), activation=activation)
    request = make_request(
        activation, False, None, frozenset().union(*(t.requires for t in TERMS.values()))
    )
    rng = np.random.default_rng(1)
    sums = rng.uniform(3.0, 4.0, (len(request.sums), 2, 3))
    full = Statistics(request, sums, np.full(2, VOXELS), np.dtype(np.float64))
    for statistics in (full, absent(full, 1), empty(full, 0), empty(full)):
        expected = sum(alone(term, statistics)[0] for term in TERMS.values())
        assert loss.value(statistics) == pytest.approx(expected, rel=1e-12, abs=1e-12)
