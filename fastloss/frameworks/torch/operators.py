"""The two passes as operators that `torch.compile`, `torch.export` and fake tensors know.

Ordinary eager calls do without them: an operator of Python's costs more than a small loss.
"""

from __future__ import annotations

from typing import Any

import torch

from fastloss.borrowed import Extras
from fastloss.frameworks.torch.batched import each
from fastloss.frameworks.torch.distributed import Ranks
from fastloss.frameworks.torch.tensors import TENSORS, is_batched
from fastloss.naming import loss_of, split
from fastloss.protocol import FusedLoss
from fastloss.request import make_request
from fastloss.statistics import Statistics
from fastloss.tracing import constant

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_library = torch.library.Library("fastloss", "DEF")
# PyTorch makes no batching rule for operators of lists, hence others for calls without fields.
_library.define(
    "loss(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor numbers, str structure,"
    " str group, str shard) -> (Tensor value, Tensor sums, Tensor voxels)"
)
_library.define(
    "gradient(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor numbers, Tensor sums,"
    " Tensor voxels, Tensor upstream, str structure, str group, str shard) -> Tensor"
)
_library.define(
    "loss_of_fields(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor numbers,"
    " Tensor[] fields, Tensor? regions, int region_count, str names, str structure, str group,"
    " str shard) -> (Tensor value, Tensor sums, Tensor voxels)"
)
_library.define(
    "gradient_of_fields(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor numbers,"
    " Tensor[] fields, Tensor? regions, Tensor sums, Tensor voxels, Tensor upstream,"
    " int region_count, str names, str structure, str group, str shard) -> Tensor"
)
_library.define(
    "made_fields(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor[] fields,"
    " Tensor? regions, int region_count, str names, str structure) -> Tensor[]"
)


