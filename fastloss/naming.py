"""Losses from text: how a compiled or exported graph knows the loss that it computes."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.frameworks.base import as_loss
from fastloss.loss import Loss
from fastloss.structure import placeholders
from fastloss.terms.base import Term
from fastloss.tracing import constant

if TYPE_CHECKING:
    from fastloss.frameworks.base import LossLike

_losses: dict[str, Loss] = {}
_foreign: dict[str, Term] = {}
"""Terms that only this process can name, by their identities. They are held for as long as it
runs, as the graphs that name them may run at any time."""


@constant
def structure_of(loss: LossLike) -> str:
    """The `fastloss.Loss.structure` of what a function makes."""
    made = as_loss(loss)
    keep(made)
    return made.structure


def keep(loss: Loss) -> None:
    """Hold what the structure of a loss names by an identity alone."""
    for _, term in loss.terms:
        if term.described.identity:
            _foreign.setdefault(term.described.identity, term)


def loss_of(structure: str, numbers: np.ndarray | None = None) -> Loss:
    """A loss of this structure, with these numbers: its operands one after another.

    Raises:
        ValueError: there is no such structure, or only the process that made it understands it;
            other numbers than it has.
    """
    loss = _of_structure(structure)
    if numbers is None:
        return loss
    flat = numbers.astype(np.float64, copy=False).tobytes()
    if any(term.described.identity for _, term in loss.terms):
        return _with_numbers(loss, flat)  # as whose terms these are may change them
    return _of_numbers(structure, flat)


def _of_structure(structure: str) -> Loss:
    loss = _losses.get(structure)
    if loss is None:
        try:
            parts = json.loads(structure)
            terms = [_term(*name) for name in parts["terms"]]
            loss = Loss(*terms, **parts["options"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"loss: {structure!r} names no loss: {error}") from error
        _losses[structure] = loss
    return loss


@lru_cache(maxsize=256)
def _of_numbers(structure: str, numbers: bytes) -> Loss:
    return _with_numbers(_of_structure(structure), numbers)


def _with_numbers(loss: Loss, numbers: bytes) -> Loss:
    flat = np.frombuffer(numbers)
    return loss.with_operands(split(loss, flat, flat.size))


def split(loss: Loss, flat: Any, count: int) -> list[Any]:
    """The numbers of a loss, one after another, as its operands."""
    sizes = [len(operand) for operand in loss.operands]
    if count != sum(sizes):
        raise ValueError(f"loss: expected {sum(sizes)} numbers for its terms, got {count}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _term(name: str, options: dict[str, Any] | str, shapes: dict[str, int | None]) -> Term:
    module, _, qualified = name.partition(":")
    if isinstance(options, str):
        if options not in _foreign:
            raise ValueError(
                f"the term {qualified} of {module} is not one of fastloss, and no process but the "
                "one that compiled or exported it can compute it"
            )
        return _foreign[options]
    kind: Any = import_module(module) if module.partition(".")[0] == "fastloss" else None
    for part in qualified.split("."):
        kind = getattr(kind, part)
    # A file that was exported elsewhere names terms, and may not name anything else to be called.
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise TypeError(f"{name} is no term")
    return kind(**options, **placeholders(shapes))
