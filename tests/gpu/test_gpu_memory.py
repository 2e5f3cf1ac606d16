"""Memory: a call allocates only the gradient, or not even that; and more than 2³¹ logits work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gpu_support import need_memory, need_torch_gpu, on_gpu, to_numpy, torch, value_and_gradient
from support import example, norm, reference

import fastloss as fl

LOSS = fl.Dice() + fl.CrossEntropy()
SHAPE = (2, 4, (64, 96, 128))  # 25 MB of float32


@pytest.fixture(autouse=True)
def _torch() -> None:
    need_torch_gpu()


def peak(call: Callable[[], object]) -> int:
    """The peak memory of a warm call in bytes, beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_alone(dtype: str, layout: str) -> None:
    x, y = on_gpu(*SHAPE, dtype=dtype, layout=layout)
    nbytes = x.numel() * x.element_size()
    taken = peak(lambda: value_and_gradient(LOSS, x, y))
    assert nbytes <= taken <= nbytes + (1 << 20)
    assert peak(lambda: LOSS(x, y)) <= 1 << 20


def test_nothing_with_a_buffer() -> None:
    x, y = on_gpu(*SHAPE)
    out = torch.empty_like(x)
    assert peak(lambda: LOSS.value_and_grad(x, y, out=out)) <= 1 << 20
    assert peak(lambda: LOSS.value_and_grad(x, y, out=x)) <= 1 << 20


class Output(torch.autograd.Function if torch is not None else object):  # type: ignore[misc]
    """Makes logits a network's output, an intermediate result that keeps no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, logits: Any) -> Any:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return None, None


def test_nothing_where_the_logits_are_reused() -> None:
    import fastloss.torch as ft

    x, y = on_gpu(*SHAPE)
    expected = LOSS.value_and_grad(x, y)[1]
    module = ft.Loss(LOSS, reuse_logits=True)
    anchor = torch.zeros((), device="cuda", requires_grad=True)
    module(Output.apply(anchor, x), y).backward()
    assert torch.equal(x, expected)
    assert peak(lambda: module(Output.apply(anchor, x), y).backward()) <= 1 << 20


def test_nothing_is_kept() -> None:
    x, y = on_gpu()
    value_and_gradient(LOSS, x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        value_and_gradient(LOSS, x, y)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_more_logits_than_an_int32_counts() -> None:
    """A repeated row of voxels has that row's value; the gradient overwrites the logits."""
    classes, edge = 105, 320
    loss = fl.Loss(fl.Dice(smooth_nr=0, smooth_dr=0), fl.CrossEntropy())
    count = classes * edge**3
    assert count > 2**31
    need_memory(3 * count)
    row, labels = example(1, classes, (1, 1, edge), dtype="float16")
    x = torch.tensor(row, device="cuda").expand(1, classes, edge, edge, edge).contiguous()
    y = torch.tensor(labels, device="cuda", dtype=torch.uint8)
    y = y.expand(1, edge, edge, edge).contiguous()
    expected, gradient = reference(loss, row, labels)
    assert float(loss(x, y)) == pytest.approx(float(expected), rel=1e-5)
    value, out = loss.value_and_grad(x, y, out=x, upstream=float(edge**2))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for at in (0, 1, edge // 2, edge - 1):
        part = to_numpy(out[:, :, at, edge - 1 - at][:, :, None, None]).astype("float64")
        assert norm(part - gradient) <= 2e-3 * norm(gradient)
    # Every row, to the last, equals the first one in every class.
    assert all(bool((out[0, c] == out[0, c, :1, :1]).all()) for c in range(classes))
