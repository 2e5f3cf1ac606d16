"""`fastloss.optax` has the values and gradients of optax, over random options and shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need, norm

jax = need("jax")
jnp = need("jax.numpy")
theirs = need("optax.losses")
if not hasattr(theirs, "dice_loss"):
    pytest.skip("optax: this version has no segmentation losses", allow_module_level=True)
ours = need("fastloss.optax")


def arrays(shape: tuple[int, ...], seed: int) -> tuple[Any, Any, Any]:
    """Logits, labels and their one-hot form."""
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, max(shape[-1], 2), shape[:-1]))
    hot = jax.nn.one_hot(labels, shape[-1]) if shape[-1] > 1 else labels[..., None] * 1.0
    return jnp.asarray(rng.normal(size=shape), jnp.float32), labels, hot


def assert_same(name: str, x: Any, *rest: Any, mine: Any = None, **options: Any) -> None:
    their_own, own = getattr(theirs, name), getattr(ours, name)

    @partial(jax.jit, static_argnums=0)  # one program, rather than one of every operation
    def both(function: Any, x: Any, *rest: Any) -> Any:
        def of(x: Any) -> Any:
            value = function(x, *rest, **options)
            return (value * (1 + jnp.arange(value.size).reshape(value.shape))).sum(), value

        (_, value), gradient = jax.value_and_grad(of, has_aux=True)(x)
        return value, gradient

    value, gradient = both(their_own, x, *rest)
    found, slope = both(own, x, *(rest if mine is None else mine))
    assert found.shape == value.shape
    np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-6)
    assert norm(slope - gradient) <= 1e-5 * norm(gradient) + 1e-7


@settings(max_examples=5)
@given(
    shape=st.sampled_from([[3], [2, 4, 3], [1, 3, 2, 2]]),
    classes=st.sampled_from([1, 3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    numbers=st.tuples(st.floats(0.1, 2), st.floats(0.1, 1), st.floats(0.1, 1)),
    weighted=st.booleans(),
    ignored=st.booleans(),
    axes=st.sets(st.integers(0, 3), max_size=3) | st.none(),
    seed=st.integers(0, 99),
)
def test_dice(
    shape: list[int], classes: int, reduction: str, numbers: tuple[float, float, float],
    weighted: bool, ignored: bool, axes: set[int] | None, seed: int,
) -> None:  # fmt: skip
    x, labels, hot = arrays((*shape, classes), seed)
    options: dict[str, Any] = dict(zip(("smooth", "alpha", "beta"), numbers, strict=True))
    options |= {"reduction": reduction, "ignore_background": ignored}
    if weighted:
        options["class_weights"] = jnp.arange(1.0, classes + 1)
    if axes is not None:
        options["axis"] = tuple(a for a in axes if a < len(shape))
    assert_same("dice_loss", x, hot, mine=(labels,) if seed % 2 else None, **options)
    options = {"smooth": numbers[0]}
    if classes == 1:
        assert_same("binary_dice_loss", x, hot, **options)
    else:
        options["ignore_background"] = ignored
        assert_same("multiclass_generalized_dice_loss", x, hot, **options)


def test_masks_and_probabilities() -> None:
    x, labels, hot = arrays((2, 4, 5, 3), 0)
    assert_same("binary_dice_loss", x[..., 0], (labels == 1) * 1.0)
    assert_same("dice_loss", x[..., 0], (labels == 1)[..., None] * 1.0)
    p = jax.nn.softmax(x)
    expected = theirs.dice_loss(p, hot, apply_softmax=False)
    for call in (lambda f: f, jax.jit):  # where optax raises
        found = call(lambda p: ours.dice_loss(p, hot, apply_softmax=False))(p)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    expected = theirs.binary_dice_loss(x[..., 0], (labels == 1) * 1.0)
    found = ours.binary_dice_loss(jax.nn.sigmoid(x[..., 0]), labels == 1, apply_sigmoid=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    by_weights = jax.grad(lambda w: ours.dice_loss(x, hot, class_weights=w).sum())(jnp.ones(3))
    wanted = jax.grad(lambda w: theirs.dice_loss(x, hot, class_weights=w).sum())(jnp.ones(3))
    np.testing.assert_allclose(by_weights, wanted, rtol=1e-5)


def test_bad_options() -> None:
    x, labels, hot = arrays((2, 4, 5, 3), 0)
    wrong = {
        "targets: for predictions": {"targets": hot[:, 1:]},
        "targets: expected integers in a label map": {"targets": labels * 1.0},
        "reduction: expected one of": {"reduction": "voxel"},
        "axis: expected axes": {"axis": -1},
        "class_weights: expected shape": {"class_weights": jnp.ones(2)},
        "smooth: ": {"smooth": -1.0},
    }
    for message, options in wrong.items():
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            ours.dice_loss(x, **{"targets": hot, **options})
    with pytest.raises(TypeError, match=r"^alpha: .*traced"):
        jax.jit(lambda a: ours.dice_loss(x, hot, alpha=a))(0.5)
