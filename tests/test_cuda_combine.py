"""The combine step for a GPU: recorded from the NumPy formulas and generated as CUDA C++."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from cuda_emulation import Library, preload
from hypothesis import given, settings
from hypothesis import strategies as st

import fastloss as fl
from fastloss.backends.cuda.combine.code import ELEMENTWISE, THREADS
from fastloss.backends.cuda.combine.program import Program, trace
from fastloss.backends.cuda.operands import HOST, MOST
from fastloss.request import make_request
from fastloss.statistics import Statistics
from fastloss.sums import OVERLAP, PREDICTED, PREDICTED_SQUARED, REFERENCE, REFERENCE_SQUARED

WEIGHTS = (0.3, 2.0, 0.0, 1.0, 1.75)


def weights(count: int) -> list[float]:
    return [WEIGHTS[c % len(WEIGHTS)] for c in range(count)]


def sums_of(
    loss: fl.Loss,
    batch: int,
    classes: int,
    *,
    dense: bool = False,
    seed: int = 0,
    odd: str = "",
    dtype: Any = np.float64,
) -> Statistics:
    """Realistic sums, with some classes absent; odd: "zero", "nan", "inf" or nothing."""
    rng = np.random.default_rng(seed)
    request = make_request(loss.activation, dense, None, loss.needs)
    sums = np.exp(rng.uniform(0, 8, (len(request.sums), batch, classes)))
    if OVERLAP in request.index:
        for size in (PREDICTED, REFERENCE, PREDICTED_SQUARED, REFERENCE_SQUARED):
            if size in request.index:  # at least their intersection
                sums[request.index[size]] += sums[request.index[OVERLAP]]
    sums[:, rng.uniform(size=(batch, classes)) < 0.2] = 0.0
    voxels = sums[0].sum(axis=-1)
    sample = int(rng.integers(batch))
    if odd == "zero":
        sums[:, sample], voxels[sample] = 0.0, 0.0
    elif odd == "nan":
        sums[:, sample], voxels[sample] = np.nan, np.nan
    elif odd == "inf":
        for place, total in enumerate(request.sums):
            if total.function.startswith(("log", "focal")):
                sums[place, sample, rng.integers(classes)] = np.inf
    return Statistics(request, sums, voxels, np.dtype(dtype))


def combined(loss: fl.Loss, statistics: Statistics, upstream: Any) -> tuple[Any, np.ndarray]:
    with np.errstate(all="ignore"):
        value, pullback = loss.combine(statistics)
        # On a GPU a NaN sample is one with a fault, which must not be hidden.
        faults = np.where(np.isnan(statistics.voxels), np.nan, 0.0)
        rows = np.ndim(value) == 2 and np.shape(value)[0] == len(faults)
        value = np.asarray(value + (faults[:, None] if rows else faults.sum()), statistics.dtype)
        return value, pullback(upstream) + faults[:, None]


def traced(loss: fl.Loss, statistics: Statistics) -> Program:
    return trace(
        loss, statistics.request, statistics.batch_size, statistics.classes, statistics.dtype
    )


def numbers_of(loss: fl.Loss) -> np.ndarray:
    """The numbers of a loss, as arguments of the combine step."""
    return np.concatenate(loss.operands)


def upstream_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------------- random losses

NUMBERS = st.sampled_from([0.0, 1e-5, 1.0, 0.37])


@st.composite
def terms(draw: st.DrawFn, classes: int, sigmoid: bool, reduction: str, whole: bool) -> fl.Term:
    def weight(count: int) -> Any:
        return draw(st.sampled_from([None, 0.7, 0.0, weights(count)]))

    kind = draw(
        st.sampled_from(
            [fl.Dice, fl.Jaccard, fl.Tversky, fl.GeneralizedDice, fl.CrossEntropy, fl.Focal]
        )
    )
    if kind is fl.CrossEntropy:
        smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
        return kind(weight=weight(classes), label_smoothing=smoothing, reduction=reduction)
    if kind is fl.Focal:
        alpha = weight(classes)
        if alpha is not None and sigmoid:
            alpha = np.clip(alpha, 0, 1)
        return kind(gamma=draw(st.sampled_from([0.0, 2.0])), alpha=alpha, reduction=reduction)
    options: dict[str, Any] = {}
    if kind is fl.Tversky:
        options = {
            "alpha": draw(NUMBERS),
            "beta": draw(NUMBERS),
            "gamma": draw(st.sampled_from([0.75, 1.0, 2.0])),
        }
    if kind is fl.GeneralizedDice:
        options = {"weighting": draw(st.sampled_from(["square", "simple", "uniform"]))}
    return kind(
        include_background=whole,
        batch=draw(st.booleans()),
        smooth_nr=draw(NUMBERS),
        smooth_dr=draw(NUMBERS),
        weight=weight(classes if whole else classes - 1),
        reduction=reduction,
        squared=draw(st.booleans()),
        **options,
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[fl.Loss, Statistics]:
    classes, batch = draw(st.sampled_from([1, 2, 3, 5, 17, 40, 300])), draw(st.integers(1, 4))
    activation = draw(st.sampled_from(["softmax", "sigmoid", "none"]))
    whole = classes == 1 or draw(st.booleans())
    none = draw(st.booleans())
    loss: Any = 0
    for _ in range(draw(st.integers(1, 4))):
        reduction = "none" if none else draw(st.sampled_from(["mean", "sum"]))
        term = draw(terms(classes, activation == "sigmoid", reduction, whole))
        loss += draw(st.sampled_from([1.0, 0.5, 2.0])) * term
    loss = fl.Loss(loss, activation=activation)
    statistics = sums_of(
        loss,
        batch,
        classes,
        dense=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        odd=draw(st.sampled_from(["", "", "zero", "nan", "inf"])),
    )
    return loss, statistics


@settings(max_examples=60, deadline=None)
@given(calls())
def test_what_is_recorded_is_the_combine_step(call: tuple[fl.Loss, Statistics]) -> None:
    loss, statistics = call
    program = traced(loss, statistics)
    upstream = upstream_of(program.value_shape)
    value, derivatives = combined(loss, statistics, upstream)
    assert program.value_shape == np.shape(value)
    numbers = numbers_of(loss)
    recorded = program.evaluate(statistics.sums, statistics.voxels, numbers, upstream)
    assert recorded[1].shape == statistics.sums.shape
    np.testing.assert_allclose(recorded[0], value, rtol=1e-12)
    np.testing.assert_allclose(recorded[1], derivatives, rtol=1e-12)


# ---------------------------------------------------------------------- custom terms


class LogCosh(fl.RegionTerm):
    """log cosh of 1 − Dice."""

    def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
        size = predicted + reference + self.smooth_dr
        dice = 1 - (2 * overlap + self.smooth_nr) / size
        slope = np.tanh(dice)
        return np.log(np.cosh(dice)), -2 * slope / size, slope * (1 - dice) / size


class Everything(fl.RegionTerm):
    """A meaningless loss that uses every supported operation, with three arrays of numbers."""

    def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
        there = np.logical_and(reference > 0, ~(predicted == 0)) | (np.int64(3) < overlap)
        share = np.divide(overlap, reference, out=np.zeros_like(overlap), where=reference > 0)
        share[share > 0.5] = 0.5
        share **= np.float32(1.5)
        share += 1 - np.where(there, 0.25, np.exp(-np.clip(predicted, None, 3.0)))
        rows = np.sum(share, axis=1, keepdims=True) / share.shape[1]
        columns = predicted.max(axis=0) - np.min(predicted, axis=0, initial=5.0)
        table = np.linspace(0.5, 1.5, share.shape[1])[::-1]
        both = np.concatenate([share[:, :1], np.sqrt(reference[:, 1:])], axis=-1)
        both[:, ::1] *= table
        both[0] += np.log1p(columns) - both.mean()
        mixed = np.stack([both, share.T.T], axis=0).prod(axis=0)
        mixed = mixed.reshape(-1).reshape(share.shape) + np.mean(there, axis=1)[:, np.newaxis]
        count = np.count_nonzero(there) + there.any(axis=1).sum() + np.all(there)
        finite = np.where(np.isfinite(mixed), mixed, 0.0) + np.sign(mixed) * np.hypot(rows, 1.0)
        some = np.maximum.reduce(finite, axis=1)[..., None] - np.abs(finite[::-1, ::-1])
        return finite, some * count, np.expand_dims(rows[:, 0], 1) + np.ones_like(finite)


@pytest.mark.parametrize("odd", ["", "zero", "nan"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"include_background": False}])
@pytest.mark.parametrize("kind", [LogCosh, Everything])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (3, 4), (4, 40)])
def test_a_term_of_ones_own(
    kind: Any, batch: int, classes: int, options: dict[str, Any], odd: str
) -> None:
    loss = fl.Loss(kind(**options))
    statistics = sums_of(loss, batch, classes, odd=odd)
    program = traced(loss, statistics)
    upstream = upstream_of(program.value_shape)
    value, derivatives = combined(loss, statistics, upstream)
    numbers = numbers_of(loss)
    recorded = program.evaluate(statistics.sums, statistics.voxels, numbers, upstream)
    np.testing.assert_allclose(recorded[0], value, rtol=1e-12)
    np.testing.assert_allclose(recorded[1], derivatives, rtol=1e-12)


# ---------------------------------------------------------------------- NumPy's array functions


def recorded_and_numpy(function: Any, *, shape: tuple[int, int] = (3, 4)) -> tuple[Any, Any]:
    """A function of one array: as recorded and evaluated, and by NumPy itself."""

    class Term(fl.Term):
        requires = frozenset({"region"})

        def combine(self, statistics: Statistics) -> Any:
            return function(statistics["overlap"]), lambda upstream: {}

    loss = fl.Loss(Term())
    statistics = sums_of(loss, *shape)
    program = traced(loss, statistics)
    sums, numbers = statistics.sums.copy(), numbers_of(loss)
    value, derivatives = program.evaluate(sums, statistics.voxels, numbers)
    assert not derivatives.any()  # as nothing depends on the sums
    with np.errstate(all="ignore"):
        return value, function(statistics["overlap"].copy())


def _through_a_view(x: Any) -> Any:
    copy = x.copy()
    row = copy[1]
    row[2] = 7.0
    row *= 2.0
    return copy


def _through_the_whole(x: Any) -> Any:
    copy = x.copy()
    column = copy[:, 1]
    copy += 1.0
    return column + copy.sum(axis=1)


def _numbers_do_not_change(x: Any) -> Any:
    total = x.sum()
    before = total
    total += 1.0
    return x - before + total


def _rows(x: Any) -> Any:
    first, *others = x
    return first + sum(others)


def _zeros(x: Any) -> Any:
    whole = np.zeros((5, 6), like=x)
    whole[1:4, 2:] = x
    whole[0, 0] = x[0, 0]
    whole[-1] += 1.0
    return whole[::2, ::-1]


@pytest.mark.parametrize(
    "function",
    [
        _through_a_view, _through_the_whole, _numbers_do_not_change, _rows, _zeros,
        lambda x: x[..., None, 1:3] * x[:, np.newaxis, ::2],
        lambda x: np.transpose(x[-1:], (1, 0)).reshape(2, 2),
        lambda x: np.broadcast_to(x[:, :1], (2, 3, 4)).swapaxes(0, 2),
        lambda x: (x > 2.0) + (x < 9.0),
        lambda x: (x > 2.0) * (x < 9.0) * 1.0,
        lambda x: (x > 2.0).astype(float) - (x > 9.0).sum(axis=0, keepdims=True),
        lambda x: np.minimum(np.float32(0.1) ** x, 2**x),
        lambda x: np.add.reduce(x) + np.max(x, axis=(0, 1), keepdims=True),
        lambda x: np.where(x - x[0, 0], x, np.nan).max(axis=1),
        lambda x: np.where([True, False, True, False], x, -x),
        lambda x: x.clip(1.0, 20.0).mean(axis=-1) + np.size(x) + np.ndim(x),
        lambda x: abs(-x) - np.floor(-x),
        lambda x: np.full_like(x, 2.5) / np.ones_like(x, shape=(1,)) + x.ravel()[3],
        lambda x: np.squeeze(x[:1]) / 0.0,
        lambda x: np.array([1, 2, 3, 4]) @ np.ones((4, 2)) + x[:, :2],
        lambda x: x[0:0].sum() + x[:, 4:].prod(axis=1),
        lambda x: x[1, 2],
        lambda x: x[:, ::2][:, 1:] + x[::-1][1:, ::3][0],
        lambda x: np.where(x > 5, np.where(x > 5, x, 1.0), np.where(x > 5, 2.0, -x)),
    ],
)  # fmt: skip
def test_arrays_that_record_behave_as_numpy_s(function: Any) -> None:
    recorded, expected = recorded_and_numpy(function)
    assert recorded.shape == np.shape(expected)
    np.testing.assert_allclose(recorded, expected, rtol=1e-14)


# ---------------------------------------------------------------------- unsupported operations


def _into_numpy(x: Any) -> Any:
    array = np.zeros((3, 4))
    array[0] = x[0]
    return array


def _into_numpy_by_out(x: Any) -> Any:
    return np.exp(x, out=np.zeros((3, 4)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "cannot branch on its sums; use np.where"),
        (lambda x: max(x[0, 0], 1.0), "cannot branch on its sums; use np.where"),
        (lambda x: np.cumsum(x), r"np\.cumsum cannot run on a GPU; use .*np\.where"),
        (lambda x: np.linalg.norm(x), r"np\.norm cannot run on a GPU; use "),
        (lambda x: x @ x.T, r"np\.matmul cannot run on a GPU; use "),
        (lambda x: x % 2, r"np\.remainder cannot run on a GPU; use "),
        (lambda x: np.add.accumulate(x), r"np\.add\.accumulate cannot run on a GPU"),
        (lambda x: x.cumsum(), r"no \.cumsum on a GPU; use "),
        (lambda x: x * float(x.sum()), "cannot make plain numbers"),
        (lambda x: np.asarray(x) * 2, "cannot make plain numbers"),
        (_into_numpy, "cannot make plain numbers"),
        (_into_numpy_by_out, r"np\.exp cannot write into a NumPy array"),
        (lambda x: np.exp(x, where=x > 0), r"np\.exp with where= needs out="),
        (lambda x: x[x > 0].sum(), "cannot select elements by"),
        (lambda x: x[:, [0, 1]], "cannot select elements by"),
        (lambda x: x.sum(dtype=np.float32), "sum takes no dtype"),
        (lambda x: np.where(x > 0), r"np\.where on a GPU: missing a required argument"),
        (lambda x: x.astype(np.float32), "expected float64 or bool"),
        (lambda x: x * 1j, "expected real numbers"),
        (lambda x: x * "2", "expected real numbers"),
    ],
)
def test_what_cannot_be_recorded(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^formula: .*{message}"):
        recorded_and_numpy(function)


def test_shapes_that_do_not_fit_are_errors_as_in_numpy() -> None:
    for function in (
        lambda x: x + np.ones(3),
        lambda x: x.reshape(5),
        lambda x: x.sum(axis=2),
        lambda x: x[:, 4:].max(),
    ):
        with pytest.raises(ValueError, match=r"."):
            recorded_and_numpy(function)
    with pytest.raises(IndexError):
        recorded_and_numpy(lambda x: x[3])


def test_a_loss_whose_values_do_not_add() -> None:
    loss = fl.Dice(reduction="none") + fl.Dice(reduction="none", include_background=False)
    with pytest.raises(ValueError, match=r"^reduction: .*\(2, 5\), \(2, 4\)"):
        trace(loss, make_request("softmax", False, None, loss.needs), 2, 5, np.dtype("float32"))


# ---------------------------------------------------------------------- the kernels


class EveryFunction(fl.Term):
    """Every supported elementwise function, on numbers inside and outside its domain."""

    requires = frozenset({"region"})

    def combine(self, statistics: Statistics) -> Any:
        x, y = (statistics[name] - 2.0 for name in ("overlap", "predicted"))
        y = y[::-1]  # so that NaN is also paired with numbers
        both = x > y, np.logical_not(y > 0.1)
        values = []
        for name in sorted(ELEMENTWISE):
            ufunc = getattr(np, name)
            given = both if name.startswith("logical_") else (x / 2.0, y / 2.0)
            values.append(ufunc(*given[: ufunc.nin]) * 1.0)
        for exponent in (-2.0, -1, 0, 0.5, 1, 2.0, 3):
            values.append(x**exponent)
        return np.stack(values), lambda upstream: {"overlap": upstream.sum(axis=0)}


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dice, cross-entropy": (fl.Dice() + fl.CrossEntropy(), {}),
    "float32": (fl.Dice() + fl.CrossEntropy(), {"dtype": np.float32}),
    "many classes": (
        fl.Dice(include_background=False, weight=weights(299))
        + 0.5 * fl.CrossEntropy(weight=weights(300), label_smoothing=0.1),
        {"shape": (4, 300)},
    ),
    "many classes of a batch": (
        fl.Jaccard(batch=True, smooth_dr=0.0) + fl.GeneralizedDice(reduction="mean"),
        {"shape": (3, 300)},
    ),
    "none": (
        fl.Dice(reduction="none", include_background=False) + fl.CrossEntropy(reduction="none"),
        {"shape": (3, 40), "dtype": np.float32},
    ),
    "none of a batch": (
        fl.Tversky(reduction="none", batch=True, gamma=0.75) + 2.0 * fl.Focal(alpha=0.3),
        {"shape": (3, 5)},
    ),
    "generalised, none": (
        fl.GeneralizedDice(reduction="none", include_background=False, weight=weights(39)),
        {"shape": (3, 40)},
    ),
    "generalised, absent": (fl.GeneralizedDice(weighting="simple"), {"odd": "zero"}),
    "no smoothing, absent": (
        fl.Dice(smooth_nr=0.0, smooth_dr=0.0) + fl.CrossEntropy(),
        {"odd": "zero", "shape": (1, 3)},
    ),
    "four": (
        fl.Tversky(gamma=0.7, batch=True) + fl.Focal(alpha=weights(3)) + fl.GeneralizedDice()
        + fl.CrossEntropy(label_smoothing=0.1) + fl.Jaccard(squared=True),
        {"shape": (2, 3)},
    ),
    "sigmoid": (
        fl.Loss(
            fl.Focal(alpha=np.clip(weights(40), 0, 1), reduction="sum")
            + fl.CrossEntropy(label_smoothing=0.2) + fl.Dice(),
            activation="sigmoid",
        ),
        {"shape": (2, 40), "dense": True},
    ),
    "top-k": (fl.TopKCrossEntropy(weight=weights(5)) + fl.Dice(), {"shape": (2, 5)}),
    "one": (fl.Loss(fl.Dice() + fl.CrossEntropy(), activation="sigmoid"), {"shape": (1, 1)}),
    "nan": (fl.Dice() + fl.CrossEntropy() + fl.GeneralizedDice(), {"odd": "nan"}),
    "nan, none": (
        fl.GeneralizedDice(reduction="none") + fl.CrossEntropy(reduction="none"), {"odd": "nan"},
    ),
    "infinite": (fl.CrossEntropy(weight=weights(4)), {"odd": "inf"}),
    "own": (LogCosh(batch=True) + fl.Focal(), {}),
    "all that is allowed": (Everything(), {"shape": (3, 4)}),
    "all that is allowed, none": (Everything(reduction="none"), {"shape": (4, 40)}),
    "all that is allowed, nan": (Everything(), {"shape": (3, 4), "odd": "nan"}),
    "every function": (fl.Loss(EveryFunction()), {"odd": "zero", "shape": (3, 40)}),
    "every function, nan": (fl.Loss(EveryFunction()), {"odd": "nan"}),
    "scratch in global memory": (fl.Dice(batch=True) + fl.Jaccard(batch=True, squared=True),
        {"shape": (5, 1000)},
    ),
}  # fmt: skip


def case(name: str) -> tuple[fl.Loss, Statistics]:
    loss, options = CASES[name]
    options = dict(options)
    loss = fl.Loss(loss)
    return loss, sums_of(loss, *options.pop("shape", (2, 4)), seed=3, **options)


@cache
def sources() -> tuple[str, dict[str, Program]]:
    """All programs in one text, each in a namespace."""
    programs = {name: traced(*case(name)) for name in CASES}
    text = "\n".join(
        f"namespace p{i} {{\n{program.sources}}}".replace('extern "C" ', "")
        for i, program in enumerate(programs.values())
    )
    return text, programs


@cache
def emulated(sanitize: str = "") -> Library:
    text, programs = sources()
    kernels = {}
    for i, program in enumerate(programs.values()):
        kernels[f"p{i}::fastloss_combine"] = f"p{i}::CombineCall"
        if program.value_shape:
            kernels[f"p{i}::fastloss_pullback"] = f"p{i}::CombineCall"
    return Library(text, kernels, sanitize=sanitize)


def check_kernels(name: str, library: Library, order: str = "forward") -> None:
    """The kernels of a case compute what `Loss.combine` does."""
    loss, statistics = case(name)
    program, number = sources()[1][name], list(CASES).index(name)
    upstream = upstream_of(program.value_shape).astype(statistics.dtype)
    value = np.full(program.value_shape, 77.0, statistics.dtype)
    derivatives = np.full(statistics.sums.shape, 77.0)
    scratch = np.full(program.scratch_doubles, np.nan)
    arrays = {
        "sums": statistics.sums,
        "voxels": statistics.voxels,
        "value": value,
        "derivatives": derivatives,
        "upstream": upstream,
        "scratch": scratch,
    }
    addresses = {field: array.ctypes.data for field, array in arrays.items()}
    numbers = numbers_of(loss)
    given = numbers.tobytes()
    if not program.takes_along:
        given = numbers.ctypes.data.to_bytes(8, "little")
    call = program.call((), given, **addresses).tobytes()

    def launch(kernel: str) -> None:
        library.launch(f"p{number}::{kernel}", (1, 1, 1), (THREADS, 1, 1), 0, call, order=order)

    launch("fastloss_combine")
    if program.value_shape:
        assert (derivatives == 77.0).all()
        launch("fastloss_pullback")
    expected = combined(loss, statistics, upstream if program.value_shape else None)
    tolerance = 1e-6 if statistics.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(value, expected[0], rtol=tolerance)
    np.testing.assert_allclose(derivatives, expected[1], rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_combine_does(name: str, order: str) -> None:
    check_kernels(name, emulated(), order)


LAYOUTS = {
    "all there": ("float64", "float32", "float32", "float32", "float64"),
    "some": (HOST, "float32", HOST, HOST, HOST),
    "mixed": ("float32", HOST, "float64", HOST, "float32"),
}


@pytest.mark.parametrize("classes", [4, MOST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_that_lie_on_the_device(layout: str, classes: int) -> None:
    """Separate device arrays work, beside numbers that are launch arguments if they fit."""
    w = weights(classes)
    loss = fl.Dice(weight=w) + 0.5 * fl.CrossEntropy(weight=w) + fl.Tversky(alpha=0.25, beta=0.75)
    statistics = sums_of(loss, 2, classes)
    program = trace(loss, statistics.request, 2, classes, statistics.dtype, LAYOUTS[layout])
    parts = list(zip(LAYOUTS[layout], loss.operands, strict=True))
    given = [numbers.astype(where) for where, numbers in parts if where != HOST]
    own = [numbers for where, numbers in parts if where == HOST]
    host = np.concatenate([*own, np.empty(0)])
    assert program.takes_along == (host.size <= MOST)
    value, derivatives = np.full((), 77.0), np.full(statistics.sums.shape, 77.0)
    arrays = {
        "sums": statistics.sums,
        "voxels": statistics.voxels,
        "value": value,
        "derivatives": derivatives,
        "scratch": np.empty(program.scratch_doubles),
    }
    call = program.call(
        tuple(array.ctypes.data for array in given),
        host.tobytes() if program.takes_along else host.ctypes.data.to_bytes(8, "little"),
        **{name: array.ctypes.data for name, array in arrays.items()},
    )
    library = Library(program.sources, {"fastloss_combine": "CombineCall"})
    library.launch("fastloss_combine", (1, 1, 1), (THREADS, 1, 1), 0, call.tobytes())
    expected = combined(loss, statistics, None)
    recorded = program.evaluate(statistics.sums, statistics.voxels, host, given=given)
    for got in ((value, derivatives), recorded):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-7)
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-7, atol=1e-300)


def test_kernels_read_and_write_within_bounds() -> None:
    try:
        environment = preload("address")
    except FileNotFoundError as error:
        support._absent("asan", ImportError(str(error)))
    support.run_python(
        """
