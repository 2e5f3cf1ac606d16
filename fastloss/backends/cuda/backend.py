"""The CUDA kernels, for arrays in the memory of a GPU: compiled on first use, through CuPy.

Nothing here synchronises with the GPU, except `validate`: the passes and the combine step are
queued on the caller's stream, and their intermediate results stay in GPU memory.

CuPy compiles with denormal float32 numbers taken for 0: a gradient below 1.2e-38 is
lost.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays, Field
from fastloss.backends.base import Backend, with_ranked, without_field
from fastloss.backends.cuda import engine, lovasz
from fastloss.backends.cuda.by_target import by_target
from fastloss.backends.cuda.call import NO_TYPE
from fastloss.backends.cuda.combine.code import THREADS
from fastloss.backends.cuda.combine.program import Program, trace
from fastloss.backends.cuda.operands import Operands, on_device, operands_of, repeat
from fastloss.backends.cuda.source import PASSES, describe, specialised
from fastloss.backends.cuda.top_k import keep_above, keep_largest
from fastloss.backends.targets import check_targets
from fastloss.borrowed import byte_bounds, device_view
from fastloss.maps import Map
from fastloss.protocol import FusedLoss
from fastloss.request import Request
from fastloss.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastloss.borrowed import Borrowed, Place

_LOG = logging.getLogger("fastloss")
_OPTIONS = ("-std=c++17", "--fmad=true")
_SLOW = 0.5  # seconds above which compilation is reported; loading from the cache takes less
REMEDY = "pip install 'fastloss[cuda13]', or 'fastloss[cuda12]' for CUDA 12"


class _Allocated(NamedTuple):
    address: int
    owner: Any


class CudaDevice:
    """The caller's device and stream, as a `Device` for `fastloss.backends.cuda.engine`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stream = _stream(place.stream, place.ordinal)
        self._is_current = _cupy().cuda.runtime.getDevice() == place.ordinal
        self.shared_bytes = 48 << 10  # available on every device without opting in
        self.multiprocessors = _multiprocessors(place.ordinal)

    def empty(self, nbytes: int) -> engine.Memory:
        array = self._place.empty((nbytes,), "uint8")
        return _Allocated(self._place.address(array), array)

    def upload(self, numbers: np.ndarray) -> engine.Memory:
        return on_device(self, np.ascontiguousarray(numbers, np.float64).tobytes())

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        return _passes(self._place.ordinal, constants, kernel)

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        return _kernels(self._place.ordinal, text, names)

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        if self._is_current:
            kernel((grid,), block, (call,), shared, self._stream)
            return
        with _cupy().cuda.Device(self._place.ordinal):
            kernel((grid,), block, (call,), shared, self._stream)


@cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"arrays on a GPU need CuPy, which compiles the kernels: {REMEDY}"
        ) from error
    except OSError as error:  # CuPy creates a folder on import
        raise ImportError(
            f"CuPy could not make its folder for compiled kernels ({error}); set CUPY_CACHE_DIR to "
            "one that can be written"
        ) from error
    return cupy


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()


def _on(ordinal: int) -> Any:
    """Make the device current, if it is not."""
    cupy = _cupy()
    return _NOTHING if cupy.cuda.runtime.getDevice() == ordinal else cupy.cuda.Device(ordinal)


class _Address:
    """A foreign stream in the protocol for exchanging streams between libraries."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address  # version, address


@cache
def _stream(address: int, ordinal: int) -> Any:
    """CuPy's view of a stream."""
    cuda = _cupy().cuda
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_Address(address))
    return cuda.ExternalStream(address, ordinal)  # deprecated in later versions


@cache
def _multiprocessors(ordinal: int) -> int:
    runtime = _cupy().cuda.runtime
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, ordinal))


@cache
def _kernels(ordinal: int, text: str, names: tuple[str, ...], what: str = "") -> tuple[Any, ...]:
    start = time.perf_counter()
    with _on(ordinal):
        module = _cupy().RawModule(code=text, options=_OPTIONS)
        kernels = tuple(module.get_function(name).kernel for name in names)
    took = time.perf_counter() - start
    if took > _SLOW and what:
        _LOG.warning("CUDA kernels for %s were ready after %.1f s; kept for next time", what, took)
    return kernels


@cache
def _passes(
    ordinal: int, constants: tuple[tuple[str, object], ...], kernel: str
) -> tuple[Any, ...]:
    what = f"the {kernel} pass, {describe(constants)}"
    return _kernels(ordinal, specialised(constants, kernel), PASSES[kernel], what)


