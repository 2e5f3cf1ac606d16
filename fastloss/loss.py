"""A loss: a weighted sum of terms, computed together in two passes over the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, wraps
from typing import Any, ClassVar

import numpy as np

from fastloss.arrays import Arrays
from fastloss.borrowed import Extras
from fastloss.calls import Passes, fields_of, on_device, value_and_grad
from fastloss.explain import explain
from fastloss.explanation import Explanation
from fastloss.fields import Form, Spacing, Target
from fastloss.frameworks import adapter_of, borrow
from fastloss.histogram import HISTOGRAMS
from fastloss.naming import keep, register
from fastloss.options import (
    check_axes,
    check_choice,
    check_class_weight,
    check_count,
    check_spacing,
    factor_of,
)
from fastloss.request import ACTIVATIONS, Request, make_request
from fastloss.statistics import Statistics
from fastloss.structure import (
    Described,
    describe,
    options_of,
    text_of_loss,
    text_of_options,
)
from fastloss.sums import Sum
from fastloss.tracing import constant, fixed, torch_compiles

Derivatives = Mapping[Any, np.ndarray]
"""Per sum, or the name of one, the derivative of the loss by it: what broadcasts to (rows, C)."""
Pullback = Callable[[np.ndarray], Derivatives]
"""From the gradient of the term's value to the derivative by each sum."""

_DEFAULTS = text_of_options(())
_ONE = np.ones(1)


