"""What `frameworks.py` times in TensorFlow and in Keras (on its TensorFlow backend)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

import fastloss as fl

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
Call = Callable[[], object]


def tensorflow(logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Call], dict[str, str]]:
    """Forward and gradient by the logits, channels last; Keras' losses read a one-hot target."""
    import keras
    import tensorflow as tf

    classes = logits.shape[1]
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), channel_axis=-1)
    x = tf.constant(np.ascontiguousarray(np.moveaxis(logits, 1, -1)))
    y = tf.constant(labels)
    one_hot = tf.one_hot(y, classes)
    dice = keras.losses.Dice(axis=(1, 2, 3))
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True)

    def ours(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x, y)
        return value, tape.gradient(value, x)

    def theirs(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = dice(one_hot, tf.nn.softmax(x)) + entropy(one_hot, x)
        return value, tape.gradient(value, x)

    def calls(function: Any) -> tuple[Call, Call, Call]:
        graph, compiled = tf.function(function), tf.function(function, jit_compile=True)
        return (lambda: function(x)), (lambda: graph(x)), (lambda: compiled(x))

    eager, graph, compiled = calls(ours)
    keras_eager, keras_graph, keras_compiled = calls(theirs)
    found = {
        "fastloss, tf.function": graph,
        "fastloss, eager": eager,
        "fastloss, jit_compile": compiled,
        "Keras' losses, eager": keras_eager,
        "Keras' losses, tf.function": keras_graph,
        "Keras' losses, jit_compile": keras_compiled,
    }
    return found, dict.fromkeys((name for name in found if "Keras" in name), "≥ 10×")


def keras_step(logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Call], dict[str, str]]:
    """`train_on_batch` of a model of one convolution with Dice + cross-entropy of its softmax."""
    import keras

    import fastloss.keras

    classes = logits.shape[1]
    image = np.ascontiguousarray(np.moveaxis(logits[:, :1], 1, -1))

    def step(loss: Any, activation: str | None = "softmax") -> Call:
        keras.utils.set_random_seed(0)
        head = keras.layers.Conv3D(classes, 1, activation=activation)
        model = keras.Sequential([keras.Input(image.shape[1:]), head])
        model.compile("sgd", loss=loss)
        return lambda: model.train_on_batch(image, labels)

    def of(module: Any) -> Call:
        dice, entropy = module.Dice(axis=(1, 2, 3)), module.SparseCategoricalCrossentropy()

        def loss(y: Any, p: Any) -> Any:
            one_hot = keras.ops.one_hot(keras.ops.cast(y, "int32"), classes)
            return dice(one_hot, p) + entropy(y, p)

        return step(loss)

    found = {
        "fastloss": of(fastloss.keras),
        "fastloss, DiceCE": step(fastloss.keras.DiceCE(smooth=1e-7)),  # their sum, in two passes
        "Keras' losses": of(keras.losses),
        WITHOUT: step(lambda _, p: keras.ops.mean(p), None),
    }
    return found, {"Keras' losses": "≥ 10×"}


WITHOUT = "a mean in place of the loss"
"""The row of `keras_step` that is taken off the others, which leaves softmax and losses."""
