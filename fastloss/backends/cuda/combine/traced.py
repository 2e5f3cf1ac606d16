"""Arrays that record NumPy operations on them, for a GPU to run later."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from fastloss.backends.cuda.combine.code import ELEMENTWISE
from fastloss.backends.cuda.combine.graph import BOOL, FLOAT, Graph, Node, Shape

INSTEAD = (
    "use arithmetic, comparisons, NumPy's functions of single elements (exp, log, maximum, ...), "
    "np.where, np.clip, np.sum, mean, prod, max, min, any and all, basic slices, reshape, "
    "transpose, broadcast_to, concatenate, stack, zeros_like, ones_like and full_like"
)
NO_BRANCH = "formula: a term that runs on a GPU cannot branch on its sums; use np.where"

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
_REDUCTIONS = {
    np.add: "sum",
    np.multiply: "prod",
    np.maximum: "max",
    np.minimum: "min",
    np.logical_or: "any",
    np.logical_and: "all",
}
_BITWISE = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor",
    "invert": "logical_not",
}


class Traced(NDArrayOperatorsMixin):
    """An array of float64 or bool of known shape and unknown elements.

    It behaves as a NumPy array in everything that `INSTEAD` lists, views and assignments included,
    and raises TypeError otherwise, above all where Python needs a number or a truth value.
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self._node = node
        self._parent: Traced | None = None
        self._view: Callable[[Node], Node] | None = None
        self._key: Any = None

    @property
    def node(self) -> Node:
        if self._parent is None or self._view is None:
            return self._node
        return self._view(self._parent.node)  # as the parent may have been written to

    def _viewed(self, view: Callable[[Node], Node], key: Any = None) -> Traced:
        other = Traced(self.graph, view(self.node))
        other._parent, other._view, other._key = self, view, key
        return other

    def _write(self, node: Node) -> None:
        """Take the elements of another array, broadcast to this one's shape."""
        node = self.graph.as_bool(node) if self.dtype == BOOL else self.graph.as_float(node)
        node = self.graph.broadcast(node, self.shape)
        if self._parent is None:
            self._node = node
        elif self._key is None:
            raise TypeError("formula: cannot assign to a reshaped array; assign, then reshape")
        else:
            self._parent._assign(self._key, node)

    # ------------------------------------------------------------------ attributes of an array

    @property
    def shape(self) -> Shape:
        return self._node.shape

    @property
    def dtype(self) -> np.dtype:
        return self._node.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self._node.size

    @property
    def T(self) -> Traced:
        return self.transpose()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("formula: len() of an array of no axes")
        return self.shape[0]

    def __iter__(self) -> Iterator[Traced]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Traced(shape={self.shape}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:
        if hasattr(np.ndarray, name) and not name.startswith("__"):
            raise TypeError(f"formula: an array has no .{name} on a GPU; {INSTEAD}")
        raise AttributeError(name)

    # ------------------------------------------------------------------ values it does not have

    def __bool__(self) -> bool:
        raise TypeError(NO_BRANCH)

    def _no_number(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "formula: a term that runs on a GPU cannot make plain numbers or NumPy arrays of its "
            f"sums (float(), math.log, np.asarray, assignment into np.zeros); {INSTEAD}"
        )

    __float__ = __int__ = __complex__ = __index__ = __array__ = _no_number
    item = tolist = _no_number

    # ------------------------------------------------------------------ slices

    def _box(self, key: Any) -> tuple[Shape, Shape, Shape, Shape]:
        """Starts, steps and lengths along the axes, and the shape of what the key selects."""
        keys = key if isinstance(key, tuple) else (key,)
        given = sum(k is not None and k is not Ellipsis for k in keys)
        if given > self.ndim or sum(k is Ellipsis for k in keys) > 1:
            raise IndexError(f"formula: too many indices for an array of shape {self.shape}")
        if not any(k is Ellipsis for k in keys):
            keys = (*keys, Ellipsis)
        starts: list[int] = []
        steps: list[int] = []
        lengths: list[int] = []
        shape: list[int] = []
        for k in keys:
            if k is None:
                shape.append(1)
                continue
            for one in (slice(None),) * (self.ndim - given) if k is Ellipsis else (k,):
                n = self.shape[len(lengths)]
                if isinstance(one, slice):
                    start, stop, step = one.indices(n)
                    length = len(range(start, stop, step))
                    shape.append(length)
                elif isinstance(one, (int, np.integer)) and not isinstance(one, bool):
                    start, step, length = operator.index(one), 1, 1
                    if not -n <= start < n:
                        raise IndexError(f"formula: index {start} for an axis of {n} elements")
                    start %= n
                else:
                    raise TypeError(
                        f"formula: cannot select elements by {one!r} on a GPU; use integers, "
                        "slices and np.where"
                    )
                starts.append(start)
                steps.append(step)
                lengths.append(length)
        return tuple(starts), tuple(steps), tuple(lengths), tuple(shape)

    def __getitem__(self, key: Any) -> Traced:
        starts, steps, lengths, shape = self._box(key)

        def view(node: Node) -> Node:
            return self.graph.reshape(self.graph.slice(node, starts, steps, lengths), shape)

        return self._viewed(view, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        node = _node(self.graph, value)
        mask = getattr(key, "dtype", None) == BOOL
        if mask and np.shape(key) == self.shape and not node.shape:
            self._write(self.graph.where(_node(self.graph, key), node, self.node))
        else:
            self._assign(key, node)

    def _assign(self, key: Any, node: Node) -> None:
        starts, steps, lengths, shape = self._box(key)
        if any(k != 1 for k, n in zip(steps, lengths, strict=True) if n > 1):
            raise TypeError("formula: cannot assign to a slice with a step; use np.where")
        part = self.graph.reshape(self.graph.broadcast(node, shape), lengths)
        self._write(self.graph.insert(self.node, part, starts))

    # ------------------------------------------------------------------ NumPy's protocols

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method == "reduce" and ufunc in _REDUCTIONS:
            return _reduce(_REDUCTIONS[ufunc], *inputs, **{"axis": 0, **options})
        name = ufunc.__name__
        out, where = options.pop("out", (None,)), options.pop("where", True)
        if method != "__call__":
            raise TypeError(f"formula: np.{name}.{method} cannot run on a GPU; {INSTEAD}")
        if options:
            raise TypeError(f"formula: np.{name} takes no {', '.join(options)} on a GPU")
        nodes = [_node(self.graph, i) for i in inputs]
        if name in _BITWISE and all(n.dtype == BOOL for n in nodes):
            name = _BITWISE[name]
        if name not in ELEMENTWISE:
            raise TypeError(f"formula: np.{name} cannot run on a GPU; {INSTEAD}")
        result = self.graph.elementwise(name, *nodes)
        (target,) = out
        if target is None:
            if where is not True:
                raise TypeError(f"formula: np.{name} with where= needs out=; or use np.where")
            return Traced(self.graph, result)
        if not isinstance(target, Traced):
            raise TypeError(
                f"formula: np.{name} cannot write into a NumPy array; make out of the sums, by "
                "np.zeros_like"
            )
        if where is not True:
            result = self.graph.where(_node(self.graph, where), result, target.node)
        target._write(result)
        return target

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        ours = _FUNCTIONS.get(function)
        if ours is None:
            raise TypeError(f"formula: np.{function.__name__} cannot run on a GPU; {INSTEAD}")
        try:
            inspect.signature(ours).bind(self.graph, *args, **options)
        except TypeError as error:
            raise TypeError(f"formula: np.{function.__name__} on a GPU: {error}") from None
        return ours(self.graph, *args, **options)

    # ------------------------------------------------------------------ methods

    def sum(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("sum", self, axis, **options)

    def prod(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("prod", self, axis, **options)

    def max(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("max", self, axis, **options)

    def min(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("min", self, axis, **options)

    def any(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("any", self, axis, **options)

    def all(self, axis: Any = None, **options: Any) -> Traced:
        return _reduce("all", self, axis, **options)

    def mean(self, axis: Any = None, **options: Any) -> Traced:
        return _mean(self.graph, self, axis, **options)

    def clip(self, *bounds: Any, **options: Any) -> Traced:
        return _clip(self.graph, self, *bounds, **options)

    def reshape(self, *shape: Any) -> Traced:
        whole = shape[0] if len(shape) == 1 else shape
        return self._reshaped(np.empty(self.shape).reshape(whole).shape)

    def ravel(self) -> Traced:
        return self._reshaped((self.size,))

    def squeeze(self, axis: Any = None) -> Traced:
        return self._reshaped(np.empty(self.shape).squeeze(axis).shape)

    def flatten(self) -> Traced:
        return self.ravel().copy()

    def transpose(self, *axes: Any) -> Traced:
        order = axes[0] if len(axes) == 1 else axes
        order = order or tuple(range(self.ndim))[::-1]
        np.empty(self.shape).transpose(order)  # raises ValueError if they are no axes
        permutation = tuple(operator.index(a) % self.ndim for a in order)
        return self._viewed(lambda node: self.graph.transpose(node, permutation))

    def swapaxes(self, one: int, other: int) -> Traced:
        order = list(range(self.ndim))
        order[one], order[other] = order[other], order[one]
        return self.transpose(order)

    def copy(self) -> Traced:
        return Traced(self.graph, self.node)

    def astype(self, dtype: Any, **_: Any) -> Traced:
        kind = np.dtype(dtype)
        if kind == BOOL:
            return Traced(self.graph, self.graph.as_bool(self.node))
        if kind == FLOAT or self.dtype == BOOL:
            return Traced(self.graph, self.graph.as_float(self.node))
        raise TypeError(f"formula: expected float64 or bool, as all is float64, got {dtype!r}")

    def _reshaped(self, shape: Shape) -> Traced:
        return self._viewed(lambda node: self.graph.reshape(node, shape))


def _in_place(ufunc: np.ufunc) -> Callable[[Traced, Any], Any]:
    def operate(self: Traced, other: Any) -> Any:
        # If no axis remains, NumPy returns a scalar, which is immutable.
        return ufunc(self, other, out=(self,)) if self.ndim else ufunc(self, other)

    return operate


for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.divide,
    "pow": np.power,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}.items():
    setattr(Traced, f"__i{_name}__", _in_place(_ufunc))


def _node(graph: Graph, value: Any) -> Node:
    if isinstance(value, Traced):
        if value.graph is not graph:
            raise TypeError("formula: arrays of two calls were mixed; keep none of them")
        return value.node
    return graph.constant(value)


def _array(graph: Graph, value: Any) -> Traced:
    return value if isinstance(value, Traced) else Traced(graph, graph.constant(value))


# ---------------------------------------------------------------------- NumPy's functions


def _reduce(
    name: str, array: Traced, axis: Any = None, *, keepdims: bool = False, **options: Any
) -> Traced:
    graph, node = array.graph, array.node
    initial = options.pop("initial", None)
    options = {k: v for k, v in options.items() if not (k == "out" and v in (None, (None,)))}
    if options.get("dtype") is None or np.dtype(options["dtype"]) == FLOAT:
        options.pop("dtype", None)
    if options:
        raise TypeError(f"formula: {name} takes no {', '.join(options)} on a GPU")
    if axis is None:
        axes = tuple(range(len(node.shape)))
    else:
        given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
        axes = tuple(operator.index(a) for a in given)
        if any(not -array.ndim <= a < array.ndim for a in axes):
            raise ValueError(f"axis: {axis} is out of bounds for an array of shape {node.shape}")
        axes = tuple(a % array.ndim for a in axes)
    left = tuple(n for i, n in enumerate(node.shape) if i not in axes)
    if initial is not None and not node.size:
        result = graph.broadcast(graph.as_float(_node(graph, initial)), left)
    else:
        result = graph.reduce(name, node, axes)
        if initial is not None:
            joined = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}[name]
            result = graph.elementwise(joined, result, _node(graph, initial))
    if keepdims:
        shape = tuple(1 if i in axes else n for i, n in enumerate(node.shape))
        result = graph.reshape(result, shape)
    return Traced(graph, result)


_Result = TypeVar("_Result")


def _function(*functions: Any) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    def register(ours: Callable[..., _Result]) -> Callable[..., _Result]:
        _FUNCTIONS.update(dict.fromkeys(functions, ours))
        return ours

    return register


def _reduction(name: str) -> Callable[..., Traced]:
    def ours(graph: Graph, a: Any, axis: Any = None, **options: Any) -> Traced:
        return _reduce(name, _array(graph, a), axis, **options)

    return ours


for _reduced in _REDUCTIONS.values():
    _function(getattr(np, _reduced))(_reduction(_reduced))
_function(np.amax)(_reduction("max"))  # other objects than np.max in NumPy 1
_function(np.amin)(_reduction("min"))


@_function(np.mean)
def _mean(graph: Graph, a: Any, axis: Any = None, **options: Any) -> Traced:
    array = _array(graph, a)
    total = _reduce("sum", array, axis, **options)
    result: Traced = total / np.float64(array.size / max(total.size, 1))
    return result


@_function(np.where)
def _where(graph: Graph, condition: Any, x: Any, y: Any) -> Traced:
    nodes = (_node(graph, value) for value in (condition, x, y))
    return Traced(graph, graph.where(*nodes))


@_function(np.clip)
def _clip(
    graph: Graph, a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None
) -> Traced:
    array = _array(graph, a)
    low, high = (a_min if min is None else min), (a_max if max is None else max)
    if low is not None:
        array = np.maximum(array, low)
    return array if high is None else np.minimum(array, high)


@_function(np.count_nonzero)
def _count_nonzero(graph: Graph, a: Any, axis: Any = None, *, keepdims: bool = False) -> Traced:
    return _reduce("sum", _array(graph, a) != 0, axis, keepdims=keepdims)


def _filled(graph: Graph, shape: Any, value: Any, dtype: Any = None) -> Traced:
    whole = (operator.index(shape),) if not isinstance(shape, (tuple, list)) else tuple(shape)
    filled = Traced(graph, graph.broadcast(_node(graph, value), whole))
    return filled.astype(FLOAT if dtype is None else dtype)


@_function(np.zeros, np.empty)
def _zeros(graph: Graph, shape: Any, dtype: Any = None) -> Traced:
    return _filled(graph, shape, 0.0, dtype)


@_function(np.ones)
def _ones(graph: Graph, shape: Any, dtype: Any = None) -> Traced:
    return _filled(graph, shape, 1.0, dtype)


@_function(np.full)
def _full(graph: Graph, shape: Any, fill_value: Any, dtype: Any = None) -> Traced:
    return _filled(graph, shape, fill_value, dtype)


@_function(np.zeros_like, np.empty_like)
def _zeros_like(graph: Graph, a: Any, dtype: Any = None, *, shape: Any = None) -> Traced:
    return _full_like(graph, a, 0.0, dtype, shape=shape)


@_function(np.ones_like)
def _ones_like(graph: Graph, a: Any, dtype: Any = None, *, shape: Any = None) -> Traced:
    return _full_like(graph, a, 1.0, dtype, shape=shape)


@_function(np.full_like)
def _full_like(
    graph: Graph, a: Any, fill_value: Any, dtype: Any = None, *, shape: Any = None
) -> Traced:
    like = _array(graph, a)
    whole = like.shape if shape is None else shape
    return _filled(graph, whole, fill_value, like.dtype if dtype is None else dtype)


@_function(np.broadcast_to)
def _broadcast_to(graph: Graph, array: Any, shape: Any) -> Traced:
    whole = tuple(shape) if isinstance(shape, (tuple, list)) else (operator.index(shape),)
    return _array(graph, array)._viewed(lambda node: graph.broadcast(node, whole))


@_function(np.reshape)
def _reshape(graph: Graph, a: Any, shape: Any) -> Traced:
    return _array(graph, a).reshape(shape)


@_function(np.expand_dims)
def _expand_dims(graph: Graph, a: Any, axis: Any) -> Traced:
    array = _array(graph, a)
    return array._reshaped(np.expand_dims(np.empty(array.shape), axis).shape)


@_function(np.concatenate)
def _concatenate(graph: Graph, arrays: Sequence[Any], axis: int = 0) -> Traced:
    parts = [_array(graph, a) for a in arrays]
    shape = np.concatenate([np.empty(p.shape) for p in parts], axis).shape
    whole = _filled(graph, shape, 0.0)
    start = 0
    for part in parts:
        end = start + part.shape[axis]
        whole[(slice(None),) * (axis % len(shape)) + (slice(start, end),)] = part
        start = end
    return whole


@_function(np.stack)
def _stack(graph: Graph, arrays: Sequence[Any], axis: int = 0) -> Traced:
    return _concatenate(graph, [_expand_dims(graph, a, axis) for a in arrays], axis)


@_function(np.squeeze)
def _squeeze(graph: Graph, a: Traced, axis: Any = None) -> Traced:
    return a.squeeze(axis)


@_function(np.ravel)
def _ravel(graph: Graph, a: Traced) -> Traced:
    return a.ravel()


@_function(np.transpose)
def _transpose(graph: Graph, a: Traced, axes: Any = None) -> Traced:
    return a.transpose() if axes is None else a.transpose(axes)


@_function(np.swapaxes)
def _swapaxes(graph: Graph, a: Traced, axis1: int, axis2: int) -> Traced:
    return a.swapaxes(axis1, axis2)


@_function(np.copy)
def _copy(graph: Graph, a: Traced) -> Traced:
    return a.copy()


@_function(np.shape)
def _shape(graph: Graph, a: Traced) -> Shape:
    return a.shape


@_function(np.ndim)
def _ndim(graph: Graph, a: Traced) -> int:
    return a.ndim


@_function(np.size)
def _size(graph: Graph, a: Traced) -> int:
    return a.size
