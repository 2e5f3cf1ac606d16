"""The passes as sequences of launches on a GPU, and the memory that they use."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastloss.arrays import Arrays
from fastloss.backends.cuda import histograms
from fastloss.backends.cuda.call import (
    CALL,
    FLOAT32,
    FLOAT64,
    NO_TYPE,
    TYPES,
    Operand,
    Operands,
    Plan,
    Work,
    in_c_order,
    operand,
    plan_fast,
)
from fastloss.backends.cuda.copies import align, aligned
from fastloss.backends.cuda.device import Device, Memory
from fastloss.backends.cuda.general import GENERAL_CALL, plan_general
from fastloss.maps import Map
from fastloss.request import Request
from fastloss.sums import CROSS_ENTROPY

__all__ = [
    "FLOAT32",
    "FLOAT64",
    "Device",
    "Memory",
    "Work",
    "apply",
    "plan_of",
    "reduce",
    "run_apply",
    "run_reduce",
    "write_map",
    "write_map_by_rows",
]


def reduce(
    device: Device,
    request: Request,
    arrays: Arrays,
    sums: int,
    voxels: int,
    voxel_map: Map | None = None,
    without: str = "",
    overwrite: Callable[[int], None] | None = None,
) -> None:
    """Write the sums, (S, rows, C) float64, and those of the voxel weights, (rows,), to addresses.

    Behind the sums of the table are those of histograms.

    Samples with a bad label or a bad voxel weight get NaN. With ``voxel_map`` also writes a map of
    kind "voxel". ``without`` names a field that a ranking term has not computed yet: it is not
    among those of the arrays, and sums that read it are 0. ``overwrite`` is called with the address
    of the map's coefficients of the cross-entropy, (C,), to overwrite them.
    """
    work = Work("reduce", without=without)
    coefficients = None
    if voxel_map is not None:
        coefficients, of_label = _coefficients(request, voxel_map)
        work = work._replace(map_kind="voxel", map_of_label=of_label)
    out = None if voxel_map is None else voxel_map.out
    plan, addresses = plan_of(device, request, arrays, out, work)
    if not plan.grid:
        return
    numbers = 0
    if coefficients is not None:
        place = request.index[CROSS_ENTROPY] if of_label else 0
        if not plan.general:
            coefficients, place = coefficients[place], 0
        memory = device.upload(coefficients)
        numbers = memory.address
        if overwrite is not None:
            overwrite(numbers + 8 * place * arrays.logits.shape[1])
    kernels = device.passes(plan.constants, "reduce")
    partial = device.empty(plan.partial)
    tallies = histograms.begin(device, request, arrays) if request.histograms else None
    run_reduce(
        device, plan, kernels, addresses, sums, voxels, partial.address, numbers, tallies=tallies
    )
    if tallies is not None:
        of_table = 8 * len(request.sums) * arrays.logits.shape[0] * arrays.logits.shape[1]
        histograms.finish(device, request, arrays, tallies, sums + of_table)


def _coefficients(request: Request, voxel_map: Map) -> tuple[np.ndarray, bool]:
    """The coefficients of a map, (S, C), and whether all but the cross-entropy's are 0."""
    assert voxel_map.coefficients is not None
    numbers = np.ascontiguousarray(voxel_map.coefficients, np.float64)
    place = request.index.get(CROSS_ENTROPY, -1)
    others = np.delete(numbers, place, axis=0) if place >= 0 else numbers
    return numbers, place >= 0 and not others.any()


def run_reduce(
    device: Device,
    plan: Plan,
    kernels: tuple[Any, ...],
    addresses: tuple[int, ...],
    sums: int,
    voxels: int,
    partial: int,
    coefficients: int = 0,
    finish: bool = True,
    tallies: histograms.Tallies | None = None,
) -> None:
    """Run a planned `reduce` on arrays at these addresses: logits, target, voxel weight, …

    ``partial``: the address for the sums of the blocks, `Plan.partial` bytes. ``coefficients``: the
    address of a map's coefficients; for a fast path, one per class. Without ``finish`` only the
    sums of the blocks are computed. ``tallies``: where errors are counted.
    """
    if plan.copies:
        with aligned(device, plan.copies, addresses) as copied:
            plan = replace(plan, copies=())
            args = (copied, sums, voxels, partial, coefficients, finish, tallies)
            run_reduce(device, plan, kernels, *args)
        return
    kernel, finishing = kernels
    record = _record(plan, addresses)
    _WRITE[3](record, _PARTIAL, partial, sums, voxels)
    if coefficients and plan.general:
        _WRITE[1](record, _MAP_COEFFICIENTS, coefficients)
    elif coefficients:
        _WRITE[2](record, _LOSSES, addresses[3], coefficients)
    if tallies is not None:
        _WRITE[2](record, _TALLIES, tallies.memory.address, tallies.largest_weight)
    call = np.frombuffer(record, _RECORDS[plan.general])
    if tallies is not None and tallies.weighted:
        (largest,) = device.passes(plan.constants, "largest")
        device.launch(largest, plan.grid, (plan.threads, 1), 0, call)
    device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)
    if finish:
        device.launch(finishing, plan.finish_grid, (32, 32), 0, call)


