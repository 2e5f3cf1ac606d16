"""Formulas on small arrays as a graph of operations, and its evaluation in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

Shape = tuple[int, ...]

FLOAT, BOOL = np.dtype(np.float64), np.dtype(np.bool_)

TRUTHS = {
    "less", "less_equal", "greater", "greater_equal", "equal", "not_equal",
    "logical_and", "logical_or", "logical_xor", "logical_not",
    "isfinite", "isnan", "isinf", "signbit", "any", "all",
}  # fmt: skip
"""Operations with boolean results; all others give numbers."""

_NEUTRAL = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "divide": 1.0}
_EMPTY: dict[str, Any] = {"sum": 0.0, "prod": 1.0, "any": False, "all": True}
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": np.sum,
    "prod": np.prod,
    "max": np.max,
    "min": np.min,
    "any": np.any,
    "all": np.all,
}


class Node:
    """One operation, and the shape of the array that it gives.

    ========== ===================== =================================================
    op         args                  params
    ========== ===================== =================================================
    input      none                  (name,)
    constant   none                  (the array,), read-only, of one element if uniform
    a ufunc    broadcast together    ()
    where      condition, two        ()
    cast       one                   (), to float64
    a reduction one                  (axes,), at least one, which are dropped
    reshape    one                   (), to ``shape``
    broadcast  one                   (), to ``shape``
    transpose  one                   (axes,)
    slice      one                   (starts, steps), one of each per axis
    insert     an array, and a part  (starts,): the array with the part written over it
    ========== ===================== =================================================

    Nodes are numbered in order of creation, so that arguments come first.
    """

    __slots__ = ("args", "dtype", "number", "op", "params", "shape")

    def __init__(
        self,
        number: int,
        op: str,
        args: tuple[Node, ...],
        shape: Shape,
        dtype: np.dtype,
        params: tuple[Any, ...],
    ) -> None:
        self.number, self.op, self.args = number, op, args
        self.shape, self.dtype, self.params = shape, dtype, params

    @property
    def size(self) -> int:
        return prod(self.shape)

    def __repr__(self) -> str:
        args = ", ".join(str(a.number) for a in self.args)
        return f"<{self.number}: {self.op}({args}) {self.shape}>"


class Graph:
    """Makes nodes, with common subexpressions merged and constants folded."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Node] = {}

    # ------------------------------------------------------------------ leaves

    def input(self, name: str, shape: Shape) -> Node:
        return self._node("input", (), shape, FLOAT, (name,))

    def constant(self, value: Any, shape: Shape | None = None) -> Node:
        """An array of numbers or booleans, or a number, broadcast to the shape."""
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"formula: expected real numbers, got {value!r}")
        array = array.astype(BOOL if array.dtype == BOOL else FLOAT)
        shape = array.shape if shape is None else shape
        first = array.reshape(-1)[:1]
        if not array.size:
            array = np.zeros((), array.dtype)
        elif array.tobytes() == first.tobytes() * array.size:
            array = first.reshape(())
        elif array.shape != shape:
            array = np.ascontiguousarray(np.broadcast_to(array, shape))
        array.flags.writeable = False
        key = ("constant", shape, array.dtype, array.tobytes())
        if key not in self._nodes:
            number = len(self._nodes)
            self._nodes[key] = Node(number, "constant", (), shape, array.dtype, (array,))
        return self._nodes[key]

    def as_float(self, node: Node) -> Node:
        if node.dtype == FLOAT:
            return node
        return self._node("cast", (node,), node.shape, FLOAT)

    def as_bool(self, node: Node) -> Node:
        if node.dtype == BOOL:
            return node
        return self.elementwise("not_equal", node, self.constant(0.0))

    # ------------------------------------------------------------------ element by element

    def elementwise(self, name: str, *args: Node) -> Node:
        """A ufunc by its name in NumPy."""
        if all(a.dtype == BOOL for a in args):
            # The dtype of arithmetic on booleans in NumPy.
            name = {
                "add": "logical_or",
                "maximum": "logical_or",
                "multiply": "logical_and",
                "minimum": "logical_and",
            }.get(name, name)
        if name.startswith("logical_"):
            args = tuple(self.as_bool(a) for a in args)
        else:
            args = tuple(self.as_float(a) for a in args)
        shape = np.broadcast_shapes(*(a.shape for a in args))
        if name in _NEUTRAL:
            one, other = args
            if _is(other, _NEUTRAL[name]):
                return self.broadcast(one, shape)
            if _is(one, _NEUTRAL[name]) and name in ("add", "multiply"):
                return self.broadcast(other, shape)
        return self._node(name, args, shape, BOOL if name in TRUTHS else FLOAT)

    def where(self, condition: Node, one: Node, other: Node) -> Node:
        condition = self.as_bool(condition)
        if one.dtype != other.dtype:
            one, other = self.as_float(one), self.as_float(other)
        shape = np.broadcast_shapes(condition.shape, one.shape, other.shape)
        if one.op == "where" and one.args[0] is condition:
            one = one.args[1]
        if other.op == "where" and other.args[0] is condition:
            other = other.args[2]
        if condition.op == "constant" and condition.params[0].ndim == 0:
            return self.broadcast(one if condition.params[0] else other, shape)
        if one is other:
            return self.broadcast(one, shape)
        return self._node("where", (condition, one, other), shape, one.dtype)

    def reduce(self, name: str, node: Node, axes: Iterable[int]) -> Node:
        """Sum, prod, max, min, any or all over axes, which are dropped."""
        axes = tuple(sorted(axes))
        shape = tuple(n for i, n in enumerate(node.shape) if i not in axes)
        if name in ("any", "all"):
            node = self.as_bool(node)
        else:
            node = self.as_float(node)
        if not node.size:
            if name not in _EMPTY and 0 not in shape:
                raise ValueError(f"formula: {name} of an empty array, without initial")
            return self.constant(_EMPTY.get(name, 0.0), shape)
        # An axis of one element is only dropped.
        rest = [i for i, n in enumerate(node.shape) if i not in axes or n != 1]
        node = self.reshape(node, tuple(node.shape[i] for i in rest))
        axes = tuple(k for k, i in enumerate(rest) if i in axes)
        return self._node(name, (node,), shape, node.dtype, (axes,)) if axes else node

    # ------------------------------------------------------------------ the same elements, moved

    def reshape(self, node: Node, shape: Shape) -> Node:
        if prod(shape) != node.size:
            raise ValueError(f"formula: cannot reshape {node.shape} into {shape}")
        if node.op == "reshape":
            node = node.args[0]
        return node if node.shape == shape else self._node("reshape", (node,), shape, node.dtype)

    def broadcast(self, node: Node, shape: Shape) -> Node:
        if np.broadcast_shapes(node.shape, shape) != shape:
            raise ValueError(f"formula: cannot broadcast {node.shape} to {shape}")
        return node if node.shape == shape else self._node("broadcast", (node,), shape, node.dtype)

    def transpose(self, node: Node, axes: tuple[int, ...]) -> Node:
        if axes == tuple(range(len(axes))):
            return node
        shape = tuple(node.shape[a] for a in axes)
        return self._node("transpose", (node,), shape, node.dtype, (axes,))

    def slice(self, node: Node, starts: Shape, steps: Shape, shape: Shape) -> Node:
        """Per axis, ``shape`` elements from a start on, in steps."""
        if 0 in shape:
            return self.constant(np.zeros(shape, node.dtype))
        while node.op == "insert":
            array, part = node.args
            (firsts,) = node.params
            ends = [a + (n - 1) * k for a, n, k in zip(starts, shape, steps, strict=True)]
            low, high = np.minimum(starts, ends), np.maximum(starts, ends)
            lasts = np.add(firsts, part.shape) - 1
            if (high < firsts).any() or (low > lasts).any():
                node = array
            elif (low >= firsts).all() and (high <= lasts).all():
                starts = tuple(a - f for a, f in zip(starts, firsts, strict=True))
                node = part
            else:
                break
        if node.op == "slice":
            inner, outer = node.params
            starts = tuple(a + k * b for a, k, b in zip(inner, outer, starts, strict=True))
            steps = tuple(j * k for j, k in zip(steps, outer, strict=True))
            node = node.args[0]
        steps = tuple(k if n > 1 else 1 for k, n in zip(steps, shape, strict=True))
        if shape == node.shape and all(k == 1 for k in steps):
            return node
        return self._node("slice", (node,), shape, node.dtype, (starts, steps))

    def insert(self, node: Node, part: Node, starts: Shape) -> Node:
        """The array overwritten by a part, of as many axes, from the starts on."""
        if node.dtype != part.dtype:
            node, part = self.as_float(node), self.as_float(part)
        if not part.size:
            return node
        if part.shape == node.shape:
            return part
        if self.slice(node, starts, (1,) * len(starts), part.shape) is part:
            return node
        if node.op == "insert" and node.params == (starts,) and node.args[1].shape == part.shape:
            node = node.args[0]
        return self._node("insert", (node, part), node.shape, node.dtype, (starts,))

    def _node(
        self,
        op: str,
        args: tuple[Node, ...],
        shape: Shape,
        dtype: np.dtype,
        params: tuple[Any, ...] = (),
    ) -> Node:
        if op != "input" and all(a.op == "constant" for a in args):
            arrays = [np.broadcast_to(a.params[0], a.shape) for a in args]
            with np.errstate(all="ignore"):
                value = _compute(op, shape, params, arrays)
            return self.constant(np.asarray(value, dtype), shape)
        if op != "input" and not prod(shape):
            return self.constant(np.zeros(shape, dtype))
        key = (op, *(a.number for a in args), shape, params)
        if key not in self._nodes:
            self._nodes[key] = Node(len(self._nodes), op, args, shape, dtype, params)
        return self._nodes[key]


