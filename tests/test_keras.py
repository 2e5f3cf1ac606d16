"""Keras' losses: against Keras' own on its three backends, and what Keras lacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import example, need, norm, one_hot, reference, run_python
from tensorflow_support import by_tape, numpy_of, tf

import fastloss as fl

keras = need("keras")
cases = need("keras_cases")
fk = need("fastloss.keras")


def last(array: np.ndarray) -> np.ndarray:
    """With the channels last."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def arrays(activation: str = "softmax") -> Any:
    """Channels-last logits or probabilities, labels, and the same with the channels second."""
    x, y = example(3, 3, (4, 5), seed=3, dtype=np.float32, activation=activation)
    return last(x), y, x


# ---------------------------------------------------------------------- against Keras' own


def test_drawn_options_against_keras() -> None:
    cases.compare(60)


@pytest.mark.parametrize(("backend", "count"), [("torch", 12), ("jax", 8)])
def test_other_backends_against_keras(backend: str, count: int) -> None:
    """In a process of its own, as Keras has one backend in each."""
    need(backend)
    code = f"import keras_cases as c; c.compare({count}, seed=1); c.fits(few=True)"
    code += "; print(c.keras.backend.backend())"
    assert run_python(code, timeout=300, KERAS_BACKEND=backend).split()[-1] == backend


@pytest.mark.filterwarnings("ignore:fastloss computes in TensorFlow's operations")
@pytest.mark.parametrize("jit_compile", ["auto", True])
def test_training_as_with_keras(jit_compile: Any) -> None:
    cases.fits(jit_compile, few=jit_compile is True)


def of_logits(loss: Any, activation: Any, logits: Any, y: Any, _: Any) -> Any:
    return loss(y, activation(logits))


REGIONS = [
    (name, {"axis": axis})
    for name in ("Dice", "Tversky")
    for axis in (None, (1, 2), (1, 2, 3), (0, 1, 2), (0, 2))
]


def test_graphs_and_other_shapes() -> None:
    """One trace of any shape, of probabilities whose logits are found in the graph."""
    for name, options in [("SparseCategoricalCrossentropy", {}), *REGIONS]:
        ours, theirs = (getattr(module, name)(**options) for module in (fk, keras.losses))

        @tf.function(
            autograph=False,
            input_signature=[
                tf.TensorSpec((None, None, None, 3)),
                tf.TensorSpec((None, None, None)),
            ],
        )
        def both(x: Any, y: Any, ours: Any = ours, theirs: Any = theirs, name: str = name) -> Any:
            region = name != "SparseCategoricalCrossentropy"
            y = tf.one_hot(tf.cast(y, tf.int32), 3) if region else y
            found = []
            for activation in (tf.nn.softmax, tf.sigmoid)[: 1 + region]:
                for f in (ours, theirs):
                    found.append(by_tape(partial(of_logits, f, activation), x, y))
            return found

        for spatial in ((4, 5), (2, 3)):
            x, y = example(2, 3, spatial, dtype=np.float32)
            found = both(last(x), y.astype(np.float32))
            for one, other in zip(found[::2], found[1::2], strict=True):
                for a, b in zip(one, other, strict=True):
                    scale = np.abs(b).max()
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * scale, err_msg=name)


def test_masks_count_as_in_keras() -> None:
    x, y, _ = arrays()
    mask = np.random.default_rng(0).integers(0, 2, y.shape).astype(bool)
    weight = np.random.default_rng(1).uniform(0, 2, y.shape).astype(np.float32)
    for reduction in cases.REDUCTIONS:
        for w in (None, weight):
            found = []
            for module in (fk, keras.losses):
                logits = tf.constant(x)
                logits._keras_mask = tf.constant(mask)
                loss = module.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
                found.append(numpy_of(loss(y, logits, w)))
            np.testing.assert_allclose(*found, rtol=2e-6, atol=1e-7)


def test_half_precision_is_read_as_it_is() -> None:
    """The gradient keeps the dtype of the predictions, the value is that of the loss."""
    x, y, first = arrays()
    for dtype in ("float16", "bfloat16"):
        logits = tf.cast(x, dtype)
        value, gradient = by_tape(lambda p, t, w: fk.DiceCE(from_logits=True)(t, p), logits, y)
        assert (value.dtype, gradient.dtype) == (tf.float32, dtype)
        same = np.moveaxis(numpy_of(tf.cast(logits, tf.float64)), -1, 1)
        expected = reference(fl.Dice() + fl.CrossEntropy(), same, y)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        error = norm(numpy_of(tf.cast(gradient, tf.float64)) - last(expected[1]))
        assert error < 8e-3 * norm(expected[1])
    loss = fk.Dice(dtype="float64")
    assert loss(one_hot(y, 3, np.float32), tf.nn.softmax(first, axis=1)).dtype == tf.float64


