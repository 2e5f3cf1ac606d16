"""The vocabulary between terms and kernels: sums over voxels of a weight times a function of p."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastloss.histogram import HISTOGRAMS


class Sum(NamedTuple):
    """Σ over voxels of m · weight · field · function(p), for every row and class.

    m is the voxel weight, g the target and p the probability. Rows are the samples of a batch, or
    their regions.

    Attributes:
        weight: one of `WEIGHTS`.
        function: one of `FUNCTIONS`.
        parameter: the exponent of a function that takes one, else 0.
        field: the name of an array of the caller's that multiplies the weight; "": none.
    """

    weight: str = "one"
    function: str = "one"
    parameter: float = 0.0
    field: str = ""


WEIGHTS = ("one", "target", "rest", "target_squared")
"""1, g, 1 − g and g²."""

FUNCTIONS = {
    "one": False,
    "p": False,
    "p_squared": False,
    "log": False,
    "log_rest": False,
    "focal": True,
    "focal_rest": True,
    "generalized": True,
    "log_power": True,
    "error": False,
    "sign": False,
    "log_ratio": False,
    "log_ratio_rest": False,
}
"""Every function of p, or of p and g, and whether it takes a parameter γ:

==================  ========================================
``one``             1
``p``               p
``p_squared``       p²
``log``             −log p
``log_rest``        −log(1−p)
``focal``           (1−p)^γ (−log p)
``focal_rest``      p^γ (−log(1−p))
``generalized``     (1 − p^γ) / γ, γ > 0
``log_power``       (−log p)^γ
``error``           |p − g|
``sign``            the sign of p − g, whose derivative is 0
``log_ratio``       log g − log p; where g = 0, −log p
``log_ratio_rest``  log(1−g) − log(1−p); where g = 1, −log(1−p)
==================  ========================================
"""

REFERENCE = Sum("target")
OVERLAP = Sum("target", "p")
PREDICTED = Sum("one", "p")
PREDICTED_SQUARED = Sum("one", "p_squared")
REFERENCE_SQUARED = Sum("target_squared")
CROSS_ENTROPY = Sum("target", "log")
CROSS_ENTROPY_REST = Sum("rest", "log_rest")
UNIFORM = Sum("one", "log")
UNIFORM_REST = Sum("one", "log_rest")
DIVERGENCE = Sum("target", "log_ratio")
DIVERGENCE_REST = Sum("rest", "log_ratio_rest")

NAMED = {
    "reference": REFERENCE,
    "overlap": OVERLAP,
    "predicted": PREDICTED,
    "predicted_squared": PREDICTED_SQUARED,
    "reference_squared": REFERENCE_SQUARED,
    "cross_entropy": CROSS_ENTROPY,
    "cross_entropy_rest": CROSS_ENTROPY_REST,
    "uniform": UNIFORM,
    "uniform_rest": UNIFORM_REST,
}
"""The sums that many terms share, by name."""

_NAMES = {total: name for name, total in NAMED.items()}
# Named sums come first in a table, in this order, then those of other functions.
_ORDER = {total: i for i, total in enumerate(NAMED.values())}
_FUNCTION_ORDER = {name: i for i, name in enumerate(FUNCTIONS)}


def as_sum(key: str | Sum) -> Sum:
    """The sum of a name: one of `NAMED`, or "focal:γ" or "focal_rest:γ"; a `Sum` is itself.

    Raises:
        KeyError: no such name.
    """
    if isinstance(key, Sum):
        return key
    function, colon, gamma = key.partition(":")
    if colon and function in ("focal", "focal_rest"):
        return Sum("target" if function == "focal" else "rest", function, float(gamma))
    return NAMED[key]


def name_of(total: Sum) -> str:
    """A short name for messages."""
    if total in _NAMES:
        return _NAMES[total]
    parts = [total.weight, total.field, total.function]
    text = " · ".join(p for p in parts if p and p != "one") or "one"
    return f"{text}({total.parameter:g})" if FUNCTIONS[total.function] else text


def family(name: str, activation: str) -> tuple[Sum, ...]:
    """The sums that terms ask for together, under one name.

    "region": overlap and predicted; "squared": overlap and the squared sizes; "cross_entropy";
    "uniform"; "focal:γ"; "divergence". Of a sigmoid the last four count both outcomes.
    """
    both = activation == "sigmoid"
    if name == "region":
        return (OVERLAP, PREDICTED)
    if name == "squared":
        return (OVERLAP, PREDICTED_SQUARED, REFERENCE_SQUARED)
    if name == "cross_entropy":
        return (CROSS_ENTROPY, CROSS_ENTROPY_REST)[: 1 + both]
    if name == "uniform":
        return (UNIFORM, UNIFORM_REST)[: 1 + both]
    if name.startswith("focal:"):
        gamma = name.partition(":")[2]
        return (as_sum(f"focal:{gamma}"), as_sum(f"focal_rest:{gamma}"))[: 1 + both]
    if name == "divergence":
        return (DIVERGENCE, DIVERGENCE_REST)[: 1 + both]
    raise ValueError(f"requires: no sums are called {name!r}")


def table(needs: Iterable[str | Sum], activation: str) -> tuple[Sum, ...]:
    """Every sum of these families and sums, once, in an order that depends on nothing else.

    Histograms that are needed beside them are passed over: see `Request.histograms`.

    Raises:
        ValueError: an unknown family, weight or function, or a parameter that is none.
    """
    found = {REFERENCE}
    for need in needs:
        if need in HISTOGRAMS:
            continue
        if isinstance(need, str):
            found.update(family(need, activation))
        else:
            found.add(_checked(need))
    return tuple(sorted(found, key=_place))


def slopes_by_target(total: Sum) -> tuple[tuple[float, Sum], ...]:
    """The derivative of a sum's summand by the target of the same voxel and class.

    It is Σ factor · the summand of another sum.

    Raises:
        ValueError: it is no such sum.
    """
    if total._replace(field="") in (DIVERGENCE, DIVERGENCE_REST):  # g log(g/p): log(g/p) + 1
        sign = 1.0 if total.weight == "target" else -1.0
        return (sign, total._replace(weight="one")), (sign, Sum(field=total.field))
    of_weight = {
        "one": (),
        "target": ((1.0, "one"),),
        "rest": ((-1.0, "one"),),
        "target_squared": ((2.0, "target"),),
    }[total.weight]
    found = tuple((factor, total._replace(weight=weight)) for factor, weight in of_weight)
    if total.function == "error":
        return (*found, (-1.0, total._replace(function="sign")))
    if total.function in ("log_ratio", "log_ratio_rest"):
        raise ValueError(f"target: no derivative of {name_of(total)} by the target is known")
    return found


def _place(total: Sum) -> tuple[int, int, float, str, str]:
    named = _ORDER.get(total, len(_ORDER))
    # All of one parameter side by side: focal, then focal_rest.
    return (
        named,
        0 if named < len(_ORDER) else 1 + bool(total.field),
        total.parameter,
        f"{_FUNCTION_ORDER[total.function]:03d} {total.weight}",
        total.field,
    )


def _checked(total: Sum) -> Sum:
    if total.weight not in WEIGHTS:
        raise ValueError(f"weight: expected one of {', '.join(WEIGHTS)}, got {total.weight!r}")
    if total.function not in FUNCTIONS:
        raise ValueError(
            f"function: expected one of {', '.join(FUNCTIONS)}, got {total.function!r}"
        )
    if not FUNCTIONS[total.function] and total.parameter:
        raise ValueError(f"parameter: the function {total.function!r} takes none")
    return total
