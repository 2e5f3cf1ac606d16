"""The step between the passes in TensorFlow's operations.

The terms' formulas are recorded once, as for a GPU, and what was recorded is built here of tensors.
Every array has one axis more than in the formula, the first: of one for a formula that has seen all
samples, or the samples, each of which it then sees alone, as their number need not be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fastloss.backends.cuda.combine.graph import BOOL, Node, reachable
from fastloss.backends.cuda.combine.program import record
from fastloss.protocol import FusedLoss
from fastloss.request import Request

Pullback = Callable[[Any], Any]

_NAMES = {
    "absolute": "abs", "fabs": "abs", "sqrt": "sqrt", "exp": "exp", "expm1": "expm1", "log": "log",
    "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "arctan2": "atan2", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
    "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "floor": "floor", "ceil": "ceil",
    "rint": "rint", "power": "pow", "float_power": "pow", "maximum": "maximum",
    "minimum": "minimum", "square": "square", "sign": "sign", "isnan": "is_nan",
    "isinf": "is_inf", "isfinite": "is_finite", "add": "add", "subtract": "subtract",
    "multiply": "multiply", "divide": "divide", "negative": "negative",
    "reciprocal": "reciprocal", "less": "less", "less_equal": "less_equal", "greater": "greater",
    "greater_equal": "greater_equal", "equal": "equal", "not_equal": "not_equal",
    "logical_and": "logical_and", "logical_or": "logical_or", "logical_xor": "logical_xor",
    "logical_not": "logical_not",
}  # fmt: skip
"""From ufuncs of NumPy to functions of ``tf.math``."""


def _where(condition: Any, one: Any, other: Any) -> Any:
    return tf.where(condition, one, tf.cast(other, tf.float64))


_OTHERS: dict[str, Callable[..., Any]] = {
    "positive": lambda x: x,
    "cbrt": lambda x: tf.sign(x) * tf.pow(tf.abs(x), 1 / 3),
    "exp2": lambda x: tf.pow(tf.constant(2.0, tf.float64), x),
    "log2": lambda x: tf.math.log(x) / np.log(2.0),
    "log10": lambda x: tf.math.log(x) / np.log(10.0),
    "trunc": lambda x: tf.sign(x) * tf.floor(tf.abs(x)),
    "hypot": lambda a, b: tf.sqrt(a * a + b * b),
    "copysign": lambda a, b: _where(b < 0, -tf.abs(a), tf.abs(a)),
    "fmax": lambda a, b: tf.where(tf.math.is_nan(a), b, _where(tf.math.is_nan(b) | (a > b), a, b)),
    "fmin": lambda a, b: tf.where(tf.math.is_nan(a), b, _where(tf.math.is_nan(b) | (a < b), a, b)),
    "logaddexp": lambda a, b: tf.maximum(a, b) + tf.math.log1p(tf.exp(-tf.abs(a - b))),
    "heaviside": lambda x, at: _where(
        x > 0, 1.0, _where(x < 0, 0.0, _where(tf.equal(x, 0), at, x))
    ),
}
_REDUCTIONS = {
    "sum": tf.reduce_sum, "prod": tf.reduce_prod, "max": tf.reduce_max, "min": tf.reduce_min,
    "any": tf.reduce_any, "all": tf.reduce_all,
}  # fmt: skip


def combine(loss: FusedLoss, request: Request, sums: Any, voxels: Any) -> tuple[Any, Pullback]:
    """The value, float64, and from its upstream gradient the derivative by every sum.

    Args:
        sums: (S, B, C) float64; B need not be known.
        voxels: (B,) float64.

    Raises:
        TypeError: a formula of the loss cannot be recorded.
        ValueError: the number of samples is not known, and a term is no function of each.
    """
    batch = sums.shape[1]
    if batch is not None:
        return _whole(loss, request, sums, voxels, batch)
    parts = []
    for factor, term in loss.terms:
        alone = loss.with_terms(((factor, term),))
        parts.append(_of_any_batch(alone, term, request, sums, voxels))
    total = sum(value for value, _ in parts)

    def pullback(upstream: Any) -> Any:
        return sum(pull(_reduced_to(upstream, value)) for value, pull in parts)

    return total, pullback


def _reduced_to(upstream: Any, value: Any) -> Any:
    """The upstream gradient of a value that was broadcast to that of the whole loss."""
    if not value.shape.rank:
        return tf.reduce_sum(upstream)
    for axis in range(1, value.shape.rank):
        if value.shape[axis] == 1 and upstream.shape[axis] != 1:
            upstream = tf.reduce_sum(upstream, axis, keepdims=True)
    return upstream


def _whole(
    loss: FusedLoss, request: Request, sums: Any, voxels: Any, batch: int
) -> tuple[Any, Pullback]:
    """Of all samples together, whose number is known."""
    value, pull = _recorded(loss, request, sums[None], voxels[None], batch)
    return value[0], lambda upstream: pull(tf.convert_to_tensor(upstream)[None])[0]


def _of_any_batch(
    loss: FusedLoss, term: Any, request: Request, sums: Any, voxels: Any
) -> tuple[Any, Pullback]:
    """Of one term, for any number of samples."""
    count = tf.shape(sums)[1]
    if loss.sums_over_batch:
        joined = tf.reduce_sum(sums, 1, keepdims=True)
        value, pull = _whole(loss, request, joined, tf.reduce_sum(voxels, keepdims=True), 1)

        def each(upstream: Any) -> Any:
            return tf.repeat(pull(upstream), count, axis=1)

        return value, each
    reduction = getattr(term, "reduction", None)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"logits: the number of samples is not known, which {type(term).__name__} needs in "
            "TensorFlow's operations; use batches of one size (drop_remainder=True), or no "
            "jit_compile"
        )
    # One formula for each sample, as if it were alone.
    of_each = tf.transpose(sums, (1, 0, 2))[:, :, None]
    value, pull = _recorded(loss, request, of_each, voxels[:, None], 1)
    share = tf.cast(tf.maximum(count, 1), tf.float64) if reduction == "mean" else 1.0
    if reduction == "none":
        value = value[:, 0]
    else:
        value = tf.reduce_sum(value) / share

    def pullback(upstream: Any) -> Any:
        if reduction == "none":
            upstream = upstream[:, None]
        else:
            upstream = tf.fill([count], upstream / share)
        return tf.transpose(pull(upstream)[:, :, 0], (1, 0, 2))

    return value, pullback


def _recorded(
    loss: FusedLoss, request: Request, sums: Any, voxels: Any, batch: int
) -> tuple[Any, Pullback]:
    """The value (N, …), of sums (N, S, batch, C), and its pullback to (N, S, batch, C)."""
    classes = int(sums.shape[3])
    layout = tuple(operand.tobytes() for operand in loss.operands)
    node, derivatives = record(loss, request, batch, classes, np.dtype(np.float64), layout)
    count = tf.shape(sums)[0]
    inputs = {"sums": sums, "voxels": voxels, "numbers": tf.zeros([count, 0], tf.float64)}
    (value,) = _build([node], inputs)

    def pullback(upstream: Any) -> Any:
        upstream = tf.cast(upstream, tf.float64)
        found = _build(derivatives, {**inputs, "upstream": upstream})
        stacked = tf.stack(found, axis=1)
        if node.shape:
            return stacked
        # A gradient of 0 is no multiple of a slope that may be infinite.
        return stacked * tf.reshape(upstream, [-1, 1, 1, 1])

    return value, pullback


def _build(roots: Sequence[Node], inputs: dict[str, Any]) -> list[Any]:
    """The tensors of the nodes, each with the further axis in front."""
    count = tf.shape(inputs["sums"])[0]
    values: dict[int, Any] = {}
    for node in reachable(roots):
        if node.op == "input":
            values[node.number] = inputs[node.params[0]]
        elif node.op == "constant":
            array = np.broadcast_to(node.params[0], node.shape)
            values[node.number] = tf.constant(array[None])
        else:
            arguments = [values[a.number] for a in node.args]
            values[node.number] = _compute(node, arguments)
    found = []
    for root in roots:
        value = values[root.number]
        found.append(tf.broadcast_to(value, [count, *root.shape]))
    return found


def _compute(node: Node, arguments: list[Any]) -> Any:
    op, shape = node.op, node.shape
    if op in _REDUCTIONS:
        return _REDUCTIONS[op](arguments[0], [axis + 1 for axis in node.params[0]])
    if op == "reshape":
        return tf.reshape(arguments[0], [-1, *shape]) if node.size else arguments[0]
    if op == "transpose":
        return tf.transpose(arguments[0], [0, *(axis + 1 for axis in node.params[0])])
    if op == "slice":
        key = [slice(None)]
        for start, step, n in zip(*node.params, shape, strict=True):
            key.append(slice(start, _end(start, step, n), step))
        return arguments[0][tuple(key)]
    if op == "insert":
        return _insert(node, *arguments)
    ranks = len(shape)
    whole = [_padded(a, n, ranks) for a, n in zip(arguments, node.args, strict=True)]
    if op == "broadcast":
        return (
            whole[0] + tf.zeros(shape, tf.float64)
            if node.dtype != BOOL
            else (whole[0] & tf.ones(shape, tf.bool))
        )
    if op == "cast":
        return tf.cast(whole[0], tf.float64)
    if op == "where":
        return tf.where(*whole)
    if op in _NAMES:
        return getattr(tf.math, _NAMES[op])(*whole)
    return _OTHERS[op](*whole)


def _padded(value: Any, node: Node, ranks: int) -> Any:
    """With axes of one behind the first, so that it broadcasts to this many."""
    missing = ranks - len(node.shape)
    return tf.reshape(value, [-1, *[1] * missing, *node.shape]) if missing else value


def _insert(node: Node, whole: Any, part: Any) -> Any:
    """The array with the part written over it."""
    (starts,) = node.params
    size = node.args[1].shape
    inside = np.zeros(node.shape, bool)
    inside[tuple(slice(a, a + n) for a, n in zip(starts, size, strict=True))] = True
    widths = [(a, m - a - n) for a, n, m in zip(starts, size, node.shape, strict=True)]
    return tf.where(inside[None], tf.pad(part, [(0, 0), *widths]), whole)


def _end(start: int, step: int, n: int) -> int | None:
    end = start + step * n
    return end if end >= 0 else None