def test_mixed_precision_training() -> None:
    """A model of float16 with a scaled loss, as with Keras' own."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        losses = []
        for module in (fk, keras.losses):
            optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
            loss = module.SparseCategoricalCrossentropy(from_logits=True)
            losses.append(cases.fit(loss, cases.labels(), None, optimizer=optimizer)[0])
        np.testing.assert_allclose(*losses, rtol=2e-3)
    finally:
        keras.mixed_precision.set_global_policy("float32")


# ---------------------------------------------------------------------- what Keras lacks

NAMED = {
    "DiceCE": (
        {"class_weight": [1.0, 2.0, 0.5], "include_background": False, "ce_weight": 0.5},
        fl.Dice(include_background=False) + 0.5 * fl.CrossEntropy(weight=[1.0, 2.0, 0.5]),
    ),
    "Jaccard": ({"smooth": 0.1}, fl.Jaccard(smooth_nr=0.1, smooth_dr=0.1)),
    "FocalTversky": ({"batch": True}, fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75, batch=True)),
    "GeneralizedDice": ({"weighting": "simple"}, fl.GeneralizedDice(weighting="simple")),
    "Boundary": ({"spacing": (2.0, 1.0)}, fl.Boundary(spacing=(2.0, 1.0))),
}


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.parametrize("from_logits", [True, False])
def test_named_losses(name: str, from_logits: bool) -> None:
    """Of logits and probabilities: the library's values, channels last."""
    options, terms = NAMED[name]
    activation = "softmax" if from_logits else "none"
    x, y, first = arrays(activation)
    loss = getattr(fk, name)(from_logits=from_logits, ignore_class=1, **options)
    expected = reference(fl.Loss(terms, activation=activation, ignore_index=1), first, y)
    value, gradient = by_tape(lambda p, t, w: loss(t, p), x, y[..., None])
    np.testing.assert_allclose(value, expected[0], rtol=2e-6)
    assert norm(numpy_of(gradient) - last(expected[1])) < 2e-6 * norm(expected[1])


def test_weights_of_samples_and_voxels() -> None:
    x, y, first = arrays()
    terms = fl.Dice() + fl.CrossEntropy()
    each = np.array([float(terms(first[i : i + 1], y[i : i + 1])) for i in range(3)])
    weight = np.array([0.5, 2.0, 0.0], np.float32)
    loss = fk.DiceCE(from_logits=True, reduction="none")
    np.testing.assert_allclose(loss(y, x), each, rtol=1e-6)
    np.testing.assert_allclose(loss(y, x, weight), each * weight, rtol=1e-6)
    total = fk.Loss(terms, reduction="sum")(y, x, weight[:, None, None])
    np.testing.assert_allclose(total, (each * weight).sum(), rtol=1e-6)
    mean = fk.Loss(terms)(y, x, weight)
    np.testing.assert_allclose(mean, (each * weight).mean(), rtol=1e-6)
    voxels = np.random.default_rng(0).uniform(0, 2, y.shape).astype(np.float32)
    np.testing.assert_allclose(fk.Loss(terms)(y, x, voxels), terms(first, y, voxels), rtol=1e-6)
    with pytest.raises(ValueError, match="sample_weight: a loss that joins the samples"):
        fk.Jaccard(from_logits=True, batch=True)(y, x, weight)


def test_saved_models_keep_their_loss(tmp_path: Path) -> None:
    terms = fl.Dice(include_background=False) - 0.5 * fl.Focal(gamma=1.5, alpha=[1.0, 2.0, 3.0])
    own = fk.Loss(fl.Loss(terms, ignore_index=255), reduction="sum")
    for loss in (
        own,
        fk.FocalTversky(from_logits=True, gamma=2.0),
        fk.DiceCE(class_weight=[1, 2, 3]),
    ):
        _, model = cases.fit(loss, cases.labels(), "softmax")
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        x = np.random.default_rng(2).normal(size=(2, 4, 4, 4, 1))
        one, other = (m.evaluate(x, cases.labels()[:2], verbose=0) for m in (model, again))
        assert one == other
        assert again.loss.get_config() == loss.get_config()


class _Other(fl.RegionTerm):
    def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
        return overlap, np.ones_like(overlap), np.zeros_like(overlap)


def test_bad_options_are_named() -> None:
    with pytest.raises(TypeError, match="loss: expected a loss or term of fastloss, got 'dice'"):
        fk.Loss("dice")
    with pytest.raises(TypeError, match=r"axis: expected an integer, got 1\.5"):
        fk.DiceCE(axis=1.5)
    with pytest.raises(ValueError, match="gamma: expected a number above 0, got 0"):
        fk.FocalTversky(gamma=0)
    with pytest.raises(ValueError, match="activation: expected one of 'softmax', 'sigmoid'"):
        fk.Jaccard(activation="tanh")
    with pytest.raises(ValueError, match="the term _Other is not one of fastloss"):
        fk.Loss(_Other()).get_config()
    with pytest.raises(ValueError, match=r"y_true: expected the shape of y_pred \(2, 3\)"):
        fk.dice_loss(np.zeros((2, 1)), np.zeros((2, 3)))


def test_plain_functions() -> None:
    p, y, _ = arrays("none")
    g = np.eye(3, dtype=np.float32)[y]
    found = fk.cross_entropy_loss(g, p)
    assert found.shape == y.shape
    np.testing.assert_allclose(found, -np.log((g * p).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(found, keras.losses.categorical_crossentropy(g, p), rtol=1e-5)
    whole = 1 - 2 * (g * p).sum() / ((g**2).sum() + (p**2).sum())
    np.testing.assert_allclose(fk.dice_loss(g, p), whole, rtol=1e-6)
