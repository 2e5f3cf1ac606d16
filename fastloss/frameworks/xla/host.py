"""The steps of a loss on arrays in CPU memory, as a compiled program names them.

What is to be computed is a text, as it may be kept in a program that another process runs.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends import use_backend
from fastloss.borrowed import Extras
from fastloss.naming import loss_of
from fastloss.request import make_request
from fastloss.statistics import Statistics


class Call(NamedTuple):
    """A step of a loss, and which arrays there are.

    Attributes:
        step: the name of a function of `STEPS`.
        structure, numbers: the loss.
        backend: the name of the one that `fastloss.use_backend` chose; empty for the default.
        rank: the number of axes of the first operand; more of them are those of `jax.vmap`.
        weighted: whether there are voxel weights.
        fields: the names of the fields that are given.
        regions: how many regions a sample has; 0: none are given.
        dense: whether the target is dense.
        sums: (S, rows, C), the shape of the sums. Between the passes on one device it is the
            statistics that tell how many rows there are.
        value: the shape of the value.
        dtype: of the value.
        reuses: whether the gradient may take the place of the logits.
        parts: over how many devices the data lies.
        shard: "batch" where each has other samples, "volume" where each has parts of them.
    """

    step: str
    structure: str
    numbers: tuple[float, ...]
    backend: str
    rank: int
    weighted: bool = False
    fields: tuple[str, ...] = ()
    regions: int = 0
    dense: bool = False
    sums: tuple[int, int, int] = (0, 0, 0)
    value: tuple[int, ...] = ()
    dtype: str = "float32"
    reuses: bool = False
    parts: int = 1
    shard: str = ""

    @property
    def text(self) -> str:
        return json.dumps(self)

    @property
    def arrays(self) -> int:
        """How many arrays a call of the loss takes."""
        return 2 + self.weighted + len(self.fields) + (self.regions > 0)

    @property
    def loss(self) -> Any:
        return loss_of(self.structure, np.array(self.numbers, np.float64))

    def passes(self, arrays: Sequence[Any]) -> Any:
        logits, target, *others = arrays[: self.arrays]
        weight = others.pop(0) if self.weighted else None
        regions = others.pop() if self.regions else None
        extras = None
        if self.fields or self.regions:
            named = tuple(zip(self.fields, others, strict=True))
            extras = Extras(named, regions, self.regions or None)
        return self.loss.passes(logits, target, weight, extras)


@lru_cache(maxsize=1024)
def _call_of(text: bytes) -> Call:
    parts: list[Any] = json.loads(text)
    return Call._make(tuple(part) if isinstance(part, list) else part for part in parts)


def run(text: bytes, operands: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
    """Compute what the text says, and write it to the results."""
    call = _call_of(text)
    step = STEPS[call.step]
    with use_backend(call.backend) if call.backend else nullcontext():
        more = operands[0].ndim - call.rank
        if not more:
            step(call, operands, results)
            return
        for index in np.ndindex(*results[0].shape[:more]):
            place = (*index, Ellipsis)  # of numbers too views
            step(call, [_at(index, o) for o in operands], [r[place] for r in results])


def _at(index: tuple[int, ...], operand: np.ndarray) -> np.ndarray:
    """The part of an operand; of one that is the same for all of an axis there is one."""
    own: Any = (*(i if n > 1 else 0 for i, n in zip(index, operand.shape, strict=False)), ...)
    part: np.ndarray = operand[own]
    return part


# ------------------------------------------------------------------ the steps


def _value(call: Call, operands: Any, results: Any) -> None:
    """Arrays → value, statistics."""
    value, statistics = results
    passes = call.passes(operands)
    if passes.loss.maps_voxels:
        value[...] = passes.forward()[0]
        return
    found = passes.reduce()
    value[...] = passes.combine(found)[0]
    if statistics.size:
        both = statistics.view(np.float64)
        both[: found.sums.size] = found.sums.reshape(-1)
        both[found.sums.size :] = found.voxels


def _gradient(call: Call, operands: Any, results: Any) -> None:
    """Arrays, statistics, upstream → gradient."""
    *arrays, statistics, upstream = operands
    passes = call.passes(arrays)
    if passes.loss.maps_voxels:
        coefficients: Any = passes.pull_map(upstream)
    else:
        both = np.ascontiguousarray(statistics).view(np.float64)
        slots, _, classes = call.sums
        rows = both.size // (slots * classes + 1)
        size = slots * rows * classes
        found = Statistics(
            passes.request,
            both[:size].reshape(slots, rows, classes),
            both[size:],
            passes.arrays.value_dtype,
            None,
            call.regions,
        )
        coefficients = passes.combine(found)[1](upstream)
    passes.apply(coefficients, passes.borrow_output(results[0]))


def _fields(call: Call, operands: Any, results: Any) -> None:
    """Arrays → the fields that the loss makes of them."""
    passes = call.passes(operands)
    made = dict(passes.whole_extras.fields)
    for name, result in zip(passes.loss.lacks(call.fields), results, strict=True):
        result[...] = made[name]


# Of data over several devices the statistics are joined between the passes. There they are numbers
# that JAX adds: a float64 is the sum of two float32 where JAX may have no float64.


def count(call: Call) -> int:
    """How many numbers the statistics are: sums, voxels, and whether there was an error."""
    return prod(call.sums) + call.sums[1] + 1


_faults: deque[str] = deque(maxlen=16)
"""What was wrong with the arrays of a device. It is raised once the statistics are joined, as the
other devices would wait for those of this one for ever."""


def _statistics(call: Call, operands: Any, results: Any) -> None:
    """Arrays → statistics, (count,) of float64 or (2, count) of float32."""
    found = np.zeros(count(call))
    try:
        sums = call.passes(operands).reduce(whole=False)
    except (ValueError, TypeError) as error:
        _faults.append(str(error))
        found[-1] = 1.0
    else:
        found[:-1] = np.concatenate([sums.sums.reshape(-1), sums.voxels])
    (result,) = results
    if result.ndim == 1:
        result[...] = found
        return
    with np.errstate(invalid="ignore", over="ignore"):
        result[0] = found
        rest = found - result[0]
    result[1] = np.where(np.isfinite(rest), rest, 0.0)


def _joined(call: Call, parts: np.ndarray) -> Statistics:
    """The statistics of all devices: (parts, count) or (parts, 2, count)."""
    found = parts.astype(np.float64)
    found = found.sum(axis=1) if parts.ndim == 3 else found
    if found[:, -1].any():
        raise ValueError(_faults[-1] if _faults else "target: a device reported bad numbers")
    size = prod(call.sums)
    sums = found[:, :size].reshape(call.parts, *call.sums)
    voxels = found[:, size:-1]
    if call.shard == "volume":
        sums, voxels = sums.sum(axis=0), voxels.sum(axis=0)
    else:  # all samples of the first device, then those of the next
        sums = np.moveaxis(sums, 0, 1).reshape(call.sums[0], -1, call.sums[2])
        voxels = voxels.reshape(-1)
    loss = call.loss
    request = make_request(loss.activation, call.dense, loss.ignore_index, loss.needs)
    return Statistics(request, sums, voxels, np.dtype(call.dtype), None, call.regions)


def _combine(call: Call, operands: Any, results: Any) -> None:
    """Statistics of all devices → value."""
    results[0][...] = call.loss.combine(_joined(call, operands[0]))[0]


def _pull(call: Call, operands: Any, results: Any) -> None:
    """Statistics of all devices, upstream → the derivative by each."""
    parts, upstream = operands
    by = call.loss.combine(_joined(call, parts))[1](upstream)
    if call.shard == "volume":
        each = np.broadcast_to(by, (call.parts, *by.shape))
    else:
        each = np.moveaxis(by.reshape(call.sums[0], call.parts, *call.sums[1:]), 1, 0)
    # Both parts of a number count alike, but one is enough: `_apply` reads it.
    results[0][...] = 0
    first = results[0] if results[0].ndim == 2 else results[0][:, 0]
    first[:, : prod(call.sums)] = each.reshape(call.parts, -1)


def _apply(call: Call, operands: Any, results: Any) -> None:
    """Arrays, the derivative by the statistics → gradient."""
    *arrays, by = operands
    by = by if by.ndim == 1 else by[0]
    coefficients = by[: prod(call.sums)].reshape(call.sums).astype(np.float64)
    passes = call.passes(arrays)
    passes.apply(coefficients, passes.borrow_output(results[0]))


STEPS: dict[str, Callable[[Call, Any, Any], None]] = {
    "value": _value,
    "gradient": _gradient,
    "fields": _fields,
    "statistics": _statistics,
    "combine": _combine,
    "pull": _pull,
    "apply": _apply,
}
