"""A metric: its name, what it measures, and what an empty mask gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fastloss.metrics.empty import Empty


class Metric(NamedTuple):
    """One number for a class of a sample."""

    name: str
    family: str
    """"overlap", "surface" or "lesion": what it is computed from."""
    formula: Callable[[Any], float]
    """Given the measurements of its family, for one class of one sample."""
    empty: Empty
    better: str
    """"higher", "lower", or "" where neither is."""
    summary: str


class Pattern(NamedTuple):
    """Metrics whose name holds a number, such as "hd95"."""

    expression: re.Pattern[str]
    make: Callable[[str, float], Metric]
    example: str


def find_metrics(
    names: Iterable[str] | str, known: dict[str, Metric], patterns: Iterable[Pattern]
) -> dict[str, Metric]:
    """The metrics of these names, in their order.

    Raises:
        ValueError: no metric has such a name.
        TypeError: a name is no str.
    """
    several = (names,) if isinstance(names, str) else tuple(names)
    found = {}
    for name in several:
        if not isinstance(name, str):
            raise TypeError(f"metrics: expected names, got {name!r}")
        found[name] = known.get(name) or _matching(name, patterns)
        if found[name] is None:
            shown = ", ".join(map(repr, known))
            examples = ", ".join(repr(pattern.example) for pattern in patterns)
            raise ValueError(
                f"metrics: expected names among {shown}, or such as {examples}, got {name!r}"
            )
    if not found:
        raise ValueError("metrics: expected at least one name, got none")
    return found


def _matching(name: str, patterns: Iterable[Pattern]) -> Any:
    for pattern in patterns:
        match = pattern.expression.fullmatch(name)
        if match:
            return pattern.make(name, float(match[1]))
    return None
