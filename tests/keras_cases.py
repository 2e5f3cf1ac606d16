"""Keras' own classes as an oracle, on the backend that KERAS_BACKEND names: `compare`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
import keras

import fastloss.keras as fk

REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none")


def gradient(function: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value, and the gradient of its sum."""
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        logits = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = function(logits)
            total = tf.reduce_sum(value)
        return value.numpy(), tape.gradient(total, logits).numpy()
    if name == "torch":
        import torch

        logits = torch.tensor(x, requires_grad=True)
        value = function(logits)
        value.sum().backward()
        return value.detach().numpy(), logits.grad.numpy()
    import jax

    @jax.jit  # which compiles once, rather than each operation
    def both(x: Any) -> Any:
        value, pullback = jax.vjp(function, x)
        return value, pullback(jax.numpy.ones_like(value))[0]

    found = both(x)
    return np.asarray(found[0]), np.asarray(found[1])


def drawn(rng: np.random.Generator) -> tuple[str, dict[str, Any], Any, Any, Any]:
    """A class, its options, y_true, y_pred and sample weights."""
    name = str(rng.choice([
        "CategoricalCrossentropy", "SparseCategoricalCrossentropy", "BinaryCrossentropy",
        "BinaryFocalCrossentropy", "CategoricalFocalCrossentropy", "Dice", "Tversky",
    ]))  # fmt: skip
    batch, classes = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    spatial = tuple(rng.integers(1, 5, rng.integers(1, 4)))
    shape = (batch, *spatial, classes)
    region = name in ("Dice", "Tversky")
    from_logits = not region and bool(rng.integers(2))
    x = rng.normal(size=shape)
    if not from_logits:
        x = np.exp(x) / np.exp(x).sum(-1, keepdims=True) * rng.uniform(0.9, 1, (*shape[:-1], 1))
    labels = rng.integers(0, classes, shape[:-1])
    one_hot = np.eye(classes, dtype=np.float32)[labels]
    soft = rng.dirichlet([1.0] * classes, shape[:-1]).astype(np.float32)
    y: Any = soft if rng.integers(2) else one_hot
    options: dict[str, Any] = {"reduction": str(rng.choice(REDUCTIONS))}
    weight: Any = None
    if not region:
        options["from_logits"] = from_logits
        shapes = [shape[:-1], (batch, *[1] * len(spatial)), (*shape[:-1], 1)]
        if rng.integers(2):
            weight = rng.uniform(0, 2, shapes[rng.integers(3)]).astype(np.float32)
    if name == "SparseCategoricalCrossentropy":
        y = labels[..., None] if rng.integers(2) else labels
        options["ignore_class"] = [None, 1, 255][rng.integers(3)]
        if options["ignore_class"] is not None and weight is not None:
            # Keras on PyTorch does not broadcast other weights to its mask.
            weight = rng.uniform(0, 2, shape[:-1]).astype(np.float32)
        if options["ignore_class"] == 255:
            y = np.where(rng.integers(0, 3, y.shape) == 0, 255, y)
    elif name == "BinaryFocalCrossentropy":
        y = rng.integers(0, 2, shape)
        options |= {"gamma": 1.5, "apply_class_balancing": bool(rng.integers(2))}
        if rng.integers(2):
            y = y.astype(np.float32)  # which Keras itself computes
    elif region:
        rank = len(shape)
        axes = [None, tuple(range(1, rank)), tuple(range(1, rank - 1)), tuple(range(rank - 1))]
        axes += [(0, *range(2, rank)), tuple(range(2, rank)), 1, (0, 1)]
        options["axis"] = axes[rng.integers(len(axes))]
        if name == "Tversky":
            options |= {"alpha": 0.3, "beta": 0.8}
    else:
        options["label_smoothing"] = [0.0, 0.1][rng.integers(2)]
        if name == "CategoricalFocalCrossentropy":
            alpha = [0.25, rng.uniform(0, 1, classes).tolist()][rng.integers(2)]
            options |= {"gamma": [2.0, 0.5, 3.0][rng.integers(3)], "alpha": alpha}
    return name, options, y, x.astype(np.float32), weight


def compare(count: int, seed: int = 0) -> None:
    """Values, gradients, shapes and dtypes of drawn options and arrays; and configurations."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        name, options, y, x, w = drawn(rng)
        ours, theirs = (getattr(module, name)(**options) for module in (fk, keras.losses))
        shown = f"{name} {options} {x.shape} {None if w is None else w.shape}"
        expected = gradient(lambda p, f=theirs, y=y, w=w: f(y, p, w), x)
        found = gradient(lambda p, f=ours, y=y, w=w: f(y, p, w), x)
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), shown
            scale = max(np.abs(other).max(initial=0), 1e-6)
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=4e-6 * scale, err_msg=shown)
        again = keras.losses.deserialize(keras.losses.serialize(ours))
        assert type(again) is type(ours)
        assert again.get_config() == ours.get_config()


def fit(loss: Any, y: Any, activation: str | None, **options: Any) -> Any:
    """The losses of two epochs of a small model, and the model."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 4, 1)).astype("float32")
    model = keras.Sequential(
        [
            keras.layers.Input((4, 4, 4, 1)),
            keras.layers.Conv3D(4, 3, padding="same", activation="relu"),
            keras.layers.Conv3D(3, 1, activation=activation, dtype="float32"),
        ]
    )
    optimizer = options.pop("optimizer", "sgd")
    model.compile(optimizer, loss=loss, **options)
    history = model.fit(x, y, batch_size=2, epochs=2, verbose=0, shuffle=False)
    return history.history["loss"], model


def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 3, (5, 4, 4, 4)).astype("uint8")


def both(module: Any) -> Any:
    """A function that adds two losses of one prediction."""
    dice, entropy = module.Dice(axis=(1, 2, 3)), module.SparseCategoricalCrossentropy()

    def loss(y: Any, p: Any) -> Any:
        return dice(keras.ops.one_hot(keras.ops.cast(y, "int32"), 3), p) + entropy(y, p)

    return loss


def fits(jit_compile: Any = "auto", few: bool = False) -> None:
    """Training runs as with Keras' losses, the last batch being smaller; ``few``: of one loss."""
    y = labels()
    one_hot = np.eye(3, dtype=np.float32)[y]
    for make, target in (
        (lambda module: module.SparseCategoricalCrossentropy(), y),
        (lambda module: module.Dice(axis=(1, 2, 3)), one_hot),
        (both, y),
    ):
        losses = [
            fit(make(module), target, "softmax", jit_compile=jit_compile)[0]
            for module in (fk, keras.losses)
        ]
        np.testing.assert_allclose(*losses, rtol=2e-6)
        if few:
            return
    found = fit(fk.DiceCE(from_logits=True), y, None, jit_compile=jit_compile)[0]
    assert found[1] < found[0]