def apply(
    device: Device,
    request: Request,
    arrays: Arrays,
    coefficients: int,
    out: np.ndarray,
    *,
    slot_stride: int,
    row_stride: int,
    upstream: int = 0,
    upstream_type: int = NO_TYPE,
    scale: float = 1.0,
) -> None:
    """Write the gradient by the logits.

    ``coefficients`` is the address of float64 numbers: the derivative by the sum s of row r and
    class c, at s · slot_stride + r · row_stride + c, is multiplied by ``scale`` and by the number
    at ``upstream``.
    """
    work = Work("apply", upstream_type)
    plan, addresses = plan_of(device, request, arrays, out, work)
    if plan.grid:
        run_apply(
            device,
            plan,
            device.passes(plan.constants, "apply"),
            addresses,
            coefficients,
            slot_stride=slot_stride,
            row_stride=row_stride,
            upstream=upstream,
            scale=scale,
        )


def run_apply(
    device: Device,
    plan: Plan,
    kernels: tuple[Any, ...],
    addresses: tuple[int, ...],
    coefficients: int,
    *,
    slot_stride: int,
    row_stride: int,
    upstream: int = 0,
    scale: float = 1.0,
) -> None:
    """Run a planned `apply` on arrays at these addresses: logits, target, voxel weight, out, …"""
    if plan.copies:
        with aligned(device, plan.copies, addresses) as copied:
            run_apply(
                device,
                replace(plan, copies=()),
                kernels,
                copied,
                coefficients,
                slot_stride=slot_stride,
                row_stride=row_stride,
                upstream=upstream,
                scale=scale,
            )
        return
    (kernel,) = kernels
    record = _record(plan, addresses)
    _WRITE[4](record, _COEFFICIENTS, coefficients, slot_stride, row_stride, upstream)
    _write_number(record, _SCALE, scale)
    if len(addresses) > _OTHERS and not plan.general:
        _WRITE[1](record, _LOSSES, addresses[_OTHERS + 1])  # its only field
    call = np.frombuffer(record, _RECORDS[plan.general])
    device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)


def write_map(
    device: Device, request: Request, arrays: Arrays, voxel_map: Map, plain: bool = False
) -> None:
    """Write a map: see `fastloss.maps.Map`. Voxels with a bad label or weight get NaN.

    ``plain``: voxel weights count as 1, or 0 where they are 0.
    """
    work = Work("map", map_kind=voxel_map.kind, plain=plain)
    plan, addresses = plan_of(device, request, arrays, voxel_map.out, work)
    if not plan.grid:
        return
    (kernel,) = device.passes(plan.constants, "map")
    with aligned(device, plan.copies, addresses) as copied:
        record = _record(plan, copied)
        if voxel_map.kind in ("voxel", "class"):
            numbers = device.upload(_coefficients(request, voxel_map)[0])
            _WRITE[1](record, _MAP_COEFFICIENTS, numbers.address)
        call = np.frombuffer(record, _RECORDS[plan.general])
        device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)


def write_map_by_rows(
    device: Device,
    request: Request,
    arrays: Arrays,
    coefficients: int,
    out: np.ndarray,
    *,
    slot_stride: int,
    row_stride: int,
    upstream: int = 0,
    upstream_type: int = NO_TYPE,
    scale: float = 1.0,
) -> None:
    """Write a map of kind "class", (B, C, voxels), of coefficients as `apply` takes them."""
    work = Work("map", upstream_type, map_kind="class", by_row=True)
    plan, addresses = plan_of(device, request, arrays, out, work)
    if not plan.grid:
        return
    (kernel,) = device.passes(plan.constants, "map")
    with aligned(device, plan.copies, addresses) as copied:
        record = _record(plan, copied)
        _WRITE[4](record, _COEFFICIENTS, coefficients, slot_stride, row_stride, upstream)
        _write_number(record, _SCALE, scale)
        call = np.frombuffer(record, _RECORDS[plan.general])
        device.launch(kernel, plan.grid, (plan.threads, 1), plan.shared, call)


# Offsets in the record of the fields that change from call to call; adjacent fields in this order.
def _place(field: str) -> int:
    offset: int = GENERAL_CALL.fields[field][1]  # type: ignore[index]
    assert field not in (CALL.names or ()) or CALL.fields[field][1] == offset  # type: ignore[index]
    return offset


