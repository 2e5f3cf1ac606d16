"""JAX's differentiation over the two passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from fastloss.arrays import Arrays, arrange
from fastloss.backends import chosen_backend
from fastloss.borrowed import Borrowed, Extras
from fastloss.frameworks.dlpack import DlpackAdapter
from fastloss.frameworks.jax import ffi
from fastloss.frameworks.memory import new_array
from fastloss.frameworks.xla import host
from fastloss.frameworks.xla.host import Call
from fastloss.protocol import FusedLoss, LossLike, as_loss

Tracer = jax.core.Tracer
Shape = jax.ShapeDtypeStruct


class JaxAdapter(DlpackAdapter):
    """Differentiates as well."""

    def serves(self, array: Any) -> bool:
        return isinstance(array, jax.Array)

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        if isinstance(array, Tracer):
            raise TypeError(
                f"{name}: got a tracer of JAX, whose memory is not there yet; in a function that "
                "JAX transforms call the loss itself, loss(logits, target), with logits of JAX's"
            )
        if len(array.devices()) > 1 and not write:
            return super().borrow(jnp.asarray(np.asarray(array)), name)
        return super().borrow(array, name, write=write)

    def value(
        self,
        loss: LossLike,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        *,
        extras: Extras | None = None,
        reuse_logits: bool = False,
    ) -> Any:
        loss = as_loss(loss)
        more = () if extras is None else extras.arrays
        if not is_traced(logits, target, voxel_weight, *more):
            value = super().value(loss, logits, target, voxel_weight, extras=extras)
            return as_jax(value, logits)
        call, arrays = described(loss, logits, target, voxel_weight, extras)
        logits, *others = alike(logits, *arrays)
        return _value(call._replace(reuses=reuse_logits), logits, tuple(others))


def is_traced(*arrays: Any) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


# ------------------------------------------------------------------ what is to be computed


def described(
    loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None
) -> tuple[Call, tuple[Any, ...]]:
    """Check the arrays by shapes and dtypes: what to compute, and the arrays beside the logits.

    Fields that the caller left out are made on the way.
    """
    names: tuple[str, ...] = ()
    fields: tuple[Any, ...] = ()
    regions = rows = None
    if extras is not None:
        names, regions, rows = extras.names, extras.regions, extras.region_count
        fields = tuple(_array(field) for _, field in extras.fields)
        if regions is not None:
            rows = _count_of_regions(regions) if rows is None else rows
            regions = _array(regions)
    loss.check_field_names(names)
    if loss.lacks_regions(extras):
        raise ValueError(
            "regions: a program that JAX transforms cannot make them, as it has to know how many "
            "there are; give those that Loss.fields makes, and region_count"
        )
    target = _array(target)
    weight = None if voxel_weight is None else _array(voxel_weight)
    arrays = arrange(
        _like(logits),
        _like(target),
        None if weight is None else _like(weight),
        activation=loss.activation,
        channel_axis=loss.channel_axis,
        fields={name: _like(field) for name, field in zip(names, fields, strict=True)},
        regions=None if regions is None else _like(regions),
        regions_by_class=loss.regions_by_class,
        rows=rows or 1,
    )
    request = loss.request(arrays)
    loss.keep_terms()
    batch, classes = arrays.logits.shape[:2]
    numbers = np.concatenate([np.ravel(operand) for operand in loss.operands])
    count = 0 if regions is None else arrays.rows
    call = Call(
        step="value",
        structure=loss.structure,
        numbers=tuple(numbers.tolist()),
        backend=chosen_backend(),
        rank=logits.ndim,
        weighted=weight is not None,
        fields=names,
        regions=count,
        dense=arrays.dense,
        sums=(request.slots, batch * arrays.rows, classes),
        value=_value_shape(loss, logits.shape, arrays, count),
        dtype=arrays.value_dtype.name,
    )
    weights = () if weight is None else (weight,)
    ends = () if regions is None else (regions,)
    lacking = loss.lacks(names)
    if lacking or names != loss.field_names:
        made = run(
            call._replace(step="fields"),
            [_field_shape(loss, name, logits.shape, arrays) for name in lacking],
            (jax.lax.stop_gradient(logits), target, *weights, *fields, *ends),
        )
        known = dict(zip((*names, *lacking), (*fields, *made), strict=True))
        fields = tuple(known[name] for name in loss.field_names)
        call = call._replace(fields=loss.field_names)
    return call, (target, *weights, *fields, *ends)


def _array(array: Any) -> Any:
    """Anybody's array as one of JAX's or NumPy's."""
    return array if isinstance(array, jax.Array) else np.asarray(array)


