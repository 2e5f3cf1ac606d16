"""The gradient's options: the upstream gradient, and the output array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import assert_agree, example, finite_differences, need, one_hot, reference

import fastloss as fl

LOSS = fl.Dice() + 0.5 * fl.CrossEntropy()


def test_gradient_is_that_of_value_and_grad(backend: str) -> None:
    x, y = example(2, 4, (300,), dtype=np.float32)
    np.testing.assert_array_equal(LOSS.gradient(x, y), LOSS.value_and_grad(x, y)[1])


@pytest.mark.parametrize(
    ("term", "shape"),
    [
        (fl.CrossEntropy(reduction="none"), (3, 1)),
        (fl.Focal(reduction="none"), (3, 1)),
        (fl.Dice(reduction="none"), (3, 4)),
        (fl.Dice(reduction="none", weight=[1.0, 2, 0, 4]), (3, 4)),
        (fl.Jaccard(reduction="none", include_background=False), (3, 3)),
        (fl.Tversky(reduction="none", batch=True, gamma=0.75), (1, 4)),
        (fl.GeneralizedDice(reduction="none"), (3, 1)),
        (fl.GeneralizedDice(reduction="none", batch=True), (1, 1)),
    ],
)
def test_reduction_none(backend: str, term: fl.Term, shape: tuple[int, ...]) -> None:
    for activation in ("softmax", "sigmoid"):
        loss = fl.Loss(term, activation=activation)
        x, y = example(3, 4, (5,))
        upstream = np.random.default_rng(4).normal(size=shape)
        value, gradient = loss.value_and_grad(x, y, upstream=upstream)
        assert value.shape == shape
        expected = finite_differences(loss, x, y, upstream=upstream)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=2e-8)
        # Without an upstream gradient: that of the sum of all values.
        np.testing.assert_allclose(
            loss.gradient(x, y), loss.gradient(x, y, upstream=np.ones(shape)), rtol=1e-15
        )


@pytest.mark.parametrize("name", ["CrossEntropy", "Focal", "Dice", "Jaccard", "Tversky"])
def test_reductions_are_those_of_the_values_per_sample_and_class(backend: str, name: str) -> None:
    term = getattr(fl, name)
    x, y = example(3, 4, (50,))
    each = term(reduction="none")(x, y)
    assert term()(x, y) == pytest.approx(each.mean(), rel=1e-12)
    # The sum of a voxel-wise loss runs over voxels.
    voxels = 50 if each.shape == (3, 1) else 1
    assert term(reduction="sum")(x, y) == pytest.approx(voxels * each.sum(), rel=1e-12)


def test_terms_of_different_shapes_broadcast(backend: str) -> None:
    parts = fl.CrossEntropy(reduction="none"), fl.Dice(reduction="none"), fl.Dice(batch=True)
    loss = fl.Loss(*parts) + 2 * fl.Tversky(reduction="none", batch=True)
    x, y = example(3, 4, (5,))
    upstream = np.random.default_rng(4).normal(size=(3, 4))
    value, gradient = loss.value_and_grad(x, y, upstream=upstream)
    assert value.shape == (3, 4)
    expected = finite_differences(loss, x, y, upstream=upstream)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("upstream", [0.0, -1.0, 1e-3, 65536.0, np.float32(2.5), np.array(3)])
def test_upstream_multiplies_the_gradient_not_the_value(backend: str, upstream: Any) -> None:
    x, y = example(2, 4, (300,), dtype=np.float32)
    value, gradient = LOSS.value_and_grad(x, y)
    value_again, scaled = LOSS.value_and_grad(x, y, upstream=upstream)
    assert value_again == value
    np.testing.assert_allclose(
        scaled, float(upstream) * gradient, rtol=1e-5, atol=1e-6 * abs(float(upstream)) / 300
    )


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_in_place(backend: str, classes: int) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        for dtype in ("float16", "float32", "float64"):
            loss = fl.Loss(LOSS, activation=activation)
            x, y = example(2, classes, (5, 130), dtype=dtype, activation=activation)
            value, gradient = loss.value_and_grad(x, y)
            value_again, out = loss.value_and_grad(x, y, out=x)
            assert out is x
            assert value_again == value
            np.testing.assert_array_equal(x, gradient)


def test_in_place_through_another_view_of_the_logits(backend: str) -> None:
    x, y = example(2, 3, (300,), dtype=np.float32)
    expected = LOSS.gradient(x, y)
    same = x[...]
    assert LOSS.gradient(x, y, out=same) is same
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("order", ["C", "F", "channels last"])
def test_out_in_any_strides(backend: str, order: str) -> None:
    def arranged(array: np.ndarray, order: str) -> np.ndarray:
        if order == "channels last":
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
        if order == "stepped":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        if order == "reversed":
            return array[..., ::-1].copy()[..., ::-1]
        return array.copy(order=order)

    x, y = example(2, 3, (9, 31), dtype=np.float32)
    expected = LOSS.gradient(x, y)
    for out_order in ("C", "F", "channels last", "stepped", "reversed"):
        out = arranged(np.full_like(x, np.nan), out_order)
        strides = out.strides
        assert LOSS.gradient(arranged(x, order), y, out=out) is out
        assert out.strides == strides
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-9)


def test_out_is_written_and_nothing_around_it(backend: str) -> None:
    x, y = example(2, 3, (7, 45), dtype=np.float32)
    frame = np.full((4, 5, 9, 50), 9.0, np.float32)
    inside = frame[1:3, 1:4, 1:8, 2:47]
    LOSS.gradient(x, y, out=inside)
    np.testing.assert_array_equal(inside, LOSS.gradient(x, y))
    inside[...] = 9
    assert (frame == 9).all()


def test_out_may_be_reused(backend: str) -> None:
    out = np.empty((2, 3, 300), np.float32)
    for seed in range(3):
        x, y = example(2, 3, (300,), seed=seed, dtype=np.float32)
        value, gradient = LOSS.value_and_grad(x, y, out=out)
        assert gradient is out
        assert_agree(value, gradient, reference(LOSS, x, y))


def test_gradient_has_the_layout_of_the_logits(backend: str) -> None:
    x, y = example(2, 3, (4, 5, 6), dtype=np.float32)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    assert LOSS.gradient(last, y).strides == last.strides
    assert LOSS.gradient(x, y).strides == x.strides


def test_out_with_a_channel_axis(backend: str) -> None:
    loss = fl.Loss(LOSS, channel_axis=-1)
    x, y = example(2, 3, (4, 50), dtype=np.float32)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    out = np.empty_like(last)
    assert loss.gradient(last, y, out=out) is out
    expected = reference(LOSS, x, y)
    assert_agree(loss(last, y), np.moveaxis(out, -1, 1), expected)


def test_bfloat16_out(backend: str) -> None:
    bfloat16 = need("ml_dtypes").bfloat16
    x, y = example(2, 3, (300,), dtype=bfloat16)
    out = np.empty_like(x)
    value, gradient = LOSS.value_and_grad(x, y, out=out)
    assert gradient is out
    assert out.dtype == bfloat16
    assert_agree(value, out, reference(LOSS, x, y))


def test_soft_target_is_not_differentiated_or_changed(backend: str) -> None:
    x, y = example(2, 3, (30,), dtype=np.float32)
    g = one_hot(y, 3, np.float32)
    g.flags.writeable = x.flags.writeable = False
    LOSS.value_and_grad(x, g)
