"""Soft skeletons: MONAI's numbers, by the kernels and by pooling, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import need, need_backend, run_python
from torch_support import needs_torch, torch  # noqa: F401

import fastloss as fl

if torch is not None:
    from fastloss.torch import soft_skeleton

BACKENDS = ["cpu", "reference"]  # the kernels; pooling


def both(function: Any, p: Any, upstream: Any, *arguments: Any) -> tuple[Any, Any]:
    """The skeleton, and the gradient by p."""
    leaf = p.detach().requires_grad_()
    value = function(leaf, *arguments)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


@st.composite
def arrays(draw: Any, least: int = 2) -> tuple[Any, Any, int]:
    """Probabilities, an upstream gradient and how many iterations, in float64."""
    axes = draw(st.integers(least, 3))
    spatial = draw(st.lists(st.integers(1, 40 if axes < 3 else 11), min_size=axes, max_size=axes))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *spatial)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["distinct", "with ties", "hard", "raw"]))
    p = {
        "distinct": rng.random(shape),
        "with ties": rng.integers(0, 4, shape) / 3,
        "hard": (rng.random(shape) < 0.6).astype(np.float64),
        "raw": rng.normal(size=shape),
    }[kind]
    layout = draw(st.sampled_from(["contiguous", "channels last", "reversed axes", "sliced"]))
    tensor = torch.tensor(p)
    if layout == "channels last":
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "reversed axes":
        tensor = tensor.permute(*reversed(range(p.ndim))).contiguous()
        tensor = tensor.permute(*reversed(range(p.ndim)))
    elif layout == "sliced":
        tensor = torch.stack([tensor, tensor + 1], -1)[..., 0]
    return tensor, torch.tensor(rng.normal(size=shape)), draw(st.integers(0, 6))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=arrays())
def test_monai(backend: str, dtype: str, case: Any) -> None:
    """The values are equal; the gradient goes where MONAI's does, ties included."""
    theirs = need("monai.losses.cldice").soft_skel
    p, upstream, iterations = case
    # Not .to(): the strides stay.
    p, upstream = (p.double(), upstream) if dtype == "float64" else (p.float(), upstream.float())
    before = p.clone()
    with fl.use_backend(need_backend(backend)):
        value, gradient = both(soft_skeleton, p, upstream, iterations)
    expected, expected_gradient = both(theirs, p, upstream, iterations)
    assert torch.equal(value, expected)
    by = 1e-12 if dtype == "float64" else 3e-6
    torch.testing.assert_close(gradient, expected_gradient, rtol=by, atol=by)
    assert torch.equal(p, before)


@given(case=arrays(least=1))
def test_kernels_are_pooling(case: Any) -> None:
    """Of lines too, which MONAI does not take."""
    results = []
    for backend in BACKENDS:
        with fl.use_backend(need_backend(backend)):
            results.append(both(soft_skeleton, *case))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_known_skeletons() -> None:
    """Of a bar three wide its middle, of a line itself, of a block that is too thick nothing."""
    image = torch.zeros(1, 1, 9, 20)
    image[..., 2:5, 2:18] = 1
    image[..., 7, 2:18] = 1
    skeleton = torch.zeros_like(image)
    skeleton[..., 3, 3:17] = 1
    skeleton[..., 7, 2:18] = 1
    for backend in BACKENDS:
        with fl.use_backend(need_backend(backend)):
            found = soft_skeleton(image, 3)
            assert torch.equal(found[..., 6:, :], skeleton[..., 6:, :])
            assert torch.equal(found[..., 3, 3:17], skeleton[..., 3, 3:17])
            assert not found[..., 2:5, 5:15][..., [0, 2], :].any()
            assert not soft_skeleton(torch.ones(1, 1, 9, 9, 9), 3).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spatial", [(9,), (4, 5), (3, 4, 4)])
