"""A loss: a weighted sum of terms, computed together in two passes over the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays, Field, arrange, channels_second, check_out
from fastloss.backends import Backend, current_backend
from fastloss.borrowed import Borrowed, Extras
from fastloss.frameworks import Adapter, adapter_of, borrow
from fastloss.maps import Map
from fastloss.request import ACTIVATIONS, Request, make_request
from fastloss.statistics import Statistics
from fastloss.structure import Recipe, text_of_loss, text_of_options
from fastloss.sums import Sum
from fastloss.terms.base import Term, check_choice, factor_of
from fastloss.tracing import constant, fixed

if TYPE_CHECKING:
    from fastloss.backends.cuda.backend import DevicePasses
    from fastloss.backends.cuda.prepared import Prepared
    from fastloss.borrowed import Place


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
      label map: for class c the field is 1 where the label is c.
    - regions: None, or the region that every voxel belongs to, (B, *spatial) or (B, 1, *spatial) of
      integers: 0, 1, 2, … within a sample, each of at least one voxel; −1 where a voxel counts for
      nothing. Sums are then formed for every region, and terms take regions for samples.
    - region_count: how many regions a sample may have; found out if it is not given, but on a GPU,
      where to look would wait. Chunks of a volume on a GPU need the same.

    PyTorch tensors give PyTorch tensors. A loss that is called with logits that require a gradient
    is differentiated by autograd, once: gradients flow to the logits alone, and second derivatives
    raise RuntimeError. Beside the gradient no memory is taken; the arrays are kept until the
    backward pass. `torch.compile`, `torch.export` and `torch.jit.trace` take a loss into the graph,
    with its numbers as they are then; a process that loads such a graph imports `fastloss.torch`
    first. The methods record no graph, whatever their tensors require.

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
        self.maps_voxels = _is_per_voxel([term for _, term in terms])
        own = None if self.ranking is None else self.ranking.ranking
        named = {need.field for need in self.needs if isinstance(need, Sum) and need != own}
        self.fields: tuple[str, ...] = tuple(sorted(named - {""}))
        """The names of the fields that the terms read, in their order."""
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
    ) -> tuple[Any, Any]:
        """The value, and its gradient by the logits in the logits' shape and dtype.

        Args:
            out: a writable array of the logits' shape and dtype that takes the gradient and is
                returned; the logits themselves are allowed, and are then overwritten.
            upstream: the gradient of the final result by this value, of the value's shape; 1 if
                not given. With ``reduction="none"`` the weights of its entries.

        Raises:
            ValueError: ``out`` is read-only, or overlaps an input other than as the logits.
        """
        extras = Extras.of(fields, regions, region_count)
        if upstream is None and extras is None:
            adapter = adapter_of(logits, "logits")
            ready = self.prepared(adapter, logits, target, voxel_weight)
            arrays = (logits, target, voxel_weight)
            if ready is not None and (
                out is None or ready[0].takes(self, adapter, arrays, ready[1], out)
            ):
                call, addresses = ready
                value, kept = call.value(self, addresses)
                return value, call.gradient(self, adapter, arrays, addresses, kept, out=out)
        passes = self.passes(logits, target, voxel_weight, extras)
        out, view = passes.output(out)
        value, pullback = passes.forward()
        passes.apply(pullback(passes.upstream(upstream)), view)
        return passes.adapter.result(value), out

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

        A chunk need not have a voxel of every region.

        >>> import numpy as np, fastloss as fl
        >>> rng, loss = np.random.default_rng(0), fl.Dice() + fl.CrossEntropy()
        >>> x = rng.normal(size=(1, 3, 8, 4, 4)); y = rng.integers(0, 3, (1, 8, 4, 4))
        >>> total = sum(loss.statistics(x[:, :, i:i+2], y[:, i:i+2]) for i in range(0, 8, 2))
        >>> bool(np.isclose(loss.value(total), loss(x, y)))
        True
        """
        self.check_additive("statistics")
        extras = Extras.of(fields, regions, region_count)
        return self.passes(logits, target, voxel_weight, extras).reduce(whole=False)

    def value(self, statistics: Statistics) -> Any:
        """The value of the loss from the sums over all its chunks."""
        self._check_statistics(statistics)
        if isinstance(statistics.sums, np.ndarray):
            return self.combine(statistics)[0]
        return _on_device(borrow(statistics.sums, "statistics")).combine(self, statistics)[0]

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

    # ------------------------------------------------------------------ how it is done

    def passes(
        self, logits: Any, target: Any, voxel_weight: Any, extras: Extras | None = None
    ) -> Passes:
        """The two passes over these arrays, for the adapters of frameworks."""
        return Passes(self, logits, target, voxel_weight, extras)

    def prepared(
        self, adapter: Adapter, logits: Any, target: Any, voxel_weight: Any
    ) -> tuple[Prepared, tuple[int, ...]] | None:
        """What is kept of such calls on a GPU, and the addresses of these arrays; or None."""
        kind = adapter.kind(logits, "logits")
        if kind is None:
            return None
        from fastloss.backends.cuda.prepared import find

        return find(self, adapter, kind, logits, target, voxel_weight)

    def _request(self, arrays: Arrays) -> Request:
        classes = arrays.logits.shape[1]
        if classes not in self._checked:
            for _, term in self.terms:
                term.check(self.activation, classes)
            self._checked.add(classes)
        if arrays.dense and self.ranking is not None:
            raise ValueError(
                f"target: {type(self.ranking).__name__} takes a label map, got a dense "
                f"target {arrays.target.shape}"
            )
        return make_request(self.activation, arrays.dense, self.ignore_index, self.needs)

    def check_additive(self, name: str) -> None:
        """Raise ValueError, naming the argument, if the loss is no function of sums."""
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
        parts = [(weight, *term.combine(statistics)) for weight, term in self.terms]
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
        """What the loss is apart from its numbers, as JSON: what compiled code is made for.

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
        from fastloss.naming import keep  # which makes losses

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


def made(*arguments: Any) -> Loss:
    """The loss of some options and recipes, which is made once."""
    return _made(*arguments)


@lru_cache(maxsize=256)
def _made(options: tuple[tuple[str, Any], ...], *recipes: Recipe) -> Loss:
    terms = [r.factor * r.kind(**dict(r.options), **dict(r.numbers)) for r in recipes]
    return Loss(*terms, **dict(options))


UPSTREAM = "upstream"
"""The field by which the gradient of a loss of every voxel is multiplied."""


class PerVoxel(NamedTuple):
    """The derivative of a loss of every voxel: k, (S, C), times its upstream gradient."""

    coefficients: np.ndarray
    upstream: Borrowed


def _pull_map(
    shape: tuple[int, ...], coefficients: np.ndarray, place: Place | None, upstream: Any
) -> PerVoxel:
    """The derivative of a map of this shape, given its upstream gradient; None: 1."""
    if upstream is None:
        one = np.broadcast_to(np.ones((), np.float32), shape)
        upstream = one if place is None else place.ones(shape, "float32")
    elif tuple(np.shape(upstream)) != shape:
        raise ValueError(
            f"upstream: expected the value's shape {shape}, got {tuple(np.shape(upstream))}"
        )
    elif place is not None and isinstance(upstream, np.ndarray):
        upstream = place.array(upstream, "float32")
    return PerVoxel(coefficients, borrow(upstream, "upstream"))


class Passes:
    """One call's arrays, and the two passes over them."""

    def __init__(
        self,
        loss: Loss,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        extras: Extras | None = None,
    ) -> None:
        self.loss = loss
        self.adapter = adapter_of(logits, "logits")
        self.caller_logits = logits
        self.logits = self.adapter.borrow(logits, "logits")
        self.target = borrow(target, "target")
        self.voxel_weight = None if voxel_weight is None else borrow(voxel_weight, "voxel_weight")
        self.device: DevicePasses | None = None
        self.more: dict[str, Borrowed] = {}  # fields and regions, by what errors call them
        places: tuple[Place | None, ...]
        places = (self.logits.place, self.target.place, self.voxel_weight and self.voxel_weight[2])
        given: dict[str, Any] = {}
        if extras is not None or loss.fields:
            given = self._borrow(extras or Extras())
            places += tuple(b.place for b in self.more.values())
        if any(places):
            self.device = _on_device(self.logits, self.target, self.voxel_weight, **self.more)
        self.arrays = arrange(
            self.logits,
            self.target,
            self.voxel_weight,
            activation=loss.activation,
            channel_axis=loss.channel_axis,
            **given,
        )
        self.request = loss._request(self.arrays)
        # Which backend computes is a choice for arrays in CPU memory.
        self.backend: Backend | None = current_backend() if self.device is None else None
        self._whole: Arrays | None = None
        """The arrays with the field that the ranking term made."""
        if self.arrays.regions is not None and self.device is None:
            self._check_regions()

    def _borrow(self, extras: Extras) -> dict[str, Any]:
        """Borrow fields and regions: what `arrange` takes beside the usual arrays."""
        names = tuple(name for name, _ in extras.fields)
        if names != self.loss.fields:
            wanted = ", ".join(map(repr, self.loss.fields)) or "none"
            got = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"fields: the terms of this loss read {wanted}, got {got}")
        fields = {name: borrow(array, f"fields[{name!r}]") for name, array in extras.fields}
        self.more.update((f"fields[{name!r}]", field) for name, field in fields.items())
        if extras.regions is None:
            return {"fields": fields}
        regions = self.more["regions"] = borrow(extras.regions, "regions")
        rows = extras.region_count
        if rows is None and regions.place is not None:
            raise ValueError(
                "region_count: expected how many regions a sample has at most, as to look for it "
                "would wait for the GPU, got None"
            )
        if rows is None:
            integers = regions.array.dtype.kind in "iu" and regions.array.size
            rows = max(int(regions.array.max()) + 1, 1) if integers else 1
        return {"fields": fields, "regions": regions, "rows": rows}

    def _check_regions(self) -> None:
        """Raise ValueError for numbers that are no region."""
        regions, rows = self.arrays.regions, self.arrays.rows
        assert regions is not None
        if regions.size:
            least, most = int(regions.min()), int(regions.max())
            if least < -1 or most >= rows:
                wrong = least if least < -1 else most
                raise ValueError(f"regions: expected numbers in [-1, {rows}), got {wrong}")

    def _check_holes(self, voxels: np.ndarray) -> None:
        """Raise ValueError for a number without voxels below another one of the same sample."""
        regions, rows = self.arrays.regions, self.arrays.rows
        assert regions is not None
        for b, of_sample in enumerate(voxels.reshape(-1, rows)):
            if of_sample.all() or not regions.size:
                continue
            present = np.zeros(rows + 1, bool)
            present[regions[b]] = True  # -1 is behind all
            count = int(np.flatnonzero(present[:-1])[-1]) + 1 if present[:-1].any() else 0
            if not present[:count].all():
                hole = int(np.flatnonzero(~present[:count])[0])
                raise ValueError(
                    f"regions: expected voxels of every region in [0, {count}), but sample {b} has "
                    f"none of region {hole}"
                )

    def reduce(self, whole: bool = True) -> Statistics:
        """The sums; not ``whole``: of a chunk, which may lack regions."""
        if self.device is not None:
            return self.device.reduce(self.loss, self.request, self.arrays)
        statistics = self._reduce()
        if whole and self.arrays.regions is not None:
            self._check_holes(statistics.voxels)
        return statistics

    def _reduce(self) -> Statistics:
        assert self.backend is not None
        request, arrays = self.request, self.arrays
        classes, batch = arrays.logits.shape[1], arrays.logits.shape[0] * arrays.rows
        regions = 0 if arrays.regions is None else arrays.rows
        voxels = np.empty(batch)
        term = self.loss.ranking
        if term is None:
            sums = np.empty((len(request.sums), batch, classes))
            self.backend.reduce(request, arrays, sums, voxels)
            return Statistics(request, sums, voxels, arrays.value_dtype, None, regions)
        assert term.ranking is not None
        # The field is made of the map that the pass over the other sums writes.
        others = make_request(
            request.activation, request.dense, request.ignore_index, request.needs - {term.ranking}
        )
        losses = np.empty(
            (arrays.target.shape[0], prod(arrays.target.shape[1:])), arrays.value_dtype
        )
        found = np.empty((len(others.sums), batch, classes))
        voxel_map = Map("voxel", losses, term.ranks_by(others, classes))
        self.backend.reduce(others, arrays, found, voxels, voxel_map)
        sums = np.zeros((len(request.sums), batch, classes))
        sums[[request.index[total] for total in others.sums]] = found
        total = term.choose(losses)
        if sums.size:
            sums[request.index[term.ranking], 0, 0] = total
        field = Field(losses.reshape(arrays.target.shape), arrays.value_dtype.name, "voxel")
        known = dict(zip(others.fields, arrays.fields, strict=True))
        known[term.ranking.field] = field
        self._whole = replace(arrays, fields=tuple(known[name] for name in request.fields))
        return Statistics(request, sums, voxels, arrays.value_dtype, None, regions)

    def forward(self) -> tuple[Any, Callable[[Any], Any]]:
        """The value of these arrays, and from its upstream gradient what `apply` takes."""
        return self._map() if self.loss.maps_voxels else self.combine(self.reduce())

    def upstream(self, gradient: Any) -> Any:
        """The upstream gradient, as the pullback takes it."""
        return gradient if self.loss.maps_voxels else self.adapter.upstream(gradient)

    def _map(self) -> tuple[Any, Callable[[Any], PerVoxel]]:
        """The loss of every voxel."""
        loss, request, arrays = self.loss, self.request, self.arrays
        batch, classes, *spatial = arrays.logits.shape
        coefficients = self._map_coefficients()
        by_class = request.activation == "sigmoid"
        shape = (batch, *[classes] * by_class, *spatial)
        flat = (*shape[: 1 + by_class], prod(spatial))
        out = self._new(flat, arrays.value_dtype)
        view = out if self.device is None else borrow(out, "out").array
        voxel_map = Map("class" if by_class else "voxel", view, coefficients)
        if self.device is not None:
            self.device.write_map(request, arrays, voxel_map, loss.validate)
        else:
            assert self.backend is not None
            self.backend.write_map(request, arrays, voxel_map)
        value = out.reshape(shape)
        if by_class and loss.channel_axis != 1:
            move = getattr(value, "movedim", None)  # a tensor's, which NumPy does not know
            axis = loss.channel_axis
            value = move(1, axis) if move is not None else np.moveaxis(value, 1, axis)
        pull = partial(_pull_map, tuple(value.shape), coefficients, self._place)
        return value, pull

    def pull_map(self, upstream: Any) -> PerVoxel:
        """For `apply`, of a loss of every voxel."""
        return _pull_map(tuple(upstream.shape), self._map_coefficients(), self._place, upstream)

    def _map_coefficients(self) -> np.ndarray:
        loss = self.loss if self.device is None else self.device.with_numbers(self.loss)
        return loss.map_coefficients(self.request, self.arrays.logits.shape[1])

    @property
    def _place(self) -> Place | None:
        return None if self.device is None else self.device.place

    @property
    def rows(self) -> int:
        """The number of rows of the statistics."""
        return int(self.arrays.logits.shape[0] * self.arrays.rows)

    def _new(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new array in C order, where the logits are."""
        if self.device is None:
            return np.empty(shape, dtype)
        return self.device.place.empty(shape, dtype.name)

    def _apply_per_voxel(self, by: PerVoxel, out: np.ndarray) -> None:
        """The gradient of the loss of every voxel: the upstream gradient is one more field."""
        loss, arrays = self.loss, self.arrays
        upstream = by.upstream.array
        by_class = self.request.activation == "sigmoid"
        if by_class and loss.channel_axis != 1:
            upstream = channels_second(upstream, loss.channel_axis, "upstream")
        whole = self.request
        weighted = {s: s._replace(field=UPSTREAM) for s in whole.sums}
        request = make_request(
            whole.activation, whole.dense, whole.ignore_index, frozenset(weighted.values())
        )
        rows, classes = arrays.logits.shape[0] * arrays.rows, arrays.logits.shape[1]
        coefficients = np.zeros((len(request.sums), rows, classes))
        for s, k in zip(whole.sums, by.coefficients, strict=True):
            coefficients[request.index[weighted[s]]] = k
        field = Field(upstream, by.upstream.dtype, "class" if by_class else "voxel")
        arrays = replace(arrays, fields=(field,))
        if self.device is not None:
            self.device.apply_sums(request, arrays, coefficients, out)
            return
        assert self.backend is not None
        self.backend.apply(request, arrays, coefficients, out)

    def combine(self, statistics: Statistics) -> tuple[Any, Callable[[Any], Any]]:
        """The value, and from its upstream gradient what `apply` takes."""
        if self.device is not None:
            return self.device.combine(self.loss, statistics)
        return self.loss.combine(statistics)

    def output(self, out: Any) -> tuple[Any, Borrowed]:
        """The array that takes the gradient, as the caller sees it, and its view."""
        if out is None:
            return self.adapter.empty_like(self.caller_logits, self.logits)
        return out, self.borrow_output(out, write=True)

    def borrow_output(self, out: Any, *, write: bool = False) -> Borrowed:
        """The view of an array that can take the gradient."""
        view = borrow(out, "out", write=write)
        if self.device is not None or view.place is not None:
            _on_device(self.logits, None, None, view)
        self.check_output(view)
        return view

    def gradient_view(self, out: Borrowed) -> np.ndarray:
        """The gradient's array with the channel axis where kernels look for it."""
        axis = self.loss.channel_axis
        return out.array if axis == 1 else channels_second(out.array, axis, "out")

    def check_output(self, view: Borrowed) -> None:
        """Raise ValueError or TypeError if the gradient cannot be written here."""
        others = [("target", self.target)]
        if self.voxel_weight is not None:
            others.append(("voxel_weight", self.voxel_weight))
        others += self.more.items()
        check_out(view, self.logits, others)

    def apply(self, coefficients: Any, out: Borrowed) -> None:
        """Write the gradient, given what `combine` returns for the upstream gradient."""
        view = self.gradient_view(out)
        if isinstance(coefficients, PerVoxel):
            self._apply_per_voxel(coefficients, view)
            return
        if self.device is not None:
            self.device.apply(self.loss, self.request, self.arrays, coefficients, view)
            return
        if self.loss.ranking is not None and self._whole is None:
            self._reduce()  # in another call than the first
        assert self.backend is not None
        self.backend.apply(self.request, self._whole or self.arrays, coefficients, view)


def _times(weight: Any, value: Any) -> Any:
    """weight · value; of a weight of 0 and an infinite value NaN, without a warning."""
    if not isinstance(weight, float) or weight:
        return value if isinstance(weight, float) and weight == 1.0 else weight * value
    with np.errstate(invalid="ignore"):
        return weight * value


def _on_device(logits: Borrowed, *others: Borrowed | None, **more: Borrowed) -> DevicePasses:
    """For arrays on a GPU. ValueError, naming the argument, if they do not all lie there."""
    from fastloss.backends.cuda.backend import DevicePasses, check_places

    check_places(logits, *others, **more)
    assert logits.place is not None
    return DevicePasses(logits.place)


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
        raise ValueError(f"terms: expected at most one {type(found[0]).__name__} in a loss")
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
