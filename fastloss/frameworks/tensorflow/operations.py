"""A loss in TensorFlow's own operations, where no function of the host can be called.

It computes the same sums, by the formulas of `fastloss.backends.reference`, and the same gradient,
in float32 with sums in float64. It runs on devices that the kernels do not reach, and is what XLA
compiles where it cannot call them (`xla.is_there`); it takes the time that such formulas take in
TensorFlow.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from fastloss.arrays import INTEGERS
from fastloss.borrowed import Extras
from fastloss.frameworks.tensorflow.combine import combine
from fastloss.frameworks.tensorflow.functions import (
    FUNCTIONS,
    WEIGHTS,
    Probability,
    activate,
    times,
)
from fastloss.frameworks.tensorflow.graph import tensor
from fastloss.frameworks.tensorflow.shapes import Shapes
from fastloss.frameworks.tensorflow.tensors import once
from fastloss.protocol import FusedLoss
from fastloss.request import Request
from fastloss.sums import Sum

_warned = False


ON_DEVICE = "on this device, where the kernels of fastloss do not reach"
COMPILED = "under jit_compile=True, where this version of TensorFlow has XLA call no kernels"


def is_compiled() -> bool:
    """Whether the graph that is being traced is compiled by XLA."""
    from tensorflow.python.framework import ops
    from tensorflow.python.ops import control_flow_util

    return bool(control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph()))


def has_devices() -> bool:
    """Whether a graph may run elsewhere than on the CPU."""
    return bool(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def value(
    loss: FusedLoss,
    logits: Any,
    target: Any,
    voxel_weight: Any,
    extras: Extras | None,
    how: str,
) -> Any:
    """The loss, differentiable once.

    Args:
        how: why it is computed in this way, for the warning that is given once.

    Raises:
        ValueError, TypeError: arrays that do not fit; a loss that cannot be computed in this way.
    """
    target = tensor(target, "target")
    voxel_weight = None if voxel_weight is None else tensor(voxel_weight, "voxel_weight")
    if extras is not None:
        fields = tuple((name, tensor(a, f"fields[{name!r}]")) for name, a in extras.fields)
        extras = extras._replace(fields=fields)
    _check(loss, extras, how)
    shapes = Shapes.of(loss, logits, target, voxel_weight, extras)
    _warn(how)
    request = loss.request(shapes.arrays)
    call = _Call(loss, request, shapes)

    @tf.custom_gradient
    def differentiable(logits: Any) -> Any:
        inputs = call.inputs(logits, target, voxel_weight, extras)
        v = activate(request.activation, inputs.x, call.axis)._replace(g=inputs.g)
        result, pullback = call.mapped(v, inputs) if loss.maps_voxels else call.combined(v, inputs)
        result = tf.cast(result, inputs.x.dtype)
        result.set_shape(shapes.value)

        def gradient(upstream: Any) -> Any:
            found = call.gradient(v, inputs, pullback(upstream))
            return once(tf.cast(found, logits.dtype), logits)

        return result, gradient

    return differentiable(logits)


def _check(loss: FusedLoss, extras: Extras | None, how: str) -> None:
    """Raise ValueError for what is not computed in this way."""
    ranks = loss.ranking or loss.counting
    if ranks is not None:
        raise ValueError(
            f"terms: {type(ranks).__name__} is not computed {how}; leave out jit_compile"
        )
    lacking = loss.lacks(() if extras is None else extras.names)
    if lacking:
        term = loss.makers[lacking[0]]
        name = term.makes
        if term.derives:
            raise ValueError(
                f"terms: {type(term).__name__} is not computed {how}; leave out jit_compile"
            )
        raise ValueError(
            f"fields: {name!r} is not made {how}; pass fields=, which Loss.fields makes of the "
            "labels in a data pipeline, or leave out jit_compile"
        )
    if extras is not None and extras.regions is not None:
        raise ValueError(f"regions: not computed {how}; leave out jit_compile")


def _warn(how: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastloss computes in TensorFlow's operations {how}: the values are the same, the "
            "time is that of such formulas",
            stacklevel=2,
        )


class _Inputs(NamedTuple):
    """The arrays of a call, with the channels along the logits' axis and 1 where there are none."""

    x: Any
    g: Any
    m: Any
    fields: dict[str, Any]
    faults: Any
    """(B,): NaN where a sample has bad labels or weights, else 0."""


