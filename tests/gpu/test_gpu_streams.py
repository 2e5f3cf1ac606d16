"""Calls do not synchronise, streams keep their order, graphs replay, bits are reproducible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gpu_support import check, need_torch_gpu, on_gpu, torch, value_and_gradient

import fastloss as fl
import fastloss.backends

LOSS = fl.Dice() + fl.CrossEntropy()
TOP_K = fl.Dice() + fl.TopKCrossEntropy(k=10)
NONE = fl.Dice(reduction="none") + fl.CrossEntropy()
LOSSES = {"dice_ce": LOSS, "top_k": TOP_K, "none": NONE}
_CYCLES = 1_000_000_000
"""About half a second of a kernel that spins: longer than a call, however busy the machine is."""


@pytest.fixture(autouse=True)
def _torch() -> None:
    need_torch_gpu()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make PyTorch raise for synchronising calls."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed() -> None:
    """The check itself works: it detects a synchronising call."""
    x, _ = on_gpu()
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_does_not_wait(name: str) -> None:
    loss = LOSSES[name]
    x, y = on_gpu(2, 4, (24, 25, 26))
    w = torch.ones(y.shape, device="cuda")
    upstream = torch.ones_like(loss(x, y))
    value_and_gradient(loss, x, y, w, upstream=upstream)  # compiles
    with no_waiting():
        value, gradient = value_and_gradient(loss, x, y, w, upstream=upstream)
    check(loss, value, gradient, x, y, w, upstream=upstream.double().cpu().numpy())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("method", ["autograd", "value_and_grad"])
def test_behind_a_long_kernel_on_a_stream_of_its_own(name: str, method: str) -> None:
    """The call returns while the previous kernel runs, and reads data written after that kernel."""
    loss = LOSSES[name]
    x, y = on_gpu(2, 4, (24, 25, 26))
    late = torch.empty_like(x)
    upstream = torch.ones_like(loss(x, y))
    torch.cuda.synchronize()

    def compute() -> Any:
        if method == "autograd":
            return value_and_gradient(loss, late, y, upstream=upstream)
        return loss.value_and_grad(late, y, upstream=upstream)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late.copy_(x)
        compute()  # compiles, and caches the memory that the next call needs
        late.fill_(float("nan"))
        stream.synchronize()
        before, after = torch.cuda.Event(), torch.cuda.Event()
        torch.cuda._sleep(_CYCLES)
        before.record()
        late.copy_(x)
        value, gradient = compute()
        after.record()
        returned_first = not before.query()
    stream.synchronize()
    assert returned_first
    assert after.query()
    check(loss, value, gradient, x, y, upstream=upstream.double().cpu().numpy())


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("name", LOSSES)
def test_captured_in_a_graph(name: str, layout: str) -> None:
    loss = LOSSES[name]
    x, y = on_gpu(2, 4, (12, 13, 14), layout=layout)
    leaf = x.detach().clone().requires_grad_()
    upstream = torch.ones_like(loss(x, y))

    def step() -> Any:
        leaf.grad = None
        value = loss(leaf, y)
        value.backward(upstream)
        return value.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(leaf, y)
        value.backward(upstream)
    gradient = leaf.grad
    for seed in (1, 2):
        new, labels = on_gpu(2, 4, (12, 13, 14), seed=seed)
        with torch.no_grad():
            leaf.copy_(new)
        y.copy_(labels)
        graph.replay()
        got = value.detach().clone(), gradient.clone()
        expected = step(), leaf.grad
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        check(loss, *got, leaf, y, upstream=upstream.double().cpu().numpy())


@pytest.mark.parametrize("classes", [2, 14, 105])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_bits_on_every_run(dtype: str, classes: int) -> None:
    x, y = on_gpu(2, classes, (40, 41, 42), dtype=dtype)
    value, gradient = LOSS.value_and_grad(x, y)
    streams = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
    results = []
    torch.cuda.synchronize()
    for i in range(100):
        with torch.cuda.stream(streams[i % len(streams)]):
            again, out = LOSS.value_and_grad(x, y)
            results.append((again, (out != gradient).sum()))
    torch.cuda.synchronize()
    assert all(torch.equal(again, value) for again, _ in results)
    assert not any(int(differs) for _, differs in results)


def test_a_backend_for_cpu_arrays_changes_nothing() -> None:
    x, y = on_gpu()
    results = []
    for backend in fastloss.backends.BACKENDS:
        try:
            with fl.use_backend(backend):
                results.append(LOSS(x, y))
        except ImportError:
            continue
    assert all(torch.equal(value, results[0]) for value in results)
