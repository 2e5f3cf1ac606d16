"""Losses by name, as a command line takes them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastloss import terms
from fastloss.loss import Loss, Term

ALIASES = {
    "dice_ce": "Dice+CrossEntropy",
    "dice_focal": "Dice+Focal",
    "dice_ce_boundary": "Dice+CrossEntropy+0.01*Boundary",
}
_BASES = frozenset({"ClassTerm", "PerRegion", "RegionTerm", "Term", "VoxelwiseTerm"})
"""Classes that are no loss before they are told of what."""

KNOWN = {
    name.lower(): kind
    for name in terms.__all__
    if isinstance(kind := getattr(terms, name), type)
    and issubclass(kind, (Term, Loss))
    and name not in _BASES
}
KNOWN["ce"] = terms.CrossEntropy
"""Classes of losses that need no option, by their names in small letters."""


def loss_of(text: str) -> Loss:
    """The loss of a name.

    Args:
        text: the name of a term, as "Dice" or "dice"; a sum of such names, as
            "Dice+0.5*CrossEntropy", each with its default options; one of `ALIASES`; or
            "module:object" for a loss of one's own, or a function that makes one.

    Raises:
        ValueError: there is no such loss.

    >>> loss_of("0.5*brier")
    Loss(0.5 * Brier(weight=None, reduction='mean'))
    """
    if ":" in text:
        return _imported(text)
    parts: list[Loss] = []
    for part in ALIASES.get(text.strip(), text).split("+"):
        factor, star, name = part.rpartition("*")
        kind = KNOWN.get(name.strip().replace("_", "").lower())
        try:
            number = float(factor) if star else 1.0
        except ValueError:
            kind = None
        if kind is None:
            known = ", ".join((*ALIASES, *(each.__name__ for each in KNOWN.values())))
            raise ValueError(
                f"loss: expected a sum of names among {known}, or module:object, got {text!r}"
            )
        try:
            made = Loss(kind())
        except TypeError as error:
            raise ValueError(
                f"loss: {kind.__name__} needs options, so name an object: {error}"
            ) from None
        parts.append(number * made)
    return Loss(*parts)


def _imported(text: str) -> Loss:
    module, _, name = text.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss: {text!r}: {error}") from None
    if callable(found) and not isinstance(found, (Term, Loss)):
        found = found()
    if not isinstance(found, (Term, Loss)):
        raise ValueError(
            f"loss: expected a loss, or a function that makes one, at {text!r}, got "
            f"{type(found).__name__}"
        )
    return Loss(found)