def value(
    structure: str,
    numbers: torch.Tensor,
    logits: Any,
    target: Any,
    voxel_weight: Any,
    extras: Extras | None = None,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """The loss of this structure and these numbers, by way of the operators."""
    target, voxel_weight = _tensor(target), _tensor(voxel_weight)
    fields: list[torch.Tensor] = []
    names = ""
    regions, count = None, 0
    if extras is not None:
        fields = [_tensor(field) for _, field in extras.fields]
        names = "\n".join([name for name, _ in extras.fields])
        if extras.regions is not None:
            if extras.region_count is None:
                raise ValueError(
                    "region_count: expected how many regions a sample has at most, which compiled "
                    "code cannot look for, got None"
                )
            regions, count = _tensor(extras.regions), extras.region_count
    group, shard = ("", "") if ranks is None else (ranks.group, ranks.shard)
    names_of = (structure, group, shard)
    result: torch.Tensor
    if regions is None and _is_regional(structure):
        raise ValueError(
            "regions: compiled code cannot make them, as it has to know how many there are; give "
            "those that Loss.fields makes, and region_count"
        )
    lacking = _lacking(structure, names, shard)
    if lacking:
        made = torch.ops.fastloss.made_fields(
            logits.detach(), target, voxel_weight, fields, regions, count, names, structure
        )
        given = zip(names.split("\n"), fields, strict=True) if fields else ()
        known = {**dict(given), **dict(zip(lacking, made, strict=True))}
        read = _read_by(structure)
        fields, names = [known[name] for name in read], "\n".join(read)
    if extras is None and not lacking:
        result = torch.ops.fastloss.loss(logits, target, voxel_weight, numbers, *names_of)[0]
    else:
        result = torch.ops.fastloss.loss_of_fields(
            logits, target, voxel_weight, numbers, fields, regions, count, names, *names_of
        )[0]
    return result


@constant
def _lacking(structure: str, names: str, shard: str) -> tuple[str, ...]:
    """The fields that are to be made, where those named are given."""
    loss, given = loss_of(structure), tuple(names.split("\n")) if names else ()
    if shard == "volume":
        regions = () if loss.regional else None  # which are given, or an error was raised
        loss.check_given(Extras(tuple((name, None) for name in given), regions), "shard")
    return loss.lacks(given)


@constant
def _is_regional(structure: str) -> bool:
    return loss_of(structure).regional is not None


@constant
def _read_by(structure: str) -> tuple[str, ...]:
    return loss_of(structure).field_names


def _tensor(array: Any) -> Any:
    """Anybody's array as a tensor; one as it is, of which a trace would record a conversion."""
    return array if array is None or isinstance(array, torch.Tensor) else torch.as_tensor(array)


def _extras(
    fields: list[torch.Tensor], names: str, regions: torch.Tensor | None, count: int
) -> Extras | None:
    if not fields and regions is None:
        return None
    named = tuple(zip(names.split("\n"), fields, strict=True)) if fields else ()
    return Extras(named, regions, count if regions is not None else None)


def _loss_of(structure: str, numbers: torch.Tensor, logits: torch.Tensor) -> FusedLoss:
    if numbers.is_cpu:
        return loss_of(structure, numbers.numpy())
    if logits.is_cpu:
        return loss_of(structure, numbers.cpu().numpy())
    return on_device(structure, numbers)


def on_device(structure: str, numbers: torch.Tensor) -> FusedLoss:
    """The loss whose numbers lie on a device."""
    loss = loss_of(structure)
    return loss.with_given(split(loss, numbers, numbers.numel()))


@torch.library.impl(_library, "made_fields", "CPU")
@torch.library.impl(_library, "made_fields", "CUDA")
def _made_fields(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    fields: list[torch.Tensor],
    regions: torch.Tensor | None,
    region_count: int,
    names: str,
    structure: str,
) -> list[torch.Tensor]:
    loss, extras = loss_of(structure), _extras(fields, names, regions, region_count)
    passes = loss.passes(logits, target, voxel_weight, extras)
    fields_of = dict(passes.whole_extras.fields)
    lacking = loss.lacks(() if extras is None else extras.names)
    return [fields_of[name].contiguous() for name in lacking]


@torch.library.register_fake("fastloss::made_fields", lib=_library)
def _fake_made_fields(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    fields: list[torch.Tensor],
    regions: torch.Tensor | None,
    region_count: int,
    names: str,
    structure: str,
) -> list[torch.Tensor]:
    loss = loss_of(structure)
    axis = loss.channel_axis % logits.ndim
    classes = logits.shape[axis]
    single = classes == 1 and loss.activation != "softmax"
    dense = single or (target.ndim == logits.ndim and target.shape[axis] == classes > 1)
    of_voxels = [n for i, n in enumerate(logits.shape) if i != axis]
    made = []
    for name in loss.lacks(tuple(names.split("\n")) if names else ()):
        form = loss.makers[name].field_form(classes, dense)
        shape = list(logits.shape) if form.by_class else of_voxels
        made.append(logits.new_empty(shape, dtype=getattr(torch, form.dtype)))
    return made


@torch.library.impl(_library, "loss_of_fields", "CPU")
@torch.library.impl(_library, "loss_of_fields", "CUDA")
def _loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    numbers: torch.Tensor,
    fields: list[torch.Tensor],
    regions: torch.Tensor | None,
    region_count: int,
    names: str,
    structure: str,
    group: str,
    shard: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = _loss_of(structure, numbers, logits)
    passes = loss.passes(
        logits, target, voxel_weight, _extras(fields, names, regions, region_count)
    )
    if loss.maps_voxels:
        value = TENSORS.result(passes.forward()[0])
        return value, logits.new_empty((0,)), logits.new_empty((0,))
    statistics = passes.reduce(whole=not group)
    if group:
        _check_ranks(loss, shard, regions)
        statistics, _ = Ranks(group, shard).join(loss, statistics)
    value = TENSORS.result(passes.combine(statistics)[0])
    sums, voxels = TENSORS.result(statistics.sums), TENSORS.result(statistics.voxels)
    if group and not len(logits) and not loss.sums_over_batch:
        if value.ndim:
            raise RuntimeError(
                "logits: under torch.compile a rank without samples cannot know the shape of a "
                'value with reduction="none"; use another reduction, or compile the model without '
                "the loss"
            )
        sums, voxels = sums[:, :0].clone(), voxels[:0].clone()  # as the graph expects them
    return value, sums, voxels


@torch.library.impl(_library, "loss", "CPU")
@torch.library.impl(_library, "loss", "CUDA")
def _plain_loss(logits: Any, target: Any, voxel_weight: Any, numbers: Any, *names: str) -> Any:
    return _loss(logits, target, voxel_weight, numbers, [], None, 0, "", *names)


@torch.library.impl(_library, "gradient_of_fields", "CPU")
@torch.library.impl(_library, "gradient_of_fields", "CUDA")
def _gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    numbers: torch.Tensor,
    fields: list[torch.Tensor],
    regions: torch.Tensor | None,
    sums: torch.Tensor,
    voxels: torch.Tensor,
    upstream: torch.Tensor,
    region_count: int,
    names: str,
    structure: str,
    group: str,
    shard: str,
) -> torch.Tensor:
    loss = _loss_of(structure, numbers, logits)
    passes = loss.passes(
        logits, target, voxel_weight, _extras(fields, names, regions, region_count)
    )
    if loss.maps_voxels:
        coefficients: Any = passes.pull_map(upstream)
    else:
        dtype = passes.arrays.value_dtype
        statistics = Statistics(
            passes.request, _plain(sums), _plain(voxels), dtype, None, region_count
        )
        coefficients = passes.combine(statistics)[1](TENSORS.upstream(upstream))
    if group:
        coefficients = Ranks(group, shard).own(coefficients, 0, passes.rows)
    gradient, view = passes.output(None)
    passes.apply(coefficients, view)
    result: torch.Tensor = gradient
    return result