class DeviceCoefficients(NamedTuple):
    """The derivative by every sum, on the device, before the upstream gradient is multiplied in.

    Attributes:
        array: (S, rows, C) float64, of the caller's framework.
        first: the row of these arrays' first sample; if the samples were summed, there is one row.
        upstream: a number on the device, or None.
        scale: a number known on the host.
        kept: objects that must stay alive until the gradient is queued.
    """

    array: Any
    address: int
    rows: int
    classes: int
    first: int = 0
    upstream: Any = None
    upstream_address: int = 0
    upstream_type: int = NO_TYPE
    scale: float = 1.0
    kept: Any = None

    def at(self, address: int) -> tuple[int, dict[str, Any]]:
        """Where a pass finds those of its first sample, and the steps and factors that it takes;
        ``address``: where they are, of these rows and classes."""
        summed = self.rows == 1
        return address + (0 if summed else 8 * self.first * self.classes), {
            "slot_stride": self.rows * self.classes,
            "row_stride": 0 if summed else self.classes,
            "upstream": self.upstream_address,
            "upstream_type": self.upstream_type,
            "scale": self.scale,
        }

    def part(self, first: int, factor: float) -> DeviceCoefficients:
        """The coefficients of the samples from ``first`` on, times a factor."""
        return self._replace(first=self.first + first, scale=self.scale * factor)


