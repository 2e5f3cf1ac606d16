"""The steps of a loss on arrays in CPU memory, as a compiled program names them.

What is to be computed is a text, as it may be kept in a program that another process runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends import use_backend
from fastloss.borrowed import Extras
from fastloss.naming import loss_of
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
        sums: (S, rows, C), the shape of the sums.
        value: the shape of the value.
        dtype: of the value.
    """

    step: str
    structure: str
    numbers: tuple[float, ...]
    backend: str
    rank: int
    weighted: bool = False
    fields: tuple[str, ...] = ()
    regions: int = 0
    sums: tuple[int, int, int] = (0, 0, 0)
    value: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def text(self) -> str:
        return json.dumps(self)

    @property
    def count(self) -> int:
        """How many arrays a call of the loss takes."""
        return 2 + self.weighted + len(self.fields) + (self.regions > 0)

    @property
    def loss(self) -> Any:
        return loss_of(self.structure, np.array(self.numbers, np.float64))

    def passes(self, arrays: Sequence[Any]) -> Any:
        logits, target, *others = arrays[: self.count]
        weight = others.pop(0) if self.weighted else None
        regions = others.pop() if self.regions else None
        extras = None
        if self.fields or self.regions:
            named = tuple(zip(self.fields, others, strict=True))
            extras = Extras(named, regions, self.regions or None)
        return self.loss.passes(logits, target, weight, extras)


@lru_cache(maxsize=1024)
def _call_of(text: bytes) -> Call:
    parts = [tuple(part) if isinstance(part, list) else part for part in json.loads(text)]
    return Call(*parts)


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
            step(call, [_at(index, o) for o in operands], [r[(*index, ...)] for r in results])


def _at(index: tuple[int, ...], operand: np.ndarray) -> np.ndarray:
    """The part of an operand; of one that is the same for all of an axis there is one."""
    own = (i if n > 1 else 0 for i, n in zip(index, operand.shape, strict=False))
    part: np.ndarray = operand[(*own, ...)]
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
        size = prod(call.sums)
        found = Statistics(
            passes.request,
            both[:size].reshape(call.sums),
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


STEPS: dict[str, Callable[[Call, Any, Any], None]] = {
    "value": _value,
    "gradient": _gradient,
    "fields": _fields,
}
