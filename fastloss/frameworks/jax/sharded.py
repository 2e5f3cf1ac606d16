"""A loss of data over several devices: the statistics are joined between the passes.

JAX differentiates what joins them, so the gradient follows its own rules for `jax.lax.psum`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from fastloss.borrowed import Extras
from fastloss.frameworks.jax.adapter import Shape, alike, described, refuse_gradient, run
from fastloss.frameworks.xla import host
from fastloss.frameworks.xla.host import Call
from fastloss.protocol import FusedLoss

SHARDS = ("batch", "volume")


def value(
    loss: FusedLoss,
    logits: Any,
    target: Any,
    voxel_weight: Any,
    extras: Extras | None,
    axis_name: Any,
    shard: str,
    reuse_logits: bool,
) -> Any:
    """The loss of the data of all devices along an axis of a mesh; the same on each."""
    loss.check_additive("axis_name", parts=shard == "volume")
    if shard == "volume":
        loss.check_given(extras, "shard")
    parts = int(jax.lax.psum(1, axis_name))
    call, arrays = described(loss, logits, target, voxel_weight, extras)
    batch = logits.shape[0] * (parts if shard == "batch" else 1)
    shape = loss.value_shape(batch, call.sums[2], call.regions)
    call = call._replace(value=shape, reuses=reuse_logits, parts=parts, shard=shard)
    logits, *others = alike(logits, *arrays)
    own = _statistics(call, logits, tuple(others))
    # A sum in which each device has a place of its own: exact, and in the same order everywhere.
    places = jnp.zeros((parts, *own.shape), own.dtype)
    places, own = alike(places, own)
    places = jax.lax.dynamic_update_index_in_dim(places, own, jax.lax.axis_index(axis_name), axis=0)
    return _combined(call, jax.lax.psum(places, axis_name))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(call: Call, logits: Any, others: tuple[Any, ...]) -> Any:
    double = call.dtype == "float64"
    shape = (host.count(call),) if double else (2, host.count(call))
    results = [Shape(shape, call.dtype)]
    return run(call._replace(step="statistics"), results, (logits, *others))[0]


def _statistics_forward(call: Call, logits: Any, others: tuple[Any, ...]) -> tuple[Any, Any]:
    refuse_gradient(call, others)
    logits, others = logits.value, tuple(other.value for other in others)
    return _statistics.fun(call, logits, others), (logits, others)


def _statistics_backward(call: Call, residuals: Any, by: Any) -> tuple[Any, None]:
    if isinstance(by, SymbolicZero):
        return None, None
    logits, others = residuals
    results = [Shape(logits.shape, logits.dtype)]
    return run(call._replace(step="apply"), results, (logits, *others, by))[0], None


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combined(call: Call, parts: Any) -> Any:
    call = call._replace(step="combine", rank=parts.ndim)
    return run(call, [Shape(call.value, call.dtype)], (parts,))[0]


def _combined_forward(call: Call, parts: Any) -> tuple[Any, Any]:
    return _combined.fun(call, parts), parts


def _combined_backward(call: Call, parts: Any, upstream: Any) -> tuple[Any]:
    call = call._replace(step="pull", rank=parts.ndim)
    return (run(call, [Shape(parts.shape, parts.dtype)], (parts, upstream))[0],)


_combined.defvjp(_combined_forward, _combined_backward)
