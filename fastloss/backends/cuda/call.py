"""Launch plans: how a pass over given arrays is spread over a GPU, and the kernel's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from fastloss.backends.cuda.axes import merge_axes
from fastloss.backends.cuda.layout import WIDEST, Layout, layout_of
from fastloss.request import ACTIVATIONS, Request
from fastloss.sums import NAMED, Sum

LANES = 32
MAX_AXES = 16
MAX_GAMMAS = 8
TYPES = (
    "float32", "float16", "bfloat16", "float64",
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
)  # fmt: skip
_CODES = {name: code for code, name in enumerate(TYPES)} | {"bool": TYPES.index("uint8")}
NO_TYPE = len(TYPES)
FLOAT32, FLOAT64 = TYPES.index("float32"), TYPES.index("float64")
SIZES = {code: np.dtype(name if name != "bfloat16" else "uint16").itemsize
          for code, name in enumerate(TYPES)}  # fmt: skip

GENERAL, TWO_CLASSES, LABELS, DENSE = range(4)  # paths
LOGITS, TARGET, WEIGHT, OUT = range(4)

_ONCE = 16  # classes that a thread can hold
_MOST_WARPS = 16  # sharing the classes of a voxel
_HELD = 64  # registers for logits, and as many for sums;
_ALL_HELD = 112  # or for both together;
_OTHERWISE = (56, 80)  # other registers of a thread, if a warp works alone or with others
_REGISTERS = 1 << 16  # per multiprocessor
_BLOCKS = 4224  # at most per launch
_MOST_PARTIAL = 960 << 10  # bytes for the sums of all blocks; a call allocates less than 1 MiB
_MOST_TALLIES = 24 << 10  # bytes per block for the threads' own sums of every class


# The named sums that each path of csrc/cuda/passes.cu takes.
_SLOTS = (
    "reference", "overlap", "predicted", "predicted_squared", "reference_squared",
    "cross_entropy", "cross_entropy_rest", "uniform", "uniform_rest",
)  # fmt: skip
_OF_TWO_CLASSES = ("reference", "overlap", "predicted", "cross_entropy")
_OF_LABELS = (*_OF_TWO_CLASSES, "predicted_squared", "reference_squared", "uniform")
_OF_DENSE = _OF_LABELS
_OF_SIGMOID = (*_OF_DENSE, "cross_entropy_rest", "uniform_rest")
CONSTANTS = (
    "upstream_type", "logits_type", "target_type", "weight_type", "path", "activation", "dense",
    "ignore_kind", "classes", "axes", "large", "vector", "per_thread", "warps", "groups", "rounds",
    "exchanged", "staged", "stages", "staged_bytes", "interleaved", "packed_target",
    "packed_weight", "keep_sums", "by_label", "tallies", "kept_slots",
    "global_sums", "narrow_sums", "global_table", "with_losses", "least_blocks", "slots", "gammas",
    *(f"slot_{name}" for name in _SLOTS), "slot_top_k",
)  # fmt: skip
"""The compile-time constants of a kernel, apart from the arrays of the focal terms."""

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
        ("row_stride", np.int64),
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


class Work(NamedTuple):
    """The work of a launch.

    Attributes:
        kernel: "reduce", "apply", or "map".
        upstream_type: the type of the number that multiplies the gradient.
        map_kind: the kind of map to write: always "voxel" in the reduce pass, or "" for none.
        map_of_label: whether only `CROSS_ENTROPY` has nonzero map coefficients.
        without: the name of a field that does not exist yet: sums that read it are 0.
        plain: whether voxel weights count as 1, or 0 where they are 0.
        by_row: whether a map takes coefficients as the apply pass does, of every row.
    """

    kernel: str
    upstream_type: int = NO_TYPE
    map_kind: str = ""
    map_of_label: bool = False
    without: str = ""
    plain: bool = False
    by_row: bool = False


class Operand(NamedTuple):
    """An array as a kernel's operand. Strides in bytes; the first two are sample and channel."""

    type: int
    strides: tuple[int, ...]
    address: int
    """The address of the first number, modulo 16."""

    def alignment(self, offset: int = 0) -> int:
        """The largest power of two, at most 16, that divides the address at this offset."""
        address = (self.address + offset) % 16
        return address & -address or 16


