"""Cached launch plans: for repeated shapes and dtypes only pointers change.

Checking arrays, planning launches and looking up kernels takes the host several times as long as
queueing them. In training all calls are alike, so the first one's plan is cached, for all losses
that differ only in numbers.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastloss.backends.cuda import backend as cuda
from fastloss.backends.cuda import engine
from fastloss.backends.cuda.call import NO_TYPE, TYPES, Work
from fastloss.backends.cuda.combine.code import THREADS
from fastloss.backends.cuda.operands import Operands, operands_of
from fastloss.borrowed import byte_bounds
from fastloss.protocol import FusedLoss, GpuAdapter

if TYPE_CHECKING:
    from fastloss.backends.cuda.call import Plan
    from fastloss.backends.cuda.combine.program import Program
    from fastloss.borrowed import Kind

_MOST_KINDS = 256
_MOST_LOSSES = 256
_FEW_SUMS = 256 << 10  # bytes
_calls: dict[tuple[str, ...], dict[Hashable, Prepared]] = {}
"""By the structure of a loss, then by the kind of the arrays."""


class Kept(NamedTuple):
    """Results of the forward pass that the backward pass reads."""

    memory: Any
    """(S · B · C + …) float64 on the device; the derivatives by the sums come first."""
    address: int


class Prepared:
    """The cached plan for losses that differ only in numbers, and arrays of one kind."""

    def __init__(self, loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any) -> None:
        passes = loss.passes(logits, target, voxel_weight)  # raises all errors
        request, arrays = passes.request, passes.arrays
        assert passes.logits.place is not None
        self.place = passes.logits.place
        self.shape = (len(request.sums), *arrays.logits.shape[:2])
        self.dtype = arrays.value_dtype.name
        self.alike = False
        if loss.counting is not None:  # which combines in steps of its own
            return
        operands = operands_of(loss, self.place)
        program = cuda.program_of(loss, request, self.shape, arrays.value_dtype, operands)
        self.alike = (
            loss.additive
            and not loss.validate
            and not any(term.joins_ranks for _, term in loss.terms)
            and not program.value_shape
            and arrays.logits.size > 0
        )
        # Whether the cached plan is sufficient; if not, calls take the full path.
        if not self.alike:
            return
        device = self._device()
        self._plan, _ = engine.plan_of(device, request, arrays, None, Work("reduce"))
        self._reduce = device.passes(self._plan.constants, "reduce")
        # One block of threads adds few sums faster than a separate kernel is launched.
        self._joined = not self._plan.general and self._plan.partial <= _FEW_SUMS
        self._combine = (operands.layout, program, self._kernel(program))
        self._latest: tuple[tuple[np.ndarray, ...], Operands] = (), operands
        self._applies: dict[Hashable, tuple[Plan, Any]] = {}
        inputs = (passes.logits, passes.target, passes.voxel_weight)
        self._spans = [None if a is None else _span(a.array) for a in inputs]
        self._outs: dict[Hashable, tuple[int, int]] = {}
        slots, batch, classes = self.shape
        count = slots * batch * classes
        # Offsets of intermediate results in one allocation, in bytes; derivatives first.
        self._sums, self._voxels, self._scratch = 8 * count, 16 * count, 16 * count + 8 * batch
        self._doubles = 2 * count + batch

    def _kernel(self, program: Program) -> Any:
        (kernel,) = self._device().kernels(program.sources, ("fastloss_combine",))
        return kernel

    def _device(self) -> engine.Device:
        return cuda.CudaDevice(self.place)

    def value(self, loss: FusedLoss, at: tuple[int, ...]) -> tuple[Any, Kept]:
        """Queue the reduce pass and the combine step on arrays at these addresses.

        The numbers of the ``loss`` may differ from earlier calls.
        """
        place, device = self.place, self._device()
        arrays, operands = self._latest
        own = loss.operands  # other arrays if the numbers changed
        if loss.given or len(own) != len(arrays) or not all(map(is_, own, arrays)):
            operands = operands_of(loss, place)
            self._latest = () if loss.given else own, operands
        layout, program, combine = self._combine
        if operands.layout != layout:  # of a term whose numbers cannot change
            dtype = np.dtype(self.dtype)
            program = cuda.program_of(loss, self._plan.request, self.shape, dtype, operands)
            combine = self._kernel(program)
            self._combine = (operands.layout, program, combine)
        given, numbers, _held = cuda.arguments(program, device, operands)
        size = self._doubles + program.scratch_doubles + -(-self._plan.partial // 8)
        memory = place.empty((size,), "float64")
        value = place.empty((), self.dtype)
        base = place.address(memory)
        sums, voxels = base + self._sums, base + self._voxels
        partial = base + 8 * (self._doubles + program.scratch_doubles)
        engine.run_reduce(
            device, self._plan, self._reduce, at, sums, voxels, partial, finish=not self._joined
        )
        call = program.call(
            given,
            numbers,
            sums=sums,
            voxels=voxels,
            value=place.address(value),
            derivatives=base,
            scratch=base + self._scratch if program.scratch_doubles else 0,
            partial=partial if self._joined else 0,
            is_narrow=self._plan.narrow,
            blocks=self._plan.blocks,
        )
        device.launch(combine, 1, (THREADS, 1), 0, call)
        return value, Kept(memory, base)

    def takes(
        self,
        loss: FusedLoss,
        adapter: GpuAdapter,
        arrays: tuple[Any, Any, Any],
        at: tuple[int, ...],
        out: Any,
    ) -> bool:
        """Whether the cached plan can write the gradient to ``out``; if not, use the full path.

        Raises the errors about ``out``.
        """
        kind = adapter.kind(out, "out")
        if kind is None:
            return False
        span = self._outs.get(kind.traits)
        if span is None:
            view = loss.passes(*arrays).borrow_output(out)
            if len(self._outs) >= _MOST_KINDS:
                self._outs.clear()
                self._applies.clear()
            span = self._outs[kind.traits] = _span(view.array)
        low, high = kind.address + span[0], kind.address + span[1]
        inputs = list(zip(self._spans, at, strict=True))
        if adapter.kind(arrays[0], "logits") == kind:
            del inputs[0]  # the logits themselves
        return not any(
            other is not None and low < address + other[1] and address + other[0] < high
            for other, address in inputs
        )

    def gradient(
        self,
        loss: FusedLoss,
        adapter: GpuAdapter,
        arrays: tuple[Any, Any, Any],
        at: tuple[int, ...],
        kept: Kept,
        upstream: Any = None,
        out: Any = None,
    ) -> Any:
        """Queue the apply pass; ``upstream``: one number on the device, or None for 1.

        ``out``: an array that `takes` accepted, or None for a new one.
        """
        place, device = self.place, self._device()
        new, layout = out, None
        if out is None:
            new = adapter.like(arrays[0])
        else:
            adapter.written(out)
            of_out = adapter.kind(out, "out")
            layout = of_out and of_out.traits
        to = place.address(new)
        upstream_type, factor = NO_TYPE, 0
        if upstream is not None:
            upstream = place.scalar(upstream, self.dtype)
            upstream_type, factor = TYPES.index(self.dtype), place.address(upstream)
        kind = (upstream_type, to & 15, layout)
        if kind not in self._applies:
            self._applies[kind] = self._plan_apply(loss, adapter, arrays, new, upstream_type)
        plan, kernels = self._applies[kind]
        _, batch, classes = self.shape
        engine.run_apply(
            device,
            plan,
            kernels,
            (*at, to),
            kept.address,
            slot_stride=batch * classes,
            row_stride=classes,
            upstream=factor,
        )
        return new

    def _plan_apply(
        self,
        loss: FusedLoss,
        adapter: GpuAdapter,
        arrays: tuple[Any, Any, Any],
        new: Any,
        upstream: int,
    ) -> tuple[Plan, Any]:
        passes = loss.passes(*arrays)
        view = passes.gradient_view(adapter.borrow(new, "out"))
        device = self._device()
        work = Work("apply", upstream)
        plan, _ = engine.plan_of(device, passes.request, passes.arrays, view, work)
        return plan, device.passes(plan.constants, "apply")

    def coefficients(self, kept: Kept, upstream: Any) -> cuda.DeviceCoefficients:
        """The coefficients for `CudaBackend.gradient`, as `CudaBackend.combine` computes them."""
        _, batch, classes = self.shape
        upstream = self.place.scalar(upstream, self.dtype)
        return cuda.DeviceCoefficients(
            kept.memory,
            kept.address,
            batch,
            classes,
            upstream=upstream,
            upstream_address=self.place.address(upstream),
            upstream_type=TYPES.index(self.dtype),
        )


def _span(view: np.ndarray) -> tuple[int, int]:
    """The extent of its bytes, from the address of its first number on."""
    address: int = view.__array_interface__["data"][0]
    low, high = byte_bounds(view)
    return low - address, high - address


def find(
    loss: FusedLoss, adapter: GpuAdapter, kind: Kind, logits: Any, target: Any, voxel_weight: Any
) -> tuple[Prepared, tuple[int, ...]] | None:
    """The cached plan of calls like this one, and the addresses of its arrays; None: the full path.

    ``kind`` is that of the logits. Raises the errors about the arrays.
    """
    of_target = adapter.kind(target, "target")
    of_weight = None if voxel_weight is None else adapter.kind(voxel_weight, "voxel_weight")
    if of_target is None or (of_weight is None) != (voxel_weight is None):
        return None
    x, y = kind.address, of_target.address
    w, traits = (0, None) if of_weight is None else (of_weight.address, of_weight.traits)
    numbers: list[Hashable] = []
    for array in loss.given:
        of_array = None if array is None else adapter.kind(array, "weight")
        if of_array is None and array is not None:
            return None
        numbers.append(of_array and of_array.traits)
    key: Any = (type(adapter), kind.traits, of_target.traits, traits, x & 15, y & 15, w & 15)
    key += tuple(numbers)
    calls = _calls.get(loss.key)
    if calls is None:
        if len(_calls) >= _MOST_LOSSES:
            _calls.clear()
        calls = _calls[loss.key] = {}
    call = calls.get(key)
    if call is None:
        call = Prepared(loss, logits, target, voxel_weight)
        if len(calls) >= _MOST_KINDS:
            calls.clear()
        calls[key] = call
    return (call, (x, y, w)) if call.alike else None
