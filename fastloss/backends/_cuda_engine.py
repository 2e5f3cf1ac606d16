"""The two passes as launches on a GPU: what is launched, in what order, over which memory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends._cuda_call import (
    NO_TYPE,
    OUT,
    TYPES,
    WEIGHT,
    Operand,
    Plan,
    operand,
    plan_pass,
)
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

    def constant(self, numbers: np.ndarray) -> Memory:
        """Numbers that never change, copied to the device once."""

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        """The compiled kernels: "reduce" with "finish", or "apply"."""

    def kernels(self, source: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Other kernels, compiled."""

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        """Run a kernel on the stream; ``call`` is its one argument, (1,) of a structured dtype."""


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
    plan = _plan(device, request, arrays, None, NO_TYPE, bool(losses))
    if not plan.grid:
        return
    kernel, finish = device.passes(plan.constants, "reduce")
    partial = device.empty(8 * plan.partial)
    call = _call(plan, arrays, None)
    call["partial"], call["sums"], call["voxel_sums"] = partial.address, sums, voxels
    call["losses"], call["loss_weights"] = losses, loss_weights
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
    plan = _plan(device, request, arrays, out, upstream_type, False)
    if not plan.grid:
        return
    (kernel,) = device.passes(plan.constants, "apply")
    call = _call(plan, arrays, out)
    call["coefficients"], call["slot_stride"] = coefficients, slot_stride
    call["coefficient_sample_stride"] = sample_stride
    call["upstream"], call["scale"], call["losses"] = upstream, scale, losses
    device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)


def _plan(
    device: Device,
    request: Request,
    arrays: Arrays,
    out: np.ndarray | None,
    upstream_type: int,
    with_losses: bool,
) -> Plan:
    weight: Operand | None = None
    if arrays.voxel_weight is not None:
        weight = operand(arrays.voxel_weight, arrays.weight_dtype, False)
    return plan_pass(
        request,
        arrays.logits.shape,
        operand(arrays.logits, arrays.logits_dtype, True),
        operand(arrays.target, arrays.target_dtype, arrays.dense),
        weight,
        None if out is None else operand(out, arrays.logits_dtype, True),
        upstream_type,
        with_losses,
        device.shared_bytes,
    )


def _call(plan: Plan, arrays: Arrays, out: np.ndarray | None) -> np.ndarray:
    call = plan.call.copy()
    data = call["data"][0]
    data[0] = _address(arrays.logits) + plan.offsets[0]
    data[1] = _address(arrays.target) + plan.offsets[1]
    if arrays.voxel_weight is not None:
        data[WEIGHT] = _address(arrays.voxel_weight) + plan.offsets[WEIGHT]
    if out is not None:
        data[OUT] = _address(out) + plan.offsets[OUT]
    return call


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
