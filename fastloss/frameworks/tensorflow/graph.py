"""The two passes in a graph of TensorFlow's, as calls of the process that traced it.

NumPy arrays are handed over without a copy, in both directions. A graph that is saved can be run by
the process that traced it alone, as TensorFlow does not save functions of Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fastloss.backends import current_backend, use_backend
from fastloss.borrowed import Borrowed, Extras
from fastloss.frameworks.tensorflow.shapes import Shapes
from fastloss.frameworks.tensorflow.tensors import aligned_like, once, plain
from fastloss.protocol import FusedLoss
from fastloss.statistics import Statistics


def value(call: Call, logits: Any) -> Any:
    """The loss in a graph, differentiable once."""

    @tf.custom_gradient
    def differentiable(logits: Any) -> Any:
        result, kept = call.forward(logits)

        def gradient(upstream: Any) -> Any:
            return once(call.gradient(logits, kept, upstream), logits)

        return result, gradient

    return differentiable(logits)


class Call:
    """One call in a graph: what does not change from run to run, and the two functions."""

    def __init__(
        self,
        loss: FusedLoss,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        extras: Extras | None,
    ) -> None:
        self.loss = loss
        self.backend = current_backend().name  # of the thread that traces
        self.shapes = Shapes.of(loss, logits, target, voxel_weight, extras)
        names = () if extras is None else extras.names
        self.makes = loss.lacks(names) if loss.makers else ()
        """The fields that the forward pass makes."""
        self.extras = extras
        given = [tensor(target, "target")]
        if voxel_weight is not None:
            given.append(tensor(voxel_weight, "voxel_weight"))
        self.has_weight = voxel_weight is not None
        if extras is not None:
            given += [tensor(array, f"fields[{name!r}]") for name, array in extras.fields]
            if extras.regions is not None:
                given.append(tensor(extras.regions, "regions"))
        self.given = given
        """Target, voxel weight, fields and regions, those that there are."""

    def forward(self, logits: Any) -> tuple[Any, Sequence[Any]]:
        """The value, and what the gradient needs: sums and voxel counts, and fields that were
        made."""
        dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32
        made = [tf.dtypes.as_dtype(self.shapes.form(name).dtype) for name in self.makes]
        result, sums, voxels, *fields = on_host(
            self._forward, [logits, *self.given], [dtype, tf.float64, tf.float64, *made]
        )
        result.set_shape(self.shapes.value)
        for field, name in zip(fields, self.makes, strict=True):
            field.set_shape(self.shapes.field(name))
        return result, (sums, voxels, *fields)

    def gradient(self, logits: Any, kept: Sequence[Any], upstream: Any) -> Any:
        upstream = tf.cast(upstream, tf.float32 if self.loss.maps_voxels else tf.float64)
        sums, voxels, *made = kept
        arrays = [logits, sums, voxels, upstream, *made, *self.given]
        (found,) = on_host(self._gradient, arrays, [logits.dtype])
        found.set_shape(logits.shape)
        return found

    # ------------------------------------------------------------------ what the host runs

    def _forward(self, logits: np.ndarray, *given: np.ndarray) -> list[Any]:
        with use_backend(self.backend):
            passes = self._passes(logits, given)
            made: list[np.ndarray] = []
            if self.makes:
                known = dict(passes.whole_extras.fields)
                made = [np.ascontiguousarray(known[name]) for name in self.makes]
            if self.loss.maps_voxels:
                none = np.empty(0)
                return [passes.forward()[0], none, none, *made]
            statistics = passes.reduce()
            result = passes.combine(statistics)[0]
        return [result, statistics.sums, statistics.voxels, *made]

    def _gradient(
        self,
        logits: np.ndarray,
        sums: np.ndarray,
        voxels: np.ndarray,
        upstream: np.ndarray,
        *arrays: np.ndarray,
    ) -> list[Any]:
        made, given = arrays[: len(self.makes)], arrays[len(self.makes) :]
        with use_backend(self.backend):
            passes = self._passes(logits, given, made)
            if self.loss.maps_voxels:
                coefficients: Any = passes.pull_map(upstream)
            else:
                regions = 0 if passes.arrays.regions is None else passes.arrays.rows
                dtype = passes.arrays.value_dtype
                statistics = Statistics(passes.request, sums, voxels, dtype, None, regions)
                coefficients = passes.combine(statistics)[1](upstream)
            new = aligned_like(logits)
            stored = "bfloat16" if new.dtype.name == "bfloat16" else passes.logits.dtype
            view = new.view(np.uint16) if stored == "bfloat16" else new
            passes.apply(coefficients, Borrowed(view, stored))
        return [new]

    def _passes(
        self, logits: np.ndarray, given: Sequence[np.ndarray], made: Sequence[np.ndarray] = ()
    ) -> Any:
        arrays = iter(given)
        target = next(arrays)
        weight = next(arrays) if self.has_weight else None
        extras = self.extras
        if extras is not None:
            fields = [next(arrays) for _ in extras.fields]
            extras = extras.with_arrays([*fields, next(arrays, None)])
        if made:
            own = dict(zip(self.makes, made, strict=True))
            own |= dict(extras.fields) if extras is not None else {}
            fields_read = tuple((name, own[name]) for name in self.loss.field_names)
            extras = (extras or Extras())._replace(fields=fields_read)
        return self.loss.passes(logits, target, weight, extras)


def tensor(array: Any, name: str) -> Any:
    """Anybody's array as a dense tensor of the graph, for which gradients stop."""
    return tf.stop_gradient(plain(tf.convert_to_tensor(array), name))


def on_host(function: Callable[..., list[Any]], arrays: list[Any], dtypes: list[Any]) -> list[Any]:
    """The tensors that a function of NumPy arrays, which the host runs, returns."""

    def contiguous(*given: Any) -> list[Any]:
        return function(*map(np.asarray, given))

    with tf.device("CPU:0"):
        found = tf.numpy_function(contiguous, arrays, dtypes, stateful=False)
    return list(found) if isinstance(found, (list, tuple)) else [found]