class CudaBackend(Backend):
    """The passes over arrays on a device, and the combine step.

    An instance serves one call, as the next may use another stream.
    """

    name = "cuda"
    counts_errors = True

    def __init__(self, place: Place, device: engine.Device | None = None) -> None:
        self.place: Place = place
        self.device: engine.Device = CudaDevice(place) if device is None else device

    def statistics(
        self, loss: FusedLoss, request: Request, arrays: Arrays
    ) -> tuple[Statistics, Field | None]:
        batch, classes = arrays.logits.shape[:2]
        rows = batch * arrays.rows
        sums = self.place.empty((request.slots, rows, classes), "float64")
        voxels = self.place.empty((rows,), "float64")
        at = (self.place.address(sums), self.place.address(voxels))
        ranked = None
        if loss.ranking is None:
            engine.reduce(self.device, request, arrays, *at)
        else:
            ranked = self._rank_there(loss, request, arrays, *at)
        if loss.validate:
            if np.isnan(self.place.numpy(voxels)).any():
                self.check(request, arrays)
                raise ValueError(
                    "voxel_weight: expected numbers of at least 0 that are finite in "
                    f"{arrays.value_dtype}"
                )
            self._check_numbers(loss, classes)
        regions = 0 if arrays.regions is None else arrays.rows
        return Statistics(request, sums, voxels, arrays.value_dtype, None, regions), ranked

    def _rank_there(
        self, loss: FusedLoss, request: Request, arrays: Arrays, sums: int, voxels: int
    ) -> Field:
        """Write the sums of a loss with a ranking term; return the field of the chosen voxels."""
        term = loss.ranking
        if term.kept_percent is None and term.kept_above is None:
            raise TypeError(
                f"terms: on a GPU a term that chooses voxels can keep the largest losses alone, "
                f"which {type(term).__name__} does not; pass arrays in CPU memory"
            )
        (batch, classes), spatial = arrays.logits.shape[:2], arrays.logits.shape[2:]
        count, dtype = prod((batch, *spatial)), arrays.value_dtype
        losses = self.device.empty(max(1, count * dtype.itemsize))
        view = _view_of(losses, (batch, prod(spatial)), dtype)
        name = term.ranking.field
        if term.kept_above is not None:
            others = without_field(request, name)
            voxel_map = Map("voxel", view, term.ranks_by(others, classes))
            engine.write_map(self.device, others, arrays, voxel_map, plain=True)
            keep_above(self.device, losses.address, count, dtype, *term.kept_above)
            field = Field(_view_of(losses, (batch, *spatial), dtype), dtype.name, "voxel")
            whole = with_ranked(request, arrays, term, field)
            engine.reduce(self.device, request, whole, sums, voxels)
            return field
        voxel_map = Map("voxel", view, term.ranks_by(request, classes))
        overwrite = self._weights_of(loss, term, classes)
        engine.reduce(self.device, request, arrays, sums, voxels, voxel_map, name, overwrite)
        place = request.index[term.ranking] * batch * arrays.rows * classes
        mean = sums + 8 * place
        keep_largest(self.device, losses.address, count, dtype, term.kept_percent, mean)
        return Field(_view_of(losses, (batch, *spatial), dtype), dtype.name, "voxel")

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        """Write a map into an array on the device, given as a view.

        Voxels with a bad label or weight get NaN; `check` raises the error.
        """
        engine.write_map(self.device, request, arrays, voxel_map)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self.place.empty(shape, dtype.name)

    def _weights_of(self, loss: FusedLoss, term: Any, classes: int) -> Callable[[int], None] | None:
        """A function that writes a ranking term's class weights, if they are on the device."""
        array = loss.given_to(term, "weight")
        if array is None:
            return None
        dtype, address, owner = self.place.operand(array)
        step = int(isinstance(term.weight, np.ndarray))

        def overwrite(to: int) -> None:
            repeat(self.device, to, dtype, address, classes, step, owner)

        return overwrite

    def with_numbers(self, loss: FusedLoss) -> FusedLoss:
        """The loss with its device numbers copied to the host; synchronises."""
        if not loss.given:
            return loss
        numbers = [
            None if array is None else np.array(self.place.numpy(array), np.float64).reshape(-1)
            for array in loss.given
        ]
        return loss.with_operands(numbers)

    def _check_numbers(self, loss: FusedLoss, classes: int) -> None:
        """Raise ValueError for invalid class weights in device memory."""
        if loss.given:
            for _, term in self.with_numbers(loss).terms:
                term.check(loss.activation, classes)

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the gradient, given the derivative by every sum, (S, rows, C), in CPU memory."""
        _, rows, classes = coefficients.shape
        numbers = self.device.upload(np.ascontiguousarray(coefficients, np.float64))
        engine.apply(
            self.device,
            request,
            arrays,
            numbers.address,
            out,
            slot_stride=rows * classes,
            row_stride=classes,
        )

    def apply_target(
        self, request: Request, arrays: Arrays, coefficients: Any, out: np.ndarray
    ) -> None:
        """As in `Backend`, of coefficients in CPU memory or those of `combine`'s pullback."""
        if isinstance(coefficients, np.ndarray):
            numbers = self.device.upload(np.ascontiguousarray(coefficients, np.float64))
            _, rows, classes = coefficients.shape
            coefficients = DeviceCoefficients(numbers, numbers.address, rows, classes)
        each = coefficients.rows * coefficients.classes
        found = by_target(self.device, request, coefficients.address, each)
        known = dict(zip(request.fields, arrays.fields, strict=True))
        arrays = replace(arrays, fields=tuple(known[name] for name in found.request.fields))
        at, steps = coefficients.at(found.memory.address)
        engine.write_map_by_rows(self.device, found.request, arrays, at, out, **steps)

    def check(self, request: Request, arrays: Arrays) -> None:
        """Raise ValueError for bad labels and weights; synchronises."""
        weight = arrays.voxel_weight
        check_targets(
            request,
            replace(
                arrays,
                target=self.to_numpy(arrays.target),
                voxel_weight=None if weight is None else self.to_numpy(weight),
            ),
        )

    def to_numpy(self, view: np.ndarray) -> np.ndarray:
        """A copy in CPU memory of a device array given as a view."""
        cupy = _cupy()
        with _on(self.place.ordinal):
            low, high = byte_bounds(view)
            memory = cupy.cuda.UnownedMemory(low, high - low, view, self.place.ordinal)
            raw = cupy.ndarray((high - low,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
            with _stream(self.place.stream, self.place.ordinal):
                numbers = raw.get()
        address: int = view.__array_interface__["data"][0]
        copied: np.ndarray = np.ndarray(
            view.shape, view.dtype, numbers, address - low, view.strides
        )
        return copied

    def combine(
        self, loss: FusedLoss, statistics: Statistics
    ) -> tuple[Any, Callable[[Any], DeviceCoefficients]]:
        """The value, on the device, and its pullback from upstream to the derivatives."""
        if loss.counting is not None:
            return lovasz.combine(self.place, self.device, self.combine, loss, statistics)
        shape = slots, batch, classes = tuple(statistics.sums.shape)
        place, device = self.place, self.device
        operands = operands_of(loss, place)
        program = program_of(
            loss,
            statistics.request,
            shape,
            statistics.dtype,
            operands,
            statistics.regions,
            statistics.for_target,
        )
        given, numbers, memory = arguments(program, device, operands)
        dtype = statistics.dtype.name
        value = place.empty(program.value_shape, dtype)
        derivatives = place.empty((slots, batch, classes), "float64")
        joined = self._joined(loss, statistics)
        scratch = device.empty(8 * program.scratch_doubles) if program.scratch_doubles else None
        addresses = {
            "sums": place.address(statistics.sums),
            "voxels": place.address(statistics.voxels),
            "joined": 0 if joined is None else place.address(joined),
            "value": place.address(value),
            "derivatives": place.address(derivatives),
            "scratch": 0 if scratch is None else scratch.address,
        }
        names = _COMBINE[: 1 + bool(program.value_shape)]
        kernels = device.kernels(program.sources, names)
        device.launch(kernels[0], 1, (THREADS, 1), 0, program.call(given, numbers, **addresses))
        coefficients = DeviceCoefficients(derivatives, addresses["derivatives"], batch, classes)

        def pullback(upstream: Any) -> DeviceCoefficients:
            if upstream is None:
                upstream = place.ones(program.value_shape, dtype) if program.value_shape else 1.0
            elif isinstance(upstream, np.ndarray) and not upstream.ndim:
                upstream = float(upstream)
            shape = tuple(getattr(upstream, "shape", ()))
            if shape != program.value_shape:
                raise ValueError(
                    f"upstream: expected the value's shape {program.value_shape}, got {shape}"
                )
            if isinstance(upstream, (int, float, np.number)):
                return coefficients._replace(scale=float(upstream))
            array = place.array(upstream, dtype)
            if not program.value_shape:
                kind = engine.FLOAT32 if dtype == "float32" else engine.FLOAT64
                return coefficients._replace(
                    upstream=array, upstream_address=place.address(array), upstream_type=kind
                )
            again = program.call(given, numbers, **addresses, upstream=place.address(array))
            device.launch(kernels[1], 1, (THREADS, 1), 0, again)
            # Held until the gradient is queued, as freed memory may be reused.
            kept = (array, statistics, joined, scratch, operands.kept, memory)
            return coefficients._replace(kept=kept)

        return value, pullback

    def _joined(self, loss: FusedLoss, statistics: Statistics) -> Any:
        """(S · C + 1): the sums over all ranks, for terms that request them."""
        terms = [term for _, term in loss.terms if term.joins_ranks]
        if not terms:
            return None
        own = statistics if loss.regional is None else statistics.of_samples()
        joined = terms[0].join_ranks(own)
        slots, _, classes = joined.sums.shape
        both = self.place.empty((slots * classes + 1,), "float64")
        both[:-1], both[-1:] = joined.sums.reshape(-1), joined.voxels
        return both

    def gradient(
        self, request: Request, arrays: Arrays, coefficients: DeviceCoefficients, out: np.ndarray
    ) -> None:
        at, steps = coefficients.at(coefficients.address)
        engine.apply(self.device, request, arrays, at, out, **steps)


def _view_of(memory: engine.Memory, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A view of a C-ordered array in device memory, which keeps it alive."""
    strides = tuple(prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape)))
    return device_view(memory, memory.address, shape, strides, dtype.name)


_COMBINE = ("fastloss_combine", "fastloss_pullback")


def arguments(
    program: Program, device: engine.Device, operands: Operands
) -> tuple[tuple[int, ...], bytes, Any]:
    """The numbers of a loss as `Program.call` takes them, and the owner of their memory."""
    if program.takes_along:
        return operands.addresses, operands.host, None
    memory = on_device(device, operands.host)
    return operands.addresses, memory.address.to_bytes(8, "little"), memory


_programs: dict[Any, Program] = {}
_MOST_PROGRAMS = 1024


def program_of(
    loss: FusedLoss,
    request: Request,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    operands: Operands,
    regions: int = 0,
    for_target: bool = False,
) -> Program:
    """The combine step, traced once per shape of the sums and structure of the loss."""
    key = (loss.key, request, shape, dtype, operands.layout, regions, for_target)
    program = _programs.get(key)
    if program is None:
        program = trace(loss, request, *shape[1:], dtype, operands.layout, regions, for_target)
        if len(_programs) >= _MOST_PROGRAMS:
            _programs.clear()
        _programs[key] = program
    return program


def check_places(logits: Borrowed, *others: Borrowed | None, **more: Borrowed) -> None:
    """Raise ValueError, naming the argument, for an array on another device than the logits."""
    named = [*zip(("target", "voxel_weight", "out"), others, strict=False), *more.items()]
    for name, other in named:
        if other is not None and _where(other) != _where(logits):
            raise ValueError(
                f"{name}: expected an array in {_where(logits)} like the logits, got one in "
                f"{_where(other)}"
            )


def _where(borrowed: Borrowed) -> str:
    place = borrowed.place
    return "CPU memory" if place is None else f"the memory of CUDA device {place.ordinal}"


def why_absent() -> str | None:
    """Why no GPU can be used here, or None."""
    try:
        describe_devices()
    except ImportError as error:
        return str(error)
    return None


def describe_devices() -> str:
    """CuPy and the devices it finds. ImportError: no device, or no CuPy."""
    cupy = _cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        names = [cupy.cuda.runtime.getDeviceProperties(i)["name"].decode() for i in range(count)]
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ImportError(f"CuPy finds no CUDA device: {error}") from error
    if not names:
        raise ImportError("CuPy finds no CUDA device")
    return f"CuPy {cupy.__version__}, {', '.join(names)}"
