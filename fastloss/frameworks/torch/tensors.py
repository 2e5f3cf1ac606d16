"""PyTorch tensors: borrowed where they lie, and what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from fastloss.borrowed import Borrowed, Kind, Place, device_view
from fastloss.frameworks.base import Adapter
from fastloss.frameworks.memory import LEAST, large

_NAMES = {
    getattr(torch, name): name
    for name in (
        "float16", "bfloat16", "float32", "float64", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    )
    if hasattr(torch, name)
}  # fmt: skip
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_is_tracing = torch._C._is_tracing  # looked up once, as are these
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_OPERANDS = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class TensorAdapter(Adapter):
    """Borrows and makes tensors; what differentiates them is built on it."""

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
        if type(array) not in _PLAIN or not is_on_gpu(array) or array.is_neg():
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
        if array.dtype == torch.bfloat16:  # see Borrowed
            return self.numpy(array.view(torch.int16)).view(np.uint16)
        result: np.ndarray = array.cpu().numpy()
        return result


def is_on_gpu(tensor: torch.Tensor) -> bool:
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
    return not is_traced(tensor) and tensor.is_cpu and not is_on_gpu(tensor)


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


def requires_gradient(array: Any) -> bool:
    """Whether autograd is to differentiate by this array."""
    return isinstance(array, torch.Tensor) and array.requires_grad and torch.is_grad_enabled()


def refuse_gradient(array: Any, name: str) -> None:
    """Raise TypeError for a tensor whose gradient would be lost without a word."""
    if requires_gradient(array):
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
            f"alone; pass {name}.detach()"
        )


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether this stands for a batch of tensors, as vmap has it."""
    return _is_legacy_batched(tensor) or _is_batched(tensor)


def no_second_derivative(ctx: Any, *upstream: Any) -> Any:
    """The backward pass of a gradient."""
    raise RuntimeError("fastloss computes first derivatives alone: no second backward through")


TENSORS = TensorAdapter()
