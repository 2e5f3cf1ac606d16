"""The structure of a loss as text, and its numbers as arrays.

Losses of equal text differ in their numbers alone, which whatever is compiled for one of them takes
as operands.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from fastloss.tracing import constant

_FLOAT64 = np.dtype(np.float64)
_Items = tuple[tuple[str, Any], ...]
_NO_OPTIONS = frozenset({"requires", "_loss", "_described", "_parts"})


class Described(NamedTuple):
    """A term, taken apart.

    Attributes:
        text: its class and options, and of every number only whether it is one or (C,). A term
            that is not the library's is an identity that this process alone understands.
        names: the options that are numbers.
        arrays: the numbers, (1,) or (C,) float64 each.
        identity: of a term whose text does not say its options; else empty.
    """

    text: str
    names: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]
    identity: str = ""


class Recipe(NamedTuple):
    """A term that is not made yet, and its factor.

    Attributes:
        kind: its class.
        options: names and values, hashable.
        numbers: likewise the options that are numbers, by name: one, or one per class; arrays of a
            framework where it takes them for operands.
        factor: a number, or an array of one.
    """

    kind: type
    options: tuple[tuple[str, Any], ...]
    numbers: tuple[tuple[str, Any], ...]
    factor: Any = 1.0


def recipe(kind: Any, options: dict[str, Any], factor: Any = 1.0) -> Recipe:
    """A term of this class with these options."""
    names = sorted(k for k, v in options.items() if k in kind.number_options and v is not None)
    others = tuple((k, v) for k, v in options.items() if k not in names)
    return Recipe(kind, others, tuple((name, options[name]) for name in names), factor)


def options_of(term: object) -> dict[str, Any]:
    """The options that a term was made with, where it keeps them under their own names."""
    return {k: v for k, v in vars(term).items() if k not in _NO_OPTIONS}


def describe(term: object, number_options: tuple[str, ...], identity: str = "") -> Described:
    """Take a term apart; ``number_options``: options that, where they are one number, are none of
    its text. Arrays of one axis are not in any case."""
    kind = type(term)
    options, numbers = [], []
    for name, value in vars(term).items():
        if isinstance(value, np.ndarray):
            is_number, size = value.ndim == 1 and value.dtype == _FLOAT64, value.size
        else:
            is_number, size = name in number_options and isinstance(value, (int, float)), None
        if is_number:
            numbers.append((name, size))
        elif name not in _NO_OPTIONS:
            options.append((name, value))
    shapes = tuple(sorted(numbers))
    names = tuple(name for name, _ in shapes)
    # Copies: PyTorch has no tensors that are read-only.
    arrays = tuple(np.array(vars(term)[name], _FLOAT64, ndmin=1) for name in names)
    text = _text(kind, tuple(options), shapes)
    if not text:
        identity = identity or uuid4().hex
        text = json.dumps([_name(kind), identity, dict(shapes)])
    else:
        identity = ""
    return Described(text, names, arrays, identity)


def text_of_loss(terms: list[str], options: str) -> str:
    """The text of a loss, from those of its terms and of its options."""
    return '{"terms": [' + ", ".join(terms) + '], "options": ' + options + "}"


@constant
def text_of_options(options: _Items) -> str:
    """The options of a loss as text, those that are not given included."""
    return _text_of_options(options)


@lru_cache(maxsize=256)
def _text_of_options(options: _Items) -> str:
    defaults = {"activation": "softmax", "ignore_index": None, "channel_axis": 1, "validate": False}
    return json.dumps({**defaults, **dict(options)}, default=int)  # int: NumPy's integers


def placeholders(shapes: dict[str, int | None]) -> dict[str, Any]:
    """Numbers of these shapes, each 1."""
    return {name: 1.0 if size is None else [1.0] * size for name, size in shapes.items()}


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _text(kind: type, options: _Items, shapes: _Items) -> str:
    """The text of a term of the library; empty if class and options do not make it again."""
    if kind.__module__.partition(".")[0] != "fastloss":
        return ""
    try:
        return _checked_text(kind, options, shapes)
    except TypeError:  # not hashable
        return ""


@lru_cache(maxsize=4096)
def _checked_text(kind: type, options: _Items, shapes: _Items) -> str:
    try:
        text = json.dumps([_name(kind), dict(options), dict(shapes)], default=int)  # int: NumPy's
        _, given, sizes = json.loads(text)
        term: Any = object.__new__(kind)
        # Its own, after which it would be taken apart.
        kind.__init__.__wrapped__(term, **given, **placeholders(sizes))  # type: ignore[misc]
        again = options_of(term)
    except (TypeError, ValueError):
        return ""
    same = len(again) == len(options) + len(shapes)
    return text if same and all(k in again and again[k] == v for k, v in options) else ""