def _is(node: Node, number: float) -> bool:
    if node.op != "constant":
        return False
    array = node.params[0]
    return array.ndim == 0 and float(array) == number


def reachable(roots: Iterable[Node]) -> list[Node]:
    """These nodes and all that they depend on, arguments first."""
    found: dict[int, Node] = {}
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node.number not in found:
            found[node.number] = node
            todo += node.args
    return [found[number] for number in sorted(found)]


def evaluate(roots: Sequence[Node], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays of the nodes, computed by NumPy."""
    values: dict[int, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node in reachable(roots):
            if node.op == "input":
                value: Any = inputs[node.params[0]]
            elif node.op == "constant":
                value = np.broadcast_to(node.params[0], node.shape)
            else:
                arrays = [values[a.number] for a in node.args]
                value = _compute(node.op, node.shape, node.params, arrays)
            values[node.number] = np.asarray(value, node.dtype)
    return [values[root.number] for root in roots]


def _compute(op: str, shape: Shape, params: tuple[Any, ...], args: list[np.ndarray]) -> Any:
    if op == "where":
        return np.where(*args)
    if op == "cast":
        return args[0].astype(FLOAT)
    if op in _REDUCTIONS:
        return _REDUCTIONS[op](args[0], axis=params[0])
    if op == "reshape":
        return args[0].reshape(shape)
    if op == "broadcast":
        return np.broadcast_to(args[0], shape)
    if op == "transpose":
        return args[0].transpose(params[0])
    if op == "slice":
        return args[0][_box(params[0], params[1], shape)]
    if op == "insert":
        whole = args[0].copy()
        whole[_box(params[0], (1,) * whole.ndim, args[1].shape)] = args[1]
        return whole
    return getattr(np, op)(*args)


def _box(starts: Shape, steps: Shape, shape: Shape) -> tuple[slice, ...]:
    def one(start: int, step: int, n: int) -> slice:
        end = start + step * n
        return slice(start, end if end >= 0 else None, step)

    return tuple(one(*each) for each in zip(starts, steps, shape, strict=True))