class Term:
    """One loss, defined on the sums over voxels; terms add and scale into a `fastloss.Loss`."""

    requires: frozenset[str | Sum] = frozenset()
    """The sums that the term reads, or the names of families of them: `fastloss.sums.family`."""

    ranking: Sum | None = None
    """For a term that chooses voxels by a map of their losses: the sum whose field it so makes."""

    ranks_weighted = True
    """For such a term: whether the map has the voxel weights in it, and is what `choose` takes.

    Else it is what `rank` takes."""

    ranks_classes = False
    """Whether that map has one number for every voxel and class."""

    sums_chosen = False
    """Whether the sums of such a term's field are formed by a pass over the logits."""

    ranks_dense = False
    """Whether such a term takes dense targets."""

    ranks_errors = False
    """Whether the value is a sum over voxels and classes of an error times a derivative that
    depends on its rank: `fastloss.explain` then asks for `jumps` and `voxel_shares`, as
    `fastloss.LovaszSoftmax` defines them."""

    kept_percent: float | None = None
    """For such a term that takes the mean of the largest losses: of how many percent of all voxels.

    A GPU chooses so, or by `kept_above`.
    """

    kept_above: tuple[float, int] | None = None
    """For such a term that is not `ranks_weighted` and keeps voxels: those whose loss is above this
    number, and at least so many."""

    histogram: ClassVar[str] = ""
    """The kind of error whose histogram the term reads: see `fastloss.histogram`."""

    makes: ClassVar[str] = ""
    """The name of a field that the term makes of the target, where the caller gives none."""

    spacing: Any = None
    """For such a term: the size of a voxel, as `fastloss.fields.spacing_of` takes it."""

    looks: ClassVar[bool] = False
    """Whether its `derives` depends on what is predicted, and so on all voxels of a sample."""

    on_gpu: ClassVar[bool] = False
    """Whether `make_field` and `derive_field` take arrays on a GPU, and leave what they make there.

    Else those of arrays on a GPU are made of copies in the processor's memory."""

    regional: ClassVar[bool] = False
    """Whether the term reads the sums of every region of a sample. The other terms of its loss then
    read those of whole samples."""

    regions_by_class = False
    """For a `regional` term: whether every class has a map of regions of its own."""

    local: ClassVar[bool] = False
    """For a `regional` term: whether the region of a voxel depends on that voxel alone, so that a
    part of a volume can make its own."""

    number_options: ClassVar[tuple[str, ...]] = ()
    """Options that are None, one number or (C,), non-negative and finite, and may be others in
    every call: nothing is compiled anew for them. A class that names them itself treats them in
    `combine` as it does the sums, for on a GPU they are arrays that record what is done."""

    signed = False
    """Whether these numbers may be negative."""

    autograph_info__: ClassVar[Any] = {}
    """TensorFlow's AutoGraph calls what has one as it is, instead of rewriting it."""

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
        # Both are made again: an identity in the description means nothing in another process, and
        # the cached loss was unpickled before its term was complete.
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

    def parts(self, statistics: Statistics) -> np.ndarray:
        """The value as a sum of parts, (rows, C); 1 in place of either where it is not split."""
        return np.reshape(self.combine(statistics)[0], (1, 1))

    def fall(self, statistics: Statistics, row: int, sums: np.ndarray) -> np.ndarray:
        """By how much the value falls if the sums of one row become others.

        Args:
            statistics: the sums as they are.
            row: the number of the row.
            sums: (S, n, C), n sets of sums in its place. Those that only the target determines are
                the same.

        Returns:
            (n,).
        """
        raise NotImplementedError(f"{type(self).__name__} must define fall")

    @property
    def shares(self) -> bool:
        """Whether the value is a sum over the voxels, of which each has its share, once the target
        is known."""
        return False

    @property
    def summands(self) -> tuple[tuple[float, Term], ...]:
        """Factors and terms whose sum this one is, of which some may be `shares` and others not."""
        return ((1.0, self),)

    @property
    def derives(self) -> str:
        """The field that the sums read, if it is made of the field `makes` in every call."""
        return ""

    @property
    def making(self) -> tuple[Any, ...]:
        """All that the field `makes` depends on beside the target."""
        return (self.makes, self.spacing)

    def field_form(self, classes: int, dense: bool) -> Form:
        """How the field looks that the sums read."""
        return Form("float32", True)

    @property
    def making_regions(self) -> tuple[Any, ...]:
        """For a `regional` term: all that its regions depend on beside the target."""
        return ()

    def make_regions(self, target: Target, spacing: Spacing) -> tuple[np.ndarray, int]:
        """For a `regional` term: the regions of a target, and how many a sample has at most.

        They are NumPy's, (B, *spatial) of int8, int16 or int32; (B, C, *spatial) of a term with
        ``regions_by_class``, but for a single class.

        Raises:
            ValueError: they cannot be made of such a target.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make_regions")

    def make_field(self, target: Target, spacing: Spacing) -> Any:
        """The field `makes`, (B, C, *spatial) or (B, *spatial); NaN and infinity are in no field.

        It is NumPy's, as the arrays of ``target`` are; both are on a GPU where the call's arrays
        are and the term is ``on_gpu``.

        Raises:
            ValueError: ``spacing`` has not one number for each spatial axis.
        """
        raise NotImplementedError(f"{type(self).__name__} must define make_field")

    def derive_field(self, field: Any, mask: Any) -> Any:
        """The field `derives` of the field `makes`, both (B, C, *spatial) of float32.

        They are NumPy's or on a GPU, as for `make_field`.

        Args:
            field: to be read only.
            mask: for a term that ``looks``, where p > ½: (B, C, *spatial) of bool, on a GPU 0 and 1
                of uint8. Else None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define derive_field")

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        """The coefficients, (S, C), of the map by which a term with a `ranking` chooses voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define ranks_by")

    def found_as(self, total: Sum) -> Term:
        """For a term that reads a `histogram`: one that reads its value as a sum in its place."""
        raise TypeError(
            f"terms: {type(self).__name__} reads a histogram in a way that no GPU does; pass "
            "arrays in CPU memory"
        )

    def choose(self, losses: np.ndarray) -> float:
        """Turn that map, (B, voxels), into the field, in place; return the sum over all voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define choose")

    def rank(self, numbers: np.ndarray, targets: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """As `choose`, of a map of unweighted voxels, (B, voxels) or with classes (B, C, voxels).

        ``targets``: for every sample g, (C, voxels), and the voxel weights, (voxels,), which are 0
        where voxels count for nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rank")

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
    ) -> tuple[Any, ...]:
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

    def fields(self, target: Any, **options: Any) -> dict[str, Any]:
        """As `fastloss.Loss.fields`, with the default options."""
        return self._loss.fields(target, **options)

    def explain(
        self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any
    ) -> Explanation:
        """As `fastloss.Loss.explain`, with the default options."""
        return self._loss.explain(logits, target, voxel_weight, **options)

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


class Loss:
    """A weighted sum of terms, fused: it costs what its dearest term costs alone.

    Terms and losses add and subtract, and are multiplied and divided by a number: Python's, NumPy's
    or an array of one, whose value is then taken.

    Args:
        *terms: terms, or losses, whose terms and weights are taken over.
        activation: "softmax" over the channels, "sigmoid" of each channel, or "none" where
            probabilities are passed in place of logits.
        ignore_index: voxels of this label count for nothing: not in sums, means or gradient. In
            a dense target, voxels of more than half this class; where it is no class (255, -1)
            or there is one channel, voxels that hold this number.
        channel_axis: the axis of the channels in logits and dense targets, 1 or for instance
            -1; any axis but the first.
        validate: on a GPU, wait for the reduce pass and raise the error for bad targets or voxel
            weights. Without it nothing waits, and they make the value and the gradient NaN. On a
            CPU they always raise.

    Every method takes

    - logits: (B, C, *spatial), float16, bfloat16, float32 or float64, in any strides; or
      probabilities in [0, 1] with ``activation="none"``. NumPy, or anything with ``__dlpack__``
      in CPU memory or on a CUDA device, which is read without a copy.
    - target: a label map (B, *spatial) or (B, 1, *spatial) of integers in [0, C), in any integer,
      bool or floating dtype; or a dense target (B, C, *spatial): one-hot, multi-label or soft.
      With one channel and no softmax the target is that channel's mask. Integers in a dense target
      or a mask are 0 and 1, floating numbers are free.
    - voxel_weight: None, or (B, *spatial) or (B, 1, *spatial), non-negative: a mask or weights;
      (1, *spatial) or (1, 1, *spatial) holds those of every sample. A voxel of weight 0 counts for
      nothing, whatever its logits hold.
    - fields: None, or by name the arrays that terms read beside the target, (B, *spatial) or
      (B, C, *spatial), of any floating dtype or bool. Integers of shape (B, *spatial) are a second
      label map: for class c the field is 1 where the label is c. Terms that make theirs of the
      target, as `fastloss.Boundary`, need none: see `fields` for how to make them ahead.
    - regions: None, or the region that every voxel belongs to, (B, *spatial) or (B, 1, *spatial) of
      integers: 0, 1, 2, … within a sample, each of at least one voxel; −1 where a voxel counts for
      nothing. Sums are then formed for every region, and terms take regions for samples: all but
      those beside a `fastloss.PerRegion`, which makes its regions where none are given, and with
      ``per_class`` takes one map for each class, (B, C, *spatial).
    - region_count: how many regions a sample may have; found out if it is not given, but on a GPU,
      where to look would wait. Chunks of a volume on a GPU need the same.

    PyTorch tensors give PyTorch tensors. A loss that is called with logits that require a gradient
    is differentiated by autograd, once: gradients flow to the logits, and to a dense target of
    floating numbers in CPU memory that requires one, but not in compiled code. Second derivatives
    raise RuntimeError. Beside the gradient no memory is taken; the arrays are kept until the
    backward pass. `torch.compile`, `torch.export` and `torch.jit.trace` take a loss into the graph,
    with its numbers as they are then; a process that loads such a graph imports `fastloss.torch`
    first. The methods record no graph, whatever their tensors require.

    JAX arrays give JAX arrays, and `jax.grad`, `jax.vjp`, `jax.vmap` and `jax.jit` of a call
    work likewise on a CPU: the numbers of the loss are constants of a compiled program. There,
    ``region_count`` is needed, and bad labels and weights are reported by XLA's runtime error. The
    methods take arrays, and cannot be traced. See `fastloss.jax` for data over several devices.

    Without a sample, or without a voxel, a mean is 0, and a region term has the value of its
    formula for empty regions; the gradient is as empty as the logits.

    Every method raises ValueError or TypeError, naming the argument, for arrays that do not fit
    each other, for labels outside [0, C) that are not ``ignore_index``, for other integers than 0
    and 1 in a dense target or a mask (as in one of 0 and 255), and for negative weights.

    Arrays on a CUDA device are computed there, on the caller's current stream, and nothing waits
    for it; results stay there, in CuPy arrays where the framework is not PyTorch. All arrays of a
    call lie in one memory.

    >>> import numpy as np, fastloss as fl
    >>> logits = np.zeros((1, 2, 4, 4, 4), np.float32)
    >>> labels = np.zeros((1, 4, 4, 4), np.uint8)
    >>> loss = fl.Dice() + 0.5 * fl.CrossEntropy()
    >>> value, grad = loss.value_and_grad(logits, labels)
    >>> print(grad.shape, grad.dtype)
    (1, 2, 4, 4, 4) float32
    """

    autograph_info__: ClassVar[Any] = {}
    """As of a `Term`."""

    def __init__(
        self,
        *terms: Term | Loss,
        activation: str | None = None,
        ignore_index: int | None = None,
        channel_axis: int | None = None,
        validate: bool | None = None,
    ) -> None:
        if not terms:
            raise ValueError("terms: expected at least one term")
        given = {
            "activation": activation,
            "ignore_index": ignore_index,
            "channel_axis": channel_axis,
            "validate": validate,
        }
        if activation is not None:
            check_choice("activation", activation, ACTIVATIONS)
        for name in ("ignore_index", "channel_axis"):
            number = given[name]
            if number is not None and not (
                isinstance(number, (int, np.integer)) and not isinstance(number, bool)
            ):
                raise TypeError(f"{name}: expected an integer, got {number!r}")
        if validate not in (None, True, False):
            raise TypeError(f"validate: expected True or False, got {validate!r}")
        if channel_axis == 0:
            raise ValueError("channel_axis: axis 0 is the batch's, got 0")

        weighted: list[tuple[float, Term]] = []
        options = {k: v for k, v in given.items() if v is not None}
        for term in terms:
            if isinstance(term, Loss):
                weighted += term.terms
                for name, value in term._options.items():
                    if options.setdefault(name, value) != value:
                        raise ValueError(
                            f"{name}: the parts of a loss must agree, got {options[name]!r} and "
                            f"{value!r}"
                        )
            elif isinstance(term, Term):
                weighted.append((1.0, term))
            else:
                raise TypeError(f"terms: expected terms or losses, got {term!r}")
        self._options: dict[str, Any] = options
        self.terms = tuple(weighted)

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Factors and terms."""
        return self._terms

    @terms.setter
    def terms(self, terms: tuple[tuple[float, Term], ...]) -> None:
        self._terms = terms
        self.needs: frozenset[str | Sum] = frozenset().union(*(term.requires for _, term in terms))
        self.ranking = _ranking_term([term for _, term in terms])
        counting = (term for _, term in terms if not term.requires.isdisjoint(HISTOGRAMS))
        self.counting = next(counting, None)
        """A term that reads a histogram, if one does."""
        self.maps_voxels = _is_per_voxel([term for _, term in terms])
        ranked = None if self.ranking is None else self.ranking.ranking
        own = "" if ranked is None else ranked.field
        named = {need.field for need in self.needs if isinstance(need, Sum)}
        self.field_names: tuple[str, ...] = tuple(sorted(named - {"", own}))
        """The names of the fields that the sums read, in their order."""
        self.makers = _makers([term for _, term in terms])
        self.regional = _regional_term([term for _, term in terms])
        self.regions_by_class = self.regional is not None and self.regional.regions_by_class
        self._checked: set[int] = set()
        self._factors = np.array([factor for factor, _ in terms], np.float64)
        self._text_of_options = text_of_options(tuple(self._options.items()))
        self.given: tuple[Any, ...] = ()
        for _, term in terms:
            if term._described is None:
                term._describe()

    @property
    def activation(self) -> str:
        return str(self._options.get("activation", "softmax"))

    @property
    def ignore_index(self) -> int | None:
        return self._options.get("ignore_index")

    @property
    def channel_axis(self) -> int:
        return int(self._options.get("channel_axis", 1))

    @property
    def validate(self) -> bool:
        return bool(self._options.get("validate", False))

    @property
    def additive(self) -> bool:
        """Whether the sums over a volume's chunks determine the value."""
        return self.ranking is None and not self.maps_voxels

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        """As that of a term, of the sum of all."""
        shapes = []
        for _, term in self.terms:
            of_regions = regions and (self.regional is None or term.regional)
            more = (regions,) if of_regions else ()  # as older terms do not know of regions
            shapes.append(term.value_shape(batch, classes, *more))
        return np.broadcast_shapes(*shapes)

    def lacks_regions(self, extras: Extras | None) -> bool:
        """Whether regions are to be made of the target, where these extras are given."""
        return self.regional is not None and (extras is None or extras.regions is None)

    @property
    def sums_over_batch(self) -> bool:
        """Whether nothing but the sums over the samples matters to any term."""
        return all(term.sums_over_batch for _, term in self.terms)

    # ------------------------------------------------------------------ what a user calls

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
        """The value of the loss: a float32 scalar (float64 for float64 logits).

        An array where a term has ``reduction="none"``: see the terms for its shape.
        """
        extras = Extras.of(fields, regions, region_count)
        return adapter_of(logits, "logits").value(self, logits, target, voxel_weight, extras=extras)

    def value_and_grad(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
        out: Any = None,
        upstream: Any = None,
        target_grad: bool = False,
    ) -> tuple[Any, ...]:
        """The value, and its gradient by the logits in the logits' shape and dtype.

        Args:
            out: a writable array of the logits' shape and dtype that takes the gradient and is
                returned; the logits themselves are allowed, and are then overwritten.
            upstream: the gradient of the final result by this value, of the value's shape; 1 if
                not given. With ``reduction="none"`` the weights of its entries.
            target_grad: return the gradient by a dense target of floating numbers as well, in its
                shape and dtype: (value, gradient, gradient by the target). Fields and regions that
                terms make of the target are constants. It takes a pass of its own, in CPU memory
                one for each region where a call has regions. PyTorch's autograd computes it of a
                target that requires a gradient.

        Raises:
            ValueError: ``out`` is read-only, or overlaps an input other than as the logits; there
                is no gradient by such a target. TypeError: a term of yours has no derivative by
                the sums of the target alone.

        >>> import numpy as np, fastloss as fl
        >>> p, g = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
        >>> loss = fl.Loss(fl.CrossEntropy(), activation="none")
        >>> print(loss.value_and_grad(p, g, target_grad=True)[2].round(3))  # −log p
        [[0.693 0.693]]
        """
        extras = Extras.of(fields, regions, region_count)
        arrays = (logits, target, voxel_weight)
        return value_and_grad(self, *arrays, extras, out, upstream, target_grad)

    def statistics(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
    ) -> Statistics:
        """The sums that the loss is a function of. They add: over chunks of a volume, over ranks.

        A chunk need not have a voxel of every region. Fields that terms would make are to be given,
        cut from those of the whole volume: see `fields`.

        >>> import numpy as np, fastloss as fl
        >>> rng, loss = np.random.default_rng(0), fl.Dice() + fl.CrossEntropy()
        >>> x = rng.normal(size=(1, 3, 8, 4, 4)); y = rng.integers(0, 3, (1, 8, 4, 4))
        >>> total = sum(loss.statistics(x[:, :, i:i+2], y[:, i:i+2]) for i in range(0, 8, 2))
        >>> bool(np.isclose(loss.value(total), loss(x, y)))
        True
        """
        self.check_additive("statistics")
        extras = Extras.of(fields, regions, region_count)
        self.check_given(extras, "statistics")
        return self.passes(logits, target, voxel_weight, extras).reduce(whole=False)

    def fields(
        self,
        target: Any,
        *,
        classes: int,
        spacing: Any = None,
        dtype: str = "float32",
        dense: bool = False,
        spatial_axes: int | None = None,
    ) -> dict[str, Any]:
        """The fields that the terms make of a target: what a call takes as ``fields``.

        For the workers of a data loader: a call then need not make them. They do not depend on
        voxel weights. An ignored voxel, as one whose label is not in [0, C), is of no class.

        Args:
            target: as in a call: a label map (B, *spatial) or (B, 1, *spatial), or if ``dense``
                (B, C, *spatial). NumPy, or anything with ``__dlpack__``.
            classes: C, the number of channels that the logits will have.
            spacing: the size of a voxel, one number or one per spatial axis, above 0; if not given,
                that of each term. (`fastloss.HausdorffDT` measures in each call too, with its own.)
            dtype: "float32" or "float16", of fields of floating numbers.
            spatial_axes: how many spatial axes there are, which tells (B, 1, *spatial) from
                (B, *spatial). If not given, as many as ``spacing`` has numbers; of one number or
                none, all axes of a label map but the first.

        Returns:
            By name, arrays of the target's framework (of one that allocates none, NumPy arrays),
            the samples along the first axis; empty where no term makes a field. The regions of
            `fastloss.PerRegion` are called ``"regions"``, and are not a field that sums read.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range.

        >>> import numpy as np, fastloss as fl
        >>> loss = fl.Dice() + 0.01 * fl.Boundary()
        >>> labels = np.zeros((1, 4, 4), np.uint8); labels[:, 1:3, 1:3] = 1
        >>> fields = loss.fields(labels, classes=2)
        >>> print({name: field.shape for name, field in fields.items()})
        {'boundary': (1, 2, 4, 4)}
        """
        axes = check_axes(spacing, spatial_axes)
        check_choice("dtype", dtype, ("float32", "float16"))
        return fields_of(
            self,
            target,
            classes=check_count("classes", classes),
            spacing=check_spacing(spacing),
            dtype=dtype,
            dense=dense,
            axes=axes,
        )

    def value(self, statistics: Statistics) -> Any:
        """The value of the loss from the sums over all its chunks."""
        self._check_statistics(statistics)
        if isinstance(statistics.sums, np.ndarray):
            return self.combine(statistics)[0]
        return on_device(borrow(statistics.sums, "statistics")).combine(self, statistics)[0]

    def gradient(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
        statistics: Statistics | None = None,
        out: Any = None,
        upstream: Any = None,
    ) -> Any:
        """The gradient by the logits; of one chunk, given the ``statistics`` of all of them.

        Other arguments as in `value_and_grad`.
        """
        if statistics is not None:
            self.check_additive("statistics")
            self._check_statistics(statistics)
            if statistics.regions and regions is not None and region_count is None:
                region_count = statistics.regions  # of which this chunk may lack the last ones
        extras = Extras.of(fields, regions, region_count)
        if statistics is not None:
            self.check_given(extras, "statistics")
        passes = self.passes(logits, target, voxel_weight, extras)
        out, view = passes.output(out)
        if self.maps_voxels:
            passes.apply(passes.forward()[1](passes.upstream(upstream)), view)
            return out
        own = passes.reduce(whole=statistics is None)  # also checks the labels
        if statistics is None:
            statistics = own
        else:
            statistics.check_place(own)
            if statistics.sums.shape != own.sums.shape or statistics.request != own.request:
                raise ValueError(
                    "statistics: expected the sums of this loss over chunks like these arrays, got "
                    f"{statistics._describe()}"
                )
        passes.apply(passes.combine(statistics)[1](passes.upstream(upstream)), view)
        return out

    def explain(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
        spacing: Any = None,
        exact: bool = False,
    ) -> Explanation:
        """Where the value comes from: its parts by term, sample and class, and maps of the voxels.

        The map of a term says of every voxel:

        - of a term that sums over voxels (cross-entropy, focal, …) its *share*, the loss of the
          voxel in units of the value of this loss: times the factor of the term and, for a mean,
          divided by what the mean divides by. The shares add up to the term's contribution.
          A Lovász loss is such a sum once its voxels are ranked, of errors times the steps of the
          Jaccard loss; of a histogram the share is right to its bin.
        - of any other term (Dice, Tversky, boundary losses, …) its *gain*: by how much the value
          would fall if this voxel alone were predicted right. That is p = its target: of a label
          1 for its class and 0 for the others. Of a softmax, or of probabilities
          (``activation="none"``), all classes of the voxel change at once; of a sigmoid each
          channel by itself. Gains do not add up to the value, as the voxels share the sums. They
          may be negative: where a soft target is no minimum of the term, and to first order where
          the term is not monotonic.
        - of a `fastloss.PerRegion`, the shares of its terms that sum over voxels and the gains of
          the others, in the regions.

        To first order the gain is Σ (derivative by a sum) · (its change), which takes one pass a
        term; ``exact`` evaluates the term on the changed sums of every voxel, which takes some
        fifty times as long. As a field does not change, distances to what is predicted
        (`fastloss.HausdorffDT`) stay what they are in both.

        Args:
            logits, target, voxel_weight, fields, regions, region_count: as in a call.
            spacing: the size of a voxel for fields and regions that are made in this call, one
                number or one per spatial axis; if not given, that of each term.
            exact: whether gains are exact rather than of first order.

        Raises:
            ValueError: a loss that has no single value (``reduction="none"`` or ``"voxel"``);
                ``exact`` for a term of one's own that does not define `Term.fall`; a term of one's
                own that reads a histogram.
            TypeError, ValueError: as in a call.

        >>> import numpy as np, fastloss as fl
        >>> logits = np.zeros((1, 2, 4, 4)); labels = np.zeros((1, 4, 4), int); labels[0, 0, 0] = 1
        >>> found = (fl.Dice() + fl.CrossEntropy()).explain(logits, labels)
        >>> print(found)
        Loss 1.3115
               Dice  CrossEntropy   total
        0    0.1739        0.6498  0.8237
        1    0.4444        0.0433  0.4878
        sum  0.6184        0.6931  1.3115
        >>> [voxel.position for voxel in found.worst(1)]
        [(0, 0)]
        """
        extras = Extras.of(fields, regions, region_count)
        return explain(self, logits, target, voxel_weight, extras, check_spacing(spacing), exact)

    # ------------------------------------------------------------------ how it is done

    def passes(
        self, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None = None
    ) -> Passes:
        """The two passes over these arrays, for the adapters of frameworks."""
        return Passes(self, logits, target, voxel_weight, extras)

    def request(self, arrays: Arrays) -> Request:
        classes = arrays.logits.shape[1]
        if classes not in self._checked:
            for _, term in self.terms:
                term.check(self.activation, classes)
            self._checked.add(classes)
        whole = self.counting
        if whole is None and self.ranking is not None and self.ranking.ranks_classes:
            whole = self.ranking
        if whole is not None and (arrays.regions is not None or self.regional is not None):
            raise ValueError(
                f"regions: {type(whole).__name__} ranks the voxels of whole samples, and has no "
                "loss of regions; leave them out, and terms that make them"
            )
        if arrays.dense and self.ranking is not None and not self.ranking.ranks_dense:
            raise ValueError(
                f"target: {type(self.ranking).__name__} takes a label map, got a dense "
                f"target {arrays.target.shape}"
            )
        return make_request(self.activation, arrays.dense, self.ignore_index, self.needs)

    def lacks(self, names: Sequence[str]) -> tuple[str, ...]:
        """The fields that the sums read and that have to be made, where those named are given."""
        return tuple(name for name in self.field_names if name in self.makers and name not in names)

    def check_field_names(self, names: tuple[str, ...]) -> None:
        """Raise ValueError if the terms read other fields than these and those that they make."""
        if names == self.field_names:
            return
        sources = {maker.makes for maker in self.makers.values()}
        made = {name for name, maker in self.makers.items() if name != maker.makes}
        read = {*self.field_names, *sources}
        if not set(names) <= read or not read - made <= {*names, *sources}:
            wanted = ", ".join(map(repr, sorted(read - made))) or "none"
            got = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"fields: the terms of this loss read {wanted}, got {got}")

    def check_given(self, extras: Extras | None, name: str) -> None:
        """Raise ValueError if a part of a volume would be taken for all of it.

        The distances within a part are not those of the volume.
        """
        if self.lacks_regions(extras) and not self.regional.local:  # type: ignore[union-attr]
            raise ValueError(
                f"{name}: a part of a volume needs the regions of the whole, cut as the part is "
                "(see Loss.fields), but regions were not given"
            )
        given = () if extras is None else extras.names
        for field in self.lacks(given):
            term = self.makers[field]
            if term.makes not in given or term.looks:
                raise ValueError(
                    f"{name}: a part of a volume needs the fields of the whole, cut as the part is "
                    f"(see Loss.fields), but {field if term.looks else term.makes!r} was not given"
                )

    def check_additive(self, name: str, parts: bool = True) -> None:
        """Raise ValueError, naming the argument, if the loss is no function of sums.

        ``parts``: of sums over parts of a sample, not over samples alone.
        """
        for _, term in self.terms:
            if parts and term.looks:
                raise ValueError(
                    f"{name}: {type(term).__name__} measures distances within what is predicted, "
                    "so parts of a volume cannot be joined"
                )
        if self.maps_voxels:
            raise ValueError(
                f"{name}: a loss of reduction='voxel' has one number per voxel, and no sums to join"
            )
        if not self.additive:
            raise ValueError(
                f"{name}: {type(self.ranking).__name__} is no function of sums over voxels, "
                "so parts of the data cannot be joined"
            )

    def _check_statistics(self, statistics: Statistics) -> None:
        if not isinstance(statistics, Statistics):
            raise TypeError(f"statistics: expected Statistics, got {type(statistics).__name__}")
        request = statistics.request
        if (request.activation, request.ignore_index, request.needs) != (
            self.activation,
            self.ignore_index,
            self.needs,
        ):
            raise ValueError("statistics: these are the sums of another loss")
        for _, term in self.terms:
            term.check(self.activation, statistics.classes)

    def combine(self, statistics: Statistics) -> tuple[Any, Callable[[Any], np.ndarray]]:
        """The value, and from its upstream gradient (None: 1) the derivative by every sum."""
        total, pull = self.formulas(statistics)
        shape = getattr(total, "shape", ())

        def pullback(upstream: Any) -> np.ndarray:
            """(S, B, C): the derivative by every sum."""
            if upstream is None:
                upstream = 1.0
            else:
                upstream = np.asarray(upstream, np.float64)
                if upstream.shape != shape:
                    raise ValueError(
                        f"upstream: expected the value's shape {shape}, got {upstream.shape}"
                    )
            return pull(upstream)

        return statistics.dtype.type(total), pullback

    def formulas(self, statistics: Statistics) -> tuple[Any, Callable[[Any], np.ndarray]]:
        """As `combine`, in float64, with an upstream gradient of the value's shape, or 1.0.

        The sums may be arrays that record what is done with them, in place of NumPy's.
        """
        if self.regional is None:
            parts = [(weight, *term.combine(statistics)) for weight, term in self.terms]
        else:
            parts = [(weight, *self.combined(term, statistics)) for weight, term in self.terms]
        total = _times(*parts[0][:2])
        for weight, value, _ in parts[1:]:
            try:
                total = total + _times(weight, value)
            except ValueError:
                raise ValueError(
                    "reduction: the values of the terms do not add, as their shapes are "
                    + ", ".join(str(np.shape(part[1])) for part in parts)
                ) from None
        shape = getattr(total, "shape", ())

        def pullback(upstream: Any) -> np.ndarray:
            coefficients = np.zeros(statistics.sums.shape, like=statistics.sums)
            index = statistics.request.index
            for weight, value, pull in parts:
                own = _reduce_to(upstream, shape, np.shape(value)) if shape else upstream
                for key, derivative in pull(own * weight).items():
                    coefficients[index[key]] += derivative
            return coefficients

        return total, pullback

    def combined(self, term: Term, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        """`Term.combine`; beside a regional term that of the sums of whole samples."""
        if self.regional is None or term.regional or not statistics.regions:
            return term.combine(statistics)
        value, pull = term.combine(statistics.of_samples())

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {key: to_regions(d, statistics) for key, d in pull(upstream).items()}

        return value, pullback

    def map_coefficients(self, request: Request, classes: int) -> np.ndarray:
        """k, (S, C), of the map that a loss of every voxel is."""
        coefficients = np.zeros((len(request.sums), classes))
        for weight, term in self.terms:
            for key, k in term.map_coefficients(request, classes).items():
                coefficients[request.index[key]] += weight * k
        return coefficients

    # ------------------------------------------------------------------ structure and numbers

    @property
    def structure(self) -> str:
        """The loss without its numbers, as JSON: compiled code is made for it.

        Equal for losses whose terms have the same classes and options but for numbers: the terms'
        factors and class weights, of which it says the shapes alone.
        """
        terms = [term._described.text for _, term in self._terms]  # type: ignore[union-attr]
        return text_of_loss(terms, self._text_of_options)

    @property
    def key(self) -> tuple[str, ...]:
        """As `structure`, quicker."""
        return (self._text_of_options, *(term.described.text for _, term in self._terms))

    @property
    def operands(self) -> tuple[np.ndarray, ...]:
        """The numbers, float64: the factors of the terms (T,), then (1,) or (C,) for each number
        of every term."""
        found = [self._factors]
        for _, term in self._terms:
            found += term._described.arrays  # type: ignore[union-attr]
        return tuple(found)

    @constant
    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """As `operands`, without arrays."""
        return tuple(tuple(operand.tolist()) for operand in self.operands)

    @constant
    def keep_terms(self) -> bool:
        """Hold the terms that a graph can name by an identity alone for as long as it may run.

        False for a loss that is made in what is being traced: all that is known of it is that there
        will be one.
        """
        if not vars(self):
            return False
        keep(self)
        return True

    def with_operands(self, operands: Sequence[Any]) -> Loss:
        """The same loss with other numbers, as `operands` has them; None for those that it has.

        They may be arrays that record what is done with them, in place of NumPy's.

        Raises:
            ValueError: a factor that is not finite, or a class weight that is not or is negative.
        """
        factors: Any = [factor for factor, _ in self.terms]
        if operands[0] is not None:
            factors = operands[0]
            if isinstance(factors, np.ndarray):
                factors = factors.tolist()
                if not np.isfinite(factors).all():
                    raise ValueError(f"factor: expected finite numbers, got {factors}")
        terms = []
        start = 1
        for i, (_, term) in enumerate(self.terms):
            end = start + len(term.described.names)
            terms.append((factors[i], term.with_numbers(operands[start:end])))
            start = end
        loss = self.with_terms(tuple((1.0, term) for _, term in terms))
        loss._terms = tuple(terms)
        if isinstance(factors, list):
            loss._factors = np.array(factors, np.float64)
        return loss

    @property
    def reads_again(self) -> bool:
        """Whether the gradient needs the numbers once more, after the value."""
        return not self.additive or any(term.value_shape(1, 2) for _, term in self.terms)

    def given_to(self, term: Term, name: str) -> Any:
        """The array with this number of a term, or None."""
        places = [(t, n) for _, t in self.terms for n in t.described.names]
        for (other, number), array in zip(places, self.given[1:], strict=False):
            if other is term and number == name:
                return array
        return None

    def with_given(self, given: Sequence[Any]) -> Loss:
        """The same loss whose numbers lie in arrays on a GPU, as `operands` has them, or are None
        where the loss has them itself. The arrays are read in every call, when it is computed."""
        loss = self.with_terms(self.terms)
        loss.given = tuple(given)
        return loss

    def with_terms(self, terms: tuple[tuple[float, Term], ...]) -> Loss:
        """The sum of these terms, with the options of this loss."""
        loss = Loss.__new__(Loss)
        loss._options = self._options
        loss.terms = terms
        return loss

    def without_histograms(self) -> tuple[Loss, tuple[tuple[Term, Sum], ...]]:
        """The loss where each term that reads a histogram is a sum of its own; and these terms."""
        ranked: list[tuple[Term, Sum]] = []
        terms = []
        for factor, term in self.terms:
            if not term.requires.isdisjoint(HISTOGRAMS):
                total = Sum(field=f"{term.histogram} {len(ranked)}")
                ranked.append((term, total))
                term = term.found_as(total)
            terms.append((factor, term))
        return self.with_terms(tuple(terms)).with_given(self.given), tuple(ranked)

    def described_inside(self) -> tuple[str, list[Any]]:
        """Structure and operands of a loss that a function makes while it is being compiled.

        What its terms were made of there `torch.compile` takes for constants.
        """
        texts, operands = [], [tuple([fixed(factor) for factor, _ in self._terms])]
        for _, term in self._terms:
            text, numbers = term.part_inside()
            texts.append(text)
            operands += numbers
        return text_of_loss(texts, text_of_options(tuple(self._options.items()))), operands

    def __add__(self, other: object) -> Loss:
        return Loss(self, other) if isinstance(other, (Term, Loss)) else NotImplemented

    def __radd__(self, other: object) -> Loss:
        if isinstance(other, Term):
            return Loss(other, self)
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> Loss:
        return self + -other if isinstance(other, (Term, Loss)) else NotImplemented

    def __rsub__(self, other: object) -> Loss:
        return -self if isinstance(other, int) and other == 0 else NotImplemented

    def __neg__(self) -> Loss:
        return self * -1.0

    def __mul__(self, factor: object) -> Loss:
        number = factor_of("factor", factor)
        return NotImplemented if number is None else self._weighted(number, 1.0)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Loss:
        number = factor_of("divisor", divisor)
        if number == 0:
            raise ValueError(f"divisor: expected a number other than 0, got {divisor!r}")
        return NotImplemented if number is None else self._weighted(1.0, number)

    __array_ufunc__ = None  # so that NumPy's numbers leave their product to the loss

    def _weighted(self, factor: float, divisor: float) -> Loss:
        scaled = Loss(self)
        scaled.terms = tuple((factor * weight / divisor, term) for weight, term in self.terms)
        return scaled

    def __getstate__(self) -> dict[str, Any]:
        return {"terms": self.terms, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._options = state["_options"]
        terms = state["terms"]
        if all(vars(term) for _, term in terms):
            self.terms = terms
        # Else it is the loss that a term is alone, within a pickle of that term: the term is not
        # whole yet, and makes its loss again.

    def __repr__(self) -> str:
        parts = [repr(t) if w == 1.0 else f"{w!r} * {t!r}" for w, t in self.terms]
        parts += [f"{name}={value!r}" for name, value in self._options.items()]
        return f"Loss({', '.join(parts)})"


def _times(weight: Any, value: Any) -> Any:
    """weight · value; of a weight of 0 and an infinite value NaN, without a warning."""
    if not isinstance(weight, float) or weight:
        return value if isinstance(weight, float) and weight == 1.0 else weight * value
    with np.errstate(invalid="ignore"):
        return weight * value


def _is_per_voxel(terms: list[Term]) -> bool:
    """Whether the loss is one of every voxel, as all of its terms must be then."""
    each = [term for term in terms if term.maps_voxels]
    if not each:
        return False
    for term in terms:
        if term not in each:
            raise ValueError(
                "reduction: 'voxel' gives one number per voxel, to which the value of "
                f"{type(term).__name__} does not add"
            )
        if any(isinstance(need, Sum) and need.field for need in term.requires):
            raise ValueError(
                f"reduction: {type(term).__name__} reads a field, and has no loss of every voxel"
            )
    return True


def _ranking_term(terms: list[Term]) -> Term | None:
    """The term that chooses among voxels, of which there may be one."""
    found = [term for term in terms if term.ranking is not None]
    if len(found) > 1:
        raise ValueError(
            f"terms: expected at most one {type(found[0]).__name__} in a loss, and beside it no "
            f"other term that ranks voxels, got {len(found)} such terms"
        )
    return found[0] if found else None


def _reduce_to(upstream: Any, shape: tuple[int, ...], own: tuple[int, ...]) -> Any:
    """The upstream gradient of one term whose value was broadcast to the total's shape."""
    if own == shape:
        return upstream
    if isinstance(upstream, float):
        upstream = np.full(shape, upstream)
    axes = tuple(range(len(shape) - len(own)))
    axes += tuple(i + len(axes) for i, n in enumerate(own) if n == 1 and shape[i + len(axes)] != 1)
    return upstream.sum(axis=axes, keepdims=True).reshape(own)


def to_regions(derivative: Any, statistics: Statistics) -> np.ndarray:
    """The derivative by the sums of samples, (B, C) or what fits, as that by those of regions."""
    regions, (_, rows, classes) = statistics.regions, statistics.sums.shape
    batch = rows // regions
    each = np.broadcast_to(derivative, (batch, classes))[:, None]
    return np.broadcast_to(each, (batch, regions, classes)).reshape(rows, classes)


def _regional_term(terms: list[Term]) -> Term | None:
    """The term whose regions the loss has, if any does: all must take the same."""
    found = [term for term in terms if term.regional]
    for term in found[1:]:
        if term.making_regions != found[0].making_regions:
            raise ValueError(
                f"regions: {found[0]!r} and {term!r} take different regions, and a loss has one "
                "map of them"
            )
    return found[0] if found else None


def _makers(terms: list[Term]) -> dict[str, Term]:
    """By name, the terms that make the fields which the sums read."""
    makers: dict[str, Term] = {}
    sources: dict[str, Term] = {}
    for term in terms:
        if not term.makes:
            continue
        makers[term.derives or term.makes] = term
        other = sources.setdefault(term.makes, term)
        if other.making != term.making:
            raise ValueError(
                f"terms: {other!r} and {term!r} make the field {term.makes!r} in different ways, "
                "and a loss has one of each name"
            )
    return makers


register(Loss, Term)
