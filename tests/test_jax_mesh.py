"""Data over several devices of JAX: the loss of all of it, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
from support import example, need, run_python

import fastloss as fl

START = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from support import *
import fastloss as fl, fastloss.jax
try:
    from jax import shard_map
    CHECKED = hasattr(jax, "typeof")  # whether it keeps account of what a host function returns
    CHECKS = ({"check_vma": True}, {"check_vma": False})
except ImportError:
    from jax.experimental.shard_map import shard_map
    CHECKS = ({"check_rep": False},)
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("data",))
batch, volume, everywhere = P("data"), P(None, None, "data"), P()
LOSS = fl.Dice(batch=True) + fl.CrossEntropy(weight=[1, 2, 3]) + fl.GeneralizedDice()
x, y = example(8, 3, (4, 5), dtype=np.float32)
w = np.random.default_rng(0).uniform(0.5, 2, y.shape).astype(np.float32)
arrays = tuple(map(jnp.asarray, (x, y, w)))
"""
FLAGS = "--xla_force_host_platform_device_count=4"


def on_four_devices(script: str) -> str:
    need("jax")
    return run_python(START + script, XLA_FLAGS=FLAGS, FASTLOSS_BACKEND="reference")


def test_shard_map_joins_the_statistics() -> None:
    """Samples, or parts of a volume, over devices; the gradient from outside and from inside."""
    on_four_devices(
        """
for checks in CHECKS:
    for shard, spec, flat in (("batch", batch, batch), ("volume", volume, P(None, "data"))):
        @partial(shard_map, mesh=mesh, in_specs=(spec, flat, flat), out_specs=everywhere, **checks)
        def whole(x, y, w):
            return fl.jax.value(LOSS, x, y, w, axis_name="data", shard=shard, reuse_logits=True)
        assert_agree(*jax.jit(jax.value_and_grad(whole))(*arrays), reference(LOSS, x, y, w))

    # Parameters that every device has: the sum of what its own samples say.
    @partial(shard_map, mesh=mesh, in_specs=(everywhere, batch, batch, batch),
             out_specs=(everywhere, everywhere), **checks)
    def step(scale, x, y, w):
        def of(scale):
            return fl.jax.value(LOSS, scale * x, y, w, axis_name="data")
        value, slope = jax.value_and_grad(of)(scale)
        return value, slope if checks.get("check_vma") else jax.lax.pmean(slope, "data")
    value, slope = jax.jit(step)(0.7, *arrays)
    expected = reference(LOSS, 0.7 * x.astype(np.float64), y, w)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(slope, (expected[1] * x).sum(), rtol=1e-5)

    # Without a name: each device's own.
    @partial(shard_map, mesh=mesh, in_specs=(batch, batch, everywhere), out_specs=batch, **checks)
    def own(x, y, w):
        return jax.grad(LOSS.__call__)(x, y, w)
    gradient = jax.jit(own)(*arrays[:2], arrays[2][:1])
    assert_agree(0, gradient[2:4], (0, reference(LOSS, x[2:4], y[2:4], w[:1])[1]))
"""
    )


def test_pmap_fields_regions_and_values_of_samples() -> None:
    on_four_devices(
        """
loss = fl.Dice() + 0.1 * fl.Boundary()
fields = loss.fields(y, classes=3)
regions = np.where(np.arange(4)[None, :, None] < 2, 0, 1) + np.zeros(y.shape, int)
options = dict(fields=fields, regions=regions, region_count=2)
cut = jax.tree.map(lambda a: jnp.asarray(a).reshape(4, 2, *a.shape[1:]), (x, y, fields, regions))
@partial(jax.pmap, axis_name="data")
def step(x, y, fields, regions):
    more = dict(fields=fields, regions=regions, region_count=2, axis_name="data")
    return jax.value_and_grad(lambda x: fl.jax.value(loss, x, y, **more))(x)
values, gradients = step(*cut)
expected = reference(loss, x, y, **options)
for value in values:
    assert_agree(value, gradients.reshape(x.shape) / 4, expected, scale=1e-3)
each = fl.Dice(reduction="none")
@partial(jax.pmap, axis_name="data")
def values_of(x, y):
    return fl.jax.value(each, x, y, axis_name="data")
for found in values_of(*cut[:2]):
    np.testing.assert_allclose(found, reference(each, x, y)[0], rtol=1e-6)
"""
    )


def test_bad_numbers_on_one_device_stop_all() -> None:
    """No device waits for ever for the statistics of one that has none."""
    on_four_devices(
        """
@partial(jax.pmap, axis_name="data")
def value(x, y):
    return fl.jax.value(LOSS, x, y, axis_name="data")
bad = y.copy(); bad[3] = 9
try:
    jax.block_until_ready(value(x.reshape(4, 2, 3, 4, 5), bad.reshape(4, 2, 4, 5)))
except Exception as error:
    assert "20 labels are not; the first is 9" in str(error), error
else:
    raise AssertionError("nothing was raised")
"""
    )


def test_arrays_that_lie_on_several_devices() -> None:
    """Outside of shard_map a loss takes them as any: at once, and compiled."""
    on_four_devices(
        """
x, y, w = (jax.device_put(a, NamedSharding(mesh, batch)) for a in arrays)
expected = reference(LOSS, *map(np.asarray, arrays))
for call in (jax.value_and_grad(LOSS), jax.jit(jax.value_and_grad(LOSS.__call__)),
             LOSS.value_and_grad):
    assert_agree(*call(x, y, w), expected)
assert jax.grad(LOSS.__call__)(x, y, w).sharding == x.sharding
third = jax.device_put(arrays[0], jax.devices()[2])
assert jax.grad(LOSS.__call__)(third, np.asarray(y)).devices() == {jax.devices()[2]}
"""
    )


def test_bad_options() -> None:
    jax = need("jax")
    value = need("fastloss.jax").value
    x, y = example(2, 3, (4, 5), dtype=np.float32)
    x = jax.numpy.asarray(x)

    def mapped(loss: object, **options: object) -> None:
        jax.vmap(lambda x, y: value(loss, x, y, axis_name="i", **options), axis_name="i")(
            x[None], y[None]
        )

    with pytest.raises(ValueError, match=r"^shard: expected one of"):
        value(fl.Dice(), x, y, shard="row")
    with pytest.raises(TypeError, match=r"^loss: expected a fastloss.Loss"):
        value(max, x, y)
    with pytest.raises(TypeError, match=r"^logits: expected an array of JAX"):
        value(fl.Dice(), y, y)
    with pytest.raises(ValueError, match=r"^axis_name: TopKCrossEntropy"):
        mapped(fl.TopKCrossEntropy())
    with pytest.raises(ValueError, match=r"^shard: a part of a volume needs the fields"):
        mapped(fl.Boundary(), shard="volume")