_OTHERS = 4  # addresses before those of the regions and of the fields
_PARTIAL = _place("partial")  # sums, voxel_sums
_COEFFICIENTS = _place("coefficients")  # slot_stride, row_stride, upstream
_SCALE, _LOSSES = _place("scale"), _place("losses")  # losses, loss_weights
_MORE, _MAP_COEFFICIENTS = _place("more"), _place("map_coefficients")
_TALLIES = _place("error_tallies")  # largest_weight
_RECORDS = {
    general: np.dtype(("V", kind.itemsize))
    for general, kind in ((False, CALL), (True, GENERAL_CALL))
}
# For so few numbers, struct packing takes a fraction of NumPy's time.
_WRITE = {n: struct.Struct(f"={n}q").pack_into for n in range(1, 10)}
_write_number = struct.Struct("=d").pack_into


def _record(plan: Plan, addresses: tuple[int, ...]) -> bytearray:
    """The bytes of CALL or GENERAL_CALL for arrays at these addresses."""
    record = bytearray(plan.call)
    starts: Sequence[int] = addresses[
        : len(plan.offsets)
    ]  # the address of a field may be passed otherwise
    if any(plan.offsets):
        starts = [a + o for a, o in zip(starts, plan.offsets, strict=False)]
    first, others = starts[:_OTHERS], starts[_OTHERS:]
    _WRITE[len(first)](record, 0, *first)
    if others:
        _WRITE[len(others)](record, _MORE, *others)
    return record


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def plan_of(
    device: Device, request: Request, arrays: Arrays, out: np.ndarray | None, work: Work
) -> tuple[Plan, tuple[int, ...]]:
    """The plan of a call, cached for arrays of the same kind, and its addresses.

    ``out`` takes the gradient or the map, (B, voxels) or (B, C, voxels).
    """
    x, y, w = arrays.logits, arrays.target, arrays.voxel_weight
    at: tuple[int, ...] = (_address(x), _address(y), _address(w), _address(out))
    key: tuple[Any, ...] = (
        id(request),  # kept alive by the plan
        x.shape,
        (x.strides, y.strides, w is not None and w.strides, out is not None and out.strides),
        (arrays.logits_dtype, arrays.target_dtype, arrays.weight_dtype),
        (at[0] & 15, at[1] & 15, at[2] & 15, at[3] & 15),
        work,
        device.shared_bytes,
        device.multiprocessors,
    )
    if work.map_kind and out is not None:
        key += (out.dtype,)
    if arrays.fields or arrays.regions is not None:
        others = (arrays.regions, *(field.array for field in arrays.fields))
        of_others = tuple(map(_address, others))
        key += (
            arrays.rows,
            arrays.regions_dtype,
            arrays.regions_by_class,
            tuple((field.kind, field.dtype) for field in arrays.fields),
            tuple(a is not None and a.strides for a in others),
            tuple(address & 15 for address in of_others),
        )
        at += of_others
    plan = _plans.get(key)
    if plan is None:
        operands, copies = align(_operands(arrays, at, out, work))
        plan = plan_fast(request, operands, work, device.shared_bytes, device.multiprocessors)
        if plan is None:
            plan = plan_general(request, operands, work, arrays.rows, device.shared_bytes)
        plan = replace(plan, copies=copies)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan, at


def _operands(arrays: Arrays, at: tuple[int, ...], out: np.ndarray | None, work: Work) -> Operands:
    x, y, w, regions = arrays.logits, arrays.target, arrays.voxel_weight, arrays.regions
    to = None
    if out is not None and work.map_kind:
        to = _map_operand(out, x.shape, at[3])
    elif out is not None:
        to = operand(out, arrays.logits_dtype, True, at[3])
    return Operands(
        x.shape,
        operand(x, arrays.logits_dtype, True, at[0]),
        operand(y, arrays.target_dtype, arrays.dense, at[1]),
        None if w is None else operand(w, arrays.weight_dtype, False, at[2]),
        to,
        tuple(
            (field.kind, operand(field.array, field.dtype, field.kind == "class", address))
            for field, address in zip(arrays.fields, at[_OTHERS + 1 :], strict=True)
        ),
        None
        if regions is None
        else operand(regions, arrays.regions_dtype, arrays.regions_by_class, at[_OTHERS]),
        arrays.regions_by_class,
    )


def _map_operand(out: np.ndarray, shape: tuple[int, ...], address: int) -> Operand:
    """A map with its voxels in the order of the spatial axes."""
    strides = (*out.strides[:-1], *(0,) * (3 - out.ndim), *in_c_order(shape[2:], out.itemsize))
    return Operand(TYPES.index(out.dtype.name), strides, address % 16)


def _address(array: np.ndarray | None) -> int:
    if array is None:
        return 0
    address: int = array.__array_interface__["data"][0]
    return address
