"""Losses of TensorFlow's tensors: tapes, graphs, and XLA."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_agree, example, need, norm, one_hot, reference
from tensorflow_support import by_tape, numpy_of, tf

import fastloss as fl
from fastloss.frameworks.tensorflow import operations, xla

SMOOTHED, GENERALIZED = fl.CrossEntropy(label_smoothing=0.1), fl.GeneralizedCrossEntropy()
LOSSES = {
    "dice_ce": fl.Dice(include_background=False) + 0.5 * fl.CrossEntropy(weight=[1.0, 2.0, 0.5]),
    "focal_tversky": fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75, batch=True) - fl.Focal(gamma=1.5),
    "generalized": fl.GeneralizedDice() + fl.Jaccard(squared=True) + SMOOTHED,
    "voxelwise": fl.Brier() + fl.MeanAbsoluteError() + fl.PolyCrossEntropy() + GENERALIZED,
    "of_samples": fl.Dice(reduction="none") + fl.CrossEntropy(reduction="none"),
    "of_voxels": fl.CrossEntropy(reduction="voxel") + fl.Focal(reduction="voxel"),
}  # fmt: skip


def last(array: np.ndarray) -> np.ndarray:
    """With the channels last."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def arrays(activation: str, dense: bool, seed: int = 0, spatial: Any = (3, 4)) -> Any:
    """Channels-last logits of float32, a target and voxel weights, some of them 0."""
    x, y = example(2, 3, spatial, seed=seed, dtype=np.float32, activation=activation)
    w = np.random.default_rng(seed).uniform(0, 2, y.shape).astype(np.float32)
    w[0, 0] = 0
    return last(x), last(one_hot(y, 3, np.float32)) if dense else y, w


def agree(found: Any, expected: tuple[Any, np.ndarray]) -> None:
    value, gradient = found
    assert_agree(numpy_of(value), numpy_of(gradient), expected, scale=norm(expected[1]))


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    activation=st.sampled_from(["softmax", "sigmoid", "none"]),
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    backend=st.sampled_from(["cpu", "reference"]),
    in_graph=st.booleans(),
    dense=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tape_against_the_reference(
    name: str,
    activation: str,
    dtype: str,
    backend: str,
    in_graph: bool,
    dense: bool,
    weighted: bool,
    seed: int,
) -> None:
    loss = fl.Loss(LOSSES[name], activation=activation, channel_axis=-1)
    x, y, w = arrays(activation, dense, seed)
    x = tf.cast(x, dtype)
    weight = w if weighted else None
    shape = np.shape(reference(loss, x, y, weight)[0])
    upstream = np.random.default_rng(seed).uniform(0.5, 2, shape)
    expected = reference(loss, numpy_of(x), y, weight, upstream=upstream)
    with fl.use_backend(backend):
        call = tf.function(by_tape, autograph=False) if in_graph else by_tape
        value, gradient = call(loss, x, y, weight, upstream)
    assert value.dtype == (tf.float64 if dtype == "float64" else tf.float32)
    assert gradient.dtype == dtype
    agree((value, gradient), expected)


def test_numbers_in_place_and_results_of_the_framework() -> None:
    """Tensors are read where they lie, and value_and_grad returns tensors."""
    x, y, _ = arrays("softmax", False)
    loss = fl.Loss(LOSSES["dice_ce"], channel_axis=-1)
    logits = tf.constant(x)
    value, gradient = loss.value_and_grad(logits, tf.constant(y))
    assert tf.is_tensor(value)
    assert tf.is_tensor(gradient)
    agree((value, gradient), reference(loss, x, y))
    with pytest.raises(ValueError, match="out: expected a writable array, got an immutable"):
        loss.value_and_grad(logits, y, out=logits)
    agree(by_tape(loss, tf.Variable(x), tf.Variable(y)), reference(loss, x, y))


