"""TensorFlow for tests: quiet, and what a tape says of a loss."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from support import need

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
tf = need("tensorflow")


def by_tape(loss: Any, x: Any, y: Any, w: Any = None, upstream: Any = None, **extras: Any) -> Any:
    """Value and gradient of a loss of tensors or arrays, the gradient weighed by ``upstream``."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(x, y, w, **extras)
        total = value
        if upstream is not None:
            total = tf.reduce_sum(tf.cast(value, tf.float64) * tf.cast(upstream, tf.float64))
    return value, tape.gradient(total, x)


def numpy_of(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.numpy()
    return found
