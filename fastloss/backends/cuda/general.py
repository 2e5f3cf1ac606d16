"""The launch of the general kernel, which takes every call that no fast path takes."""

from __future__ import annotations

from math import prod

import numpy as np

from fastloss.backends.cuda import call as cuda_call
from fastloss.backends.cuda import histograms
from fastloss.backends.cuda.call import (
    CALL,
    GENERAL,
    LANES,
    MAX_AXES,
    NO_TYPE,
    Operands,
    Plan,
    Work,
    spread,
    usual_fields,
    walk,
    write_call,
)
from fastloss.maps import KINDS as MAPS
from fastloss.request import Request
from fastloss.sums import FUNCTIONS, WEIGHTS

MAX_FIELDS = 8
MAX_SUMS = 32
"""The limit of the build that serves any call; specialised kernels have none."""
_FIELDS = ("voxel", "class", "labels")
_WARPS = (4, 2, 1)
_BLOCKS = 1536  # at most per launch: a few for every multiprocessor
_MOST_PARTIAL = 64 << 20  # bytes for the sums of a launch's blocks, unless one needs more

_CONSTANTS = (
    "path", "upstream_type", "logits_type", "target_type", "weight_type", "activation", "dense",
    "ignore_kind", "classes", "axes", "large", "vector", "warps", "staged", "interleaved",
    "packed_target", "packed_weight", "global_sums", "global_table", "slots",
    "map_kind", "map_type", "regions_type", "regions_by_class", "fields", "histograms", "plain",
    "by_row",
)  # fmt: skip
_TABLES = ("field_kind", "field_type", "sum_weight", "sum_function", "sum_field", "parameter")

# Mirrors `struct GeneralCall` in csrc/cuda/general.h.
GENERAL_CALL = np.dtype(
    [
        *((name, CALL.fields[name][0]) for name in CALL.names or ()),  # type: ignore[index]
        ("more", np.int64, 1 + MAX_FIELDS),
        ("more_sample_stride", np.int64, 1 + MAX_FIELDS),
        ("more_channel_stride", np.int64, 1 + MAX_FIELDS),
        ("more_stride", np.int64, (1 + MAX_FIELDS, MAX_AXES)),
        ("map_coefficients", np.int64),
        ("error_tallies", np.int64),
        ("largest_weight", np.int64),
        ("parameter", np.float64, MAX_SUMS),
        ("rows", np.int32),
        ("part_bits", np.int32),
        *((name, np.int32) for name in ("map_kind", "map_type")),
        *((name, np.int32) for name in ("regions_type", "regions_by_class", "fields")),
        *((name, np.int32) for name in ("histograms", "plain", "by_row")),
        ("field_kind", np.int32, MAX_FIELDS),
        ("field_type", np.int32, MAX_FIELDS),
        ("sum_weight", np.int32, MAX_SUMS),
        ("sum_function", np.int32, MAX_SUMS),
        ("sum_field", np.int32, MAX_SUMS),
    ],
    align=True,
)


def plan_general(
    request: Request, operands: Operands, work: Work, rows: int, most_shared: int
) -> Plan:
    """The launch plan of a pass, or of a map, for the general kernel.

    ``rows``: the regions of a sample.

    Raises:
        ValueError: more fields than fit, or too many axes without an even step.
    """
    names = [name for name in request.fields if name != work.without]
    if len(names) > MAX_FIELDS:
        raise ValueError(f"fields: at most {MAX_FIELDS} fit one loss on a GPU, got {len(names)}")
    regions = operands.regions
    batch, classes, *spatial = operands.shape
    voxels, count = prod(spatial), len(request.sums) * classes
    # The first place is for the regions.
    more = [regions or operands.nothing, *(o for _, o in operands.fields)]
    offsets, axes = walk(operands, more)
    computed = 8 if operands.logits.type == cuda_call.FLOAT64 else 4

    reduce, width = work.kernel == "reduce", rows * (count + 1) + 1
    if width >= 1 << 31:
        raise ValueError(
            f"region_count: the sums of {rows} regions of {classes} classes do not fit a GPU's "
            "kernel; pass fewer at a time"
        )
    warps, shared = _WARPS[0], 0
    global_sums, global_table = False, work.by_row
    if reduce:
        fitting = [n for n in _WARPS if 8 * n * width <= most_shared // 2]
        global_sums = not fitting
        warps = fitting[0] if fitting else 1
        shared = 8 * warps * width if fitting else 0
    elif work.kernel == "apply":
        global_table = regions is not None or count * computed > most_shared // 2
        shared = 0 if global_table else count * computed
    most = min(_BLOCKS, cuda_call._BLOCKS)
    blocks, chunk = spread(
        batch,
        voxels,
        warps * LANES,
        min(most, max(1, _MOST_PARTIAL // (8 * width))) if reduce else most,
    )
    fields: dict[str, object] = {
        **usual_fields(request, operands, work, len(axes)),
        "path": GENERAL,
        "vector": 1,
        "warps": warps,
        "global_sums": int(global_sums),
        "global_table": int(global_table),
        "map_kind": 1 + MAPS.index(work.map_kind) if work.map_kind else 0,
        "map_type": operands.out.type if work.map_kind and operands.out else NO_TYPE,
        "regions_type": NO_TYPE if regions is None else regions.type,
        "regions_by_class": int(operands.regions_by_class),
        "fields": len(names),
        "histograms": 0 if work.kernel == "map" else histograms.kinds_of(request),
        "plain": int(work.plain),
        "by_row": int(work.by_row),
        **dict.fromkeys(("staged", "interleaved", "packed_target", "packed_weight"), 0),
    }
    place = {work.without: -2, "": -1} | {name: i for i, name in enumerate(names)}
    tables: dict[str, tuple[object, ...]] = {
        "field_kind": tuple(_FIELDS.index(kind) for kind, _ in operands.fields),
        "field_type": tuple(o.type for _, o in operands.fields),
        "sum_weight": tuple(WEIGHTS.index(total.weight) for total in request.sums),
        "sum_function": tuple(list(FUNCTIONS).index(total.function) for total in request.sums),
        "sum_field": tuple(place[total.field] for total in request.sums),
        "parameter": tuple(total.parameter for total in request.sums),
    }
    call = np.zeros(1, GENERAL_CALL)
    write_call(call, request, fields, operands, axes, blocks, chunk)
    for name, values in tables.items():
        call[name][0, : len(values)] = values[: call[name].shape[1]]
    for i, o in enumerate(more):
        call["more_sample_stride"][0, i], call["more_channel_stride"][0, i] = o.strides[:2]
        call["more_stride"][0, i, : len(axes)] = [steps[4 + i] for _, steps in axes]
    call["rows"], call["part_bits"] = rows, histograms.PART_BITS
    return Plan(
        request,
        call.tobytes(),
        tuple(offsets),
        (*((name, fields[name]) for name in _CONSTANTS), *tables.items()),
        batch * blocks,
        warps * LANES,
        shared,
        8 * batch * blocks * width if reduce else 0,
        batch * -(-(width - 1) // LANES) if reduce else 0,
        general=True,
    )
