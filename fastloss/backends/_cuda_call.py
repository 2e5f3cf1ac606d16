"""A pass over given arrays on a GPU: how it is laid out, and the record a kernel is given."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from fastloss.backends._axes import merge_axes
from fastloss.request import ACTIVATIONS, Request

LANES = 32
MAX_AXES = 16
MAX_GAMMAS = 8
TYPES = (
    "float32", "float16", "bfloat16", "float64",
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
)  # fmt: skip
_CODES = {name: code for code, name in enumerate(TYPES)} | {"bool": TYPES.index("uint8")}
NO_TYPE = len(TYPES)
_SIZES = {code: np.dtype(name if name != "bfloat16" else "uint16").itemsize
          for code, name in enumerate(TYPES)}  # fmt: skip

_NAMES = ("logits", "target", "voxel_weight", "out")
LOGITS, TARGET, WEIGHT, OUT = range(4)

_ONCE = 16  # classes that a thread can hold
_MOST_WARPS = 16  # that share the classes of a voxel
_HELD = 64  # registers for logits, and as many for sums,
_ALL_HELD = 112  # and for both,
_OTHERWISE = (56, 80)  # beside which a warp alone, or one of several, needs these
_REGISTERS = 1 << 16  # of a multiprocessor
_SHARED = 48 << 10  # bytes that a block has without asking
_BLOCKS = 1536  # of a launch, where there is enough to do: a few for every multiprocessor

_SLOTS = (
    "reference", "overlap", "predicted", "predicted_squared", "reference_squared",
    "cross_entropy", "cross_entropy_rest", "uniform", "top_k",
)  # fmt: skip
CONSTANTS = (
    "upstream_type", "logits_type", "target_type", "weight_type", "activation", "dense",
    "ignore_kind", "classes", "axes", "large", "vector", "per_thread", "warps", "groups", "rounds",
    "exchanged", "staged", "staged_bytes", "interleaved", "packed_target", "packed_weight",
    "keep_sums", "by_label", "kept_slots",
    "global_sums", "global_table", "with_losses", "least_blocks", "slots", "gammas",
    *(f"slot_{name}" for name in _SLOTS),
)  # fmt: skip
"""The numbers that a kernel is compiled for, apart from the arrays of the focal terms."""

# Mirrors `struct Call` in csrc/cuda/call.h.
CALL = np.dtype(
    [
        ("data", np.int64, 4),
        ("sample_stride", np.int64, 4),
        ("channel_stride", np.int64, 4),
        ("stride", np.int64, (4, MAX_AXES)),
        ("shape", np.int64, MAX_AXES),
        ("voxels", np.int64),
        ("chunk", np.int64),
        ("partial", np.int64),
        ("sums", np.int64),
        ("voxel_sums", np.int64),
        ("coefficients", np.int64),
        ("slot_stride", np.int64),
        ("coefficient_sample_stride", np.int64),
        ("upstream", np.int64),
        ("scale", np.float64),
        ("losses", np.int64),
        ("loss_weights", np.int64),
        ("gamma", np.float64, MAX_GAMMAS),
        ("ignore", np.int64),
        ("batch", np.int32),
        ("blocks", np.int32),
        *((name, np.int32) for name in CONSTANTS),
        ("slot_focal", np.int32, MAX_GAMMAS),
        ("slot_focal_rest", np.int32, MAX_GAMMAS),
    ],
    align=True,
)


class Operand(NamedTuple):
    """An array as a kernel sees it. Strides in bytes; the first two are sample and channel."""

    type: int
    strides: tuple[int, ...]
    address: int
    """Of the first number, modulo 16."""

    def alignment(self, offset: int = 0) -> int:
        """The largest power of two, at most 16, that an address at this distance divides by."""
        address = (self.address + offset) % 16
        return address & -address or 16


@dataclass(frozen=True, eq=False)
class Plan:
    """A launch, but for the addresses of its arrays."""

    request: Request
    call: bytes
    """CALL, (1,)."""
    offsets: tuple[int, ...]
    """Per array, in bytes, where its first voxel lies."""
    constants: tuple[tuple[str, object], ...]
    """What the kernel is compiled for."""
    grid: int
    threads: int
    shared: int
    """Bytes of shared memory of a block."""
    partial: int
    """Numbers that the reduce pass keeps between its two kernels."""
    finish_grid: int


def operand(array: np.ndarray, dtype: str, channels: bool, address: int) -> Operand:
    """An array (B, C, *spatial) or (B, *spatial)."""
    strides = array.strides if channels else (array.strides[0], 0, *array.strides[1:])
    return Operand(_CODES[dtype], strides, address % 16)


def plan_pass(
    request: Request,
    shape: tuple[int, ...],
    logits: Operand,
    target: Operand,
    weight: Operand | None,
    out: Operand | None,
    upstream_type: int,
    with_losses: bool,
    most_shared: int,
) -> Plan:
    """The reduce pass, or with ``out`` the apply pass.

    Raises:
        ValueError: arrays that a kernel cannot walk through: numbers that lie across their own
            alignment, too many axes without an even step, or too many focal exponents.
    """
    batch, classes, *spatial = shape
    item = _SIZES[logits.type]
    nothing = Operand(NO_TYPE, (0,) * len(shape), 0)
    operands = (logits, target, weight or nothing, out or nothing)
    _check(operands, shape, request)
    offsets, axes = merge_axes(spatial, [o.strides[2:] for o in operands])
    # Of an array that runs backwards the walk starts at what is its last number.
    starts = [o.alignment(offset) for o, offset in zip(operands, offsets, strict=True)]
    if len(axes) > MAX_AXES:
        raise ValueError(
            f"logits: at most {MAX_AXES} spatial axes without an even step between them fit a "
            f"kernel, got {len(axes)}; pass a contiguous copy"
        )
    voxels = prod(spatial)
    fields: dict[str, object] = {
        "upstream_type": upstream_type,
        "logits_type": logits.type,
        "target_type": target.type,
        "weight_type": NO_TYPE if weight is None else weight.type,
        "activation": ACTIVATIONS.index(request.activation),
        "dense": int(request.dense),
        "ignore_kind": _ignore_kind(request, classes),
        "classes": classes,
        "axes": len(axes),
        "large": int(voxels >= 1 << 31),
        "with_losses": int(with_losses),
        "slots": len(request.slots),
        "gammas": len(request.gammas),
        **{f"slot_{name}": request.index.get(name, -1) for name in _SLOTS},
    }
    words = 2 if logits.type == _CODES["float64"] else 1
    labels = request.activation == "softmax" and not request.dense
    arrays_held = 1 if labels else 2
    exchanged = 3
    if labels:
        exchanged = 2
        if out is not None and "squared" in request.needs:
            exchanged = 4
        elif out is not None and "region" in request.needs:
            exchanged = 3

    # The classes of a voxel: held by as few warps as have the registers.
    slots_of_classes = ("predicted", "predicted_squared", "uniform")
    by_label = labels and classes > _ONCE
    kept_slots = len(request.slots)
    if by_label:
        kept_slots = sum(name in request.index for name in slots_of_classes)
    sums = kept_slots * words if out is None else 0
    # Those of float64 need all the registers that a thread can have, for which eight are the most.
    most_warps = _MOST_WARPS // 2 if words == 2 else _MOST_WARPS
    warps = _warps(classes, sums, labels, most_warps)
    per_thread = min(_ONCE, -(-classes // warps))
    if words == 2 and warps * per_thread < classes:
        per_thread = _ONCE * 3 // 4  # as going round takes registers too
    rounds = -(-classes // (warps * per_thread))
    keep = rounds == 1 and per_thread * sums <= _HELD
    groups = max(1, 4 // warps)

    # Neighbouring voxels of a thread: as many as one access of 16 bytes holds.
    room = _HELD // 2 if warps > 4 else _HELD  # two blocks, as one waits for its warps now and then
    if keep:
        room = min(room, _ALL_HELD - per_thread * sums)
    most = max(1, room // (per_thread * words * arrays_held))
    large = [(logits, LOGITS)] if out is None else [(logits, LOGITS), (out, OUT)]
    # Channels last: through shared memory, or of few classes whole voxels at once.
    last = classes > 1 and rounds == 1 and voxels > 1 and len(axes) == 1
    last = last and all(
        o.strides[1] == item and axes[0][1][place] == classes * item for o, place in large
    )
    whole = 0
    if last and labels and warps == 1:
        whole = _whole_voxels([(o, starts[place]) for o, place in large], shape, item, most)
    interleaved = whole > 0
    staged = last and not interleaved
    vector = max(1, whole)
    while (
        not last
        and 2 * vector * item <= 16
        and 2 * vector <= most
        and len(axes) == 1
        and all(
            _loads(o, starts[place], axes[0][1][place], 2 * vector, voxels) for o, place in large
        )
    ):
        vector *= 2
    computed = 4 * words
    fixed = 0
    table = classes * len(request.slots)
    fields["global_sums"] = fields["global_table"] = 0
    if out is None:
        fixed = 8 * groups * (table + 2)
        if fixed > most_shared // 2:
            fields["global_sums"] = 1
            # A sum that belongs to one warp of a block must not belong to another's group too.
            groups, fixed = 1, 0
    else:
        fixed = table * computed
        if fixed > most_shared // 2:
            fields["global_table"] = 1
            fixed = 0
    fixed = -(-fixed // 16) * 16

    row = classes * item

    def shared(vector: int) -> int:
        needed = fixed
        if warps > 1:
            needed += groups * 2 * warps * exchanged * vector * LANES * computed
        if staged:
            needed += groups * LANES * vector * (row + 16 * (row % 32 == 0))
        return needed

    while vector > 1 and shared(vector) > most_shared:
        vector //= 2
    if staged and shared(vector) > most_shared:
        staged = False
    if shared(vector) > most_shared:
        fields["global_sums" if out is None else "global_table"] = 1
        groups, fixed = 1 if out is None else groups, 0
    assert shared(vector) <= most_shared
    bytes_of_piece = min(starts[LOGITS], starts[OUT])
    if any(o.strides[0] % 16 and batch > 1 for o, _ in large):
        bytes_of_piece = 0
    # The plain cases know what they need; the others take what there is.
    plain = labels and not staged and not request.gammas and keep and words == 1

    def registers(vector: int) -> int:
        needed = _OTHERWISE[warps > 1] + 5 * max(0, vector - 4)
        needed += per_thread * (words * vector * arrays_held + sums)
        top_k = "top_k" in request.index
        if weight is not None or top_k:
            of_voxel = _SIZES[target.type] // 4 + (weight is not None) + 2 * top_k
            needed += vector * of_voxel
        return needed

    lanes = -(-groups * warps // 4) * 4 * LANES  # the four parts of one get as many warps
    while plain and not interleaved and vector > 1 and warps > _MOST_WARPS // 2:
        if registers(vector) <= _REGISTERS // lanes:
            break
        vector //= 2
    each = lanes * registers(vector)
    least_blocks = max(1, min(8, _REGISTERS // each)) if plain else 1
    fields |= {
        "vector": vector,
        "per_thread": per_thread,
        "warps": warps,
        "groups": groups,
        "rounds": rounds,
        "exchanged": exchanged,
        "staged": int(staged),
        "staged_bytes": 16 if staged and bytes_of_piece == 16 else item,
        "interleaved": int(interleaved),
        "packed_target": int(_packs(target, starts, axes, TARGET, vector, request.dense)),
        "packed_weight": int(
            weight is not None and _packs(weight, starts, axes, WEIGHT, vector, False)
        ),
        "keep_sums": int(keep),
        "by_label": int(by_label),
        "kept_slots": kept_slots,
        "least_blocks": least_blocks,
    }

    tile = groups * LANES * vector
    tiles = -(-voxels // tile)
    blocks = max(1, min(tiles, -(-_BLOCKS // max(batch, 1))))
    chunk = -(-tiles // blocks) * tile
    blocks = max(1, -(-voxels // chunk)) if chunk else 1
    call, constants = _record(request, fields, operands, axes, batch, voxels, blocks, chunk)
    width = len(request.slots) * classes + 2
    return Plan(
        request,
        call.tobytes(),
        tuple(offsets),
        constants,
        batch * blocks,
        groups * warps * LANES,
        shared(vector),
        batch * blocks * width,
        batch * (-(-(width - 1) // LANES)),
    )


def _record(
    request: Request,
    fields: dict[str, object],
    operands: tuple[Operand, ...],
    axes: list[tuple[int, list[int]]],
    batch: int,
    voxels: int,
    blocks: int,
    chunk: int,
) -> tuple[np.ndarray, tuple[tuple[str, object], ...]]:
    """What the kernel is launched with, (1,) of CALL, and what it is compiled for."""
    focal = [request.index.get(f"focal:{g!r}", -1) for g in request.gammas]
    focal_rest = [request.index.get(f"focal_rest:{g!r}", -1) for g in request.gammas]

    call = np.zeros(1, CALL)
    for name, value in fields.items():
        call[name] = value
    for i, o in enumerate(operands):
        call["sample_stride"][0, i], call["channel_stride"][0, i] = o.strides[:2]
        call["stride"][0, i, : len(axes)] = [steps[i] for _, steps in axes]
    call["shape"][0, : len(axes)] = [n for n, _ in axes]
    call["voxels"], call["chunk"], call["batch"], call["blocks"] = (
        voxels,
        max(chunk, 1),
        batch,
        blocks,
    )
    call["gamma"][0, : len(focal)] = request.gammas
    call["slot_focal"], call["slot_focal_rest"] = -1, -1
    call["slot_focal"][0, : len(focal)] = focal
    call["slot_focal_rest"][0, : len(focal)] = focal_rest
    call["ignore"] = request.ignore_index or 0
    call["scale"] = 1.0
    constants: list[tuple[str, object]] = [(name, fields[name]) for name in CONSTANTS]
    constants += [
        ("gamma", tuple(request.gammas)),
        ("slot_focal", tuple(focal)),
        ("slot_focal_rest", tuple(focal_rest)),
    ]
    return call, tuple(constants)


def _warps(classes: int, sums: int, labels: bool, most: int) -> int:
    """How many warps share the classes of a voxel; ``sums``: registers for those of a class."""

    def fits(warps: int) -> bool:
        each = -(-classes // warps)
        # The threads of so many warps have 128 registers each.
        held = _HELD if labels or warps <= _MOST_WARPS // 2 else _HELD // 2
        return each <= _ONCE and each * sums <= held

    fewest = next((n for n in range(1, most + 1) if fits(n)), None)
    if fewest is None:
        return _MOST_WARPS // 2
    # A warp or two more, if all then have the same number of classes.
    several = [n for n in range(fewest, fewest * 5 // 4 + 1) if n <= most and fits(n)]
    return min(several, key=lambda n: (-(-classes // n) * n - classes, n))


def _ignore_kind(request: Request, classes: int) -> int:
    if request.ignore_index is None:
        return 0
    return 2 if request.dense and classes > 1 and 0 <= request.ignore_index < classes else 1


def _loads(o: Operand, start: int, step: int, vector: int, voxels: int) -> bool:
    """Whether this many neighbouring voxels of every class can be loaded at once."""
    item = _SIZES[o.type]
    size = vector * item
    aligned = start >= size and o.strides[0] % size == 0 and o.strides[1] % size == 0
    return aligned and step == item and voxels % vector == 0


def _whole_voxels(
    arrays: list[tuple[Operand, int]], shape: tuple[int, ...], item: int, most: int
) -> int:
    """How many neighbouring voxels, their classes last, accesses of 16 bytes hold; 0: not so."""
    batch, classes, *spatial = shape
    size = classes * item
    aligned = all(start == 16 and (batch == 1 or o.strides[0] % 16 == 0) for o, start in arrays)
    if not aligned or 16 % size:
        return 0
    voxels = 16 // item
    while voxels > 1 and (prod(spatial) % voxels or voxels > most):
        voxels //= 2
    return voxels if voxels * size >= 16 else 0


def _packs(
    o: Operand,
    starts: list[int],
    axes: list[tuple[int, list[int]]],
    place: int,
    vector: int,
    channels: bool,
) -> bool:
    """Whether the numbers of neighbouring voxels can be loaded at once."""
    if vector == 1 or len(axes) > 1:
        return False
    item = _SIZES[o.type]
    size = min(16, vector * item)
    aligned = starts[place] >= size and o.strides[0] % size == 0
    aligned = aligned and (not channels or o.strides[1] % size == 0)
    return aligned and axes[0][1][place] == item


def _check(operands: tuple[Operand, ...], shape: tuple[int, ...], request: Request) -> None:
    if len(request.gammas) > MAX_GAMMAS:
        raise ValueError(
            f"gamma: at most {MAX_GAMMAS} different focal exponents fit one loss, got "
            f"{len(request.gammas)}"
        )
    for name, o in zip(_NAMES, operands, strict=True):
        if o.type == NO_TYPE:
            continue
        item = _SIZES[o.type]
        if o.alignment() < item or any(
            s % item and n > 1 for s, n in zip(o.strides, shape, strict=True)
        ):
            raise ValueError(
                f"{name}: on a GPU numbers must lie at multiples of their size, {item} bytes; "
                "pass a contiguous copy"
            )