from test_cuda_combine import CASES, check_kernels, emulated
library = emulated("address,undefined")
for name in CASES:
    check_kernels(name, library)
""",
        **environment,
    )


def test_scratch_memory_is_asked_for_where_a_block_has_not_enough() -> None:
    _, programs = sources()
    needing = {name for name, program in programs.items() if program.scratch_doubles}
    assert needing == {"scratch in global memory"}


def test_code_is_of_modest_size() -> None:
    _, programs = sources()
    assert len(programs["four"].sources.splitlines()) < 300


def test_kernels_are_cuda(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        support._absent("nvcc", ImportError("not on the PATH"))
    text, _ = sources()
    (tmp_path / "programs.cu").write_text(text)
    command = [
        "nvcc",
        "-std=c++17",
        "-diag-suppress=177",
        "-cubin",
        "-arch=sm_80",
        "-o",
        "programs.cubin",
        "programs.cu",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


# ---------------------------------------------------------------------- terms of the drop-ins


def drop_in_losses(classes: int) -> dict[str, tuple[fl.Loss, bool]]:
    """Losses by name, and whether the target of each is dense."""
    support.need("torch")
    from fastloss.monai import _terms as monai
    from fastloss.nnunet import _terms as nnunet

    found: dict[str, tuple[Any, str]] = {}
    for batch in (False, True):
        found[f"overlap {batch}"] = (
            monai.Overlap(alpha=0.5, beta=0.5, batch=batch, smooth_dr=0.0),
            "softmax",
        )
        found[f"masked {batch}"] = (
            monai.MaskedOverlap(
                alpha=1.0,
                beta=0.3,
                voxels=10_000,
                squared=True,
                batch=batch,
                include_background=batch,
                reduction="none",
            ),
            "sigmoid",
        )
        for weighting in ("square", "simple", "uniform"):
            found[f"generalised {batch} {weighting}"] = (
                monai.GeneralizedOverlap(weighting=weighting, batch=batch),
                "softmax",
            )
        found[f"negative {batch}"] = (
            nnunet.NegativeDice(batch=batch, clip_tp=40.0, smooth_dr=0.0),
            "softmax",
        )
        found[f"unclipped {batch}"] = (nnunet.NegativeDice(batch=batch), "softmax")
        found[f"recall {batch}"] = (nnunet.NegativeSkeletonRecall(batch=batch), "softmax")
    for reduction in ("mean", "sum"):
        found[f"focal {reduction}"] = (
            monai.ChannelFocal(
                gamma=2.0,
                positive=weights(classes),
                negative=0.7,
                channels=classes,
                reduction=reduction,
                voxels=None if reduction == "mean" else 99,
            ),
            "sigmoid",
        )
        found[f"binary {reduction}"] = (
            monai.BinaryCrossEntropy(positive=2.0, reduction=reduction),
            "sigmoid",
        )
        found[f"weighted binary {reduction}"] = (
            nnunet.BinaryCrossEntropy(
                positive=weights(classes), negative=3.0, per_voxel=True, reduction=reduction
            ),
            "sigmoid",
        )  # fmt: skip
    return {
        name: (fl.Loss(term, activation=activation), activation == "sigmoid")
        for name, (term, activation) in found.items()
    }


@pytest.mark.parametrize("odd", ["", "zero", "nan", "inf"])
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (3, 7)])
def test_terms_of_the_drop_ins(batch: int, classes: int, odd: str) -> None:
    for name, (loss, dense) in drop_in_losses(classes).items():
        statistics = sums_of(loss, batch, classes, dense=dense, odd=odd)
        program = traced(loss, statistics)
        upstream = upstream_of(program.value_shape)
        value, derivatives = combined(loss, statistics, upstream)
        numbers = numbers_of(loss)
        recorded = program.evaluate(statistics.sums, statistics.voxels, numbers, upstream)
        np.testing.assert_allclose(recorded[0], value, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(recorded[1], derivatives, rtol=1e-12, err_msg=name)
