"""What every term of a loss has in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, wraps
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastloss.borrowed import Extras
from fastloss.frameworks import adapter_of
from fastloss.request import Request
from fastloss.statistics import Statistics
from fastloss.structure import Described, describe, options_of, text_of_loss, text_of_options
from fastloss.sums import Sum
from fastloss.tracing import constant, fixed, torch_compiles, torch_traces

if TYPE_CHECKING:
    from fastloss.loss import Loss

Derivatives = Mapping[Any, np.ndarray]
"""Per sum, or the name of one, the derivative of the loss by it: what broadcasts to (rows, C)."""
Pullback = Callable[[np.ndarray], Derivatives]
"""From the gradient of the term's value to the derivative by each sum."""

REDUCTIONS = ("mean", "sum", "none")
_DEFAULTS = text_of_options(())
_ONE = np.ones(1)


class Term:
    """One loss, defined on the sums over voxels; terms add and scale into a `fastloss.Loss`."""

    requires: frozenset[str | Sum] = frozenset()
    """The sums that the term reads, or the names of families of them: `fastloss.sums.family`."""

    ranking: Sum | None = None
    """For a term that chooses voxels by a map of their losses: the sum whose field it so makes."""

    kept_percent: float | None = None
    """For such a term that takes the mean of the largest losses: of how many percent of all voxels.

    A GPU chooses so and in no other way.
    """

    number_options: ClassVar[tuple[str, ...]] = ()
    """Options that are None, one number or (C,), non-negative and finite, and may be others in
    every call: nothing is compiled anew for them. A class that names them itself treats them in
    `combine` as it does the sums, for on a GPU they are arrays that record what is done."""

    signed = False
    """Whether these numbers may be negative."""

    _described: Described | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _describing(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        known = self.__dict__.get("_described")
        if known is not None and name in self.number_options and not self.signed:
            value = check_class_weight(name, value)
        super().__setattr__(name, value)
        if known is not None and (
            not known.identity or name in known.names or name in self.number_options
        ):
            self._describe()

    def __setstate__(self, state: Any) -> None:
        state, slots = state if isinstance(state, tuple) else (state, None)
        # What the term was called may be understood by another process alone, and the loss that it
        # is by itself was made again before it was whole.
        skipped = ("_described", "_loss")
        vars(self).update((k, v) for k, v in (state or {}).items() if k not in skipped)
        for name, value in (slots or {}).items():
            super().__setattr__(name, value)
        self._describe()

    @constant
    def _describe(self) -> None:
        """Take the term apart, while nothing is being compiled."""
        if vars(self) or not (_is_ours(type(self)) or torch_compiles()):
            known = self._described
            identity = "" if known is None else known.identity
            vars(self)["_described"] = describe(self, self.number_options, identity)
        # Else it is being made in compiled code, which knows nothing of it yet.

    @property
    def described(self) -> Described:
        """The term, taken apart."""
        if self._described is None:
            self._describe()
        assert self._described is not None
        return self._described

    def with_numbers(self, values: Sequence[Any]) -> Term:
        """The same term with other numbers, as many as `described` names: arrays (1,) or (C,).

        None stands for what is there.
        """
        known = self.described
        changed = {}
        for name, old, new in zip(known.names, known.arrays, values, strict=True):
            if new is None or (isinstance(new, np.ndarray) and np.array_equal(new, old)):
                continue
            changed[name] = new if isinstance(vars(self)[name], np.ndarray) else new[0]
            if isinstance(new, np.ndarray) and name in self.number_options and not self.signed:
                changed[name] = check_class_weight(name, changed[name])
        return self.with_options(changed) if changed else self

    def with_options(self, changed: dict[str, Any]) -> Term:
        """The same term with other options, unchecked."""
        term = copy.copy(self)
        vars(term).pop("_loss", None)
        vars(term).update(changed)
        # Or they are arrays that record what is done with them.
        if all(v is None or isinstance(v, (float, np.ndarray)) for v in changed.values()):
            identity = self.described.identity
            vars(term)["_described"] = describe(term, self.number_options, identity)
        return term

    @classmethod
    def recordable(cls) -> tuple[str, ...]:
        """The numbers that `combine` takes as arrays that record what is done with them."""
        whose = next(kind for kind in cls.__mro__ if "number_options" in vars(kind))
        return cls.number_options if _is_ours(cls) or not _is_ours(whose) else ()

    def largest(self, name: str, activation: str) -> float:
        """The largest that a number may be with this activation."""
        return np.inf

    def check(self, activation: str, classes: int) -> None:
        """Raise ValueError if the term has no meaning for this activation and class count."""

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        """The term's value and its pullback, from the sums alone."""
        raise NotImplementedError(f"{type(self).__name__} must define combine")

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        """The coefficients, (S, C), of the map by which a term with a `ranking` chooses voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define ranks_by")

    def choose(self, losses: np.ndarray) -> float:
        """Turn that map, (B, voxels), into the field, in place; return the sum over all voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define choose")

    @property
    def maps_voxels(self) -> bool:
        """Whether the value is a map: one number per voxel, of a sigmoid per voxel and channel."""
        return False

    def map_coefficients(self, request: Request, classes: int) -> Mapping[Any, Any]:
        """Per sum, its coefficient in the map of a term that is `maps_voxels`: what fits (C,)."""
        raise NotImplementedError(f"{type(self).__name__} must define map_coefficients")

    @property
    def sums_over_batch(self) -> bool:
        """Whether `combine` sums over the samples first, and so needs no sums of each."""
        return False

    @property
    def joins_ranks(self) -> bool:
        """Whether `combine` reads ``statistics.joined``."""
        return False

    def join_ranks(self, statistics: Statistics) -> Statistics:
        """The sums over all ranks and samples, for terms that join them by themselves."""
        raise NotImplementedError(f"{type(self).__name__} must define join_ranks")

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        """The shape of the value that `combine` returns: (), if it is not defined anew.

        ``regions``: how many regions a sample has; 0 where a call names none.
        """
        return ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in options_of(self).items())
        return f"{type(self).__name__}({shown})"

    # A term alone is a loss too.

    @property
    def structure(self) -> str:
        """As `fastloss.Loss.structure`, with the default options."""
        assert self._described is not None
        return text_of_loss([self._described.text], _DEFAULTS)

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """As `fastloss.Loss.operands`."""
        assert self._described is not None
        return (_ONE, *self._described.arrays)

    @constant
    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """As `fastloss.Loss.numbers`."""
        return self._loss.numbers()

    @constant
    def keep_terms(self) -> bool:
        """As `fastloss.Loss.keep_terms`."""
        if not vars(self) and (_is_ours(type(self)) or torch_compiles()):
            return False
        return self._loss.keep_terms()

    def described_inside(self) -> tuple[str, list[Any]]:
        """As `fastloss.Loss.described_inside`."""
        return self._as_loss().described_inside()

    def part_inside(self) -> tuple[str, list[Any]]:
        """The term's part of that: its text and numbers."""
        if self.keep_terms():
            assert self._described is not None
            return self._described.text, list(self._described.arrays)
        options = options_of(self).items()
        made = tuple([(k, fixed(v) if isinstance(v, float) else v) for k, v in options])
        text, numbers = _described_inside(type(self), made)
        return text, list(numbers)

    @cached_property
    def _loss(self) -> Loss:
        return self._as_loss()

    def _as_loss(self) -> Loss:
        from fastloss.loss import Loss  # which is built on terms

        return Loss(self)

    def __call__(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
    ) -> Any:
        """As `fastloss.Loss.__call__`, with the default options."""
        extras = Extras.of(fields, regions, region_count)
        return adapter_of(logits, "logits").value(self, logits, target, voxel_weight, extras=extras)

    def value_and_grad(
        self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """As `fastloss.Loss.value_and_grad`, with the default options."""
        return self._loss.value_and_grad(logits, target, voxel_weight, **options)

    def gradient(self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
        """As `fastloss.Loss.gradient`, with the default options."""
        return self._loss.gradient(logits, target, voxel_weight, **options)

    def statistics(
        self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any
    ) -> Statistics:
        """As `fastloss.Loss.statistics`, with the default options."""
        return self._loss.statistics(logits, target, voxel_weight, **options)

    def value(self, statistics: Statistics) -> Any:
        """As `fastloss.Loss.value`."""
        return self._loss.value(statistics)

    def __add__(self, other: object) -> Loss:
        return self._as_loss() + other

    def __radd__(self, other: object) -> Loss:
        return self._as_loss().__radd__(other)

    def __sub__(self, other: object) -> Loss:
        return self._as_loss() - other

    def __rsub__(self, other: object) -> Loss:
        return self._as_loss().__rsub__(other)

    def __neg__(self) -> Loss:
        return -self._as_loss()

    def __mul__(self, factor: object) -> Loss:
        return self._as_loss() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Loss:
        return self._as_loss() / divisor

    __array_ufunc__ = None  # so that NumPy's numbers leave their product to the term


@constant
def _described_inside(kind: type[Term], options: tuple[tuple[str, Any], ...]) -> Any:
    """The text of a term of this class and options, and its numbers."""
    described = _made_inside(kind, options).described  # type: ignore[arg-type]
    return described.text, tuple(tuple(numbers.tolist()) for numbers in described.arrays)


@lru_cache(maxsize=256)
def _made_inside(kind: type[Term], options: tuple[tuple[str, Any], ...]) -> Term:
    term = kind(**dict(options))
    term.keep_terms()
    return term


def _is_ours(what: Any) -> bool:
    """Whether a class or function is the library's."""
    package: str = what.__module__.partition(".")[0]
    return package == "fastloss"


def _describing(init: Callable[..., None]) -> Callable[..., None]:
    """A term's ``__init__`` after which it is taken apart, once it is made as a whole."""

    @wraps(init)
    def __init__(self: Term, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        if type(self).__init__ is __init__:
            self._describe()

    return __init__


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> float:
    refuse_gradient(name, value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (low <= number <= high) or number == np.inf:
        bounds = f"of at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value!r}")
    return number


def factor_of(name: str, value: Any) -> float | None:
    """The number that a loss is multiplied by; None if this is not one.

    Raises:
        TypeError: an array of several numbers, or a tensor that requires a gradient.
        ValueError: a number that is not finite.
    """
    if not isinstance(value, (int, float)) and hasattr(value, "ndim"):
        if value.ndim:
            shape = tuple(value.shape)
            raise TypeError(f"{name}: expected a number, got an array of shape {shape}")
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
                f"alone; pass {name}.detach(), or multiply the value of the loss by it"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not -np.inf < value < np.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def check_class_weight(name: str, value: Any) -> np.ndarray | float | None:
    """A weight per class: None, one number, or a 1-D array of non-negative finite numbers.

    Anybody's array is copied, wherever it lies. TypeError for one that requires a gradient.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return check_number(name, value)
    if torch_traces():
        raise RuntimeError(
            f"{name}: a term with a weight for each class cannot be made inside a compiled "
            "function; make it outside, and call it inside"
        )
    for one in value if isinstance(value, (list, tuple)) else (value,):
        refuse_gradient(name, one)
    try:
        weight = np.array(readable(name, value), dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a number or a sequence of one per class, got {value!r}"
        ) from None
    if weight.ndim > 1:
        raise ValueError(f"{name}: expected one number per class, got shape {weight.shape}")
    if weight.size and not (np.isfinite(weight).all() and weight.min() >= 0):
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {value!r}")
    if weight.ndim == 0:
        return float(weight)
    weight.flags.writeable = False
    return weight


def refuse_gradient(name: str, value: Any) -> None:
    """Raise TypeError for a tensor whose gradient would be lost without a word."""
    if isinstance(value, (int, float)):
        return
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
            f"alone; pass {name}.detach()"
        )


def readable(name: str, value: Any) -> Any:
    """What NumPy can read, for a framework's array; else the value itself."""
    if isinstance(value, (list, tuple)):
        return [readable(name, one) for one in value]
    if isinstance(value, (int, float, np.ndarray)):
        return value
    try:
        return adapter_of(value, name).numbers(value, name)
    except TypeError:  # no array; NumPy will say so
        return value


def check_class_count(name: str, weight: np.ndarray | float | None, classes: int) -> None:
    if isinstance(weight, np.ndarray) and weight.size != classes:
        raise ValueError(f"{name}: expected {classes} numbers, one per class, got {weight.size}")