def _like(array: Any) -> Borrowed:
    """A stand-in of the same shape and dtype, without memory."""
    dtype = np.dtype(array.dtype)
    name = dtype.name
    number = np.zeros((), np.uint16 if name == "bfloat16" else dtype)
    return Borrowed(np.broadcast_to(number, array.shape), name)


def _count_of_regions(regions: Any) -> int:
    if isinstance(regions, Tracer):
        raise ValueError(
            "region_count: expected how many regions a sample has at most, which a program that "
            "JAX compiles cannot look for, got None"
        )
    regions = np.asarray(regions)
    return max(int(regions.max()) + 1, 1) if regions.dtype.kind in "iu" and regions.size else 1


def _value_shape(
    loss: FusedLoss, shape: tuple[int, ...], arrays: Arrays, regions: int
) -> tuple[int, ...]:
    if loss.maps_voxels:
        if loss.activation == "sigmoid":
            return shape
        axis = loss.channel_axis % len(shape)
        return shape[:axis] + shape[axis + 1 :]
    batch, classes = arrays.logits.shape[:2]
    return loss.value_shape(batch, classes, regions)


def _field_shape(loss: FusedLoss, name: str, shape: tuple[int, ...], arrays: Arrays) -> Shape:
    form = loss.makers[name].field_form(arrays.logits.shape[1], arrays.dense)
    if not form.by_class:
        axis = loss.channel_axis % len(shape)
        shape = shape[:axis] + shape[axis + 1 :]
    return Shape(shape, form.dtype)


# ------------------------------------------------------------------ the two passes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(call: Call, logits: Any, others: tuple[Any, ...]) -> Any:
    return _forward(call, logits, others)[0]


def _forward(call: Call, logits: Any, others: tuple[Any, ...]) -> Sequence[Any]:
    """The value, and the statistics as the bytes of float64 numbers, which JAX may not have."""
    slots, rows, classes = call.sums
    count = 0 if call.loss.maps_voxels else slots * rows * classes + rows
    results = [Shape(call.value, call.dtype), Shape((2 * count,), np.uint32)]
    return run(call, results, (logits, *others))


def _value_forward(call: Call, logits: Any, others: tuple[Any, ...]) -> tuple[Any, Any]:
    refuse_gradient(call, others)
    logits, others = logits.value, tuple(other.value for other in others)
    value, statistics = _forward(call, logits, others)
    return value, (logits, others, statistics)


def _value_backward(call: Call, residuals: Any, upstream: Any) -> tuple[Any, None]:
    if isinstance(upstream, SymbolicZero):
        return None, None
    logits, others, statistics = residuals
    return _gradient(call, logits, others, statistics, upstream), None


_value.defvjp(_value_forward, _value_backward, symbolic_zeros=True)


def _gradient(
    call: Call, logits: Any, others: tuple[Any, ...], statistics: Any, upstream: Any
) -> Any:
    results = [Shape(logits.shape, logits.dtype)]
    operands = (logits, *others, statistics, upstream)
    return run(call._replace(step="gradient"), results, operands)[0]


def refuse_gradient(call: Call, others: Sequence[Any]) -> None:
    """Raise TypeError for an array whose gradient would be lost without a word."""
    names = ["target", *(["voxel_weight"] if call.weighted else [])]
    names += [f"fields[{name!r}]" for name in call.fields]
    for name, other in zip(names, others, strict=False):
        if other.perturbed:
            raise TypeError(
                f"{name}: JAX differentiates by it, but gradients flow to the logits alone; pass "
                f"jax.lax.stop_gradient of it"
            )


