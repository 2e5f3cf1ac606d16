"""Losses from text: how a compiled or exported graph knows the loss that it computes."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from fastloss.protocol import FusedLoss, LossLike, as_loss
from fastloss.structure import Recipe, placeholders
from fastloss.tracing import constant

_Loss: Any = None
_Term: Any = None
_losses: dict[str, FusedLoss] = {}
_foreign: dict[str, Any] = {}
"""Terms that only this process can name, by their identities. They are held for as long as it
runs, as the graphs that name them may run at any time."""


def register(loss: type, term: type) -> None:
    """Tell the classes from which losses are made, which import this module."""
    global _Loss, _Term
    _Loss, _Term = loss, term


def made(*arguments: Any) -> Any:
    """The loss of some options and recipes, which is made once."""
    return _made(*arguments)


@lru_cache(maxsize=256)
def _made(options: tuple[tuple[str, Any], ...], *recipes: Recipe) -> Any:
    terms = [r.factor * r.kind(**dict(r.options), **dict(r.numbers)) for r in recipes]
    return _Loss(*terms, **dict(options))


@constant
def structure_of(loss: LossLike) -> str:
    """The `fastloss.Loss.structure` of what a function makes."""
    made = as_loss(loss)
    keep(made)
    return str(made.structure)


def keep(loss: Any) -> None:
    """Hold what the structure of a loss names by an identity alone."""
    for _, term in loss.terms:
        if term.described.identity:
            _foreign.setdefault(term.described.identity, term)


def loss_of(structure: str, numbers: np.ndarray | None = None) -> FusedLoss:
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


def _of_structure(structure: str) -> FusedLoss:
    loss = _losses.get(structure)
    if loss is None:
        try:
            parts = json.loads(structure)
            terms = [_term(*name) for name in parts["terms"]]
            loss = _Loss(*terms, **parts["options"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"loss: {structure!r} names no loss: {error}") from error
        _losses[structure] = loss
    return loss


@lru_cache(maxsize=256)
def _of_numbers(structure: str, numbers: bytes) -> FusedLoss:
    return _with_numbers(_of_structure(structure), numbers)


def _with_numbers(loss: FusedLoss, numbers: bytes) -> FusedLoss:
    flat = np.frombuffer(numbers)
    return loss.with_operands(split(loss, flat, flat.size))


def split(loss: FusedLoss, flat: Any, count: int) -> list[Any]:
    """The numbers of a loss, one after another, as its operands."""
    sizes = [len(operand) for operand in loss.operands]
    if count != sum(sizes):
        raise ValueError(f"loss: expected {sum(sizes)} numbers for its terms, got {count}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _term(name: str, options: dict[str, Any] | str, shapes: dict[str, int | None]) -> Any:
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
    if not (isinstance(kind, type) and issubclass(kind, _Term)):
        raise TypeError(f"{name} is no term")
    return kind(**options, **placeholders(shapes))
