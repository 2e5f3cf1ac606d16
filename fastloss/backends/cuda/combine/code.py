"""Generates CUDA C++ for one block of threads from a graph of operations on small arrays.

Reductions cut a graph into stages with a barrier between them; a stage computes element by element,
in loops whose bodies define every shared value once. Sums are taken in a fixed order: the threads'
own parts first, then trees over the lanes, then the warps one after another.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import numpy as np

from fastloss.backends.cuda.combine.graph import BOOL, Node, Shape, reachable

THREADS = 512
WARPS = THREADS // 32
SHARED_DOUBLES = 32 * 1024 // 8
"""The most numbers that a kernel keeps in static shared memory."""

_CALLS = {
    "absolute": "fabs", "fabs": "fabs", "sqrt": "sqrt", "cbrt": "cbrt", "exp": "exp",
    "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2", "log10": "log10",
    "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan", "arctan2": "atan2", "sinh": "sinh", "cosh": "cosh",
    "tanh": "tanh", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
    "hypot": "hypot", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "rint",
    "copysign": "copysign", "fmax": "fmax", "fmin": "fmin", "power": "pow", "float_power": "pow",
    "maximum": "fl_maximum", "minimum": "fl_minimum", "square": "fl_square", "sign": "fl_sign",
    "isnan": "fl_isnan", "isinf": "fl_isinf", "isfinite": "fl_isfinite",
    "logaddexp": "fl_logaddexp", "heaviside": "fl_heaviside",
}  # fmt: skip
_OPERATORS = {
    "add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "divide": "{} / {}",
    "negative": "-{}", "positive": "{}", "reciprocal": "1.0 / {}", "less": "{} < {}",
    "less_equal": "{} <= {}", "greater": "{} > {}", "greater_equal": "{} >= {}",
    "equal": "{} == {}", "not_equal": "{} != {}", "logical_and": "{} && {}",
    "logical_or": "{} || {}", "logical_xor": "{} != {}", "logical_not": "!{}",
}  # fmt: skip
ELEMENTWISE = frozenset(_CALLS) | frozenset(_OPERATORS)
"""The ufuncs with a C++ counterpart."""

_OTHER_POWERS = {2.0: "{0} * {0}", 1.0: "{0}", -1.0: "1.0 / {0}", -2.0: "1.0 / ({0} * {0})"}
_VIEWS = ("reshape", "broadcast", "transpose", "slice")
_REDUCTIONS = {
    "sum": ("fl_sum", "0.0"),
    "prod": ("fl_product", "1.0"),
    "max": ("fl_largest", "-fl_infinity()"),
    "min": ("fl_smallest", "fl_infinity()"),
    "any": ("fl_largest", "0.0"),
    "all": ("fl_smallest", "1.0"),
}
"""The functor that combines two numbers, and its neutral element."""

HELPERS = r"""
#ifndef FL_TABLE
#define FL_TABLE static __device__ const
#endif

#define FL_HELPER static __device__ __forceinline__

FL_HELPER double fl_infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
FL_HELPER double fl_nan() { return __longlong_as_double(0x7ff8000000000000LL); }
FL_HELPER bool fl_isnan(double x) { return x != x; }
FL_HELPER bool fl_isinf(double x) { return fabs(x) == fl_infinity(); }
FL_HELPER bool fl_isfinite(double x) { return fabs(x) < fl_infinity(); }
FL_HELPER double fl_square(double x) { return x * x; }

// NaN where either is, as in NumPy.
FL_HELPER double fl_maximum(double a, double b) { return a >= b || a != a ? a : b; }
FL_HELPER double fl_minimum(double a, double b) { return a <= b || a != a ? a : b; }
FL_HELPER double fl_sign(double x) { return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : x; }
FL_HELPER double fl_heaviside(double x, double at_0) {
  return x > 0.0 ? 1.0 : x < 0.0 ? 0.0 : x != x ? x : at_0;
}
FL_HELPER double fl_logaddexp(double a, double b) {
  return a == b ? a + log(2.0) : fl_maximum(a, b) + log1p(exp(-fabs(a - b)));
}

struct fl_sum {
  FL_HELPER double of(double a, double b) { return a + b; }
};
struct fl_product {
  FL_HELPER double of(double a, double b) { return a * b; }
};
struct fl_largest {
  FL_HELPER double of(double a, double b) { return fl_maximum(a, b); }
};
struct fl_smallest {
  FL_HELPER double of(double a, double b) { return fl_minimum(a, b); }
};

