"""The two passes as launches on a GPU: what is launched, in what order, over which memory."""

from __future__ import annotations

import struct
from typing import Any, Protocol

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends._cuda_call import CALL, NO_TYPE, TYPES, Plan, operand, plan_pass
from fastloss.request import Request


class Memory(Protocol):
    """Memory of a device, from the caller's allocator."""

    @property
    def address(self) -> int:
        """Where it lies."""


class Device(Protocol):
    """A GPU and a stream on it, as the caller's framework sees them."""

    shared_bytes: int
    """The most shared memory that a block can have."""

    def empty(self, nbytes: int) -> Memory:
        """New memory, which is used on the stream alone."""

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        """The compiled kernels: "reduce" with "finish", or "apply"."""

    def kernels(self, source: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Other kernels, compiled."""

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        """Run a kernel on the stream; ``call``, (1,), is its one argument, a struct's bytes."""


FLOAT32, FLOAT64 = TYPES.index("float32"), TYPES.index("float64")


def reduce(
    device: Device,
    request: Request,
    arrays: Arrays,
    sums: int,
    voxels: int,
    losses: int = 0,
    loss_weights: int = 0,
) -> None:
    """Write the sums, (S, B, C) float64, and those of the voxel weights, (B,), at these addresses.

    Samples with a bad label or a bad voxel weight get NaN. With ``losses`` also the loss of every
    voxel, (B, voxels), given the class weights, (C,) float64.
    """
    plan, addresses = plan_of(device, request, arrays, None, NO_TYPE, bool(losses))
    if plan.grid:
        kernels = device.passes(plan.constants, "reduce")
        run_reduce(device, plan, kernels, addresses, sums, voxels, losses, loss_weights)


def run_reduce(
    device: Device,
    plan: Plan,
    kernels: tuple[Any, ...],
    addresses: tuple[int, ...],
    sums: int,
    voxels: int,
    losses: int = 0,
    loss_weights: int = 0,
) -> None:
    """`reduce` as planned, of arrays at these addresses: logits, target, voxel weight."""
    kernel, finish = kernels
    partial = device.empty(8 * plan.partial)
    record = _record(plan, addresses)
    _WRITE[3](record, _PARTIAL, partial.address, sums, voxels)
    _WRITE[2](record, _LOSSES, losses, loss_weights)
    call = np.frombuffer(record, _RECORD)
    device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)
    device.launch(finish, plan.finish_grid, (32, 32), 0, call)


def apply(
    device: Device,
    request: Request,
    arrays: Arrays,
    coefficients: int,
    out: np.ndarray,
    *,
    slot_stride: int,
    sample_stride: int,
    upstream: int = 0,
    upstream_type: int = NO_TYPE,
    scale: float = 1.0,
    losses: int = 0,
) -> None:
    """Write the gradient by the logits.

    ``coefficients`` is the address of float64 numbers, the derivative by the sum of slot s, sample
    b and class c being at s · slot_stride + b · sample_stride + c, times ``scale`` and times the
    number at ``upstream``.
    """
    plan, addresses = plan_of(device, request, arrays, out, upstream_type, False)
    if plan.grid:
        run_apply(
            device,
            plan,
            device.passes(plan.constants, "apply"),
            addresses,
            coefficients,
            slot_stride=slot_stride,
            sample_stride=sample_stride,
            upstream=upstream,
            scale=scale,
            losses=losses,
        )


def run_apply(
    device: Device,
    plan: Plan,
    kernels: tuple[Any, ...],
    addresses: tuple[int, ...],
    coefficients: int,
    *,
    slot_stride: int,
    sample_stride: int,
    upstream: int = 0,
    scale: float = 1.0,
    losses: int = 0,
) -> None:
    """`apply` as planned, of arrays at these addresses: logits, target, voxel weight, out."""
    (kernel,) = kernels
    record = _record(plan, addresses)
    _WRITE[4](record, _COEFFICIENTS, coefficients, slot_stride, sample_stride, upstream)
    _write_number(record, _SCALE, scale)
    _WRITE[1](record, _LOSSES, losses)
    call = np.frombuffer(record, _RECORD)
    device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)


# Where the fields that change from call to call lie in CALL, neighbours in this order.
def _place(field: str) -> int:
    offset: int = CALL.fields[field][1]  # type: ignore[index]
    return offset


_PARTIAL = _place("partial")  # sums, voxel_sums
_COEFFICIENTS = _place("coefficients")  # slot_stride, coefficient_sample_stride, upstream
_SCALE, _LOSSES = _place("scale"), _place("losses")  # losses, loss_weights
_RECORD = np.dtype(("V", CALL.itemsize))
# Python's own packing takes a fraction of the time that NumPy takes for so few numbers.
_WRITE = {n: struct.Struct(f"={n}q").pack_into for n in (1, 2, 3, 4)}
_write_number = struct.Struct("=d").pack_into


def _record(plan: Plan, addresses: tuple[int, ...]) -> bytearray:
    """The bytes of CALL for arrays at these addresses."""
    record = bytearray(plan.call)
    starts = [a + o for a, o in zip(addresses, plan.offsets, strict=False)]
    _WRITE[len(starts)](record, 0, *starts)
    return record


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def plan_of(
    device: Device,
    request: Request,
    arrays: Arrays,
    out: np.ndarray | None,
    upstream_type: int,
    with_losses: bool,
) -> tuple[Plan, tuple[int, ...]]:
    """The plan of a call, which is made once for arrays of one kind, and its addresses."""
    x, y, w = arrays.logits, arrays.target, arrays.voxel_weight
    at = (_address(x), _address(y), _address(w), _address(out))
    key = (
        id(request),  # which the plan keeps
        x.shape,
        (x.strides, y.strides, w is not None and w.strides, out is not None and out.strides),
        (arrays.logits_dtype, arrays.target_dtype, arrays.weight_dtype),
        (at[0] & 15, at[1] & 15, at[2] & 15, at[3] & 15),
        (upstream_type, with_losses, device.shared_bytes),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = plan_pass(
            request,
            x.shape,
            operand(x, arrays.logits_dtype, True, at[0]),
            operand(y, arrays.target_dtype, arrays.dense, at[1]),
            None if w is None else operand(w, arrays.weight_dtype, False, at[2]),
            None if out is None else operand(out, arrays.logits_dtype, True, at[3]),
            upstream_type,
            with_losses,
            device.shared_bytes,
        )
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan, at


def _address(array: np.ndarray | None) -> int:
    if array is None:
        return 0
    address: int = array.__array_interface__["data"][0]
    return address
