"""Several losses of the same logits in one graph of TensorFlow's, and targets made by one_hot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import example, norm, reference
from tensorflow_support import by_tape, tf

import fastloss as fl
from fastloss.frameworks.tensorflow import joint


def arrays() -> Any:
    """Channels-last logits, labels and voxel weights."""
    x, y = example(2, 3, (3, 4), dtype=np.float32)
    w = np.random.default_rng(0).uniform(0, 2, y.shape).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)), y.astype(np.int32), w


def test_losses_of_the_same_logits_share_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value and gradient as alone, in one forward and one backward call of the host."""
    calls: list[str] = []
    for name in ("_forward", "_gradient"):
        own = getattr(joint._Passes, name)
        monkeypatch.setattr(
            joint._Passes, name, lambda *a, own=own, name=name: calls.append(name) or own(*a)
        )
    dice = fl.Loss(fl.Dice(reduction="none"), channel_axis=-1)
    entropy = fl.Loss(fl.CrossEntropy(label_smoothing=0.1), channel_axis=-1)
    focal = fl.Loss(fl.Focal(), channel_axis=-1)
    x, y, w = arrays()

    def of_labels(x: Any, y: Any, w: Any) -> Any:
        one_hot = tf.one_hot(tf.cast(tf.cast(y, tf.float32), tf.int32), 3)
        return dice(x, tf.cast(one_hot, tf.float16)), entropy(x, tf.cast(y, tf.float32))

    def of_dense(x: Any, y: Any, w: Any) -> Any:
        dense = 0.5 * tf.one_hot(y, 3) + 0.5 * tf.one_hot(2 - y, 3)
        return tf.reduce_sum(dice(x, dense)), 2 * entropy(x, dense), entropy(x, dense)

    def of_weights(x: Any, y: Any, w: Any) -> Any:
        return entropy(x, y, w), focal(x, tf.cast(y, tf.int64), w)

    def of_others(x: Any, y: Any, w: Any) -> Any:
        return entropy(x, y, w), entropy(x, y), entropy(x, 2 - y)

    def alone(losses: Any, x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = losses(x)
            total = tf.add_n([tf.reduce_sum(own) for own in found])
        return found, tape.gradient(total, x)

    for losses, passes in ((of_labels, 1), (of_dense, 1), (of_weights, 1), (of_others, 3)):
        step = tf.function(lambda x, y, w, f=losses: alone(lambda x: f(x, y, w), x))
        given = [tf.constant(a) for a in (x, y, w)]
        expected = alone(lambda x, f=losses, g=given: f(x, *g[1:]), given[0])  # eager
        calls.clear()
        found = step(*given)
        assert sorted(calls) == ["_forward"] * passes + ["_gradient"] * passes
        for own, other in zip(found[0], expected[0], strict=True):
            assert own.shape == other.shape
            np.testing.assert_allclose(own, other, rtol=1e-6)
        assert norm(found[1] - expected[1]) < 1e-6 * norm(expected[1])


def test_every_tape_has_its_gradient() -> None:
    """Tapes that watch the logits of shared passes, one after the other or one in another."""
    dice, entropy = (fl.Loss(t, channel_axis=-1) for t in (fl.Dice(), fl.CrossEntropy()))
    x, y, _ = arrays()

    @tf.function(autograph=False)
    def step(x: Any, y: Any) -> Any:
        first = by_tape(dice, x, y)[1], by_tape(entropy, x, y)[1]
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(x)
            a = dice(x, y)
            with tf.GradientTape() as inner:
                inner.watch(x)
                b = entropy(x, y)
            inside = inner.gradient(b, x)
            total = a + b
        with tf.GradientTape(persistent=True) as kept:
            kept.watch(x)
            values = dice(x, y), entropy(x, y)
        each = [kept.gradient(value, x) for value in values]
        with tf.GradientTape() as tape:
            tape.watch(x)
            a = dice(x, y)
            b = tf.cond(x[0, 0, 0, 0] < 1e9, lambda: entropy(x, y), lambda: 2 * a)
        return *first, *each, tape.gradient(b, x), inside, outer.gradient(total, x)

    given = tf.constant(x), tf.constant(y)
    graph = tf.function(lambda x, y, w: dice(x, y) + entropy(x, y))
    found = [*step(*given), by_tape(graph, *given)[1]]
    ours = [reference(loss, x, y)[1] for loss in (dice, entropy)]
    expected = [*ours, *ours, ours[1], ours[1], *[ours[0] + ours[1]] * 2]
    for own, other in zip(found, expected, strict=True):
        assert norm(own - other) < 1e-6 * norm(other)


def test_one_hot_of_an_index_that_is_no_class() -> None:
    """All of its numbers are 0, whether the target is read as labels or not."""
    x, y, _ = arrays()
    y[0, 0, 0], y[1, 2, 3] = 255, -1
    dice = fl.Loss(fl.Dice(), channel_axis=-1)
    found = tf.function(lambda x, y: by_tape(dice, x, tf.one_hot(y, 3)))(x, y)
    expected = by_tape(dice, x, tf.one_hot(y, 3))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert norm(found[1] - expected[1]) < 1e-6 * norm(expected[1])
    with pytest.raises(Exception, match="target: "):
        tf.function(lambda x, y: dice(x, tf.one_hot(y, 3)) + dice(x, y))(x, y)