// Joins the numbers of all lanes of a warp; every lane gets the result.
template <class Join>
FL_HELPER double fl_of_warp(double x) {
  for (int distance = 16; distance > 0; distance /= 2)
    x = Join::of(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

// Joins the numbers of all warps.
template <class Join>
FL_HELPER double fl_of_warps(const double* parts) {
  double x = parts[0];
  for (int warp = 1; warp < WARPS; ++warp) x = Join::of(x, parts[warp]);
  return x;
}
""".replace("WARPS", str(WARPS))


@dataclass(frozen=True)
class Store:
    """An array that a kernel writes: to ``target`` from the element ``first`` on, in C order."""

    node: Node
    target: str
    first: int = 0
    type: str = "double"


# ---------------------------------------------------------------------- indices


@dataclass(frozen=True)
class _Index:
    """An index along one axis: ``base * step + offset``, kept between ``low`` and ``high``."""

    base: str  # C++ code; empty for a constant
    top: int  # the largest that base can be; the least is 0
    step: int
    offset: int
    low: int
    high: int
    depth: int
    """The number of enclosing loops."""

    @staticmethod
    def of(base: str, top: int, depth: int) -> _Index:
        return _Index(base, top, 1, 0, 0, top, depth) if top else _Index.at(0)

    @staticmethod
    def at(position: int) -> _Index:
        return _Index("", 0, 0, position, position, position, 0)

    @property
    def reach(self) -> tuple[int, int]:
        """The range before clamping."""
        ends = (self.offset, self.offset + self.top * self.step)
        return min(ends), max(ends)

    @property
    def free(self) -> bool:
        return self.reach == (self.low, self.high)

    def scaled(self, step: int, offset: int) -> _Index:
        low, high = sorted((self.low * step + offset, self.high * step + offset))
        return replace(
            self, step=self.step * step, offset=self.offset * step + offset, low=low, high=high
        )

    def kept(self, low: int, high: int) -> _Index:
        low, high = min(max(self.low, low), high), max(min(self.high, high), low)
        return _Index.at(low) if low == high else replace(self, low=low, high=high)

    @property
    def text(self) -> str:
        text = _sum_text({self.base: self.step} if self.base else {}, self.offset)
        if self.low > self.reach[0]:
            text = f"max({text}, {self.low})"
        if self.high < self.reach[1]:
            text = f"min({text}, {self.high})"
        return text


def _sum_text(factors: dict[str, int], constant: int) -> str:
    parts = [base if k == 1 else f"{base} * {k}" for base, k in factors.items() if k]
    text = " + ".join(parts)
    if not text:
        return str(constant)
    if constant:
        text += f" {'+' if constant > 0 else '-'} {abs(constant)}"
    return text


def _strides(shape: Shape) -> Shape:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class _Loop:
    """A loop over all elements of a shape, its counter and the index along each axis."""

    name: str
    shape: Shape
    depth: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the indices along the axes; the counter itself where there is one axis."""
        if sum(n > 1 for n in self.shape) == 1:
            return (self.name,) * len(self.shape)
        return tuple(f"{self.name}{axis}" for axis in range(len(self.shape)))

    @property
    def indices(self) -> tuple[_Index, ...]:
        sizes = zip(self.names, self.shape, strict=True)
        return tuple(_Index.of(name, n - 1, self.depth) for name, n in sizes)

    @property
    def strides(self) -> dict[str, int]:
        """Per running index, the stride of the counter."""
        each = zip(self.names, self.shape, _strides(self.shape), strict=True)
        return {name: stride for name, n, stride in each if n > 1}

    def definitions(self, body: str) -> list[str]:
        """Definitions of the indices that the body names."""
        lines = []
        whole = prod(self.shape)
        for name, stride in self.strides.items():
            if name != self.name and re.search(rf"\b{name}\b", body):
                text = self.name if stride == 1 else f"{self.name} / {stride}"
                n = self.shape[self.names.index(name)]
                lines.append(
                    f"const int {name} = {text}{'' if n * stride == whole else f' % {n}'};"
                )
        return lines


_Indices = tuple[_Index, ...]


def _offset(shape: Shape, indices: _Indices, loops: Sequence[_Loop]) -> str:
    """The offset in C order, by the loops' counters where these equal it."""
    factors: dict[str, int] = {}
    constant = 0
    for index, stride in zip(indices, _strides(shape), strict=True):
        if index.free:
            constant += index.offset * stride
            if index.base:
                factors[index.base] = factors.get(index.base, 0) + index.step * stride
        else:
            factors[index.text] = factors.get(index.text, 0) + stride
    for loop in loops:
        own = loop.strides
        if own and all(factors.get(name) == stride for name, stride in own.items()):
            factors = {k: v for k, v in factors.items() if k not in own}
            factors[loop.name] = 1
    return _sum_text(factors, constant)


def _before_reshape(old: Shape, new: Shape, indices: _Indices) -> _Indices:
    wide = [i for i, n in zip(indices, new, strict=True) if n > 1]
    if [n for n in old if n > 1] == [n for n in new if n > 1]:
        following = iter(wide)
        return tuple(next(following) if n > 1 else _Index.at(0) for n in old)
    flat = f"({_offset(new, indices, ())})"
    depth = max((i.depth for i in indices), default=0)
    if not depth:
        position = _constant_offset(new, indices)
        return tuple(
            _Index.at(position // stride % n) for n, stride in zip(old, _strides(old), strict=True)
        )
    return tuple(
        _Index.of(f"({flat} / {stride} % {n})", n - 1, depth)
        for n, stride in zip(old, _strides(old), strict=True)
    )


def _constant_offset(shape: Shape, indices: _Indices) -> int:
    """The offset in C order of constant indices."""
    return sum(i.offset * stride for i, stride in zip(indices, _strides(shape), strict=True))


# ---------------------------------------------------------------------- one loop nest


@dataclass
class _Text:
    text: str
    depth: int
    simple: bool
    """A name, a number or a load, which is not hoisted out of a loop."""
    closed: bool = True
    """Whether it needs no parentheses as an operand."""

    @property
    def operand(self) -> str:
        return self.text if self.closed else f"({self.text})"


@dataclass
class _Nest:
    """The statements of one or two nested loops, and those before them."""

    kernel: _Kernel
    loops: tuple[_Loop, ...]
    lines: list[list[str]] = field(init=False)
    """Per depth, the definitions."""
    _wanted: dict[Node, dict[_Indices, int]] = field(default_factory=dict)
    _texts: dict[tuple[Node, _Indices], _Text] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = [[] for _ in range(len(self.loops) + 1)]

    def want(self, node: Node, indices: _Indices) -> None:
        """Request an element, before `compute`."""
        node, indices = _resolved(node, indices)
        uses = self._wanted.setdefault(node, {})
        uses[indices] = uses.get(indices, 0) + 1

    def text(self, node: Node, indices: _Indices) -> str:
        """The element, after `compute`."""
        return self._texts[_resolved(node, indices)].text

    def compute(self) -> None:
        # The users of a node were created after it.
        waiting = [-node.number for node in self._wanted]
        nodes = {node.number: node for node in self._wanted}
        heapq.heapify(waiting)
        while waiting:
            node = nodes[-heapq.heappop(waiting)]
            for indices in tuple(self._wanted[node]):
                for argument in self._arguments(node, indices):
                    inner, _ = _resolved(*argument)
                    if inner.number not in nodes:
                        nodes[inner.number] = inner
                        heapq.heappush(waiting, -inner.number)
                    self.want(*argument)
        for node in sorted(self._wanted, key=lambda n: n.number):
            for indices, uses in self._wanted[node].items():
                text = self._say(node, indices)
                self._texts[node, indices] = text
                literal = node.op == "constant" and not text.depth
                if (uses > 1 and not literal) or len(text.text) > 80:
                    self._name(node, text)

    def _arguments(self, node: Node, indices: _Indices) -> list[tuple[Node, _Indices]]:
        if node.op in ("input", "constant") or node in self.kernel.places:
            return []
        if node.op in _REDUCTIONS:
            return _terms(node, indices)
        if node.op == "insert":
            inside, conditions = _inside(node, indices)
            found = [(node.args[1], inside)] if conditions is not None else []
            return found if conditions == [] else [(node.args[0], indices), *found]
        return [(a, _broadcast(node, a, indices)) for a in node.args]

    def _say(self, node: Node, indices: _Indices) -> _Text:
        if node.op == "constant" or node.op == "input" or node in self.kernel.places:
            return self._load(node, indices)
        args = []
        entries = [
            (argument, self._texts[_resolved(*argument)])
            for argument in self._arguments(node, indices)
        ]
        own = [i.depth for i in indices] if node.op == "insert" else [0]
        depth = max([*own, *(entry.depth for _, entry in entries)])
        for argument, entry in entries:
            if entry.depth < depth and not entry.simple:
                self._name(argument[0], entry)
            args.append(entry.operand)
        if node.op == "where":
            text = f"{args[0]} ? {args[1]} : {args[2]}"
        elif node.op == "cast":
            return _Text(f"double({entries[0][1].text})", depth, False)
        elif node.op == "insert":
            conditions = _inside(node, indices)[1]
            if not conditions:
                return entries[0][1]
            text = f"{' && '.join(conditions)} ? {args[1]} : {args[0]}"
        elif node.op in _REDUCTIONS:
            return self._joined(node.op, args, depth)
        elif node.op in ("power", "float_power") and (power := _power(node.args[1])) is not None:
            if node.args[0].op != "constant":
                self._name(node.args[0], entries[0][1])
            text = power.format(entries[0][1].operand)
        elif node.op in _CALLS:
            inner = ", ".join(entry.text for _, entry in entries)
            return _Text(f"{_CALLS[node.op]}({inner})", depth, False)
        else:
            text = _OPERATORS[node.op].format(*args)
        return _Text(text, depth, False, False)

    def _joined(self, op: str, args: list[str], depth: int) -> _Text:
        if op in ("max", "min"):
            text = args[0]
            for other in args[1:]:
                text = f"fl_{op}imum({text}, {other})"
            return _Text(text, depth, False)
        joint = {"sum": " + ", "prod": " * ", "any": " || ", "all": " && "}[op]
        return _Text(joint.join(args), depth, False, False)

    def _load(self, node: Node, indices: _Indices) -> _Text:
        depth = max((i.depth for i in indices), default=0)
        if node.op == "constant":
            array = node.params[0]
            if not array.ndim:
                return _Text(_literal(array), 0, True)
            if not depth:
                return _Text(_literal(array[tuple(i.offset for i in indices)]), 0, True)
        if prod(node.shape) == 1:
            place = "0"
        else:
            place = _offset(node.shape, indices, self.loops)
        if node.op == "constant":
            return _Text(f"{self.kernel.table(node)}[{place}]", depth, True)
        if node.op == "input":
            name = node.params[0]
            text = f"call.numbers[{place}]" if name == "numbers" else f"{name}[{place}]"
            is_double = name in ("sums", "voxels", "joined", "numbers")
            return _Text(text if is_double else f"double({text})", depth, True)
        first = self.kernel.places[node]
        place = str(first + int(place)) if place.isdigit() else _sum_text({place: 1}, first)
        text = f"scratch[{place}]"
        if node.dtype == BOOL:
            return _Text(f"{text} != 0.0", depth, True, False)
        return _Text(text, depth, True)

    def _name(self, node: Node, text: _Text) -> None:
        """Define a C++ constant for it, outside the loops that it does not depend on."""
        if re.fullmatch(r"\w+", text.text):
            return
        name = self.kernel.name()
        kind = "bool" if node.dtype == BOOL else "double"
        self.lines[text.depth].append(f"const {kind} {name} = {text.text};")
        text.text, text.simple, text.closed = name, True, True


def _resolved(node: Node, indices: _Indices) -> tuple[Node, _Indices]:
    """The element of which this one is a view."""
    while node.op in _VIEWS:
        (inner,) = node.args
        if node.op == "reshape":
            indices = _before_reshape(inner.shape, node.shape, indices)
        elif node.op == "broadcast":
            indices = _broadcast(node, inner, indices)
        elif node.op == "transpose":
            order = node.params[0]
            indices = tuple(indices[order.index(axis)] for axis in range(len(order)))
        else:
            indices = tuple(i.scaled(k, a) for i, a, k in zip(indices, *node.params, strict=True))
            indices = tuple(_Index.at(i.low) if i.low == i.high else i for i in indices)
        node = inner
    return node, indices


def _broadcast(node: Node, inner: Node, indices: _Indices) -> _Indices:
    own = indices[len(node.shape) - len(inner.shape) :]
    return tuple(i if n > 1 else _Index.at(0) for i, n in zip(own, inner.shape, strict=True))


def _inside(node: Node, indices: _Indices) -> tuple[_Indices, list[str] | None]:
    """For an insert: the index into the part, and the condition for being inside; None: never."""
    inside, conditions = [], []
    for index, start, n in zip(indices, node.params[0], node.args[1].shape, strict=True):
        if index.high < start or index.low >= start + n:
            return (), None
        if index.low < start:
            conditions.append(f"{index.text} >= {start}")
        if index.high >= start + n:
            conditions.append(f"{index.text} < {start + n}")
        inside.append(index.scaled(1, -start).kept(0, n - 1))
    return tuple(inside), conditions


def _terms(node: Node, indices: _Indices) -> list[tuple[Node, _Indices]]:
    """The elements of a small reduction."""
    (inner,), (axes,) = node.args, node.params
    choices: list[tuple[_Index, ...]] = []
    kept = iter(indices)
    for axis, n in enumerate(inner.shape):
        choices.append(tuple(map(_Index.at, range(n))) if axis in axes else (next(kept),))
    return [(inner, chosen) for chosen in product(*choices)]


def _power(exponent: Node) -> str | None:
    if exponent.op != "constant" or exponent.params[0].ndim:
        return None
    return _OTHER_POWERS.get(float(exponent.params[0]))


def _literal(value: np.ndarray) -> str:
    if value.dtype == BOOL:
        return "true" if value else "false"
    number = float(value)
    if np.isnan(number):
        return "fl_nan()"
    if np.isinf(number):
        return "fl_infinity()" if number > 0 else "(-fl_infinity())"
    return repr(number) if np.copysign(1.0, number) > 0 else f"({number!r})"


# ---------------------------------------------------------------------- a kernel


class _Kernel:
    """Code for one block that computes and writes some arrays."""

    def __init__(self, stores: Sequence[Store], tables: dict[Node, str]) -> None:
        self.tables = tables
        self.places: dict[Node, int] = {}
        """The offsets of reductions' results in the scratch memory."""
        self.partials = 0
        self._names = 0
        self.lines: list[str] = []
        self._stores = [s for s in stores if s.node.size]
        self.levels = self._plan()
        self.scratch = sum(node.size for node in self.places)
        self._emit()

    def name(self) -> str:
        self._names += 1
        return f"v{self._names - 1}"

    def table(self, node: Node) -> str:
        return self.tables.setdefault(node, f"fl_table{len(self.tables)}")

    def _plan(self) -> dict[Node, int]:
        """How many barriers precede each node; and the offset of each reduction's result."""
        levels: dict[Node, int] = {}
        costs: dict[Node, int] = {}
        place = 0
        for node in reachable([s.node for s in self._stores]):
            level = max((levels[a] for a in node.args), default=0)
            cost = sum(costs[a] for a in node.args)
            if node.op in _REDUCTIONS:
                if prod(node.args[0].shape) // node.size <= 4 and cost <= 2:
                    cost += 4  # the most for a reduction inside a reduction
                else:
                    self.places[node] = place
                    place += node.size
                    level, cost = level + 1, 0
            elif node.op not in ("input", "constant", *_VIEWS):
                cost += 1
            levels[node], costs[node] = level, min(cost, 100)
        return levels

    def _emit(self) -> None:
        stores = list(self._stores)
        last = max(self.levels.values(), default=0)
        for level in range(1, last + 1):
            flat: dict[Shape, list[Node]] = {}
            rows: dict[tuple[Shape, Shape], list[Node]] = {}
            for node in self.places:
                if self.levels[node] == level:
                    inner = node.args[0].shape
                    if node.size == 1:
                        flat.setdefault(_wide(inner), []).append(node)
                    else:
                        rows.setdefault((inner, node.params[0]), []).append(node)
            finish: list[str] = []
            for shape, nodes in flat.items():
                ready = [
                    s
                    for s in stores
                    if _wide(s.node.shape) == shape and self.levels[s.node] < level
                ]
                stores = [s for s in stores if s not in ready]
                finish += self._flat(shape, nodes, ready)
            for (shape, axes), nodes in rows.items():
                self._rows(shape, axes, nodes)
            self.lines.append("__syncthreads();")
            if finish:
                self.lines += [*finish, "__syncthreads();"]
        groups: dict[Shape, list[Store]] = {}
        for store in stores:
            groups.setdefault(_wide(store.node.shape), []).append(store)
        for shape, group in groups.items():
            self._flat(shape, [], group)

    def _flat(self, shape: Shape, nodes: list[Node], stores: list[Store]) -> list[str]:
        """A loop over a shape: reductions to one number each, and stores. Returns the statements to
        be done after a barrier."""
        loop = _Loop("i", shape, 1)
        nest = _Nest(self, (loop,))
        for node in nodes:
            nest.want(node.args[0], _indices(node.args[0].shape, loop.indices))
        for store in stores:
            nest.want(store.node, _indices(store.node.shape, loop.indices))
        nest.compute()
        body = []
        for k, node in enumerate(nodes):
            body.append(
                _join(node, f"a{k}", nest.text(node.args[0], _indices_of(node, loop.indices)))
            )
        for store in stores:
            text = nest.text(store.node, _indices(store.node.shape, loop.indices))
            place = _offset(shape, loop.indices, (loop,))
            place = place if not store.first else _sum_text({place: 1}, store.first)
            place = str(store.first) if not shape else place
            if store.type != "double":
                text = f"static_cast<{store.type}>({text})"
            body.append(f"{store.target}[{place}] = {text};")
        size = prod(shape)
        one_warp = size <= 32
        counter = (
            f"if (const int i = threadIdx.x; i < {size}) {{"
            if size <= THREADS
            else f"for (int i = threadIdx.x; i < {size}; i += {THREADS}) {{"
        )
        lines = [*nest.lines[0], *(_accumulator(node, f"a{k}") for k, node in enumerate(nodes))]
        inner = [*nest.lines[1], *body]
        lines += [counter, *_indented(loop.definitions("\n".join(inner)) + inner), "}"]
        finish: list[str] = []
        for k, node in enumerate(nodes):
            functor, _ = _REDUCTIONS[node.op]
            lines.append(f"a{k} = fl_of_warp<{functor}>(a{k});")
            place = f"scratch[{self.places[node]}]"
            if one_warp:
                lines.append(f"if (threadIdx.x == 0) {place} = a{k};")
            else:
                first = self.partials * WARPS
                lines.append(
                    f"if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32 + {first}] = a{k};"
                )
                finish.append(
                    f"if (threadIdx.x == {self.partials % THREADS}) "
                    f"{place} = fl_of_warps<{functor}>(partials + {first});"
                )
                self.partials += 1
        guard = "if (threadIdx.x < 32) {" if nodes and one_warp else "{"
        self.lines += [guard, *_indented(lines), "}"]
        return finish

    def _rows(self, shape: Shape, axes: Shape, nodes: list[Node]) -> None:
        """Reductions over some axes: one thread per result, or a warp per long one."""
        kept = tuple(n for axis, n in enumerate(shape) if axis not in axes)
        gone = tuple(n for axis, n in enumerate(shape) if axis in axes)
        outer, inner = _Loop("r", kept, 1), _Loop("k", gone, 2)
        outside, inside = iter(outer.indices), iter(inner.indices)
        indices = tuple(next(inside if axis in axes else outside) for axis in range(len(shape)))
        nest = _Nest(self, (outer, inner))
        for node in nodes:
            nest.want(node.args[0], indices)
        nest.compute()
        results, length = prod(kept), prod(gone)
        warps = length > 16
        joins = [_join(n, f"a{k}", nest.text(n.args[0], indices)) for k, n in enumerate(nodes)]
        deep = [*nest.lines[2], *joins]
        deep = inner.definitions("\n".join(deep)) + deep
        lines = [*nest.lines[1], *(_accumulator(node, f"a{k}") for k, node in enumerate(nodes))]
        first, step = ("threadIdx.x % 32", 32) if warps else ("0", 1)
        lines.append(f"for (int k = {first}; k < {length}; k += {step}) {{")
        lines += [*_indented(deep), "}"]
        for k, node in enumerate(nodes):
            place = self.places[node]
            store = f"scratch[{_sum_text({'r': 1}, place)}] = a{k};"
            if warps:
                lines.append(f"a{k} = fl_of_warp<{_REDUCTIONS[node.op][0]}>(a{k});")
                store = f"if (threadIdx.x % 32 == 0) {store}"
            lines.append(store)
        lines = outer.definitions("\n".join(lines)) + lines
        first, step = ("threadIdx.x / 32", WARPS) if warps else ("threadIdx.x", THREADS)
        head = f"for (int r = {first}; r < {results}; r += {step}) {{"
        self.lines += ["{", *_indented([*nest.lines[0], head, *_indented(lines), "}"]), "}"]

    def source(
        self, name: str, value_type: str, shared: bool, given: tuple[str, ...], begin: str
    ) -> str:
        body = "\n".join(self.lines)
        head = [
            f"const {kind}* __restrict__ given{k} = static_cast<const {kind}*>(call.given[{k}]);"
            for k, kind in enumerate(given)
            if f"given{k}[" in body
        ]
        for pointer, kind in (
            ("sums", "const double"),
            ("voxels", "const double"),
            ("joined", "const double"),
            ("upstream", f"const {value_type}"),
            ("value", value_type),
            ("derivatives", "double"),
        ):
            if re.search(rf"\b{pointer}\[", body):
                # Memory that the kernel may itself write is not read through the constant cache.
                alone = "" if begin and pointer in ("sums", "voxels") else "__restrict__ "
                head.append(f"{kind}* {alone}{pointer} = static_cast<{kind}*>(call.{pointer});")
        if self.scratch:
            head.append(
                f"__shared__ double scratch[{self.scratch}];"
                if shared
                else "double* scratch = call.scratch;"
            )
        if self.partials:
            head.append(f"__shared__ double partials[{self.partials * WARPS}];")
        lines = _indented([*begin.splitlines(), *head, *self.lines])
        return "\n".join(
            [
                f'extern "C" __global__ void __launch_bounds__({THREADS})',
                f"{name}(const CombineCall call) {{",
                *lines,
                "}",
                "",
            ]
        )


def _wide(shape: Shape) -> Shape:
    return tuple(n for n in shape if n > 1)


def _indices(shape: Shape, wide: _Indices) -> _Indices:
    """All indices of an array, from those along its axes of more than one element."""
    following = iter(wide)
    return tuple(next(following) if n > 1 else _Index.at(0) for n in shape)


def _indices_of(node: Node, wide: _Indices) -> _Indices:
    return _indices(node.args[0].shape, wide)


def _accumulator(node: Node, name: str) -> str:
    return f"double {name} = {_REDUCTIONS[node.op][1]};"


def _join(node: Node, name: str, text: str) -> str:
    if node.op == "sum":
        return f"{name} += {text};"
    return f"{name} = {_REDUCTIONS[node.op][0]}::of({name}, {text});"


def _indented(lines: Sequence[str]) -> list[str]:
    return ["  " + line for line in lines]


def generate(
    struct: str,
    value_type: str,
    kernels: dict[str, list[Store]],
    given: tuple[str, ...] = (),
    begin: dict[str, str] | None = None,
) -> tuple[str, int]:
    """The kernels' source, and how many doubles of global scratch memory they need.

    Args:
        struct: the definition of the argument, ``CombineCall``.
        value_type: "float" or "double".
        kernels: per name, what it writes.
        given: the types of the inputs "given0", "given1", ….
        begin: per name, code that runs before the kernel reads its inputs, followed by a barrier.
    """
    begin = begin or {}
    tables: dict[Node, str] = {}
    made = {name: _Kernel(stores, tables) for name, stores in kernels.items()}
    scratch = 0
    texts = []
    for name, kernel in made.items():
        shared = kernel.scratch + kernel.partials * WARPS <= SHARED_DOUBLES
        scratch = max(scratch, 0 if shared else kernel.scratch)
        texts.append(kernel.source(name, value_type, shared, given, begin.get(name, "")))
    return "\n".join([struct, HELPERS, *map(_table, tables.items()), "", *texts]), scratch


def _table(item: tuple[Node, str]) -> str:
    node, name = item
    array = node.params[0]
    kind = "bool" if array.dtype == BOOL else "double"
    rows = [array.reshape(-1)[k : k + 8] for k in range(0, array.size, 8)]
    text = ",\n    ".join(", ".join(map(_literal, row)) for row in rows)
    return f"FL_TABLE {kind} {name}[{array.size}] = {{\n    {text}}};"