class Operands(NamedTuple):
    """The arrays of a call. ``out`` takes the gradient, or a map."""

    shape: tuple[int, ...]
    """The shape of the logits."""
    logits: Operand
    target: Operand
    weight: Operand | None = None
    out: Operand | None = None
    fields: tuple[tuple[str, Operand], ...] = ()
    """The given fields with their kinds, in the order of their names."""
    regions: Operand | None = None
    regions_by_class: bool = False

    @property
    def nothing(self) -> Operand:
        """The placeholder of an absent array."""
        return Operand(NO_TYPE, (0,) * len(self.shape), 0)

    @property
    def first_four(self) -> tuple[Operand, Operand, Operand, Operand]:
        nothing = self.nothing
        return self.logits, self.target, self.weight or nothing, self.out or nothing


class Copy(NamedTuple):
    """The plan of an array's copy in aligned memory, without the addresses of both."""

    place: int
    """The array's index among the addresses of a call: logits, target, weight, out; then others."""
    nbytes: int
    offsets: tuple[int, int]
    """The offset of the first number, in bytes: in the array and in the copy."""
    record: bytes
    """COPY_CALL, (1,)."""
    grid: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A launch without the addresses of its arrays."""

    request: Request
    call: bytes
    """CALL, (1,), or a struct that begins with it."""
    offsets: tuple[int, ...]
    """Per array, the offset of its first voxel in bytes: logits, target, weight, out; others."""
    constants: tuple[tuple[str, object], ...]
    """The constants that the kernel is compiled with."""
    grid: int
    threads: int
    shared: int
    """Bytes of shared memory per block."""
    partial: int
    """Bytes that the first kernel of the reduce pass leaves for the second."""
    finish_grid: int
    blocks: int = 0
    """Per sample."""
    narrow: bool = False
    """Whether ``partial`` holds float32 numbers; else float64."""
    general: bool = False
    """Whether the general kernel computes it."""
    copies: tuple[Copy, ...] = ()
    """Aligned copies that replace misaligned arrays."""


def operand(array: np.ndarray, dtype: str, channels: bool, address: int) -> Operand:
    """An array (B, C, *spatial) or (B, *spatial)."""
    strides = array.strides if channels else (array.strides[0], 0, *array.strides[1:])
    return Operand(_CODES[dtype], strides, address % 16)


class Table(NamedTuple):
    """The slots of the sums that the fast paths know; −1: absent."""

    path: int
    """LABELS or DENSE."""
    slots: dict[str, int]
    gammas: tuple[float, ...]
    focal: tuple[int, ...]
    focal_rest: tuple[int, ...]


def fast_table(request: Request, operands: Operands, work: Work) -> Table | None:
    """The sums of a call that a fast path supports with its fields, regions and maps; or None.

    A whitelist: anything else goes to the general kernel.
    """
    sigmoid = request.activation == "sigmoid"
    labels = request.activation == "softmax" and not request.dense
    names = _OF_LABELS if labels else _OF_SIGMOID if sigmoid else _OF_DENSE
    slots = {name: request.index.get(NAMED[name], -1) for name in names}
    gammas = tuple(sorted({t.parameter for t in request.sums if t.function == "focal"}))
    focal = [Sum("target", "focal", gamma) for gamma in gammas]
    focal_rest = [Sum("rest", "focal_rest", gamma) for gamma in gammas if sigmoid]
    of_field = [Sum("target", "log", field=name) for name in request.fields]
    taken = {*(NAMED[name] for name in names), *focal, *focal_rest}
    if labels and len(of_field) == 1:
        # The reduce pass skips a ranking term's sum, whose field is computed from the pass's map.
        if work.kernel == "reduce":
            there = request.fields == (work.without,)
        else:
            there = all(_is_working_type(f, operands.logits) for _, f in operands.fields)
            there = there and [kind for kind, _ in operands.fields] == ["voxel"]
        taken.update(of_field if there else ())
    mapped = work.map_kind == "voxel" and work.map_of_label and operands.out is not None
    mapped = mapped and labels and _is_working_type(operands.out, operands.logits)
    takes = (
        work.kernel in ("reduce", "apply")
        and taken.issuperset(request.sums)
        and request.index.keys() >= {*focal, *focal_rest}
        and len(gammas) <= MAX_GAMMAS
        and (work.map_kind == "" or mapped)
        and operands.regions is None
        and not request.histograms
    )
    if not takes:
        return None
    slots["top_k"] = request.index[of_field[0]] if of_field else -1
    return Table(
        LABELS if labels else DENSE,
        slots,
        gammas,
        tuple(request.index[total] for total in focal),
        tuple(request.index[total] for total in focal_rest),
    )


def _is_working_type(numbers: Operand | None, logits: Operand) -> bool:
    """Whether these have the type in which the logits are computed."""
    working = FLOAT64 if logits.type == FLOAT64 else FLOAT32
    return numbers is not None and numbers.type == working


def walk(
    operands: Operands, others: Sequence[Operand] = ()
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Merge the spatial axes of the first four arrays and of others: see `merge_axes`.

    Raises:
        ValueError: too many axes without an even step.
    """
    arrays = [*operands.first_four, *others]
    offsets, axes = merge_axes(operands.shape[2:], [o.strides[2:] for o in arrays])
    if len(axes) > MAX_AXES:
        raise ValueError(
            f"logits: at most {MAX_AXES} spatial axes without an even step between them fit a "
            f"kernel, got {len(axes)}; pass a contiguous copy"
        )
    return offsets, axes