def test_gradient_by_finite_differences(backend: str, spatial: tuple[int, ...]) -> None:
    p = torch.rand(1, 1, *spatial, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with fl.use_backend(need_backend(backend)):
        assert torch.autograd.gradcheck(lambda p: soft_skeleton(p, 2), p.requires_grad_())
        (gradient,) = torch.autograd.grad(soft_skeleton(p, 2).sum(), p, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives alone"):
            torch.autograd.grad(gradient.sum(), p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half(dtype: str, backend: str) -> None:
    """Computed in float32, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 5, 6, 20, generator=generator).to(getattr(torch, dtype))
    upstream = torch.randn(p.shape, generator=generator).to(p)
    with fl.use_backend(need_backend(backend)):
        for own in (p, p.movedim(1, -1).contiguous().movedim(-1, 1)):
            found = both(soft_skeleton, own, upstream)
            exact = both(soft_skeleton, own.float(), upstream.float())
            assert torch.equal(found[0], exact[0].to(p))
            torch.testing.assert_close(found[1], exact[1].to(p))


@pytest.mark.parametrize(("planes", "iterations"), [(97, 0), (300, 1), (700, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_bits_for_any_number_of_threads(
    channels: int, planes: int, iterations: int
) -> None:
    """However few channels there are, so that each is cut."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, channels, planes, 4, 32, generator=generator)
    upstream = torch.randn(p.shape, generator=generator)
    before = fl.get_num_threads()
    with fl.use_backend(need_backend("cpu")):
        results = []
        for threads in (1, 2, 5):
            fl.set_num_threads(threads)
            results.append(both(soft_skeleton, p, upstream, iterations))
        fl.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_a_forked_child_computes() -> None:
    need_backend("cpu")
    run_python(
        "import os, torch, fastloss\n"
        "from fastloss.torch import soft_skeleton\n"
        "fastloss.set_num_threads(3)\n"
        "p = torch.rand(4, 2, 40, 9, 9)\n"
        "expected = soft_skeleton(p)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(soft_skeleton(p), expected) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


def test_memory() -> None:
    """Working memory of at most twice the input, however many threads there are."""
    need_backend("cpu")
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell of peak memory")
    printed = run_python(
        "import re, torch, fastloss\n"
        "from fastloss.torch import soft_skeleton\n"
        "fastloss.set_num_threads(8)\n"
        "small = torch.rand(1, 1, 16, 16, 16, requires_grad=True)\n"
        "torch.autograd.grad(soft_skeleton(small), small, torch.rand(small.shape))\n"
        "p = torch.rand(1, 1, 192, 160, 160, requires_grad=True)\n"
        "upstream = torch.rand(p.shape)\n"
        # Not ru_maxrss, which begins with that of the parent process.
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024\n"
        "start = peak()\n"
        "value = soft_skeleton(p)\n"
        "after = peak()\n"
        "torch.autograd.grad(value, p, upstream)\n"
        "print((after - start) / p.nbytes, (peak() - start) / p.nbytes)\n"
    )
    forward, both_ways = map(float, printed.split())
    assert 0.9 < forward < 3.1, printed  # with the skeleton
    assert 1.9 < both_ways < 4.2, printed  # and the gradient


@pytest.mark.parametrize("isa", ["baseline", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_every_instruction_set(isa: str) -> None:
    need_backend("cpu")
    if isa not in fl.backends.load_backend("cpu").isas:  # type: ignore[attr-defined]
        pytest.skip(f"this processor has no {isa}")
    run_python(
        "import torch, fastloss\n"
        "from fastloss.torch import soft_skeleton\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):\n"
        "    p = torch.rand(1, 2, 9, 6, 37).to(dtype).requires_grad_()\n"
        "    g, found = torch.randn(p.shape).to(dtype), []\n"
        "    for backend in ('cpu', 'reference'):\n"
        "        with fastloss.use_backend(backend):\n"
        "            value = soft_skeleton(p)\n"
        "            found.append((value.detach(), torch.autograd.grad(value, p, g)[0]))\n"
        "    torch.testing.assert_close(*found)\n",
        FASTLOSS_ISA=isa,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_graphs(backend: str) -> None:
    torch.compiler.reset()
    p = torch.rand(2, 2, 5, 6, dtype=torch.float64)
    with fl.use_backend(need_backend(backend)):
        operator = torch.ops.fastloss.soft_skeleton.default
        torch.library.opcheck(operator, (p.clone().requires_grad_(), 2))
        torch.library.opcheck(operator, (p.transpose(2, 3).float(), 0))
        compiled = torch.compile(
            lambda p: soft_skeleton(2 * p) ** 2, fullgraph=True, backend="aot_eager"
        )
        upstream = torch.rand_like(p)
        found = both(compiled, p, upstream)
        torch.testing.assert_close(found, both(lambda p: soft_skeleton(2 * p) ** 2, p, upstream))
    meta = soft_skeleton(torch.empty(1, 1, 4, 4, device="meta"))
    assert meta.is_meta
    assert meta.shape == (1, 1, 4, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate(backend: str) -> None:
    with fl.use_backend(need_backend(backend)):
        for shape in ((0, 2, 4, 4), (2, 0, 4, 4), (1, 1, 1), (1, 1, 1, 1, 1)):
            p = torch.rand(shape, requires_grad=True)
            value = soft_skeleton(p)
            assert value.shape == shape
            value.sum().backward()
            assert not value.any()
            assert not p.grad.any()
        p = torch.rand(1, 1, 6, 6)
        p[0, 0, 2, 3] = np.nan
        assert soft_skeleton(p)[0, 0, 2, 3].isnan()


def test_bad_input() -> None:
    for shape in ((2, 3), (1, 1, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"^p: expected .* 1 to 3 spatial axes, got shape"):
            soft_skeleton(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"^p: expected floating numbers, got torch.int64$"):
        soft_skeleton(torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^iterations: expected at least 0, got -1$"):
        soft_skeleton(torch.zeros(1, 1, 4, 4), -1)
    with pytest.raises(TypeError, match=r"^iterations: expected an integer, got 2.5$"):
        soft_skeleton(torch.zeros(1, 1, 4, 4), 2.5)
