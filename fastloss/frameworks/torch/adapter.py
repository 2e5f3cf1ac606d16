"""PyTorch tensors: borrowed where they lie, differentiated by autograd."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastloss.borrowed import Borrowed, Extras, Kind, Place, device_view
from fastloss.frameworks.base import Adapter, as_loss
from fastloss.frameworks.memory import LEAST, large
from fastloss.loss import made
from fastloss.naming import structure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from fastloss.backends.cuda.prepared import Prepared
    from fastloss.frameworks.base import LossLike
    from fastloss.frameworks.torch.distributed import Ranks
    from fastloss.loss import Loss
    from fastloss.structure import Recipe

_NAMES = {
    getattr(torch, name): name
    for name in (
        "float16", "bfloat16", "float32", "float64", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    )
    if hasattr(torch, name)
}  # fmt: skip
# Whether hooks, as those that offload, may take elsewhere what is saved. PyTorch before 2.8 does
# not tell: there may always be some.
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_is_tracing = torch._C._is_tracing  # looked up once, as are these
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_OPERANDS = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class TorchAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return isinstance(array, torch.Tensor)

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise TypeError(f"{name}: unsupported dtype {array.dtype}")
        if _is_tracing():
            raise RuntimeError(
                f"{name}: torch.jit.trace would record the result of this call as a constant; call "
                "the loss itself in what is traced, or use torch.export or torch.compile"
            )
        array = plain(array)
        if array.requires_grad:
            if name not in ("logits", "out"):
                refuse_gradient(array, name)
            array = array.detach()
        if not array.is_cpu:
            return _borrow_on_device(array, name, dtype, write)
        try:
            if dtype == "bfloat16":  # which NumPy lacks
                view = array.view(torch.int16).numpy().view(np.uint16)
            else:
                view = array.numpy()
        except (TypeError, RuntimeError) as error:
            raise TypeError(f"{name}: the tensor's memory could not be read: {error}") from error
        if write and not array.is_inference():
            increment_version(array)
        return Borrowed(view, dtype)

    def numbers(self, array: Any, name: str) -> np.ndarray:
        result: np.ndarray = plain(array).detach().to("cpu", torch.float64).numpy()
        return result

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        is_large = borrowed.place is None and borrowed.array.nbytes >= LEAST
        new = _large_like(plain(array)) if is_large else self.like(array)
        return new, self.borrow(new, "out")

    def kind(self, array: Any, name: str) -> Kind | None:
        if type(array) not in _PLAIN or not _is_on_gpu(array) or array.is_neg():
            return None
        if _is_tracing():  # which `borrow` refuses
            return None
        if name != "logits" and array.requires_grad:
            return None
        traits = (array.get_device(), array.dtype, array.shape, array.stride())
        return Kind(traits, array.data_ptr())

    def like(self, array: Any) -> Any:
        return torch.empty_like(plain(array))

    def written(self, array: Any) -> None:
        if not array.is_inference():
            increment_version(array)

    def result(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        return torch.from_numpy(np.asarray(value))

    def upstream(self, gradient: Any) -> Any:
        if not isinstance(gradient, torch.Tensor) or not gradient.is_cpu:
            return gradient
        if gradient.ndim == 0:
            return gradient.item()
        # Straight to float64, which loses nothing of a gradient that was scaled for float16.
        return gradient.detach().to("cpu", torch.float64).numpy()

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
        refuse_gradient(target, "target")
        refuse_gradient(voxel_weight, "voxel_weight")
        if extras is not None:
            for name, field in extras.fields:
                refuse_gradient(field, f"fields[{name!r}]")
        if is_traced(logits):
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
        differentiable = torch.is_grad_enabled() and logits.requires_grad
        if differentiable and reuse_logits:
            _check_reuse(logits)
        if ranks is None and extras is None:
            ready = loss.prepared(self, logits, target, voxel_weight)
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


def _with_given(loss: Loss, given: Sequence[Any], logits: torch.Tensor) -> Loss:
    """The loss with the numbers of these tensors, None for its own."""
    if _is_on_gpu(logits):
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


class TorchPlace(Place):
    """A CUDA device and PyTorch's current stream on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ordinal = device.index

    @property
    def stream(self) -> int:
        if _raw_stream is not None:  # without an object around it
            return int(_raw_stream(self.ordinal))
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def ones(self, shape: tuple[int, ...], dtype: str) -> Any:
        return torch.ones(shape, dtype=getattr(torch, dtype), device=self.device)

    def array(self, values: Any, dtype: str) -> Any:
        if not isinstance(values, torch.Tensor):
            values = torch.as_tensor(values)
        return values.detach().to(self.device, getattr(torch, dtype)).contiguous()

    def scalar(self, number: Any, dtype: str) -> Any:
        plain = type(number) is torch.Tensor and number.device == self.device
        return (
            number
            if plain and number.dtype is getattr(torch, dtype)
            else super().scalar(number, dtype)
        )

    def operand(self, array: Any) -> tuple[str, int, Any]:
        dtype = array.dtype
        if array.device != self.device or not array.is_contiguous() or dtype not in _OPERANDS:
            dtype = torch.float64
            array = array.detach().to(self.device, dtype, non_blocking=True).contiguous()
        return _OPERANDS[dtype], array.data_ptr(), array

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def numpy(self, array: Any) -> np.ndarray:
        result: np.ndarray = array.cpu().numpy()
        return result


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None


