"""TensorFlow's automatic differentiation over the two passes."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from fastloss.borrowed import Extras
from fastloss.frameworks.tensorflow import graph, joint, operations, xla
from fastloss.frameworks.tensorflow.tensors import EagerAdapter, is_on_device, once, plain
from fastloss.protocol import FusedLoss, LossLike, as_loss


class TensorflowAdapter(EagerAdapter):
    """Differentiates as well."""

    @tf.autograph.experimental.do_not_convert
    def value(
        self,
        loss: LossLike,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        *,
        extras: Extras | None = None,
    ) -> Any:
        loss = as_loss(loss)
        logits = plain(logits, "logits")
        if tf.executing_eagerly():
            if is_on_device(logits):
                how = f"on {logits.device}, where the kernels of fastloss do not reach"
                return operations.value(loss, logits, target, voxel_weight, extras, how)
            return _eager_value(loss, logits, target, voxel_weight, extras)
        if operations.has_devices():
            how = operations.ON_DEVICE
            return operations.value(loss, logits, target, voxel_weight, extras, how)
        if not operations.is_compiled():
            return joint.value(graph.Call(loss, logits, target, voxel_weight, extras), logits)
        if not xla.is_there():
            how = operations.COMPILED
            return operations.value(loss, logits, target, voxel_weight, extras, how)
        return graph.value(xla.Call(loss, logits, target, voxel_weight, extras), logits)


def _eager_value(
    loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None
) -> Any:
    """The reduce pass now, and the apply pass when a tape asks for the gradient."""
    # Variables are read out here, as within they would be asked for their gradients.
    target, voxel_weight = _plain(target, "target"), _plain(voxel_weight, "voxel_weight")
    if extras is not None:
        extras = extras.with_arrays([_plain(array, "fields") for array in extras.arrays])

    @tf.custom_gradient
    def differentiable(logits: Any) -> Any:
        passes = loss.passes(logits, target, voxel_weight, extras)
        value, pullback = passes.forward()

        def gradient(upstream: Any) -> Any:
            if not tf.executing_eagerly():  # a tape that records a backward pass as a graph
                raise RuntimeError(
                    "logits: the gradient of a loss that was computed eagerly is asked for in a "
                    "tf.function; call the loss inside the function too"
                )
            coefficients = pullback(passes.upstream(upstream))
            new, view = passes.output(None)
            passes.apply(coefficients, view)
            return once(new, logits)

        return ADAPTER.result(value), gradient

    return differentiable(logits)


def _plain(array: Any, name: str) -> Any:
    return plain(array, name) if tf.is_tensor(array) else array


ADAPTER = TensorflowAdapter()
