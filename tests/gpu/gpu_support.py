"""Helpers of the tests on a GPU: skips, arrays on the device, and expected results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import REQUIRED, assert_agree, example, need, reference

from fastloss.backends.cuda.backend import why_absent

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

FLOATS = ("float32", "float16", "bfloat16", "float64")


def need_gpu() -> None:
    """Skip where no GPU can be used; fail where "gpu" is required."""
    _absent_if(why_absent())


def need_torch_gpu() -> None:
    """The same where PyTorch finds none."""
    need("torch")
    if not torch.cuda.is_available():
        _absent_if(f"PyTorch {torch.__version__} sees none")


def need_gpus(count: int) -> None:
    """Skip where there are fewer GPUs; never a failure."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"{count} CUDA devices are needed, there is {torch.cuda.device_count()}")


def need_memory(nbytes: int) -> None:
    """Skip where the device has less free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        pytest.skip(
            f"{nbytes / 1e9:.0f} GB of the device's memory are needed, {free / 1e9:.0f} are free"
        )


def _absent_if(why: str | None) -> None:
    if why is None:
        return
    if "gpu" in REQUIRED:
        pytest.fail(f"gpu is required by FASTLOSS_REQUIRE, but: {why}", pytrace=False)
    pytest.skip(f"no CUDA device: {why}")


def to_numpy(array: Any) -> np.ndarray:
    """A copy of a PyTorch or CuPy array in CPU memory; bfloat16 as in ml_dtypes."""
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            bits = array.contiguous().view(torch.int16).numpy()
            numbers: np.ndarray = bits.view(need("ml_dtypes").bfloat16)
            return numbers
        return array.numpy()
    if hasattr(array, "get"):
        array = array.get()
    return np.asarray(array)


def on_gpu(
    batch: int = 2,
    classes: int = 3,
    spatial: tuple[int, ...] = (5, 6, 7),
    *,
    dtype: str = "float32",
    layout: str = "contiguous",
    labels: str = "uint8",
    seed: int = 0,
    activation: str = "softmax",
) -> tuple[Any, Any]:
    """Logits and a label map on the current device."""
    x, y = example(batch, classes, spatial, seed=seed, activation=activation)
    logits = torch.tensor(x).to("cuda", getattr(torch, dtype))
    if layout == "channels last":
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "slice":
        logits = torch.nn.functional.pad(logits, (3, 2))[..., 3:-2]
    elif layout == "reversed axes":
        axes = tuple(reversed(range(logits.ndim)))
        logits = logits.permute(axes).contiguous().permute(axes)
    return logits, torch.tensor(y).to("cuda", getattr(torch, labels))


def value_and_gradient(call: Any, logits: Any, *arguments: Any, upstream: Any = None) -> Any:
    """The value, and by autograd the gradient of its sum, or of its product with ``upstream``."""
    leaf = logits.detach().requires_grad_()
    value = call(leaf, *arguments)
    (gradient,) = torch.autograd.grad(value.sum() if upstream is None else value, leaf, upstream)
    return value.detach(), gradient


def check(
    loss: Any, value: Any, gradient: Any, logits: Any, *arguments: Any, **options: Any
) -> None:
    """Value and gradient agree with the float64 reference on the same numbers."""
    expected = reference(loss, to_numpy(logits), *map(to_numpy, arguments), **options)
    assert_agree(to_numpy(value), to_numpy(gradient), expected)