class _Call:
    """One call: its sums, and along which axes they are taken."""

    def __init__(self, loss: FusedLoss, request: Request, shapes: Shapes) -> None:
        self.loss, self.request, self.shapes = loss, request, shapes
        self.rank = len(shapes.logits)
        self.axis = loss.channel_axis % self.rank
        self.voxels = [i for i in range(1, self.rank) if i != self.axis]

    def inputs(self, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None) -> _Inputs:
        dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32
        x = tf.cast(logits, dtype)
        classes, ignore = self.shapes.classes, self.request.ignore_index
        ones = tf.ones_like(tf.gather(x, [0], axis=self.axis))
        m, bad = ones, tf.zeros_like(ones, tf.bool)
        if voxel_weight is not None:
            given = tf.cast(self._with_channel(voxel_weight), dtype)
            m = m * given
            bad |= ~((given >= 0) & (given < np.inf))
        whole = self._with_channel(target)
        if self.shapes.dense:
            y = tf.cast(whole, dtype)
            g = y
            wrong = tf.zeros_like(y, tf.bool)
            if target.dtype.name in INTEGERS:
                wrong = (y != 0) & (y != 1)
            if ignore is not None:
                if self.request.ignores_number(classes):
                    ignored = tf.reduce_any(y == ignore, self.axis, keepdims=True)
                    wrong &= y != ignore
                else:
                    ignored = tf.gather(y, [ignore], axis=self.axis) > 0.5
                m = tf.where(ignored, tf.zeros_like(m), m)
            bad |= tf.reduce_any(wrong, self.axis, keepdims=True)
        else:
            labels = tf.cast(whole, tf.float64 if whole.dtype == tf.float64 else tf.int32)
            if whole.dtype.is_floating:
                labels = tf.cast(whole, dtype)
            number = tf.cast(self._along(tf.range(classes)), labels.dtype)
            good = tf.reduce_any(labels == number, self.axis, keepdims=True)
            if ignore is not None:
                ignored = labels == tf.cast(ignore, labels.dtype)
                good |= ignored
                m = tf.where(ignored, tf.zeros_like(m), m)
            g = tf.cast(labels == number, dtype)
            bad |= ~good
        nothing = m == 0
        x = tf.where(nothing, tf.zeros_like(x), x)
        g = tf.where(nothing, tf.zeros_like(g), g)
        fields = {}
        given = () if extras is None else zip(extras.fields, self.shapes.arrays.fields, strict=True)
        for (name, array), field in given:
            own = self._with_channel(array)
            if field.kind == "labels":
                own = tf.cast(own, tf.int32) == self._along(tf.range(classes))
            own = tf.cast(own, dtype)
            fields[name] = tf.where(nothing, tf.zeros_like(own), own)
        faulty = tf.reduce_any(bad, range(1, self.rank))
        faults = tf.where(faulty, np.float64(np.nan), np.float64(0.0))
        return _Inputs(x, g, m, fields, faults)

    def combined(self, v: Probability, inputs: _Inputs) -> tuple[Any, Any]:
        """The value, and its pullback to the coefficients, (S, B, C)."""
        axes = self.voxels
        each = []
        for total in self.request.sums:
            summands = self._summands(total, v, inputs)
            each.append(tf.reduce_sum(tf.cast(summands, tf.float64), axes))
        counted = tf.reduce_sum(tf.cast(inputs.m, tf.float64), range(1, self.rank))
        sums = tf.stack(each)
        sums.set_shape([None, self.shapes.logits[0], self.shapes.classes])
        found, pullback = combine(self.loss, self.request, sums, counted + inputs.faults)
        return found, lambda upstream: pullback(tf.cast(upstream, tf.float64))

    def mapped(self, v: Probability, inputs: _Inputs) -> tuple[Any, Any]:
        """The loss of every voxel, and its pullback to coefficients of every voxel."""
        each = self.loss.map_coefficients(self.request, self.shapes.classes)
        coefficients = [self._along(tf.constant(k, v.p.dtype)) for k in each]
        by_class = self.request.activation == "sigmoid"
        total = tf.zeros_like(v.p)
        for sum_, k in zip(self.request.sums, coefficients, strict=True):
            total += times(k + tf.zeros_like(v.p), self._summands(sum_, v, inputs))
        if not by_class:
            total = tf.reduce_sum(total, self.axis)
        shape = [-1, *[1] * (len(total.shape) - 1)]
        faults = tf.cast(tf.reshape(inputs.faults, shape), total.dtype)

        def pullback(upstream: Any) -> list[Any]:
            upstream = tf.cast(upstream, total.dtype) + faults
            if not by_class:
                upstream = tf.expand_dims(upstream, self.axis)
            return [k * upstream for k in coefficients]

        return total + faults, pullback

    def gradient(self, v: Probability, inputs: _Inputs, coefficients: Any) -> Any:
        """The derivative by the logits, as `fastloss.backends.reference` has it."""
        zero = tf.zeros_like(v.p)
        by: dict[str, Any] = {}
        for i, total in enumerate(self.request.sums):
            function = FUNCTIONS[total.function]
            if function.slope is None:
                continue
            k = coefficients[i]
            if not self.loss.maps_voxels:
                k = self._of_classes(tf.cast(k, v.p.dtype))
            slope = function.slope(v, total.parameter)
            part = times(k * self._weights(total, inputs) + zero, slope)
            by[function.by] = by[function.by] + part if function.by in by else part
        gradient = zero
        by_p, by_log_p, by_log_q = (by.get(name) for name in ("p", "log_p", "log_q"))
        if self.request.activation == "softmax":
            if by_p is not None or by_log_p is not None:
                t = zero if by_p is None else by_p * v.p
                t = t if by_log_p is None else t + by_log_p
                others = tf.reduce_sum(tf.where(v.first, zero, t), self.axis, keepdims=True)
                whole = tf.reduce_sum(t, self.axis, keepdims=True)
                gradient = tf.where(v.first, t * v.q - v.p * others, t - v.p * whole)
            if by_log_q is not None:
                t = by_log_q * v.p
                shares = tf.where(v.p == 0, zero, t / v.q)
                others = tf.reduce_sum(tf.where(v.first, zero, shares), self.axis, keepdims=True)
                whole = tf.reduce_sum(shares, self.axis, keepdims=True)
                gradient += v.p * tf.where(v.first, others, whole - shares) - t
        elif self.request.activation == "sigmoid":
            gradient = zero if by_p is None else by_p * v.p * v.q
            gradient = gradient if by_log_p is None else gradient + by_log_p * v.q
            gradient = gradient if by_log_q is None else gradient - by_log_q * v.p
        else:
            gradient = zero if by_p is None else by_p
            if by_log_p is not None:
                gradient += tf.where(by_log_p == 0, zero, by_log_p / v.p)
            if by_log_q is not None:
                gradient -= tf.where(by_log_q == 0, zero, by_log_q / v.q)
        faults = tf.reshape(inputs.faults, [-1, *[1] * (self.rank - 1)])
        return gradient + tf.cast(faults, gradient.dtype)

    def _summands(self, total: Sum, v: Probability, inputs: _Inputs) -> Any:
        """m · weight · field · function(p)."""
        weights = self._weights(total, inputs) + tf.zeros_like(v.p)
        return times(weights, FUNCTIONS[total.function].value(v, total.parameter))

    def _weights(self, total: Sum, inputs: _Inputs) -> Any:
        weight = inputs.m * WEIGHTS[total.weight](inputs.g)
        return times(weight, inputs.fields[total.field]) if total.field else weight

    def _with_channel(self, array: Any) -> Any:
        """With an axis where the channels of the logits are."""
        return array if len(array.shape) == self.rank else tf.expand_dims(array, self.axis)

    def _along(self, numbers: Any) -> Any:
        """(C,) along the channels' axis."""
        shape = [1] * self.rank
        shape[self.axis] = -1
        return tf.reshape(numbers, shape)

    def _of_classes(self, numbers: Any) -> Any:
        """(B, C) as the logits lie."""
        shape = [1] * self.rank
        shape[0], shape[self.axis] = -1, self.shapes.classes
        return tf.reshape(numbers, shape)
