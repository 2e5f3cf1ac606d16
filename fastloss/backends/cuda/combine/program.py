"""The combine step of a loss for a GPU: recorded once per shape, then one block of threads."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

import numpy as np

from fastloss.backends.cuda.combine.code import THREADS, Store, generate
from fastloss.backends.cuda.combine.graph import Graph, Node, evaluate
from fastloss.backends.cuda.combine.traced import Traced
from fastloss.backends.cuda.operands import HOST, MOST, Layout, recorded_of
from fastloss.backends.cuda.source import source
from fastloss.protocol import FusedLoss
from fastloss.request import Request
from fastloss.statistics import Statistics

_STRUCT = """\
struct CombineCall {{
  double* sums;          // (S, B, C)
  double* voxels;        // (B)
  const double* joined;  // (S * C + 1): sums and voxels over all ranks, or null
  void* value;
  double* derivatives;   // (S, B, C)
  const void* upstream;  // as the value
  double* scratch;       // null where the program asks for none
  const void* partial;   // (B, blocks, S * C + 2): what sums and voxels are made of, or null
  long long is_narrow;   // whether these are float32, not float64
  long long blocks;
{numbers}}};"""
_FIELDS = 10  # before the numbers
_FINISH = """\
const int blocks = int(call.blocks);
if (call.partial == nullptr) {{
}} else if (call.is_narrow) {{
  fl_finish<{threads}>(static_cast<const float*>(call.partial), blocks, {batch}, {slots}, {classes},
                       call.sums, call.voxels);
}} else {{
  fl_finish<{threads}>(static_cast<const double*>(call.partial), blocks, {batch}, {slots},
                       {classes}, call.sums, call.voxels);
}}"""


class Program:
    """The combine step of one loss, for sums of one shape.

    Attributes:
        value_shape: the shape of the loss value.
        sources: CUDA C++ of the kernels, for one block of `THREADS` each, that take a
            ``CombineCall`` of device pointers. ``fastloss_combine`` first adds up the sums if it is
            given those of the blocks; it writes the value and, if that is one number, its
            derivatives as well. Otherwise ``fastloss_pullback`` writes the derivatives for an
            upstream gradient.
        scratch_doubles: how many doubles of global scratch memory the kernels need; mostly 0.
        takes_along: whether the host's numbers are launch arguments; if there are too many, their
            address is.
    """

    def __init__(
        self,
        value: Node,
        derivatives: list[Node],
        value_dtype: np.dtype,
        shape: tuple[int, int, int],
        host_numbers: int,
        given: tuple[str, ...],
    ) -> None:
        slots, batch, classes = shape
        self.value_shape = value.shape
        self._value, self._derivatives = value, derivatives
        value_type = {4: "float", 8: "double"}[value_dtype.itemsize]
        stores = [Store(value, "value", type=value_type)]
        pullback = [
            Store(node, "derivatives", slot * batch * classes)
            for slot, node in enumerate(derivatives)
        ]
        kernels = {"fastloss_combine": stores, "fastloss_pullback": pullback}
        if not self.value_shape:
            kernels = {"fastloss_combine": stores + pullback}
        self.takes_along = host_numbers <= MOST
        fields = ""
        if given:
            fields += f"  const void* given[{len(given)}];  // numbers of the loss\n"
        if host_numbers:
            others = f"double numbers[{host_numbers}]" if self.takes_along else "double* numbers"
            fields += f"  {others};  // the others\n"
        types = tuple({"float32": "float", "float64": "double"}[dtype] for dtype in given)
        struct = _STRUCT.format(numbers=fields)
        finish = _FINISH.format(threads=THREADS, batch=batch, slots=slots, classes=classes)
        begin = {"fastloss_combine": finish}
        text = f"{source('finish_all.h')}\n{struct}"
        self.sources, self.scratch_doubles = generate(text, value_type, kernels, types, begin)
        along = host_numbers if self.takes_along else 1
        self._layout = Struct(f"={_FIELDS + len(given)}Q{8 * along}s")
        self._record = np.dtype(("V", self._layout.size))

    def call(
        self,
        given: tuple[int, ...],
        numbers: bytes,
        *,
        sums: int,
        voxels: int,
        value: int,
        derivatives: int,
        joined: int = 0,
        upstream: int = 0,
        scratch: int = 0,
        partial: int = 0,
        is_narrow: int = 0,
        blocks: int = 0,
    ) -> np.ndarray:
        """The ``CombineCall``, (1,), of the addresses that it names.

        Args:
            given: the addresses of the numbers that are on the device.
            numbers: the others, float64, or their address if they are not launch arguments.
        """
        given_first = (sums, voxels, joined, value, derivatives, upstream, scratch)
        fields = (*given_first, partial, is_narrow, blocks)
        return np.frombuffer(bytearray(self._layout.pack(*fields, *given, numbers)), self._record)

    def evaluate(
        self,
        sums: np.ndarray,
        voxels: np.ndarray,
        numbers: np.ndarray,
        upstream: Any = 1.0,
        joined: np.ndarray | None = None,
        given: Sequence[np.ndarray] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """The value and the derivatives (S, B, C), in NumPy: the expected results of the kernels.

        Args:
            numbers, given: those of the loss, as `call` takes them.
            upstream: an array of the value's shape, or a number.
            joined: (S · C + 1), the sums over all ranks, for terms that join ranks.
        """
        upstream = np.broadcast_to(np.asarray(upstream, np.float64), self.value_shape)
        inputs = {"sums": sums, "voxels": voxels, "upstream": upstream, "numbers": numbers}
        inputs.update((f"given{k}", array) for k, array in enumerate(given))
        if joined is not None:
            inputs["joined"] = joined
        value, *derivatives = evaluate([self._value, *self._derivatives], inputs)
        stacked = np.stack(derivatives)
        return value, stacked if self.value_shape else stacked * upstream


def trace(
    loss: FusedLoss,
    request: Request,
    batch: int,
    classes: int,
    value_dtype: np.dtype,
    layout: Layout | None = None,
    regions: int = 0,
    for_target: bool = False,
) -> Program:
    """The combine step of a loss whose sums are (S, batch, classes), by the request's sums.

    Args:
        layout: where the numbers of the loss will be; None: all are launch arguments.
        regions: how many rows of the ``batch`` a sample has; 0 where a row is a sample.
        for_target: whether there are derivatives by the sums of the target alone.

    Raises:
        TypeError: a formula of the loss cannot be recorded: it branches on its sums, or uses
            functions beyond those that the message lists.
    """
    value_dtype = np.dtype(value_dtype)
    shape = (len(request.sums), batch, classes)
    if layout is None:
        layout = tuple(
            HOST if recorded else operand.tobytes()
            for operand, recorded in zip(loss.operands, recorded_of(loss), strict=True)
        )
    value, derivatives = record(
        loss, request, batch, classes, value_dtype, layout, regions, for_target
    )
    types = tuple(where for where in layout if where in ("float32", "float64"))
    host = sum(len(o) for o, where in zip(loss.operands, layout, strict=True) if where == HOST)
    return Program(value, derivatives, value_dtype, shape, host, types)


def record(
    loss: FusedLoss,
    request: Request,
    batch: int,
    classes: int,
    value_dtype: np.dtype,
    layout: Layout,
    regions: int = 0,
    for_target: bool = False,
) -> tuple[Node, list[Node]]:
    """The value, and the derivative by each sum, as graphs of the inputs that `evaluate` lists.

    Arguments and errors as in `trace`.
    """
    graph = Graph()
    shape = (len(request.sums), batch, classes)
    sums = graph.input("sums", shape)
    voxels = graph.input("voxels", (batch,))
    numbers, given = _numbers(graph, loss, layout)
    joined = None
    if any(term.joins_ranks for _, term in loss.terms):
        count = shape[0] * classes
        both = _as_array(graph, graph.input("joined", (count + 1,)))
        joined_sums = both[:count].reshape(shape[0], 1, classes)
        joined = Statistics(request, joined_sums, both[count:], value_dtype)
    statistics = Statistics(
        request,
        _as_array(graph, sums),
        _as_array(graph, voxels),
        value_dtype,
        joined,
        regions,
        for_target,
    )
    with np.errstate(all="ignore"):
        total, pullback = loss.with_operands(numbers).formulas(statistics)
        # Faults in the data make the value NaN even if the formula ignores the sums that are NaN,
        faults = np.where(np.isnan(statistics.voxels), np.nan, 0.0)
        for array, largest in given:  # and so do bad weights, which nothing has checked
            fits = (array >= 0) & (array <= largest) & (array < np.inf)
            faults = faults + np.where(fits, 0.0, np.nan).sum()
        rows = np.ndim(total) == 2 and np.shape(total)[0] == batch
        total = total + (faults[:, None] if rows else faults.sum())
        value = graph.as_float(_node(graph, total))
        upstream: Any = 1.0
        if value.shape:
            upstream = _as_array(graph, graph.input("upstream", value.shape))
        coefficients = pullback(upstream) + faults[:, None]
    return value, [_node(graph, coefficients[slot]) for slot in range(shape[0])]


def _numbers(
    graph: Graph, loss: FusedLoss, layout: Layout
) -> tuple[list[Any], list[tuple[Any, float]]]:
    """The operands of the loss; and the unchecked ones, with their upper bounds."""
    operands: list[Any] = []
    unchecked: list[tuple[Any, float | None]] = []
    bounds: list[float | None] = [None]  # factors may be anything
    for _, term in loss.terms:
        for name in term.described.names:
            bounds.append(None if term.signed else term.largest(name, loss.activation))
    sizes = [len(operand) for operand in loss.operands]
    host = sum(n for n, where in zip(sizes, layout, strict=True) if where == HOST)
    along = _as_array(graph, graph.input("numbers", (host,)))
    start = 0
    for size, where, largest in zip(sizes, layout, bounds, strict=True):
        if isinstance(where, bytes):
            operands.append(np.frombuffer(where))
        elif where == HOST:
            operands.append(along[start : start + size])
            start += size
        else:
            array = _as_array(graph, graph.input(f"given{len(unchecked)}", (size,)))
            operands.append(array)
            unchecked.append((array, largest))
    return operands, [(array, bound) for array, bound in unchecked if bound is not None]


def _as_array(graph: Graph, node: Node) -> Any:
    """Wrap a node for formulas, whose arguments are NumPy arrays."""
    return Traced(graph, node)


def _node(graph: Graph, value: Any) -> Node:
    return value.node if isinstance(value, Traced) else graph.constant(value)