def test_a_graph_takes_other_shapes_and_keeps_static_ones() -> None:
    loss = fl.Loss(LOSSES["dice_ce"], channel_axis=-1)
    traces = []

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, None, 3)), tf.TensorSpec((None, None, None), tf.int64)
        ]
    )  # fmt: skip
    def step(x: Any, y: Any) -> Any:
        traces.append(1)
        return by_tape(loss, x, y)

    for spatial in ((3, 4), (6, 2)):
        x, y, _ = arrays("softmax", False, spatial=spatial)
        agree(step(x, y), reference(loss, x, y))
    assert len(traces) == 1
    shapes = step.get_concrete_function().output_shapes
    assert [tuple(s) for s in shapes] == [(), (None, None, None, 3)]
    for name, expected in (("of_samples", (2, 3)), ("of_voxels", (2, 3, 4))):
        other = fl.Loss(LOSSES[name], channel_axis=-1)
        x, y, _ = arrays("softmax", False)
        found = tf.function(other).get_concrete_function(tf.constant(x), tf.constant(y))
        assert tuple(found.output_shapes) == expected


def test_fields_and_regions() -> None:
    """Fields that are given or made, and regions, in eager code and in a graph."""
    loss = fl.Loss(fl.Dice() + 0.1 * fl.Boundary() + fl.HausdorffDT(), channel_axis=-1)
    x, y, w = arrays("softmax", False, spatial=(4, 5))
    regions = np.zeros(y.shape, np.int32)
    regions[:, 2:] = 1
    fields = loss.fields(y, classes=3)
    for call in (by_tape, tf.function(by_tape)):
        agree(call(loss, x, y, w), reference(loss, x, y, w))
        given_ones = {name: tf.constant(field) for name, field in fields.items()}
        agree(call(loss, x, y, fields=given_ones), reference(loss, x, y))
        expected = reference(loss, x, y, w, regions=regions)
        agree(call(loss, x, y, w, regions=tf.constant(regions)), expected)
    with pytest.raises(ValueError, match=r"the terms of this loss read .*, got 'other'"):
        tf.function(loss)(tf.constant(x), y, fields={"other": w})


