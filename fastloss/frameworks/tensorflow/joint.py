"""Losses of the same logits in one graph, computed together in the passes of one loss.

A training often adds two losses of one prediction. The first one that is traced makes an operation
with places for more values. Another of the same logits and target takes the next place: it adds no
pass, but its sums to the table of those that are made, as functions of the host look up what to
compute when the graph runs. The tape hands the upstream gradients of all values to one gradient.

A target that `tf.one_hot` made is read as the labels it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fastloss.backends import use_backend
from fastloss.borrowed import Borrowed
from fastloss.frameworks.tensorflow import graph, labels
from fastloss.frameworks.tensorflow.shapes import Shapes
from fastloss.frameworks.tensorflow.tensors import aligned_like, once
from fastloss.protocol import FusedLoss
from fastloss.statistics import Statistics

_PLACES = 4
_MARK = "_fastloss_passes"
"""The attribute of a graph that holds the passes in it, by the name of the logits."""

try:
    from tensorflow.python import pywrap_tfe

    _watched = pywrap_tfe.TFE_Py_TapeSetPossibleGradientTypes
except (ImportError, AttributeError):  # of other versions
    _watched = None
_SEVERAL = 2
"""Its answer where more than one gradient may be asked for: nested or persistent tapes."""


def value(call: graph.Call, logits: Any) -> Any:
    """The loss in a graph, differentiable once, with other losses of these logits if it can be."""
    own = tf.compat.v1.get_default_graph()
    # Those of a branch or of the body of a loop may be from another graph.
    here = own.building_function and getattr(logits, "graph", None) is own
    if not here or not _is_of_sums(call):
        return graph.value(call, logits)
    target = _Target(call, logits)
    if not hasattr(own, _MARK):
        setattr(own, _MARK, {})
    found: list[_Passes] = getattr(own, _MARK).setdefault(logits.name, [])
    for passes in found:
        if passes.takes(call, target, logits):
            return passes.add(call, target)
    found.append(_Passes(target, call.has_weight, logits))
    return found[-1].add(call, target)


def _is_of_sums(call: graph.Call) -> bool:
    """Whether it reads logits, target and weight alone, and its sums say all of it."""
    loss = call.loss
    return loss.additive and not (
        loss.makers or loss.field_names or loss.counting or loss.regional or call.extras
    )


class _Target:
    """Target and voxel weight of a call, as the graph reads them.

    Attributes:
        given: what the function of the host is given beside the logits.
        key: what is the same for calls that can be computed together.
        of_indices: whether it was one-hot: of an index that is no class, all numbers are 0.
    """

    def __init__(self, call: graph.Call, logits: Any) -> None:
        loss, shapes = call.loss, call.shapes
        axis = loss.channel_axis % len(shapes.logits)
        target, *weight = call.given
        found = target
        if shapes.dense and shapes.classes > 1 and loss.ignore_index is None:
            indices = labels.of_one_hot(target, axis)
            if indices is not None and _takes_labels(call, logits, indices):
                found = indices
        self.of_indices = found is not target
        dense = shapes.dense and not self.of_indices
        origin = labels.itself(found) if dense else labels.source(found)
        if labels.fits(origin, logits, axis):
            found = origin
        self.given = [tf.stop_gradient(found), *weight]
        names = (origin.name, *(labels.itself(w).name for w in weight))
        options = loss.activation, axis, loss.ignore_index, loss.validate, call.backend
        self.key = (*names, *options)


def _takes_labels(call: graph.Call, logits: Any, indices: Any) -> bool:
    """Whether the loss is one of a label map too."""
    try:
        return not Shapes.of(call.loss, logits, indices, None, None).dense
    except (TypeError, ValueError):
        return False


class _Passes:
    """The two passes over some logits, and the calls whose values they give.

    Attributes:
        values: tensors of the graph, the first ones of them the values of the calls.
        loss: with the terms of all calls.
        all_of_indices: whether all targets were one-hot, and their indices are read.
    """

    loss: FusedLoss

    def __init__(self, target: _Target, has_weight: bool, logits: Any) -> None:
        self.calls: list[graph.Call] = []
        self.target = target
        self.all_of_indices = True
        self.has_weight = has_weight
        self.values = self._differentiable(logits)

    def takes(self, call: graph.Call, target: _Target, logits: Any) -> bool:
        """Whether a call can be computed in these passes, for the tapes that record now."""
        if len(self.calls) == _PLACES or target.key != self.target.key or _watched is None:
            return False
        # The tape that records the logits, if there is one, has to have recorded these passes.
        watched = _watched([logits])
        return bool(watched < _SEVERAL and watched == _watched([self.values[0]]))

    def add(self, call: graph.Call, target: _Target) -> Any:
        place = self.values[len(self.calls)]
        place.set_shape(call.shapes.value)
        self.all_of_indices = self.all_of_indices and target.of_indices
        self.calls.append(call)
        terms = [term for own in self.calls for term in own.loss.terms]
        self.loss = call.loss if len(self.calls) == 1 else call.loss.with_terms(tuple(terms))
        return place

    def _differentiable(self, logits: Any) -> Sequence[Any]:
        dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32
        kinds = [*[dtype] * _PLACES, tf.float64, tf.float64, tf.bool]

        @tf.custom_gradient
        def differentiable(logits: Any) -> Any:
            found = graph.on_host(self._forward, [logits, *self.target.given], kinds)

            def gradient(*upstream: Any) -> Any:
                by = [tf.cast(u, tf.float64) for u in upstream[: len(self.calls)]]
                arrays = [logits, *self.target.given, *found[_PLACES:], *by]
                (new,) = graph.on_host(self._gradient, arrays, [logits.dtype])
                new.set_shape(logits.shape)
                return once(new, logits)

            return tuple(found[:_PLACES]), gradient

        found: Sequence[Any] = differentiable(logits)
        return found

    # ------------------------------------------------------------------ what the host runs

    def _forward(self, logits: np.ndarray, target: np.ndarray, *weight: np.ndarray) -> list[Any]:
        """The values, empty ones in other places, the statistics, and whether the target that was
        read is dense."""
        dense = False
        with use_backend(self.calls[0].backend):
            passes = self._of(logits, target, weight)
            try:
                statistics = passes.reduce()
            except ValueError:
                if not self._has_others(target):
                    raise
                dense = True
                passes = self._of(logits, self._one_hot(target), weight)
                statistics = passes.reduce()
            combine = passes.backend.combine
            values = [combine(call.loss, statistics)[0] for call in self.calls]
        none = np.empty(0, passes.arrays.value_dtype)
        values += [none] * (_PLACES - len(values))
        return [*values, statistics.sums, statistics.voxels, np.bool_(dense)]

    def _gradient(self, logits: np.ndarray, target: np.ndarray, *others: np.ndarray) -> list[Any]:
        weight, others = others[: self.has_weight], others[self.has_weight :]
        sums, voxels, dense, *upstream = others
        with use_backend(self.calls[0].backend):
            passes = self._of(logits, self._one_hot(target) if dense else target, weight)
            dtype = passes.arrays.value_dtype
            statistics = Statistics(passes.request, sums, voxels, dtype, None, 0)
            coefficients = np.zeros(sums.shape)
            for call, by in zip(self.calls, upstream, strict=False):
                coefficients += passes.backend.combine(call.loss, statistics)[1](by)
            new = aligned_like(logits)
            stored = "bfloat16" if new.dtype.name == "bfloat16" else passes.logits.dtype
            view = new.view(np.uint16) if stored == "bfloat16" else new
            passes.apply(coefficients, Borrowed(view, stored))
        return [new]

    def _of(self, logits: np.ndarray, target: np.ndarray, weight: Sequence[np.ndarray]) -> Any:
        return self.loss.passes(logits, target, weight[0] if weight else None, None)

    def _has_others(self, indices: np.ndarray) -> bool:
        """Whether these are indices for one-hot targets, and some are no class."""
        if not self.all_of_indices or not indices.size:
            return False
        return bool(indices.min() < 0 or indices.max() >= self.calls[0].shapes.classes)

    def _one_hot(self, indices: np.ndarray) -> np.ndarray:
        call = self.calls[0]
        axis = call.loss.channel_axis % len(call.shapes.logits)
        if indices.ndim == len(call.shapes.logits):
            indices = np.squeeze(indices, axis)
        shape = [1] * (indices.ndim + 1)
        shape[axis] = call.shapes.classes
        classes = np.arange(call.shapes.classes).reshape(shape)
        found: np.ndarray = np.expand_dims(indices, axis) == classes
        return found