def spread(batch: int, voxels: int, tile: int, most: int) -> tuple[int, int]:
    """The number of blocks of a sample, given the most per launch, and the voxels of each."""
    tiles = -(-voxels // tile)
    blocks = max(1, min(tiles, -(-most // max(batch, 1))))
    chunk = -(-tiles // blocks) * tile
    return max(1, -(-voxels // chunk)) if chunk else 1, chunk


def in_c_order(spatial: Sequence[int], item: int) -> tuple[int, ...]:
    """The strides of a C-ordered array."""
    return tuple(prod(spatial[axis + 1 :]) * item for axis in range(len(spatial)))


def usual_fields(request: Request, operands: Operands, work: Work, axes: int) -> dict[str, object]:
    """The fields of a call that all paths share."""
    classes, weight = operands.shape[1], operands.weight
    return {
        "upstream_type": work.upstream_type,
        "logits_type": operands.logits.type,
        "target_type": operands.target.type,
        "weight_type": NO_TYPE if weight is None else weight.type,
        "activation": ACTIVATIONS.index(request.activation),
        "dense": int(request.dense),
        "ignore_kind": ignore_kind(request, classes),
        "classes": classes,
        "axes": axes,
        "large": int(prod(operands.shape[2:]) >= 1 << 31),
        "slots": len(request.sums),
    }


def plan_fast(
    request: Request, operands: Operands, work: Work, most_shared: int, multiprocessors: int
) -> Plan | None:
    """The launch plan of the fast path that takes this call; None: no path does.

    Raises:
        ValueError: too many axes without an even step.
    """
    table = fast_table(request, operands, work)
    if table is None:
        return None
    of_voxels = operands.out if work.kernel == "reduce" else None
    of_voxels = operands.fields[0][1] if operands.fields else of_voxels
    if work.kernel == "reduce":
        operands = operands._replace(out=None)
    batch, classes, *spatial = operands.shape
    logits, target, weight, out = operands.logits, operands.target, operands.weight, operands.out
    item, voxels = SIZES[logits.type], prod(spatial)
    if of_voxels is None:
        offsets, axes = walk(operands)
    else:
        # Per-voxel numbers are indexed by the voxel's number, so the walk must be in C order.
        offsets, axes = walk(operands, [of_voxels])
        size = SIZES[of_voxels.type]
        steps = [steps.pop() for _, steps in axes]
        if (
            offsets.pop()
            or (voxels > 1 and tuple(steps) != in_c_order([n for n, _ in axes], size))
            or (batch > 1 and of_voxels.strides[0] != voxels * size)
        ):
            return None
    starts = [o.alignment(offset) for o, offset in zip(operands.first_four, offsets, strict=True)]
    labels = table.path == LABELS
    slots = table.slots
    fields: dict[str, object] = {
        **usual_fields(request, operands, work, len(axes)),
        "with_losses": int(bool(work.map_kind)),
        "gammas": len(table.gammas),
        **{f"slot_{name}": -1 for name in (*_SLOTS, "top_k")},
        **{f"slot_{name}": slot for name, slot in slots.items()},
    }
    words = 2 if logits.type == FLOAT64 else 1
    count = classes * len(request.sums)
    arrays_held = 1 if labels else 2
    exchanged = 3
    if labels:
        exchanged = 2
        if out is not None and slots["predicted_squared"] >= 0:
            exchanged = 4
        elif out is not None and slots["predicted"] >= 0:
            exchanged = 3

    # As few warps share the classes of a voxel as have the registers.
    slots_of_classes = ("predicted", "predicted_squared", "uniform")
    of_labels = ("reference", "overlap", "reference_squared", "cross_entropy")
    two_classes = labels and classes == 2 and not work.map_kind
    two_classes = two_classes and {NAMED[name] for name in _OF_TWO_CLASSES} >= {*request.sums}
    tallies = sum(slots[name] >= 0 for name in of_labels) + len(table.gammas)
    if two_classes or not labels or out is not None or classes > _ONCE or words == 2:
        tallies = 0
    if tallies * classes * 4 * LANES * 4 > _MOST_TALLIES:
        tallies = 0
    by_label = labels and (classes > _ONCE or tallies > 0)
    kept_slots = len(request.sums)
    if by_label:
        kept_slots = sum(slots[name] >= 0 for name in slots_of_classes)
    sums = kept_slots * words if out is None else 0
    # In float64 a thread needs all registers it can have, which allows at most eight warps.
    most_warps = _MOST_WARPS // 2 if words == 2 else _MOST_WARPS
    large = [(logits, LOGITS)] if out is None else [(logits, LOGITS), (out, OUT)]
    last = classes > 1 and voxels > 1 and len(axes) == 1
    last = last and all(
        o.strides[1] == item and axes[0][1][place] == classes * item for o, place in large
    )
    if labels and words == 1:
        most_rows = _MOST_PARTIAL // (4 * (count + 2) * multiprocessors)
        layout = layout_of(classes, item, sums, last, out is None, most_rows)
        warps = min(layout.warps, _MOST_WARPS)
        per_thread = min(WIDEST, -(-classes // warps))
    else:
        warps = _warps(classes, sums, labels, most_warps)
        layout = Layout(warps, max(1, 4 // warps), _HELD, _ALL_HELD)
        per_thread = min(_ONCE, -(-classes // warps))
        if words == 2 and warps * per_thread < classes:
            per_thread = _ONCE * 3 // 4  # the loop over rounds takes registers too
    rounds = -(-classes // (warps * per_thread))
    keep = rounds == 1 and per_thread * sums <= layout.held
    groups = layout.groups

    # Adjacent voxels of a thread: as many as one access of 16 bytes holds.
    room = layout.held
    if warps > 4:
        room //= 2  # two blocks, as one stalls at barriers
    if keep:
        room = min(room, layout.all_held - per_thread * sums)
    most = max(1, room // (per_thread * words * arrays_held))
    # Channels last: staged in shared memory, or, with few classes, whole voxels in one access.
    last = last and rounds == 1
    whole = 0
    if last and labels and warps == 1:
        whole = _whole_voxels(
            [(o, starts[place]) for o, place in large], operands.shape, item, most
        )
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
    fields["global_sums"] = fields["global_table"] = 0
    if out is None:
        fixed = 8 * groups * (count + 2)
        if fixed > most_shared // 2:
            fields["global_sums"] = 1
            # All groups would share these sums, but each sum must belong to one warp.
            groups, fixed = 1, 0
    else:
        fixed = count * computed
        if fixed > most_shared // 2:
            fields["global_table"] = 1
            fixed = 0
    fixed = -(-fixed // 16) * 16

    row = classes * item
    bytes_of_piece = min(starts[LOGITS], starts[OUT])
    if any(o.strides[0] % 16 and batch > 1 for o, _ in large):
        bytes_of_piece = 0
    stages = layout.stages if staged and bytes_of_piece == 16 else 1

    def shared(vector: int) -> int:
        needed = fixed
        if warps > 1:
            needed += groups * 2 * warps * exchanged * vector * LANES * computed
        if staged:
            needed += stages * groups * LANES * vector * (row + 16 * (row % 32 == 0))
        return needed + tallies * classes * groups * warps * LANES * computed

    while vector > 1 and shared(vector) > most_shared:
        vector //= 2
    while staged and stages > 1 and shared(vector) > most_shared:
        stages -= 1
    if staged and shared(vector) > most_shared:
        staged = False
    if shared(vector) > most_shared:
        fields["global_sums" if out is None else "global_table"] = 1
        groups, fixed = 1 if out is None else groups, 0
    assert shared(vector) <= most_shared
    # The common cases have measured layouts; the others use the available registers.
    simple = labels and not table.gammas and keep and words == 1
    plain = simple and not staged

    def registers(vector: int) -> int:
        needed = _OTHERWISE[warps > 1] + 5 * max(0, vector - 4)
        needed += per_thread * (words * vector * arrays_held + sums)
        top_k = slots["top_k"] >= 0
        if weight is not None or top_k:
            of_voxel = SIZES[target.type] // 4 + (weight is not None) + 2 * top_k
            needed += vector * of_voxel
        return needed

    lanes = -(-groups * warps // 4) * 4 * LANES  # equally many warps per partition
    while plain and not interleaved and vector > 1 and warps > _MOST_WARPS // 2:
        if registers(vector) <= _REGISTERS // lanes:
            break
        vector //= 2
    each = lanes * registers(vector)
    least_blocks = max(1, min(8, _REGISTERS // each)) if plain else 1
    if simple and weight is None and slots["top_k"] < 0 and layout.least_blocks:
        least_blocks = layout.least_blocks
    fields |= {
        "path": TWO_CLASSES if two_classes else table.path,
        "vector": vector,
        "per_thread": per_thread,
        "warps": warps,
        "groups": groups,
        "rounds": rounds,
        "exchanged": exchanged,
        "staged": int(staged),
        "stages": stages,
        "staged_bytes": 16 if staged and bytes_of_piece == 16 else item,
        "interleaved": int(interleaved),
        "packed_target": int(_packs(target, starts, axes, TARGET, vector, request.dense)),
        "packed_weight": int(
            weight is not None and _packs(weight, starts, axes, WEIGHT, vector, False)
        ),
        "keep_sums": int(keep),
        "by_label": int(by_label),
        "tallies": tallies,
        "kept_slots": kept_slots,
        "least_blocks": least_blocks,
    }

    tile = groups * LANES * vector
    narrow = words == 1 and not fields["global_sums"]
    fields["narrow_sums"] = int(narrow)
    width, number = count + 2, 4 if narrow else 8
    most_blocks = min(_BLOCKS, layout.blocks * multiprocessors)
    if out is None:
        most_blocks = min(most_blocks, max(multiprocessors, _MOST_PARTIAL // (number * width)))
    blocks, chunk = spread(batch, voxels, tile, most_blocks)
    call = np.zeros(1, CALL)
    write_call(call, request, fields, operands, axes, blocks, chunk)
    focal, focal_rest = table.focal, table.focal_rest
    call["gamma"][0, : len(table.gammas)] = table.gammas
    call["slot_focal"], call["slot_focal_rest"] = -1, -1
    call["slot_focal"][0, : len(focal)] = focal
    call["slot_focal_rest"][0, : len(focal_rest)] = focal_rest
    constants: list[tuple[str, object]] = [(name, fields[name]) for name in CONSTANTS]
    constants += [
        ("gamma", table.gammas),
        ("slot_focal", focal),
        ("slot_focal_rest", focal_rest or (-1,) * len(focal)),
    ]
    return Plan(
        request,
        call.tobytes(),
        tuple(offsets),
        tuple(constants),
        batch * blocks,
        groups * warps * LANES,
        shared(vector),
        number * batch * blocks * width,
        batch * (-(-(width - 1) // LANES)),
        blocks,
        narrow,
    )


def write_call(
    call: np.ndarray,
    request: Request,
    fields: dict[str, object],
    operands: Operands,
    axes: list[tuple[int, list[int]]],
    blocks: int,
    chunk: int,
) -> None:
    """Fill the fields that all kernels read into CALL, (1,), or a struct that begins with it."""
    for name, value in fields.items():
        call[name] = value
    for i, o in enumerate(operands.first_four):
        call["sample_stride"][0, i], call["channel_stride"][0, i] = o.strides[:2]
        call["stride"][0, i, : len(axes)] = [steps[i] for _, steps in axes]
    call["shape"][0, : len(axes)] = [n for n, _ in axes]
    call["voxels"], call["chunk"] = prod(operands.shape[2:]), max(chunk, 1)
    call["batch"], call["blocks"] = operands.shape[0], blocks
    call["ignore"] = request.ignore_index or 0
    call["scale"] = 1.0


def _warps(classes: int, sums: int, labels: bool, most: int) -> int:
    """How many warps share the classes of a voxel; ``sums``: registers for the sums of a class."""

    def fits(warps: int) -> bool:
        each = -(-classes // warps)
        # Threads of more than half of the warps have 128 registers each.
        held = _HELD if labels or warps <= _MOST_WARPS // 2 else _HELD // 2
        return each <= _ONCE and each * sums <= held

    fewest = next((n for n in range(1, most + 1) if fits(n)), None)
    if fewest is None:
        return _MOST_WARPS // 2
    # A warp or two more, if that balances the classes.
    several = [n for n in range(fewest, fewest * 5 // 4 + 1) if n <= most and fits(n)]
    return min(several, key=lambda n: (-(-classes // n) * n - classes, n))


def ignore_kind(request: Request, classes: int) -> int:
    if request.ignore_index is None:
        return 0
    return 2 if request.dense and classes > 1 and 0 <= request.ignore_index < classes else 1


def _loads(o: Operand, start: int, step: int, vector: int, voxels: int) -> bool:
    """Whether this many adjacent voxels of every class can be loaded in one access."""
    item = SIZES[o.type]
    size = vector * item
    aligned = start >= size and o.strides[0] % size == 0 and o.strides[1] % size == 0
    return aligned and step == item and voxels % vector == 0


def _whole_voxels(
    arrays: list[tuple[Operand, int]], shape: tuple[int, ...], item: int, most: int
) -> int:
    """How many adjacent channels-last voxels fill whole accesses of 16 bytes; 0: none."""
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
    """Whether the numbers of adjacent voxels can be loaded in one access."""
    if vector == 1 or len(axes) > 1:
        return False
    item = SIZES[o.type]
    size = min(16, vector * item)
    aligned = starts[place] >= size and o.strides[0] % size == 0
    aligned = aligned and (not channels or o.strides[1] % size == 0)
    return aligned and axes[0][1][place] == item
