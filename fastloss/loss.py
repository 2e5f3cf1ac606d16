"""A loss: a weighted sum of terms, computed together in two passes over the logits."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.arrays import Arrays, arrange, channels_second, check_out
from fastloss.backends import Backend, current_backend
from fastloss.frameworks import Adapter, Borrowed, adapter_of, borrow
from fastloss.frameworks.base import constant
from fastloss.request import ACTIVATIONS, Request, make_request
from fastloss.statistics import Statistics
from fastloss.terms.base import Term, check_choice
from fastloss.terms.distribution import TopKCrossEntropy
from fastloss.voxel_losses import VoxelLosses

if TYPE_CHECKING:
    from fastloss.backends._cuda_prepared import Prepared
    from fastloss.backends.cuda import DevicePasses


class Loss:
    """A weighted sum of terms, fused: it costs what its dearest term costs alone.

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
    - voxel_weight: None, or (B, *spatial) or (B, 1, *spatial), non-negative: a mask or weights. A
      voxel of weight 0 counts for nothing, whatever its logits hold.

    PyTorch tensors give PyTorch tensors. A loss that is called with logits that require a gradient
    is differentiated by autograd, once: gradients flow to the logits alone, and second derivatives
    raise RuntimeError. Beside the gradient no memory is taken; the arrays are kept until the
    backward pass. `torch.compile` and `torch.export` take a loss into the graph. The methods record
    no graph, whatever their tensors require.

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
        self.terms: tuple[tuple[float, Term], ...] = tuple(weighted)
        self._options: dict[str, Any] = options
        self.needs = frozenset().union(*(term.requires for _, term in self.terms))
        self.term_of_voxels = _term_of_voxels([term for _, term in self.terms])
        self._checked: set[int] = set()

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
        return self.term_of_voxels is None

    @property
    def sums_over_batch(self) -> bool:
        """Whether nothing but the sums over the samples matters to any term."""
        return all(term.sums_over_batch for _, term in self.terms)

    # ------------------------------------------------------------------ what a user calls

    def __call__(self, logits: Any, target: Any, voxel_weight: Any = None) -> Any:
        """The value of the loss: a float32 scalar (float64 for float64 logits).

        An array where a term has ``reduction="none"``: see the terms for its shape.
        """
        return adapter_of(logits, "logits").value(self, logits, target, voxel_weight)

    def value_and_grad(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
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
        if upstream is None:
            adapter = adapter_of(logits, "logits")
            ready = self.prepared(adapter, logits, target, voxel_weight)
            arrays = (logits, target, voxel_weight)
            if ready is not None and (
                out is None or ready[0].takes(self, adapter, arrays, ready[1], out)
            ):
                call, addresses = ready
                value, kept = call.value(addresses)
                return value, call.gradient(self, adapter, arrays, addresses, kept, out=out)
        passes = self.passes(logits, target, voxel_weight)
        out, view = passes.output(out)
        value, pullback = passes.combine(passes.reduce())
        passes.apply(pullback(passes.adapter.upstream(upstream)), view)
        return passes.adapter.result(value), out

    def statistics(self, logits: Any, target: Any, voxel_weight: Any = None) -> Statistics:
        """The sums that the loss is a function of. They add: over chunks of a volume, over ranks.

        >>> import numpy as np, fastloss as fl
        >>> rng, loss = np.random.default_rng(0), fl.Dice() + fl.CrossEntropy()
        >>> x = rng.normal(size=(1, 3, 8, 4, 4)); y = rng.integers(0, 3, (1, 8, 4, 4))
        >>> total = sum(loss.statistics(x[:, :, i:i+2], y[:, i:i+2]) for i in range(0, 8, 2))
        >>> bool(np.isclose(loss.value(total), loss(x, y)))
        True
        """
        self.check_additive("statistics")
        return self.passes(logits, target, voxel_weight).reduce()

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
        statistics: Statistics | None = None,
        out: Any = None,
        upstream: Any = None,
    ) -> Any:
        """The gradient by the logits; of one chunk, given the ``statistics`` of all of them.

        Other arguments as in `value_and_grad`.
        """
        passes = self.passes(logits, target, voxel_weight)
        out, view = passes.output(out)
        own = passes.reduce()  # also checks the labels
        if statistics is None:
            statistics = own
        else:
            self.check_additive("statistics")
            self._check_statistics(statistics)
            statistics.check_place(own)
            if statistics.sums.shape != own.sums.shape or statistics.request != own.request:
                raise ValueError(
                    "statistics: expected the sums of this loss over chunks like these arrays, got "
                    f"{statistics._describe()}"
                )
        passes.apply(passes.combine(statistics)[1](passes.adapter.upstream(upstream)), view)
        return out

    # ------------------------------------------------------------------ how it is done

    def passes(self, logits: Any, target: Any, voxel_weight: Any) -> Passes:
        """The two passes over these arrays, for the adapters of frameworks."""
        return Passes(self, logits, target, voxel_weight)

    def prepared(
        self, adapter: Adapter, logits: Any, target: Any, voxel_weight: Any
    ) -> tuple[Prepared, tuple[int, ...]] | None:
        """What is kept of such calls on a GPU, and the addresses of these arrays; or None."""
        kind = adapter.kind(logits, "logits")
        if kind is None:
            return None
        from fastloss.backends._cuda_prepared import find

        return find(self, adapter, kind, logits, target, voxel_weight)

    def _request(self, arrays: Arrays) -> Request:
        classes = arrays.logits.shape[1]
        if classes not in self._checked:
            for _, term in self.terms:
                term.check(self.activation, classes)
            self._checked.add(classes)
        if arrays.dense and not self.additive:
            raise ValueError(
                f"target: {type(self.term_of_voxels).__name__} takes a label map, got a dense "
                f"target {arrays.target.shape}"
            )
        return make_request(self.activation, arrays.dense, self.ignore_index, self.needs)

    def check_additive(self, name: str) -> None:
        """Raise ValueError, naming the argument, if the loss is no function of sums."""
        if not self.additive:
            raise ValueError(
                f"{name}: {type(self.term_of_voxels).__name__} is no function of sums over voxels, "
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
        shape = np.shape(total)

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
        shape = np.shape(total)

        def pullback(upstream: Any) -> np.ndarray:
            coefficients = np.zeros(statistics.sums.shape, like=statistics.sums)
            for weight, value, pull in parts:
                own = _reduce_to(upstream, shape, np.shape(value)) if shape else upstream
                for slot, derivative in pull(own * weight).items():
                    coefficients[statistics.request.index[slot]] += derivative
            return coefficients

        return total, pullback

    @constant
    def graph_name(self) -> str:
        """What the graphs of `torch.compile` and `torch.export` call this loss."""
        from fastloss.naming import text_of  # which makes losses

        return text_of(self)

    def __add__(self, other: object) -> Loss:
        return Loss(self, other) if isinstance(other, (Term, Loss)) else NotImplemented

    def __radd__(self, other: object) -> Loss:
        if isinstance(other, Term):
            return Loss(other, self)
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: object) -> Loss:
        if isinstance(factor, bool) or not isinstance(
            factor, (int, float, np.integer, np.floating)
        ):
            return NotImplemented
        if not np.isfinite(factor):
            raise ValueError(f"factor: expected a finite number, got {factor!r}")
        scaled = Loss(self)
        scaled.terms = tuple((float(factor) * weight, term) for weight, term in self.terms)
        return scaled

    __rmul__ = __mul__

    def __getstate__(self) -> dict[str, Any]:
        # The name of a loss may be understood by this process alone; programs are made again.
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_text", "_programs", "_prepared")
        }

    def __repr__(self) -> str:
        parts = [repr(t) if w == 1.0 else f"{w!r} * {t!r}" for w, t in self.terms]
        parts += [f"{name}={value!r}" for name, value in self._options.items()]
        return f"Loss({', '.join(parts)})"