@torch.library.impl(_library, "gradient", "CPU")
@torch.library.impl(_library, "gradient", "CUDA")
def _plain_gradient(
    logits: Any,
    target: Any,
    voxel_weight: Any,
    numbers: Any,
    sums: Any,
    voxels: Any,
    upstream: Any,
    *names: str,
) -> Any:
    arrays = (logits, target, voxel_weight, numbers)
    return _gradient(*arrays, [], None, sums, voxels, upstream, 0, "", *names)


def _plain(sums: torch.Tensor) -> Any:
    """As the step between the passes takes them: NumPy's, or on a GPU as they are."""
    return sums if sums.is_cuda else sums.numpy()


def _check_ranks(loss: FusedLoss, shard: str, regions: torch.Tensor | None) -> None:
    if regions is not None:
        raise RuntimeError(
            "regions: under torch.compile those of several ranks cannot be joined; compile the "
            "model without the loss"
        )
    if shard == "batch" and not loss.sums_over_batch:
        raise RuntimeError(
            "process_group: under torch.compile the samples of other ranks can be summed but not "
            "counted; give every region term batch=True, or compile the model without the loss"
        )


@torch.library.register_fake("fastloss::loss_of_fields", lib=_library)
def _fake_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    numbers: torch.Tensor,
    fields: list[torch.Tensor],
    regions: torch.Tensor | None,
    region_count: int,
    names: str,
    structure: str,
    group: str,
    shard: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = loss_of(structure)
    if logits.dtype not in _FLOATS or logits.ndim < 2:
        raise TypeError(
            "logits: expected floating numbers of shape (batch, channels, *spatial), got "
            f"{logits.dtype} of shape {tuple(logits.shape)}"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if loss.maps_voxels:
        shape = list(logits.shape)
        if loss.activation != "sigmoid":
            del shape[loss.channel_axis]
        nothing = logits.new_empty((0,))
        return logits.new_empty(shape, dtype=dtype), nothing, torch.empty_like(nothing)
    batch, classes = logits.shape[0], logits.shape[loss.channel_axis]
    of_value = loss.value_shape(batch, classes, 0 if regions is None else region_count)
    slots, batch = _count_of_sums(loss), batch * (1 if regions is None else region_count)
    if group:
        _check_ranks(loss, shard, regions)
        batch = 1 if loss.sums_over_batch else batch
    return (
        logits.new_empty(of_value, dtype=dtype),
        logits.new_empty((slots, batch, classes), dtype=torch.float64),
        logits.new_empty((batch,), dtype=torch.float64),
    )


@torch.library.register_fake("fastloss::loss", lib=_library)
def _fake_plain_loss(logits: Any, target: Any, voxel_weight: Any, numbers: Any, *names: str) -> Any:
    return _fake_loss(logits, target, voxel_weight, numbers, [], None, 0, "", *names)


def _count_of_sums(loss: FusedLoss) -> int:
    """How many sums there are, which does not depend on the kind of target."""
    return make_request(loss.activation, False, loss.ignore_index, loss.needs).slots


@torch.library.register_fake("fastloss::gradient_of_fields", lib=_library)
@torch.library.register_fake("fastloss::gradient", lib=_library)
def _fake_gradient(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, structure, group, shard = inputs
    ctx.names = (structure, group, shard)
    _keep(ctx, output, *arrays)


def _save_with_fields(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, fields, regions, region_count, names, structure, group, shard = inputs
    ctx.names = (region_count, names, structure, group, shard)
    _keep(ctx, output, *arrays, regions, *fields)


def _keep(ctx: Any, output: Any, *arrays: Any) -> None:
    _, sums, voxels = output
    ctx.save_for_backward(sums, voxels, *arrays)
    ctx.mark_non_differentiable(sums, voxels)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
    gradient = None
    if upstream is not None and ctx.needs_input_grad[0]:
        sums, voxels, *arrays = ctx.saved_tensors
        gradient = torch.ops.fastloss.gradient(*arrays, sums, voxels, upstream, *ctx.names)
    return gradient, None, None, None, None, None, None


def _backward_with_fields(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
    gradient = None
    sums, voxels, *arrays = ctx.saved_tensors
    regions, fields = arrays[4], arrays[5:]
    if upstream is not None and ctx.needs_input_grad[0]:

        def of(upstream: torch.Tensor) -> torch.Tensor:
            return torch.ops.fastloss.gradient_of_fields(  # type: ignore[no-any-return]
                *arrays[:4], fields, regions, sums, voxels, upstream, *ctx.names
            )

        gradient = each(of, upstream, arrays[0]) if is_batched(upstream) else of(upstream)
    of_fields = [None] * len(fields)
    return gradient, None, None, None, of_fields, None, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise RuntimeError("fastloss computes first derivatives alone: no second backward through")


torch.library.register_autograd("fastloss::loss", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fastloss::loss_of_fields", _backward_with_fields, setup_context=_save_with_fields, lib=_library
)
for _name in ("fastloss::gradient", "fastloss::gradient_of_fields"):
    torch.library.register_autograd(
        _name, _no_second_derivative, setup_context=_save_nothing, lib=_library
    )
