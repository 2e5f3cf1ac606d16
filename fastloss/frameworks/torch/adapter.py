"""PyTorch's autograd over the two passes."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd import forward_ad

from fastloss.borrowed import Extras
from fastloss.frameworks.torch.tensors import (
    TensorAdapter,
    is_batched,
    is_exporting,
    is_on_gpu,
    is_readable,
    is_traced,
    no_second_derivative,
    plain,
    refuse_gradient,
    requires_gradient,
)
from fastloss.naming import made, structure_of
from fastloss.protocol import FusedLoss, LossLike, as_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fastloss.backends.cuda.prepared import Prepared
    from fastloss.frameworks.torch.distributed import Ranks
    from fastloss.structure import Recipe

# Whether hooks, as those that offload, may take elsewhere what is saved. PyTorch before 2.8 does
# not tell: there may always be some.
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


class TorchAdapter(TensorAdapter):
    """Differentiates as well."""

    def value(
        self,
        loss: LossLike,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        *,
        extras: Extras | None = None,
        given: Sequence[Any] = (),
        reuse_logits: bool = False,
        ranks: Ranks | None = None,
    ) -> Any:
        traced, by_target = is_traced(logits), requires_gradient(target)
        if by_target and (traced or reuse_logits or ranks is not None):
            refuse_gradient(target, "target")
        refuse_gradient(voxel_weight, "voxel_weight")
        if extras is not None:
            for name, field in extras.fields:
                refuse_gradient(field, f"fields[{name!r}]")
        if traced:
            from fastloss.frameworks.torch import operators as torch_operators

            structure: str
            operands: Sequence[Any]
            if isinstance(loss, partial):  # what makes a loss, all of whose numbers are given
                structure, operands = structure_of(loss), given
            # A method, as older versions hand no objects to functions that are constant.
            elif not loss.keep_terms():  # it is made in what is being traced
                structure, operands = loss.described_inside()
            else:
                structure, operands = loss.structure, loss.operands
                if is_exporting():  # which takes no arrays of NumPy's, and nothing changes there
                    operands = loss.numbers()
            numbers = _joined(operands, given, logits)
            return torch_operators.value(
                structure, numbers, logits, target, voxel_weight, extras, ranks
            )
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "logits: the transforms of torch.func do not go through fastloss; take the "
                "gradient by backward() or torch.autograd.grad"
            )
        loss, logits = as_loss(loss), plain(logits)
        if given:
            loss = _with_given(loss, given, logits)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
            raise RuntimeError(
                "logits: forward-mode derivatives are not computed; take the gradient by backward()"
            )
        if ranks is not None and ranks.shard == "volume":
            loss.check_given(extras, "shard")
        given_names = () if extras is None else extras.names
        if loss.lacks_regions(extras) or (loss.makers and loss.lacks(given_names)):
            # Made once, not again in the backward pass: autograd saves them, as it does others.
            constant = target.detach() if by_target else target
            extras = loss.passes(logits, constant, voxel_weight, extras).whole_extras
        differentiable = torch.is_grad_enabled() and (logits.requires_grad or by_target)
        if differentiable and reuse_logits:
            _check_reuse(logits)
        if ranks is None and extras is None and not by_target:
            ready = self.prepared(loss, logits, target, voxel_weight)
            if ready is not None:
                call, addresses = ready
                if not differentiable:
                    return call.value(loss, addresses)[0]
                arrays = (logits, target, voxel_weight)
                if not reuse_logits or _takes_logits(loss, ready, arrays):
                    return _QueuedValue.apply(*arrays, (loss, *ready), reuse_logits)
        if differentiable:
            return _Value.apply(logits, target, voxel_weight, loss, reuse_logits, ranks, extras)
        passes = loss.passes(logits, target, voxel_weight, extras)
        if ranks is None:
            return self.result(passes.forward()[0])
        _join_regions(passes, ranks, logits)
        return self.result(passes.combine(ranks.join(loss, passes.reduce(whole=False))[0])[0])

    def takes_numbers(self, logits: Any, options: Iterable[Any]) -> bool:
        if is_traced(logits):
            return True
        return any(isinstance(v, torch.Tensor) and not is_readable(v) for v in options)

    def evaluate(
        self,
        options: tuple[tuple[str, Any], ...],
        recipes: Sequence[Recipe],
        logits: torch.Tensor,
        target: Any,
        voxel_weight: Any,
        extras: Extras | None = None,
    ) -> Any:
        given: Sequence[Any] = ()
        if is_traced(logits):
            factors = torch.cat([_as_tensor(r.factor, logits) for r in recipes])
            given = [factors, *(_as_tensor(n, logits) for r in recipes for _, n in r.numbers)]
            recipes = [_of_ones(r, True) for r in recipes]
        elif any(isinstance(n, torch.Tensor) for r in recipes for _, n in r.numbers):
            given = [
                n if isinstance(n, torch.Tensor) else None for r in recipes for _, n in r.numbers
            ]
            given = [None, *(g if g is None else g.detach().reshape(-1) for g in given)]
            recipes = [_of_ones(r, False) for r in recipes]
        # Made by the adapter, where `torch.compile` does not look.
        loss = partial(made, options, *recipes)
        return self.value(loss, logits, target, voxel_weight, extras=extras, given=given)


def _joined(operands: Sequence[Any], given: Sequence[Any], logits: torch.Tensor) -> torch.Tensor:
    """The numbers of a loss one after another, where the logits are: those that are given, and its
    own where they are None."""
    chosen = [o if g is None else g for o, g in zip(operands, given or operands, strict=True)]
    tensors = [_float64(c) for c in chosen]
    if len(tensors) > 1 and not any(isinstance(c, torch.Tensor) for c in chosen):
        tensors = [torch.cat(tensors)]
    if any(t.device != logits.device for t in tensors):
        tensors = [t.to(logits.device, non_blocking=True) for t in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _with_given(loss: FusedLoss, given: Sequence[Any], logits: torch.Tensor) -> FusedLoss:
    """The loss with the numbers of these tensors, None for its own."""
    if is_on_gpu(logits):
        if loss.reads_again:
            given = [None if g is None else g.detach().clone() for g in given]
        return loss.with_given(given)
    return loss.with_operands(
        [None if g is None else np.array(ADAPTER.numbers(g, "weight")).reshape(-1) for g in given]
    )


def _float64(numbers: Any) -> torch.Tensor:
    if isinstance(numbers, tuple):
        return torch.tensor(numbers, dtype=torch.float64)
    return torch.as_tensor(numbers).detach().to(torch.float64).reshape(-1)


def _as_tensor(number: Any, logits: torch.Tensor) -> torch.Tensor:
    """One number or several, (1,) or (C,), as an operand of what is being compiled."""
    if isinstance(number, (list, np.ndarray)):  # a caller's
        if isinstance(number, np.ndarray):
            number = torch.as_tensor(number)
        else:  # which may be variables
            return torch.cat([torch.ones(1, dtype=torch.float64) * n for n in number])
    if isinstance(number, torch.Tensor):
        return number.detach().to(logits.device, torch.float64, non_blocking=True).reshape(-1)
    if isinstance(number, tuple):
        return torch.tensor(number, dtype=torch.float64)
    operand: torch.Tensor = torch.ones(1, dtype=torch.float64) * number
    return operand


def _of_ones(recipe: Recipe, traced: bool) -> Recipe:
    """As if each number that is given, all of them where it is ``traced``, were 1."""
    numbers = []
    for name, number in recipe.numbers:
        if traced or isinstance(number, torch.Tensor):
            several = isinstance(number, (tuple, list)) or (
                isinstance(number, (torch.Tensor, np.ndarray)) and number.ndim > 0
            )
            number = (1.0,) * len(number) if several else 1.0
        numbers.append((name, number))
    return recipe._replace(numbers=tuple(numbers), factor=1.0 if traced else recipe.factor)


def _check_reuse(logits: torch.Tensor) -> None:
    """Raise ValueError where the gradient may not take the place of the logits."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "logits: reuse_logits=True would overwrite the values of a leaf tensor; pass what an "
            "operation returned, such as a network's output"
        )


