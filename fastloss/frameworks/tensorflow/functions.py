"""The functions of p, and their derivatives, in TensorFlow's operations.

What `fastloss.backends.reference` writes in NumPy, for tensors with the channels along any axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf


class Probability(NamedTuple):
    """p, 1−p, their logarithms, where a class is the first of the largest logit, and the target."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any
    first: Any
    g: Any = None


class Function(NamedTuple):
    """A function of p, and its derivative by what ``by`` names; None: it is 0."""

    by: str
    value: Callable[[Probability, float], Any]
    slope: Callable[[Probability, float], Any] | None


def times(a: Any, b: Any) -> Any:
    """a b, but 0 for 0 · ∞: the limit of x log x."""
    nan = tf.math.is_nan
    return tf.where((a == 0) & ~nan(b) | (b == 0) & ~nan(a), tf.zeros_like(a * b), a * b)


def _ones(v: Probability, _: float) -> Any:
    return tf.ones_like(v.p)


def _minus_ones(v: Probability, _: float) -> Any:
    return -tf.ones_like(v.p)


def _focal_slope(p: Any, log_p: Any, q: Any, gamma: float) -> Any:
    """The derivative of q^γ log p by log p, with q = 1−p: q^γ − γ p log p · q^(γ−1)."""
    if gamma == 0:
        return tf.ones_like(p)
    # At q = 0 the second part has the limit 0, as log p ≈ −q.
    product = times(times(p, log_p), tf.pow(q, gamma - 1))
    return tf.pow(q, gamma) - gamma * tf.where(q == 0, tf.zeros_like(q), product)


def _power_slope(loss: Any, gamma: float) -> Any:
    """The derivative of (−log p)^γ by log p; at p = 1 that by the logit, which is 0."""
    return -gamma * tf.where(loss == 0, tf.zeros_like(loss), tf.pow(loss, gamma - 1))


def _difference(v: Probability) -> Any:
    """p − g, exact where both are near 1."""
    return tf.where(v.p > 0.5, (1 - v.g) - v.q, v.p - v.g)


def _log_of_target(g: Any) -> Any:
    """log g, and 0 where g is 0."""
    return tf.math.log(tf.where(g == 0, tf.ones_like(g), g))


FUNCTIONS = {
    "one": Function("p", _ones, None),
    "p": Function("p", lambda v, _: v.p, _ones),
    "p_squared": Function("p", lambda v, _: v.p * v.p, lambda v, _: 2 * v.p),
    "log": Function("log_p", lambda v, _: -v.log_p, _minus_ones),
    "log_rest": Function("log_q", lambda v, _: -v.log_q, _minus_ones),
    "focal": Function(
        "log_p",
        lambda v, gamma: -times(tf.pow(v.q, gamma), v.log_p),
        lambda v, gamma: -_focal_slope(v.p, v.log_p, v.q, gamma),
    ),
    "focal_rest": Function(
        "log_q",
        lambda v, gamma: -times(tf.pow(v.p, gamma), v.log_q),
        lambda v, gamma: -_focal_slope(v.q, v.log_q, v.p, gamma),
    ),
    "generalized": Function(
        "log_p",
        lambda v, gamma: -tf.math.expm1(gamma * v.log_p) / gamma,
        lambda v, gamma: -tf.pow(v.p, gamma),
    ),
    "log_power": Function(
        "log_p",
        lambda v, gamma: tf.pow(-v.log_p, gamma),
        lambda v, gamma: _power_slope(-v.log_p, gamma),
    ),
    "error": Function(
        "p", lambda v, _: tf.abs(_difference(v)), lambda v, _: tf.sign(_difference(v))
    ),
    "sign": Function("p", lambda v, _: tf.sign(_difference(v)), None),
    "log_ratio": Function("log_p", lambda v, _: _log_of_target(v.g) - v.log_p, _minus_ones),
    "log_ratio_rest": Function(
        "log_q", lambda v, _: _log_of_target(1 - v.g) - v.log_q, _minus_ones
    ),
}

WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "one": tf.ones_like,
    "target": lambda g: g,
    "rest": lambda g: 1 - g,
    "target_squared": lambda g: g * g,
}


def activate(activation: str, x: Any, axis: int) -> Probability:
    """Probabilities of logits whose channels are along an axis."""
    if activation == "softmax":
        # Without one largest member the sum is exact where that one dominates.
        places = tf.argmax(x, axis)
        first = tf.one_hot(places, x.shape[axis], True, False, axis, tf.bool)
        largest = tf.reduce_max(x, axis, keepdims=True)
        zero = tf.zeros_like(x)
        d = tf.where(x == largest, zero, x - largest)  # of infinities too
        e = tf.exp(d)
        rest = tf.reduce_sum(tf.where(first, zero, e), axis, keepdims=True)
        p, log_p = e / (1 + rest), d - tf.math.log1p(rest)
        q = tf.where(first, rest, 1 + rest - e) / (1 + rest)
        log_q = tf.where(p < 0.5, tf.math.log1p(-p), tf.math.log(q))
        return Probability(p, q, log_p, log_q, first)
    if activation == "sigmoid":
        small = tf.math.log1p(tf.exp(-tf.abs(x)))
        log_p, log_q = tf.minimum(x, 0) - small, -tf.maximum(x, 0) - small
        return Probability(tf.exp(log_p), -tf.math.expm1(log_p), log_p, log_q, None)
    return Probability(x, 1 - x, tf.math.log(x), tf.math.log1p(-x), None)