# ---------------------------------------------------------------------- XLA


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    activation=st.sampled_from(["softmax", "sigmoid", "none"]),
    dense=st.booleans(),
    weighted=st.booleans(),
    ignore=st.sampled_from([None, 2, 255]),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_operations_give_the_same(
    name: str,
    activation: str,
    dense: bool,
    weighted: bool,
    ignore: int | None,
    known: bool,
    seed: int,
) -> None:
    """Of a known batch and of one that is not, without XLA, which takes long."""
    loss = fl.Loss(LOSSES[name], activation=activation, channel_axis=-1, ignore_index=ignore)
    x, y, w = arrays(activation, dense, seed)
    weight = w if weighted else None
    upstream = np.random.default_rng(seed).uniform(
        0.5, 2, np.shape(reference(loss, x, y, weight)[0])
    )
    expected = reference(loss, x, y, weight, upstream=upstream)

    def step(x: Any, y: Any, w: Any) -> Any:
        return by_tape(loss, x, y, w if weighted else None, upstream)

    specs = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in map(tf.constant, (x, y, w))]
    how = {} if known else {"input_signature": specs}
    with (
        mock.patch.object(operations, "has_devices", return_value=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        agree(tf.function(step, autograph=False, **how)(x, y, w), expected)


def need_calls() -> None:
    """Skip where TensorFlow's XLA calls no functions of the host."""
    if not xla.is_there():
        pytest.skip("tensorflow: the XLA of this version cannot call")


COMPILED = {
    **LOSSES,
    "ranking": fl.TopKCrossEntropy(k=30) + fl.Dice(),
    "counting": fl.LovaszSoftmax() + fl.CrossEntropy(),
    "fields": fl.Dice() + 0.1 * fl.Boundary(),
    "fields of predictions": fl.HausdorffDT(),
}


def test_xla_calls_the_kernels() -> None:
    """Values and gradients, of other shapes than were traced, without a warning."""
    need_calls()
    for i, terms in enumerate(COMPILED.values()):
        dense = i % 3 == 2
        loss = fl.Loss(terms, channel_axis=-1, ignore_index=None if dense else 2)
        given = arrays("softmax", dense)
        specs = [tf.TensorSpec((None, 3, None, *a.shape[3:]), a.dtype) for a in given]
        specs.append(tf.TensorSpec(None, tf.float64))
        call = partial(by_tape, loss)
        step = tf.function(call, jit_compile=True, autograph=False, input_signature=specs)
        for spatial in ((3, 4), (3, 2)):
            given = arrays("softmax", dense, spatial=spatial)
            size = np.shape(reference(loss, *given)[0])
            upstream = np.arange(1.0, 1.0 + np.prod(size)).reshape(size)
            agree(step(*given, upstream), reference(loss, *given, upstream=upstream))


def test_xla_calls_with_other_arrays() -> None:
    """Half precision, labels of few bits, fields and regions that are given, sigmoids."""
    need_calls()
    compiled = tf.function(by_tape, jit_compile=True, autograph=False)
    x, y, w = arrays("softmax", False)
    loss = fl.Loss(LOSSES["dice_ce"], channel_axis=-1)
    for dtype in ("bfloat16", "float16", "float64"):
        logits = tf.cast(x, dtype)
        value, gradient = compiled(loss, logits, y.astype(np.uint8))
        assert gradient.dtype == dtype
        expected = reference(loss, numpy_of(tf.cast(logits, tf.float64)), y)
        np.testing.assert_allclose(value, expected[0], rtol=2e-6)
        error = norm(numpy_of(tf.cast(gradient, tf.float64)) - expected[1])
        assert error < 8e-3 * norm(expected[1])
    loss = fl.Loss(fl.Dice() + fl.Boundary(), channel_axis=-1, activation="sigmoid")
    field = loss.fields(y, classes=3)["boundary"]
    found = compiled(loss, x, y, w, fields={"boundary": field})
    agree(found, reference(loss, x, y, w, fields={"boundary": field}))
    regions = (y > 0).astype(np.int32)
    found = compiled(loss, x, y, w, regions=regions, region_count=2)
    agree(found, reference(loss, x, y, w, regions=regions))


def test_xla_names_what_is_wrong() -> None:
    need_calls()
    x, y, _ = arrays("softmax", False)
    compiled = tf.function(by_tape, jit_compile=True, autograph=False)
    loss = fl.Loss(fl.Dice(), channel_axis=-1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="target: expected labels in"):
        compiled(loss, x, y + 7)
    with pytest.raises(ValueError, match="region_count: expected how many regions"):
        compiled(loss, x, y, regions=y)


@pytest.mark.filterwarnings("ignore:fastloss computes in TensorFlow's operations")
def test_xla_of_operations_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, of another batch size than it was compiled for; fields."""
    monkeypatch.setattr(xla, "is_there", lambda: False)
    loss = fl.Loss(
        LOSSES["dice_ce"] + LOSSES["focal_tversky"] + fl.Boundary(), channel_axis=-1, ignore_index=2
    )
    x, y, w = arrays("softmax", False)
    specs = [tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in map(tf.constant, (x, y, w))]
    specs.append(tf.TensorSpec((None, 3, 4, 3)))

    @tf.function(jit_compile=True, autograph=False, input_signature=specs)
    def step(x: Any, y: Any, w: Any, field: Any) -> Any:
        return by_tape(loss, x, y, w, fields={"boundary": field})

    for batch in (2, 1):
        x, y, w = x[:batch], y[:batch], w[:batch]
        field = loss.fields(y, classes=3)["boundary"]
        agree(step(x, y, w, field), reference(loss, x, y, w))


def test_operations_warn_once_and_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "is_there", lambda: False)
    monkeypatch.setattr(operations, "_warned", False)
    x, y, _ = arrays("softmax", False)
    x, y = tf.constant(x), tf.constant(y)

    def compiled(term: Any, y: Any = y, **extras: Any) -> Any:
        loss = fl.Loss(term, channel_axis=-1)
        return tf.function(lambda: loss(x, y, **extras), jit_compile=True, autograph=False)()

    with pytest.warns(UserWarning, match="under jit_compile=True") as caught:
        assert np.isnan(numpy_of(compiled(fl.Dice(), y + 7)))
    assert sum("fastloss" in str(w.message) for w in caught) == 1
    with pytest.raises(ValueError, match="TopKCrossEntropy is not computed under jit_compile"):
        compiled(fl.TopKCrossEntropy())
    with pytest.raises(ValueError, match="HausdorffDT is not computed under jit_compile"):
        compiled(fl.HausdorffDT())
    with pytest.raises(ValueError, match=r"pass fields=, which Loss\.fields makes"):
        compiled(fl.Boundary())
    with pytest.raises(ValueError, match="regions: not computed under jit_compile"):
        compiled(fl.Dice(), regions=y)


# ---------------------------------------------------------------------- precision and errors


def test_a_loss_scale_does_not_underflow() -> None:
    """Small gradients of float16 logits are scaled before they are rounded."""
    loss = fl.Loss(fl.Dice() + fl.CrossEntropy(), channel_axis=-1)
    x, y, _ = arrays("softmax", False, spatial=(40, 40, 40))
    x = tf.cast(x, tf.float16)
    scale = 2.0**15
    expected = reference(loss, numpy_of(x), y)[1]
    for call in (by_tape, tf.function(by_tape)):
        _, gradient = call(loss, x, y, upstream=scale)
        unscaled = numpy_of(gradient).astype(np.float64) / scale
        assert norm(unscaled - expected) <= 1e-3 * norm(expected)
        assert not (numpy_of(by_tape(loss, x, y)[1]) == expected).all()


def test_bad_input_is_named() -> None:
    loss = fl.Loss(fl.Dice(), channel_axis=-1)
    x, y, _ = arrays("softmax", False)
    with pytest.raises(ValueError, match="target: expected labels in"):
        loss(tf.constant(x), y + 7)
    with pytest.raises(tf.errors.InvalidArgumentError, match="target: expected labels in"):
        tf.function(loss)(tf.constant(x), tf.constant(y + 7))
    with pytest.raises(ValueError, match="target: for logits"):
        tf.function(loss)(tf.constant(x), tf.constant(y[:1]))
    with pytest.raises(TypeError, match="logits: expected float16"):
        loss(tf.constant(x > 0), y)
    with pytest.raises(TypeError, match="logits: expected a dense tensor"):
        loss(tf.ragged.constant([[1.0], [1.0, 2.0]]), y)
    with pytest.raises(TypeError, match="target: unsupported dtype string"):
        loss(tf.constant(x), tf.constant(["a"]))
    unknown = tf.function(loss, input_signature=[tf.TensorSpec(None), tf.TensorSpec(y.shape)])
    with pytest.raises(ValueError, match="logits: expected a known rank"):
        unknown(x, y.astype(np.float32))


def test_second_derivatives_are_refused() -> None:
    loss = fl.Loss(fl.Dice(), channel_axis=-1)
    x, y, _ = arrays("softmax", False)
    logits = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(logits)
        gradient = by_tape(loss, logits, y)[1]
    with pytest.raises(RuntimeError, match="second derivatives are not computed"):
        outer.gradient(gradient, logits)


def test_gradients_flow_to_the_logits_alone() -> None:
    loss = fl.Loss(fl.Dice(), channel_axis=-1)
    x, y, _ = arrays("softmax", True)

    def both(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, y])
            value = loss(x, y)
        return tape.gradient(value, [x, y])

    for call in (both, tf.function(both)):
        by_logits, by_target = call(tf.constant(x), tf.constant(y))
        assert by_logits is not None
        assert by_target is None


# ---------------------------------------------------------------------- processes


def test_beside_pytorch() -> None:
    """Both frameworks in one process, each with its threads."""
    torch = need("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 24, 24, 24)).astype("float32")
    y = rng.integers(0, 3, (2, 24, 24, 24))
    loss = fl.Dice() + fl.CrossEntropy()
    with fl.use_backend("cpu"):
        value, gradient = loss.value_and_grad(x, y)
        for _ in range(3):
            for make in (tf.constant, torch.tensor):
                found = loss.value_and_grad(make(x), make(y))
                assert float(found[0]) == float(value)
                assert (np.asarray(found[1]) == gradient).all()
            assert (
                float(tf.reduce_sum(tf.linalg.matmul(tf.ones((99, 99)), tf.ones((99, 99)))))
                == 99**3
            )
            assert float((torch.ones(99, 99) @ torch.ones(99, 99)).sum()) == 99**3


def test_no_warning_in_a_graph() -> None:
    loss = fl.Loss(fl.Dice(), channel_axis=-1)
    x, y, _ = arrays("softmax", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tf.function(loss)(tf.constant(x), tf.constant(y))