@contextmanager
def _about_reuse() -> Iterator[None]:
    """Re-raise errors about ``out`` as errors about ``logits``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"logits: reuse_logits=True cannot write here, {error}") from None


def _takes_logits(
    loss: FusedLoss, ready: tuple[Prepared, tuple[int, ...]], arrays: tuple[Any, Any, Any]
) -> bool:
    call, addresses = ready
    with _about_reuse():
        return call.takes(loss, ADAPTER, arrays, addresses, arrays[0].detach())


def _join_regions(passes: Any, ranks: Ranks, logits: torch.Tensor) -> None:
    """Have as many rows for the regions of a sample as the rank that has most."""
    if passes.arrays.regions is not None:
        passes.arrays.rows = ranks.most(passes.arrays.rows, logits.device)


def _check_unspent(ctx: Any) -> None:
    """Raise RuntimeError where a gradient has been written over the logits before."""
    if ctx.spent:
        raise RuntimeError(
            "reuse_logits=True: the first backward pass wrote the gradient over the logits, so "
            "there can be no second"
        )


class _Value(torch.autograd.Function):
    """The reduce pass forward, the apply pass backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        loss: FusedLoss,
        reuse_logits: bool,
        ranks: Ranks | None,
        extras: Extras | None,
    ) -> Any:
        passes = loss.passes(logits, target, voxel_weight, extras)
        if reuse_logits:
            with _about_reuse():
                passes.check_output(passes.logits)
        ctx.first = 0
        if ctx.needs_input_grad[1]:
            passes.differentiate_target()
        if ranks is None:
            value, ctx.pullback = passes.forward()
        else:
            _join_regions(passes, ranks, logits)
            statistics, ctx.first = ranks.join(loss, passes.reduce(whole=False))
            value, ctx.pullback = passes.combine(statistics)
        # Of the large arrays nothing may live longer than what autograd itself keeps of them: it
        # frees that after the backward pass, and hooks may move it, as offloading does.
        given = (logits, target, voxel_weight, *(extras.arrays if extras is not None else ()))
        ctx.extras = None if extras is None else extras.with_arrays([None] * len(extras.arrays))
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in given))
        ctx.others = tuple(None if isinstance(a, torch.Tensor) else a for a in given)
        ctx.passes = None if _saved_tensors_hooks(True) else passes
        ctx.loss, ctx.backend, ctx.ranks, ctx.rows = loss, passes.backend, ranks, passes.arrays.rows
        ctx.reuse_logits, ctx.spent = reuse_logits, False
        return ADAPTER.result(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        _check_unspent(ctx)
        saved = zip(ctx.saved_tensors, ctx.others, strict=True)
        logits, target, voxel_weight, *others = (b if a is None else a for a, b in saved)
        passes, ctx.passes = ctx.passes, None
        if passes is None:
            extras = None if ctx.extras is None else ctx.extras.with_arrays(others)
            passes = ctx.loss.passes(logits, target, voxel_weight, extras)
            passes.arrays.rows = ctx.rows
            if passes.backend.place is None:  # the choice that the forward pass met
                passes.backend = ctx.backend

        def of(upstream: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            if upstream.requires_grad:
                upstream = upstream.detach()
            coefficients = ctx.pullback(passes.upstream(upstream))
            if ctx.ranks is not None:
                coefficients = ctx.ranks.own(coefficients, ctx.first, passes.rows)
            gradient, view = passes.output(out)
            passes.apply(coefficients, view)
            return gradient  # type: ignore[no-any-return]

        found = _gradient(ctx, of, upstream[0], logits) if ctx.needs_input_grad[0] else None
        by_target = None
        if ctx.needs_input_grad[1]:
            by_target = _by_target(ctx, passes, upstream[0], logits, target)
        return found, by_target, None, None, None, None, None


def _by_target(ctx: Any, passes: Any, upstream: Any, logits: Any, target: Any) -> torch.Tensor:
    """The gradient by the target."""
    if is_batched(upstream):
        raise RuntimeError(
            "target: its gradient is computed of one upstream gradient at a time, not of a batch"
        )
    coefficients = ctx.pullback(passes.upstream(upstream.detach()))
    found: torch.Tensor = passes.target_gradient(coefficients, target.detach())
    found = found.to(target.dtype)
    if torch.is_grad_enabled():
        found = _Once.apply(found, upstream, logits, target)
    return found


class _QueuedValue(torch.autograd.Function):
    """As `_Value`, of calls on a GPU that are like earlier ones."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        how: tuple[FusedLoss, Prepared, tuple[int, ...]],
        reuse_logits: bool,
    ) -> Any:
        loss, call, addresses = how
        ctx.reuse_logits, ctx.spent = reuse_logits, False
        value, ctx.kept = call.value(loss, addresses)
        ctx.save_for_backward(logits, target, voxel_weight)
        ctx.how, ctx.moved = how, _saved_tensors_hooks(True) is not None
        return value

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        _check_unspent(ctx)
        arrays = logits, target, voxel_weight = ctx.saved_tensors
        loss, call, addresses = ctx.how
        ready: Any = call, addresses
        here = (logits.data_ptr(), target.data_ptr())
        if ctx.moved or here != addresses[:2] or voxel_weight is not None:
            ready = ADAPTER.prepared(loss, *arrays)
            if ready is not None and ctx.reuse_logits and not _takes_logits(loss, ready, arrays):
                ready = None

        def of(upstream: torch.Tensor, out: torch.Tensor | None = None) -> Any:
            if ready is not None:
                return ready[0].gradient(
                    loss, ADAPTER, arrays, ready[1], ctx.kept, upstream, out=out
                )
            passes = loss.passes(*arrays)
            gradient, view = passes.output(out)
            passes.apply(call.coefficients(ctx.kept, upstream), view)
            return gradient

        return _gradient(ctx, of, upstream, logits), None, None, None, None


def _gradient(
    ctx: Any,
    of: Callable[..., torch.Tensor],
    upstream: torch.Tensor,
    logits: torch.Tensor,
) -> torch.Tensor:
    """The gradient as a function makes it of the upstream gradient, or of a batch of such."""
    if is_batched(upstream):
        from fastloss.frameworks.torch.batched import each

        return each(of, upstream, logits)  # of which none can take the logits' place
    if ctx.reuse_logits:
        gradient = of(upstream, logits.detach())
        ctx.spent = True
    else:
        gradient = of(upstream)
    if torch.is_grad_enabled():
        gradient = _Once.apply(gradient, upstream, logits)
    return gradient


class _Once(torch.autograd.Function):
    """A gradient that says so when it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *by: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        no_second_derivative(ctx, *upstream)


ADAPTER = TorchAdapter()
