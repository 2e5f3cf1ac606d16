"""Values that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl

pytestmark = pytest.mark.usefixtures("backend")

NO_SMOOTHING = {"smooth_nr": 0, "smooth_dr": 0}
# One channel, four voxels: overlap 1, one false positive, one false negative.
PREDICTED = np.array([[[1.0, 1, 0, 0]]])
THERE = np.array([[[1.0, 0, 1, 0]]])
# Two classes, four voxels of which the last is class 1.
HALVES = np.array([[[1, 1, 0.5, 0.5], [0, 0, 0.5, 0.5]]])
LAST = np.array([[0, 0, 0, 1]])


def probabilities(*terms: fl.Term, **options: object) -> fl.Loss:
    return fl.Loss(*terms, activation="none", **options)


def test_cross_entropy_of_probabilities() -> None:
    loss = probabilities(fl.CrossEntropy())
    assert loss(np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]])) == pytest.approx(0.22314355131421)
    assert loss(np.array([[0.8, 0.2]]), np.array([0])) == pytest.approx(0.22314355131421)
    assert loss(np.array([[0.8, 0.2]]), np.array([[0.5, 0.5]])) == pytest.approx(
        -0.5 * np.log(0.8) - 0.5 * np.log(0.2)
    )


def test_cross_entropy_of_equal_logits_is_log_c() -> None:
    x = np.full((2, 5, 3), 7.0)
    y = np.array([[0, 1, 2], [3, 4, 0]])
    assert fl.CrossEntropy()(x, y) == pytest.approx(np.log(5))
    assert fl.CrossEntropy(label_smoothing=0.3)(x, y) == pytest.approx(np.log(5))
    assert fl.CrossEntropy(reduction="sum")(x, y) == pytest.approx(6 * np.log(5))
    assert fl.CrossEntropy(weight=[1, 2, 3, 4, 5])(x, y) == pytest.approx(np.log(5))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("most", [1.0, 1.2, 1.4])
def test_a_thousand_classes_cost_float32_no_precision(most: float, dense: bool) -> None:
    # All classes but the first are equal: added one by one, their rounding errors would accumulate.
    classes = 1024
    logits = np.full((1, classes, 64), 0.7, np.float32)
    logits[:, 0] = most
    labels = 1 + np.arange(64, dtype=np.uint16)[None]
    there = np.eye(classes)[labels].transpose(0, 2, 1)
    value, gradient = fl.CrossEntropy().value_and_grad(
        logits, there.astype(np.float32) if dense else labels
    )
    top = np.exp(np.float64(logits[0, 0, 0]) - np.float64(logits[0, 1, 0]))
    total = top + classes - 1
    p = np.full((1, classes, 1), 1 / total)
    p[:, 0] = top / total
    assert value == pytest.approx(np.log(total), rel=1e-6)
    np.testing.assert_allclose(gradient, (p - there) / 64, rtol=1e-6)


def test_gradient_of_cross_entropy_is_p_minus_one_hot() -> None:
    gradient = fl.CrossEntropy().gradient(np.log([[0.7, 0.2, 0.1]]), np.array([1]))
    np.testing.assert_allclose(gradient, [[0.7, -0.8, 0.1]], rtol=1e-12)


def test_weighted_cross_entropy_divides_by_the_weights_of_the_labels() -> None:
    x = np.log(np.array([[[0.5, 0.25], [0.5, 0.75]]]))  # class 0: ½, ¼; class 1: ½, ¾
    loss = fl.CrossEntropy(weight=[1, 3])
    expected = (np.log(2) + 3 * np.log(4 / 3)) / 4
    assert loss(x, np.array([[0, 1]])) == pytest.approx(expected)


def test_label_smoothing() -> None:
    loss = fl.CrossEntropy(label_smoothing=0.2)
    expected = -(0.9 * np.log(0.8) + 0.1 * np.log(0.2))
    assert loss(np.log([[0.8, 0.2]]), np.array([0])) == pytest.approx(expected)


def test_binary_cross_entropy() -> None:
    loss = fl.Loss(fl.CrossEntropy(), activation="sigmoid")
    assert loss(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))) == pytest.approx(np.log(2))
    # p = 0.8; smoothing by 0.2 moves the target 1 to 0.9.
    x = np.array([[[np.log(4)]]])
    assert loss(x, np.ones((1, 1, 1))) == pytest.approx(-np.log(0.8))
    assert loss(x, np.zeros((1, 1, 1))) == pytest.approx(-np.log(0.2))
    smooth = fl.Loss(fl.CrossEntropy(label_smoothing=0.2), activation="sigmoid")
    expected = -(0.9 * np.log(0.8) + 0.1 * np.log(0.2))
    assert smooth(x, np.ones((1, 1, 1))) == pytest.approx(expected)


def test_ignored_and_weighted_voxels() -> None:
    x = np.array([[[0.8, 0.1], [0.2, 0.9]]])
    ignoring = probabilities(fl.CrossEntropy(), ignore_index=255)
    assert ignoring(x, np.array([[0, 255]])) == pytest.approx(-np.log(0.8))
    loss = probabilities(fl.CrossEntropy())
    expected = -(3 * np.log(0.8) + np.log(0.9)) / 4
    assert loss(x, np.array([[0, 1]]), np.array([[3.0, 1.0]])) == pytest.approx(expected)


def test_focal() -> None:
    x, y = np.array([[0.8, 0.2]]), np.array([0])
    cross_entropy = -np.log(0.8)
    assert probabilities(fl.Focal())(x, y) == pytest.approx(0.04 * cross_entropy)
    assert probabilities(fl.Focal(gamma=0))(x, y) == pytest.approx(cross_entropy)
    assert probabilities(fl.Focal(gamma=0.5))(x, y) == pytest.approx(0.2**0.5 * cross_entropy)
    assert probabilities(fl.Focal(gamma=1, alpha=[0.25, 0.75]))(x, y) == pytest.approx(
        0.25 * 0.2 * cross_entropy
    )
    assert fl.Focal()(np.log(x), y) == pytest.approx(0.04 * cross_entropy)


def test_sigmoid_focal() -> None:
    x = np.array([[[np.log(4)]]])
    loss = fl.Loss(fl.Focal(gamma=2, alpha=0.25), activation="sigmoid")
    assert loss(x, np.ones((1, 1, 1))) == pytest.approx(-0.25 * 0.04 * np.log(0.8))
    assert loss(x, np.zeros((1, 1, 1))) == pytest.approx(-0.75 * 0.64 * np.log(0.2))
    plain = fl.Loss(fl.Focal(gamma=2), activation="sigmoid")
    assert plain(x, np.zeros((1, 1, 1))) == pytest.approx(-0.64 * np.log(0.2))


@pytest.mark.parametrize("squared", [False, True])
def test_dice_of_masks(squared: bool) -> None:
    loss = probabilities(fl.Dice(squared=squared, **NO_SMOOTHING))
    assert loss(PREDICTED, THERE) == 0.5
    assert loss(THERE, THERE) == 0.0
    assert loss(1 - THERE, THERE) == 1.0
    smooth = probabilities(fl.Dice(squared=squared, smooth_nr=1, smooth_dr=2))
    assert smooth(PREDICTED, THERE) == pytest.approx(1 - 3 / 6)


def test_dice_of_probabilities() -> None:
    half = np.full((1, 1, 4), 0.5)
    assert probabilities(fl.Dice(**NO_SMOOTHING))(half, THERE) == pytest.approx(1 - 2 * 1 / 4)
    squared = probabilities(fl.Dice(squared=True, **NO_SMOOTHING))
    assert squared(half, THERE) == pytest.approx(1 - 2 * 1 / 3)


def test_dice_by_class() -> None:
    loss = probabilities(fl.Dice(reduction="none", **NO_SMOOTHING))
    np.testing.assert_allclose(loss(HALVES, LAST), [[1 - 5 / 6, 1 - 1 / 2]])
    foreground = probabilities(fl.Dice(include_background=False, **NO_SMOOTHING))
    assert foreground(HALVES, LAST) == pytest.approx(0.5)
    weighted = probabilities(fl.Dice(weight=[3, 1], **NO_SMOOTHING))
    assert weighted(HALVES, LAST) == pytest.approx((3 / 6 + 1 / 2) / 2)
    total = probabilities(fl.Dice(reduction="sum", **NO_SMOOTHING))
    assert total(HALVES, LAST) == pytest.approx(1 / 6 + 1 / 2)


def test_batch_dice_is_dice_of_the_samples_as_one_volume() -> None:
    x = np.array([[[1.0, 1, 1, 1]], [[1.0, 0, 0, 0]]])
    y = np.array([[[1.0, 1, 1, 1]], [[0.0, 1, 1, 1]]])
    each = probabilities(fl.Dice(**NO_SMOOTHING))
    together = probabilities(fl.Dice(batch=True, **NO_SMOOTHING))
    assert each(x, y) == pytest.approx((0 + 1) / 2)
    assert together(x, y) == pytest.approx(1 - 2 * 4 / (5 + 7))


def test_jaccard() -> None:
    assert probabilities(fl.Jaccard(**NO_SMOOTHING))(PREDICTED, THERE) == pytest.approx(2 / 3)
    smooth = probabilities(fl.Jaccard(smooth_nr=1, smooth_dr=1))
    assert smooth(PREDICTED, THERE) == pytest.approx(1 - 2 / 4)


@pytest.mark.parametrize("smooth_dr", [0, 1e-5])
def test_matthews_correlation(smooth_dr: float) -> None:
    loss = probabilities(fl.MCC(smooth_dr=smooth_dr, reduction="none"))
    g = np.array([[[1.0, 1, 0, 0]]])
    wanted = {(1, 1, 0, 0): 0, (0, 0, 1, 1): 2, (1, 0, 1, 0): 1, (1, 0, 0, 0): 1 - 2 / 12**0.5}
    for p, value in wanted.items():
        assert loss(np.array([[p]], float), g) == pytest.approx(value, abs=1e-5)
    # Nothing there, or nothing else: right, or of no relation and without a gradient.
    for g, p in ((0.0, 0.25), (1.0, 0.25)):
        there, half = np.full((1, 1, 4), g), np.array([[[p, 0, 1, 0]]])
        value, gradient = loss.value_and_grad(half, there)
        assert value == pytest.approx(1)
        assert not gradient.any()
        assert loss(there, there) == 0
    # A voxel's weight is how often it counts.
    p, g, w = (np.array(a, float) for a in ([[[0.9, 0.2, 0.4]]], [[[1, 0, 1]]], [[3, 1, 2]]))
    often = [np.repeat(a, [3, 1, 2], axis=-1) for a in (p, g)]
    assert loss(p, g, w) == pytest.approx(loss(*often))


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [(0.5, 0.5, 0.5), (1, 1, 2 / 3), (0.3, 0.7, 0.5), (0.2, 0.3, 1 / 3), (0, 0, 0)],
)
def test_tversky(alpha: float, beta: float, expected: float) -> None:
    loss = probabilities(fl.Tversky(alpha=alpha, beta=beta, **NO_SMOOTHING))
    assert loss(PREDICTED, THERE) == pytest.approx(expected)


def test_tversky_weighs_false_positives_by_alpha_and_false_negatives_by_beta() -> None:
    loss = probabilities(fl.Tversky(alpha=0.2, beta=0.8, **NO_SMOOTHING))
    there = np.array([[[1.0, 0, 0, 0]]])
    too_much, too_little = np.array([[[1.0, 1, 1, 0]]]), np.array([[[0.25, 0, 0, 0]]])
    assert loss(too_much, there) == pytest.approx(1 - 1 / 1.4)
    assert loss(too_little, there) == pytest.approx(1 - 0.25 / (0.25 + 0.8 * 0.75))


def test_focal_tversky() -> None:
    loss = probabilities(fl.Tversky(gamma=0.75, **NO_SMOOTHING))
    assert loss(PREDICTED, THERE) == pytest.approx(0.5**0.75)


@pytest.mark.parametrize(
    ("weighting", "expected"), [("square", 5 / 12), ("simple", 1 / 3), ("uniform", 1 / 4)]
)
def test_generalized_dice(weighting: str, expected: float) -> None:
    # Overlaps 2½ and ½; sizes 3 and 1, both predicted and true.
    loss = probabilities(fl.GeneralizedDice(weighting=weighting, **NO_SMOOTHING))
    assert loss(HALVES, LAST) == pytest.approx(expected)


def test_generalized_dice_gives_an_absent_class_the_largest_weight() -> None:
    x = np.array([[[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]])
    loss = probabilities(fl.GeneralizedDice(**NO_SMOOTHING))
    # Class 0 has G = 2 and w = ¼; the others are absent and get ¼ too.
    assert loss(x, np.array([[0, 0]])) == pytest.approx(1 - 2 * 1 / (2 + 2))


@pytest.mark.parametrize("q", [0.05, 0.7, 1.0])
def test_generalized_cross_entropy(backend: str, q: float) -> None:
    p = np.array([[[0.7, 0.2], [0.3, 0.8]]])
    labels = np.array([[0, 0]])
    loss = fl.Loss(fl.GeneralizedCrossEntropy(q=q), activation="none")
    expected = ((1 - 0.7**q) / q + (1 - 0.2**q) / q) / 2
    value, gradient = loss.value_and_grad(p, labels)
    assert value == pytest.approx(expected, rel=1e-12)
    assert np.allclose(gradient, [[[-(0.7 ** (q - 1)) / 2, -(0.2 ** (q - 1)) / 2], [0, 0]]])