def _borrow_on_device(array: torch.Tensor, name: str, dtype: str, write: bool) -> Borrowed:
    if not array.is_cuda or torch.version.hip is not None:
        raise TypeError(
            f"{name}: expected a tensor in CPU memory or on a CUDA device, got one on "
            f"{array.device}"
        )
    if array.is_conj() or array.is_neg():
        array = array.resolve_conj().resolve_neg()
    item = array.element_size()
    strides = tuple(s * item for s in array.stride())
    view = device_view(array, array.data_ptr(), tuple(array.shape), strides, dtype)
    if write and not array.is_inference():
        increment_version(array)
    return Borrowed(view, dtype, TorchPlace(array.device))


def _large_like(like: torch.Tensor) -> torch.Tensor:
    """As `torch.empty_like`, in memory as NumPy arrays have."""
    layout = torch.empty_like(like, device="meta")
    memory = torch.from_numpy(large(like.numel() * like.element_size()))
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(
        memory.untyped_storage(), 0, layout.shape, layout.stride()
    )


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, without what a subclass adds to it."""
    if type(tensor) in _PLAIN:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether there is no memory to see, or somebody watches operators: fake tensors, tracers."""
    if torch.compiler.is_compiling() or _is_tracing():
        return True
    kind = type(tensor)
    return (
        (kind not in _PLAIN and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__)
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


# PyTorch before 2.7 does not tell.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether there are numbers in CPU memory to see."""
    return not is_traced(tensor) and tensor.is_cpu and not _is_on_gpu(tensor)


def bytes_of(tensor: torch.Tensor | None) -> Any:
    """Dtype and bytes of a few numbers in CPU memory; None if they cannot be read here."""
    if tensor is None:
        return ()
    if not is_readable(tensor):
        return None
    tensor, dtype = plain(tensor), tensor.dtype
    if dtype is torch.bfloat16:  # which NumPy lacks
        tensor = tensor.view(torch.int16)
    try:
        return dtype, tensor.detach().numpy().tobytes()
    except (RuntimeError, TypeError):  # a transform's view of it, or a dtype of no numbers
        return None


def refuse_gradient(array: Any, name: str) -> None:
    """Raise TypeError for a tensor whose gradient would be lost without a word."""
    if isinstance(array, torch.Tensor) and array.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
            f"alone; pass {name}.detach()"
        )


def _check_reuse(logits: torch.Tensor) -> None:
    """Raise ValueError where the gradient may not take the place of the logits."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "logits: reuse_logits=True would overwrite the values of a leaf tensor; pass what an "
            "operation returned, such as a network's output"
        )


@contextmanager
def _about_reuse() -> Iterator[None]:
    """Let what is wrong with an output be said of the logits."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"logits: reuse_logits=True cannot write here, {error}") from None


def _takes_logits(
    loss: Loss, ready: tuple[Prepared, tuple[int, ...]], arrays: tuple[Any, Any, Any]
) -> bool:
    call, addresses = ready
    with _about_reuse():
        return call.takes(loss, ADAPTER, arrays, addresses, arrays[0].detach())


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
        loss: Loss,
        reuse_logits: bool,
        ranks: Ranks | None,
        extras: Extras | None,
    ) -> Any:
        passes = loss.passes(logits, target, voxel_weight, extras)
        if reuse_logits:
            with _about_reuse():
                passes.check_output(passes.logits)
        ctx.first = 0
        if ranks is None:
            value, ctx.pullback = passes.forward()
        else:
            statistics, ctx.first = ranks.join(loss, passes.reduce(whole=False))
            value, ctx.pullback = passes.combine(statistics)
        # Of the large arrays nothing may live longer than what autograd itself keeps of them: it
        # frees that after the backward pass, and hooks may move it, as offloading does.
        given = (logits, target, voxel_weight, *(extras.arrays if extras is not None else ()))
        ctx.extras = None if extras is None else extras.with_arrays([None] * len(extras.arrays))
        ctx.save_for_backward(*(a if isinstance(a, torch.Tensor) else None for a in given))
        ctx.others = tuple(None if isinstance(a, torch.Tensor) else a for a in given)
        ctx.passes = None if _saved_tensors_hooks(True) else passes
        ctx.loss, ctx.backend, ctx.ranks = loss, passes.backend, ranks
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

        return _gradient(ctx, of, upstream[0], logits), None, None, None, None, None, None


class _QueuedValue(torch.autograd.Function):
    """As `_Value`, of calls on a GPU that are like earlier ones."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        how: tuple[Loss, Prepared, tuple[int, ...]],
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
            ready = loss.prepared(ADAPTER, *arrays)
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


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether this stands for a batch of tensors, as vmap has it."""
    return _is_legacy_batched(tensor) or _is_batched(tensor)


class _Once(torch.autograd.Function):
    """A gradient that says so when it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *by: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        no_second_derivative(ctx, *upstream)


def no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    """The backward pass of a gradient."""
    raise RuntimeError("fastloss computes first derivatives alone: no second backward through")


ADAPTER = TorchAdapter()
