"""The two passes as operators that `torch.compile`, `torch.export` and fake tensors know.

Ordinary eager calls do without them: an operator of Python's costs more than a small loss.
"""

from __future__ import annotations

from typing import Any

import torch

from fastloss.frameworks.torch import ADAPTER
from fastloss.frameworks.torch_distributed import Ranks
from fastloss.loss import Loss
from fastloss.naming import loss_of
from fastloss.request import make_request
from fastloss.statistics import Statistics

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_library = torch.library.Library("fastloss", "DEF")
_library.define(
    "loss(Tensor logits, Tensor target, Tensor? voxel_weight, str loss, str group, str shard)"
    " -> (Tensor value, Tensor sums, Tensor voxels)"
)
_library.define(
    "gradient(Tensor logits, Tensor target, Tensor? voxel_weight, Tensor sums, Tensor voxels,"
    " Tensor upstream, str loss, str group, str shard) -> Tensor"
)


def value(
    text: str, logits: Any, target: Any, voxel_weight: Any, ranks: Ranks | None = None
) -> torch.Tensor:
    """The loss of this name, by way of the operators."""
    if not isinstance(target, torch.Tensor):
        target = torch.as_tensor(target)
    if not (voxel_weight is None or isinstance(voxel_weight, torch.Tensor)):
        voxel_weight = torch.as_tensor(voxel_weight)
    group, shard = ("", "") if ranks is None else (ranks.group, ranks.shard)
    result: torch.Tensor = torch.ops.fastloss.loss(
        logits, target, voxel_weight, text, group, shard
    )[0]
    return result


@torch.library.impl(_library, "loss", "CPU")
@torch.library.impl(_library, "loss", "CUDA")
def _loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    text: str,
    group: str,
    shard: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = loss_of(text)
    passes = loss.passes(logits, target, voxel_weight)
    statistics = passes.reduce()
    if group:
        _check_ranks(loss, shard)
        statistics, _ = Ranks(group, shard).join(loss, statistics)
    return (
        ADAPTER.result(passes.combine(statistics)[0]),
        ADAPTER.result(statistics.sums),
        ADAPTER.result(statistics.voxels),
    )


@torch.library.impl(_library, "gradient", "CPU")
@torch.library.impl(_library, "gradient", "CUDA")
def _gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    sums: torch.Tensor,
    voxels: torch.Tensor,
    upstream: torch.Tensor,
    text: str,
    group: str,
    shard: str,
) -> torch.Tensor:
    loss = loss_of(text)
    passes = loss.passes(logits, target, voxel_weight)
    dtype = passes.arrays.value_dtype
    statistics = Statistics(passes.request, _plain(sums), _plain(voxels), dtype)
    coefficients = passes.combine(statistics)[1](ADAPTER.upstream(upstream))
    if group:
        coefficients = Ranks(group, shard).own(coefficients, 0, logits.shape[0])
    gradient, view = passes.output(None)
    passes.apply(coefficients, view)
    result: torch.Tensor = gradient
    return result


def _plain(sums: torch.Tensor) -> Any:
    """As the step between the passes takes them: NumPy's, or on a GPU as they are."""
    return sums if sums.is_cuda else sums.numpy()


def _check_ranks(loss: Loss, shard: str) -> None:
    if shard == "batch" and not loss.sums_over_batch:
        raise RuntimeError(
            "process_group: under torch.compile the samples of other ranks can be summed but not "
            "counted; give every region term batch=True, or compile the model without the loss"
        )


@torch.library.register_fake("fastloss::loss", lib=_library)
def _fake_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    text: str,
    group: str,
    shard: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = loss_of(text)
    if logits.dtype not in _FLOATS or logits.ndim < 2:
        raise TypeError(
            "logits: expected floating numbers of shape (batch, channels, *spatial), got "
            f"{logits.dtype} of shape {tuple(logits.shape)}"
        )
    batch, classes = logits.shape[0], logits.shape[loss.channel_axis]
    shape = torch.broadcast_shapes(*(t.value_shape(batch, classes) for _, t in loss.terms))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    slots = _count_of_sums(loss)
    if group:
        _check_ranks(loss, shard)
        batch = 1 if shard == "batch" else batch
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty((slots, batch, classes), dtype=torch.float64),
        logits.new_empty((batch,), dtype=torch.float64),
    )


def _count_of_sums(loss: Loss) -> int:
    """How many sums there are, which does not depend on the kind of target."""
    return len(make_request(loss.activation, False, loss.ignore_index, loss.needs).sums)


@torch.library.register_fake("fastloss::gradient", lib=_library)
def _fake_gradient(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, text, group, shard = inputs
    ctx.names = (text, group, shard)
    _, sums, voxels = output
    ctx.save_for_backward(*arrays, sums, voxels)
    ctx.mark_non_differentiable(sums, voxels)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
    gradient = None
    if upstream is not None and ctx.needs_input_grad[0]:
        gradient = torch.ops.fastloss.gradient(*ctx.saved_tensors, upstream, *ctx.names)
    return gradient, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    raise RuntimeError("fastloss computes first derivatives alone: no second backward through")


torch.library.register_autograd("fastloss::loss", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fastloss::gradient", _no_second_derivative, setup_context=_save_nothing, lib=_library
)
