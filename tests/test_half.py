"""Half precision at the sizes of real volumes: nothing overflows, and little underflows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import example, need, norm, reference, tolerances

import fastloss as fl

EDGE = 256
LOSS = fl.Loss(
    fl.Dice(smooth_nr=0, smooth_dr=0),
    fl.Dice(squared=True, batch=True),
    fl.CrossEntropy(),
    fl.Focal(),
)
SCALE = 65536.0  # the initial scale of a loss scaler for float16


def dtype_named(name: str) -> Any:
    return need("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_volume_of_256_cubed(fast_backend: str, name: str) -> None:
    """A volume that repeats a block has the block's means and Dice, computed in float64."""
    dtype = dtype_named(name)
    block, labels = example(1, 2, (16, 16, 16), dtype=dtype)
    expected, gradient = reference(LOSS, block, labels)
    times = EDGE // 16
    x = np.tile(block, (1, 1, times, times, times))
    y = np.tile(labels.astype(np.uint8), (1, times, times, times))
    value, big = LOSS.value_and_grad(x, y, upstream=SCALE, out=x)
    # The smoothing of the second Dice weighs 4096 times less.
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    part = big[:, :, :16, -16:, 32:48].astype(np.float64)
    fraction = SCALE / times**3
    assert np.isfinite(big[0, 0, 0]).all()
    error = norm(part - fraction * gradient)
    step = tolerances(dtype)[2]
    assert error <= tolerances(dtype)[1] * fraction * norm(gradient) + step * np.sqrt(part.size)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_loss_scale_lifts_small_gradients_over_the_rounding(
    backend: str, name: str, activation: str
) -> None:
    dtype = dtype_named(name)
    loss = fl.Loss(LOSS, activation=activation)
    x, y = example(1, 3, (20_000,), dtype=dtype)
    _, expected = reference(loss, x, y)
    gradient = loss.gradient(x, y, upstream=SCALE).astype(np.float64) / SCALE
    # Relative in norm, without any allowance for subnormal numbers.
    assert norm(gradient - expected) <= tolerances(dtype)[1] * norm(expected)


def test_a_gradient_beyond_the_range_overflows_to_infinity(backend: str) -> None:
    """A loss scaler relies on this to lower its scale."""
    x, y = example(1, 3, (2,), dtype=np.float16)
    gradient = fl.CrossEntropy().gradient(x, y, upstream=1e7)
    assert np.isinf(gradient).any()
    assert not np.isnan(gradient).any()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_value_is_float32_and_rounded_once(backend: str, name: str) -> None:
    x, y = example(2, 3, (5000,), dtype=dtype_named(name))
    value = LOSS(x, y)
    assert value.dtype == np.float32
    assert value == pytest.approx(float(reference(LOSS, x, y)[0]), rel=1e-6)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(backend: str, name: str) -> None:
    """With one voxel and an identity, the gradient is the upstream gradient, rounded."""
    dtype = dtype_named(name)
    loss = fl.Loss(fl.Tversky(alpha=0, beta=0, smooth_nr=0, smooth_dr=1), activation="none")
    # (1 − O / (O + 1)) has the slope −1 / (O + 1)² = −1 at p = 0.
    x, y = np.zeros((1, 1, 1), dtype), np.ones((1, 1, 1), np.float32)
    step = 2.0**-10 if name == "float16" else 2.0**-7
    for steps in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.5, 3.5):
        scale = np.float32(1 + steps * step)
        gradient = loss.gradient(x, y, upstream=-scale)
        assert float(gradient[0, 0, 0]) == float(np.array(scale).astype(dtype))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even_throughout_a_volume(
    backend: str, name: str, classes: int
) -> None:
    """For equal logits the gradient of cross-entropy is the upstream times 1/C or 1/C − 1."""
    dtype = dtype_named(name)
    loss = fl.Loss(fl.CrossEntropy())
    x, y = np.zeros((1, classes, 1024), dtype), np.arange(1024)[None] % classes
    share = np.where(y[:, None] == np.arange(classes)[:, None], 1 / classes - 1, 1 / classes)
    step = 2.0**-10 if name == "float16" else 2.0**-7
    for steps in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.5, 3.5):
        scale = 1 + steps * step
        gradient = loss.gradient(x, y, upstream=1024 * scale)
        expected = (np.float32(scale) * share.astype(np.float32)).astype(dtype)
        assert (gradient == expected).all(), steps


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_one_logit_far_from_0(backend: str, name: str, classes: int) -> None:
    """Wherever it is, and whatever its neighbours: exponentials neither overflow nor get lost."""
    for far in (36.25, -36.25, 100.0, -100.0, 40_000.0):
        dtype = dtype_named(name)
        loss = fl.CrossEntropy(reduction="sum")
        x, y = example(1, classes, (1003,), dtype=dtype)
        for at in (0, 7, 8, 15, 500, 511, 512, 1000, 1002):
            for c in (0, classes - 1):
                moved = x.copy()
                moved[0, c, at] = far
                value, gradient = loss.value_and_grad(moved, y)
                expected, of_reference = reference(loss, moved, y)
                assert float(value) == pytest.approx(float(expected), rel=1e-6)
                error = norm(gradient[..., at].astype(np.float64) - of_reference[..., at])
                assert error <= tolerances(dtype)[1] * max(norm(of_reference[..., at]), 1e-3)
