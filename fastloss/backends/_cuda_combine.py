"""The combine step of a loss for a GPU: recorded once per shape, then one block of threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.backends._cuda_code import Store, generate
from fastloss.backends._cuda_graph import Graph, Node, evaluate
from fastloss.backends._cuda_trace import Traced
from fastloss.loss import Loss
from fastloss.request import Request
from fastloss.statistics import Statistics

_STRUCT = """\
struct CombineCall {
  const double* sums;    // (S, B, C)
  const double* voxels;  // (B)
  const double* joined;  // (S * C + 1): sums and voxels over all ranks, or null
  void* value;
  double* derivatives;   // (S, B, C)
  const void* upstream;  // as the value
  double* scratch;       // null where the program asks for none
};"""
COMBINE_CALL = np.dtype(
    [
        (name, np.uint64)
        for name in ("sums", "voxels", "joined", "value", "derivatives", "upstream", "scratch")
    ]
)
"""The struct as bytes: addresses."""


class Program:
    """The combine step of one loss, for sums of one shape.

    Attributes:
        value_shape: the shape of the loss value.
        sources: CUDA C++ of the kernels, for one block of 256 threads each, that take a
            ``CombineCall`` of device pointers. ``fastloss_combine`` writes the value, and if that
            is one number its derivatives as well. If not, ``fastloss_pullback`` writes those for
            an upstream gradient.
        scratch_doubles: how many doubles of global memory the kernels need beside; mostly 0.
    """

    def __init__(
        self, value: Node, derivatives: list[Node], value_dtype: np.dtype, slot_size: int
    ) -> None:
        self.value_shape = value.shape
        self._value, self._derivatives = value, derivatives
        value_type = {4: "float", 8: "double"}[value_dtype.itemsize]
        stores = [Store(value, "value", type=value_type)]
        pullback = [
            Store(node, "derivatives", slot * slot_size) for slot, node in enumerate(derivatives)
        ]
        kernels = {"fastloss_combine": stores, "fastloss_pullback": pullback}
        if not self.value_shape:
            kernels = {"fastloss_combine": stores + pullback}
        self.sources, self.scratch_doubles = generate(_STRUCT, value_type, kernels)

    def evaluate(
        self,
        sums: np.ndarray,
        voxels: np.ndarray,
        upstream: Any = 1.0,
        joined: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The value and the derivatives (S, B, C), in NumPy: what the kernels should give.

        Args:
            upstream: an array of the value's shape, or a number.
            joined: (S · C + 1), what terms that join ranks read.
        """
        upstream = np.broadcast_to(np.asarray(upstream, np.float64), self.value_shape)
        inputs = {"sums": sums, "voxels": voxels, "upstream": upstream}
        if joined is not None:
            inputs["joined"] = joined
        value, *derivatives = evaluate([self._value, *self._derivatives], inputs)
        stacked = np.stack(derivatives)
        return value, stacked if self.value_shape else stacked * upstream


def trace(
    loss: Loss,
    request: Request,
    batch: int,
    classes: int,
    value_dtype: np.dtype,
    regions: int = 0,
) -> Program:
    """The combine step of a loss whose sums are (S, batch, classes), by the request's sums.

    ``regions``: how many rows of the ``batch`` a sample has; 0 where a row is a sample.

    Raises:
        TypeError: a formula of the loss does what cannot be recorded: it branches on its sums, or
            uses functions beyond those that the message lists.
    """
    value_dtype = np.dtype(value_dtype)
    graph = Graph()
    shape = (len(request.sums), batch, classes)
    sums = graph.input("sums", shape)
    voxels = graph.input("voxels", (batch,))
    joined = None
    if any(term.joins_ranks for _, term in loss.terms):
        count = shape[0] * classes
        both = _as_array(graph, graph.input("joined", (count + 1,)))
        joined_sums = both[:count].reshape(shape[0], 1, classes)
        joined = Statistics(request, joined_sums, both[count:], value_dtype)
    statistics = Statistics(
        request, _as_array(graph, sums), _as_array(graph, voxels), value_dtype, joined, regions
    )
    with np.errstate(all="ignore"):
        total, pullback = loss.formulas(statistics)
        # A fault of the data must not get lost where a formula does without what it made NaN.
        faults = np.where(np.isnan(statistics.voxels), np.nan, 0.0)
        rows = np.ndim(total) == 2 and np.shape(total)[0] == batch
        total = total + (faults[:, None] if rows else faults.sum())
        value = graph.as_float(_node(graph, total))
        upstream: Any = 1.0
        if value.shape:
            upstream = _as_array(graph, graph.input("upstream", value.shape))
        coefficients = pullback(upstream) + faults[:, None]
    derivatives: list[Node] = [_node(graph, coefficients[slot]) for slot in range(shape[0])]
    return Program(value, derivatives, value_dtype, batch * classes)


def _as_array(graph: Graph, node: Node) -> Any:
    """For formulas, whose arguments are NumPy arrays."""
    return Traced(graph, node)


def _node(graph: Graph, value: Any) -> Node:
    return value.node if isinstance(value, Traced) else graph.constant(value)