def run(call: Call, results: Sequence[Shape], operands: Sequence[Any]) -> Sequence[Any]:
    """The results of a step: at once where there is memory to read, else in the program."""
    if is_traced(*operands):
        found: Sequence[Any] = _in_program(call, tuple(results), tuple(operands))
        return found
    like = operands[0]
    if isinstance(like, jax.Array) and next(iter(like.devices())).platform != "cpu":
        return _run_on_device(call, operands)
    made = [new_array(result.shape, np.dtype(result.dtype)) for result in results]
    host.run(call.text.encode(), [np.asarray(operand) for operand in operands], made)
    return [as_jax(array, like) for array in made]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _in_program(call: Call, results: tuple[Shape, ...], operands: tuple[Any, ...]) -> Any:
    operands = alike(*operands)
    if mesh_axes(operands[0]):
        results = tuple(_on_mesh(result, operands[0]) for result in results)
    # The gradient takes the place of the logits.
    aliases = {0: 0} if call.reuses and call.step in ("gradient", "apply") else None
    return tuple(ffi.call(call.text, results, operands, aliases))


@_in_program.defjvp
def _no_second_derivative(call: Call, results: Any, primals: Any, tangents: Any) -> Any:
    raise RuntimeError(
        "fastloss computes first derivatives by jax.grad or jax.vjp alone: there is no derivative "
        "of a gradient"
    )


def mesh_axes(array: Any) -> frozenset[str]:
    """The axes of a mesh along which an array differs, where `jax.shard_map` keeps account."""
    typeof = getattr(jax, "typeof", None)
    if typeof is None:
        return frozenset()
    kind = typeof(array)
    manual = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())


def _on_mesh(result: Shape, like: Any) -> Shape:
    """The same with the axes of another array."""
    kind = jax.typeof(like)
    if hasattr(kind, "manual_axis_type"):
        return Shape(
            result.shape,
            result.dtype,
            sharding=NamedSharding(kind.sharding.mesh, PartitionSpec(*[None] * len(result.shape))),
            manual_axis_type=kind.manual_axis_type,
        )
    options: dict[str, Any] = {"vma": kind.vma}  # of older versions
    return Shape(result.shape, result.dtype, **options)


def alike(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays, all with the axes of which any has one."""
    own = [mesh_axes(array) for array in arrays]
    union = frozenset().union(*own)
    if all(axes == union for axes in own):
        return arrays
    return tuple(
        _vary(array, tuple(sorted(union - axes))) for array, axes in zip(arrays, own, strict=True)
    )


def _vary(array: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return array
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)  # of older versions


def _run_on_device(call: Call, operands: Sequence[Any]) -> Sequence[Any]:
    """As `run`, on a GPU, where the gradient makes the statistics once more: they stay there in
    arrays that are not JAX's."""
    like = operands[0]
    if call.step == "gradient":
        *arrays, _, upstream = operands
        passes = call.passes(arrays)
        out, view = passes.output(None)
        passes.apply(passes.forward()[1](passes.upstream(upstream)), view)
        return [as_jax(out, like)]
    passes = call.passes(operands)
    if call.step == "fields":
        fields = dict(passes.whole_extras.fields)
        return [as_jax(fields[name], like) for name in call.loss.lacks(call.fields)]
    return as_jax(passes.forward()[0], like), jnp.zeros((0,), np.uint32)


def as_jax(array: Any, like: Any) -> Any:
    """A new array as one of JAX's, without a copy where it is large, where ``like`` lies."""
    if not isinstance(array, (np.ndarray, np.generic)):
        return jax.dlpack.from_dlpack(array)
    if not isinstance(like, jax.Array):
        return jnp.asarray(array)
    if len(like.devices()) == 1:
        return jax.device_put(array, next(iter(like.devices())))
    return jax.device_put(array, like.sharding) if array.shape == like.shape else jnp.asarray(array)


ADAPTER = JaxAdapter()
