"""Losses as text and back: how a compiled or exported graph names the loss that it computes."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from fastloss.frameworks.base import as_loss, constant, torch_compiles
from fastloss.loss import Loss
from fastloss.terms.base import Term, options_of

if TYPE_CHECKING:
    from fastloss.frameworks.base import LossLike

_losses: dict[str, Loss] = {}
_foreign: dict[str, Term] = {}
"""Terms that only this process can name, by a number that no other process uses. They are held
for as long as it runs, as the graphs that name them may run at any time."""


@constant
def text_of(loss: LossLike) -> str:
    """The name of a loss: JSON text, the same for equal options.

    A term of this library is named by its class and options, which any process understands that
    has the library. A term from elsewhere is named by its class and a number, which this process
    alone understands. The name is empty for a loss that a function makes while it is compiled.
    """
    named = isinstance(loss, (Term, Loss))
    if named and not vars(loss) and (_is_ours(type(loss)) or torch_compiles()):
        # All that is known while it is being traced is that there will be a loss.
        return ""
    loss = as_loss(loss)
    text: str | None = loss.__dict__.get("_text")
    if text is None:
        parts = {
            "terms": [[weight, *_name(term)] for weight, term in loss.terms],
            "activation": loss.activation,
            "ignore_index": loss.ignore_index,
            "channel_axis": loss.channel_axis,
            "validate": loss.validate,
        }
        text = json.dumps(parts, default=int)  # int: NumPy's integers
        loss.__dict__["_text"] = text
        _losses.setdefault(text, loss)
    return text


def loss_of(text: str) -> Loss:
    """The loss of this name.

    Raises:
        ValueError: no such name, or one that only the process that made it understands.
    """
    loss = _losses.get(text)
    if loss is None:
        try:
            parts = json.loads(text)
            terms = [weight * _term(*name) for weight, *name in parts.pop("terms")]
            loss = Loss(*terms, **parts)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"loss: {text!r} names no loss: {error}") from error
        _losses[text] = loss
    return loss


def _name(term: Term) -> tuple[str, dict[str, Any] | str]:
    """The class of a term, and its options or its number."""
    kind = type(term)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _is_ours(kind):
        options = options_of(term)
        options = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in options.items()}
        if _makes(kind, options):
            return name, options
    for number, known in _foreign.items():
        if known is term:
            return name, number
    number = uuid4().hex
    _foreign[number] = term
    return name, number


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "fastloss"


def _makes(kind: type[Term], options: dict[str, Any]) -> bool:
    """Whether the class makes the same term of these options after a detour through text."""
    try:
        again = options_of(kind(**json.loads(json.dumps(options))))
    except (TypeError, ValueError):
        return False
    return again.keys() == options.keys() and all(
        np.array_equal(again[k], options[k]) for k in options
    )


def _term(name: str, options: dict[str, Any] | str) -> Term:
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
    return kind(**options)