class Passes:
    """One call's arrays, and the two passes over them."""

    def __init__(self, loss: Loss, logits: Any, target: Any, voxel_weight: Any) -> None:
        self.loss = loss
        self.adapter = adapter_of(logits, "logits")
        self.caller_logits = logits
        self.logits = self.adapter.borrow(logits, "logits")
        self.target = borrow(target, "target")
        self.voxel_weight = None if voxel_weight is None else borrow(voxel_weight, "voxel_weight")
        self.device: DevicePasses | None = None
        places = (self.logits.place, self.target.place, self.voxel_weight and self.voxel_weight[2])
        if places != (None, None, None):
            self.device = _on_device(self.logits, self.target, self.voxel_weight)
        self.arrays = arrange(
            self.logits,
            self.target,
            self.voxel_weight,
            activation=loss.activation,
            channel_axis=loss.channel_axis,
        )
        self.request = loss._request(self.arrays)
        # Which backend computes is a choice for arrays in CPU memory.
        self.backend: Backend | None = current_backend() if self.device is None else None
        self._losses: VoxelLosses | None = None

    def reduce(self) -> Statistics:
        if self.device is not None:
            return self.device.reduce(self.loss, self.request, self.arrays)
        assert self.backend is not None
        batch, classes = self.arrays.logits.shape[:2]
        sums = np.empty((len(self.request.slots), batch, classes))
        voxels = np.empty(batch)
        term = self.loss.term_of_voxels
        if term is None:
            self.backend.reduce(self.request, self.arrays, sums, voxels)
        else:
            values = np.empty((batch, prod(self.arrays.target.shape[1:])), self.arrays.value_dtype)
            self._losses = VoxelLosses(values, term.class_weight(classes))
            self.backend.reduce(self.request, self.arrays, sums, voxels, self._losses)
            sums[self.request.index["top_k"]] = 0.0
            if sums.size:
                sums[self.request.index["top_k"], 0, 0] = self._losses.keep_largest(term.k)
        return Statistics(self.request, sums, voxels, self.arrays.value_dtype)

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
        check_out(view, self.logits, others)

    def apply(self, coefficients: Any, out: Borrowed) -> None:
        """Write the gradient, given what `combine` returns for the upstream gradient."""
        view = self.gradient_view(out)
        if self.device is not None:
            self.device.apply(self.loss, self.request, self.arrays, coefficients, view)
            return
        if self._losses is None and not self.loss.additive:
            self.reduce()  # in another call than the first
        assert self.backend is not None
        self.backend.apply(self.request, self.arrays, coefficients, view, self._losses)


def _times(weight: float, value: Any) -> Any:
    """weight · value; of a weight of 0 and an infinite value NaN, without a warning."""
    if weight:
        return value if weight == 1.0 else weight * value
    with np.errstate(invalid="ignore"):
        return weight * value


def _on_device(logits: Borrowed, *others: Borrowed | None) -> DevicePasses:
    """For arrays on a GPU. ValueError, naming the argument, if they do not all lie there."""
    from fastloss.backends.cuda import DevicePasses, check_places

    check_places(logits, *others)
    assert logits.place is not None
    return DevicePasses(logits.place)


def _term_of_voxels(terms: list[Term]) -> TopKCrossEntropy | None:
    """The term that looks at single voxels, of which there may be one."""
    found = [term for term in terms if isinstance(term, TopKCrossEntropy)]
    if len(found) > 1:
        raise ValueError("terms: expected at most one TopKCrossEntropy in a loss")
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
