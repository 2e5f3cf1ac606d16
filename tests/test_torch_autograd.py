"""Autograd differentiates losses of PyTorch tensors, with all its features."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, need, need_backend, python
from torch_support import (
    PARTS,
    TOP_K,
    needs_torch,  # noqa: F401
    options,
    tensors,
    torch,
    value_and_gradient,
)

import fastloss as fl

if torch is not None:
    import fastloss.torch as ft

LOSS = fl.Dice() + 0.5 * fl.CrossEntropy(label_smoothing=0.1)
KINDS = ["labels", "one-hot", "soft", "ignored"]


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_gradcheck(part: Any) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        for i, kind in enumerate(KINDS):
            x, y, w = tensors(activation, kind, weighted=i % 2 == 0, seed=i)
            loss = fl.Loss(part, **options(activation, kind))
            x.requires_grad_()
            assert torch.autograd.gradcheck(lambda x: loss(x, y, w), (x,))  # noqa: B023


@pytest.mark.parametrize("part", TOP_K, ids=repr)
def test_gradcheck_of_the_hardest_voxels(part: Any, backend: str) -> None:
    x, y, w = tensors(kind="ignored", weighted=True)
    loss = fl.Loss(part, ignore_index=255)
    assert torch.autograd.gradcheck(lambda x: loss(x, y, w), (x.requires_grad_(),))


def test_gradcheck_of_a_random_direction(backend: str) -> None:
    """All entries of ``reduction="none"`` at once, each with its own upstream gradient."""

    def along(loss: fl.Loss, y: Any, w: Any, upstream: Any) -> Any:
        return lambda x: (upstream * loss(x, y, w)).sum()

    for part in PARTS:
        x, y, w = tensors(weighted=True, spatial=(3, 4, 5))
        x.requires_grad_()
        loss = fl.Loss(part)
        upstream = torch.randn(loss(x, y, w).shape, dtype=x.dtype)
        assert torch.autograd.gradcheck(along(loss, y, w, upstream), (x,), fast_mode=True)


def plain_dice_ce(x: Any, y: Any) -> Any:
    """The same loss in PyTorch's own operations."""
    p = x.softmax(1)
    g = torch.nn.functional.one_hot(y, x.shape[1]).movedim(-1, 1).to(p.dtype)
    axes = tuple(range(2, x.ndim))
    dice = 1 - (2 * (p * g).sum(axes) + 1e-5) / (p.sum(axes) + g.sum(axes) + 1e-5)
    return dice.mean() + 0.5 * torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1)


@given(data=st.data())
def test_agrees_with_pytorch(data: st.DataObject) -> None:
    backend = data.draw(st.sampled_from(BACKENDS))
    spatial = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    batch, classes = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    layout = data.draw(st.sampled_from(["contiguous", "channels last", "slice", "reversed axes"]))
    factor = data.draw(st.sampled_from([1.0, -0.3, 65536.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, classes, *spatial, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (batch, *spatial), generator=generator)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "slice":
        x = torch.nn.functional.pad(x, (2, 1))[..., 2:-1]
    elif layout == "reversed axes":
        x = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    with fl.use_backend(need_backend(backend)):
        leaf = x.detach().requires_grad_()
        value = LOSS(leaf, y)
        (gradient,) = torch.autograd.grad(factor * value, leaf)
    expected = plain_dice_ce(leaf, y)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(factor * expected, leaf)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12 * abs(factor))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_same_bits_as_value_and_grad(backend: str, dtype: str) -> None:
    x, y, w = tensors(weighted=True, spatial=(5, 6, 7))
    x = x.to(getattr(torch, dtype))
    value, gradient = value_and_gradient(LOSS, x, y, w)
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert gradient.dtype == x.dtype
    other_value, other_gradient = LOSS.value_and_grad(x, y, w)
    assert isinstance(other_value, torch.Tensor)
    assert isinstance(other_gradient, torch.Tensor)
    assert torch.equal(value, other_value)
    assert torch.equal(gradient, other_gradient)
    if dtype != "bfloat16":
        numpy_value, numpy_gradient = LOSS.value_and_grad(x.numpy(), y.numpy(), w.numpy())
        assert value.item() == numpy_value
        np.testing.assert_array_equal(gradient.numpy(), numpy_gradient)


def test_arrays_of_other_kinds_beside_the_logits(backend: str) -> None:
    x, y, w = tensors(weighted=True)
    expected = value_and_gradient(LOSS, x, y, w)
    for got in (
        value_and_gradient(LOSS, x, y.numpy(), w.numpy()),
        value_and_gradient(LOSS, x, y.float(), w),
        value_and_gradient(LOSS, x, y[:, None].to(torch.int8), w[:, None]),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("format_", ["contiguous_format", "channels_last_3d"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_in_the_layout_of_the_logits(fast_backend: str, format_: str, dtype: str) -> None:
    x, y, _ = tensors(spatial=(4, 5, 6))
    x = x.to(getattr(torch, dtype)).contiguous(memory_format=getattr(torch, format_))
    x.requires_grad_()
    LOSS(x, y).backward()
    assert x.grad.stride() == x.stride()
    assert LOSS.gradient(x, y).stride() == x.stride()


def test_expanded_logits(fast_backend: str) -> None:
    x, y, _ = tensors(batch=1, spatial=(3, 3))
    leaf = x.clone().requires_grad_()
    LOSS(leaf.expand(4, -1, -1, -1), y.expand(4, -1, -1)).backward()
    _, expected = value_and_gradient(LOSS, x, y)
    torch.testing.assert_close(leaf.grad, expected)


def test_loss_scaling_of_half_logits(fast_backend: str) -> None:
    """Each voxel's gradient is far below float16's least number, unless it is scaled."""
    x, y, _ = tensors(spatial=(32, 32, 32))
    half = x.half().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(fl.CrossEntropy()(half, y)).backward()
    exact = half.detach().double().requires_grad_()
    (65536 * torch.nn.functional.cross_entropy(exact, y)).backward()
    assert half.grad.isfinite().all()
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2e-3, atol=6e-8)


# ------------------------------------------------------------------ uses of autograd


def test_without_a_gradient() -> None:
    x, y, _ = tensors()
    assert not LOSS(x, y).requires_grad
    leaf = x.clone().requires_grad_()
    expected = LOSS(leaf, y)
    assert expected.requires_grad
    with torch.no_grad():
        assert not LOSS(leaf, y).requires_grad
    with torch.inference_mode():
        value = LOSS(leaf * 1, y)
        assert not value.requires_grad
        assert torch.equal(value, expected)
        assert torch.equal(LOSS.gradient(leaf * 1, y), LOSS.gradient(x, y))


def test_value_and_grad_records_nothing() -> None:
    x, y, _ = tensors()
    leaf = x.clone().requires_grad_()
    value, gradient = LOSS.value_and_grad(leaf, y)
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert torch.equal(gradient, value_and_gradient(LOSS, x, y)[1])


def test_autograd_notices_out() -> None:
    x, y, _ = tensors()
    result = x.requires_grad_().exp()  # its backward needs the result
    LOSS.value_and_grad(result, y, out=result)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_upstream_as_a_tensor() -> None:
    x, y, _ = tensors()
    loss = fl.Dice(reduction="none")
    upstream = torch.randn(2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss(x.requires_grad_(), y), x, upstream)
    assert torch.equal(loss.gradient(x, y, upstream=upstream), expected)
    half = upstream.bfloat16().requires_grad_()
    torch.testing.assert_close(
        loss.gradient(x, y, upstream=half), expected, rtol=0.02, atol=0.02 * expected.abs().max()
    )


MANY = [part for part in PARTS if "'none'" in repr(part)]


@pytest.mark.parametrize("part", [*MANY, TOP_K[0]], ids=repr)
def test_vectorised_jacobian(part: Any, backend: str) -> None:
    x, y, w = tensors(weighted=True, spatial=(3, 4, 5))
    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(lambda x: part(x, y, w), x)
    assert torch.equal(jacobian(lambda x: part(x, y, w), x, vectorize=True), expected)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gradients_of_many_upstreams_at_once() -> None:
    x, y, _ = tensors()
    x.requires_grad_()
    numbers = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    each = torch.stack([n * LOSS.gradient(x, y) for n in numbers])
    for module in (LOSS, ft.Loss(LOSS, reuse_logits=True), compiled(LOSS.__call__)):
        logits = x * 1
        kept = logits.detach().clone()
        (got,) = torch.autograd.grad(module(logits, y), logits, numbers, is_grads_batched=True)
        torch.testing.assert_close(got, each)
        assert torch.equal(logits, kept)
    value = LOSS(x, y)
    got = torch.func.vmap(lambda n: torch.autograd.grad(value, x, n)[0])(numbers)
    torch.testing.assert_close(got, each)
    assert torch.autograd.gradcheck(lambda x: LOSS(x, y), (x,), check_batched_grad=True)
    (got,) = torch.autograd.grad(LOSS(x, y), x, numbers, is_grads_batched=True, create_graph=True)
    with pytest.raises(RuntimeError, match="fastloss computes first derivatives alone"):
        got.sum().backward()


def test_several_losses_and_retain_graph() -> None:
    x, y, _ = tensors()
    _, one = value_and_gradient(LOSS, x, y)
    _, two = value_and_gradient(fl.Focal(), x, y)
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    total = LOSS(logits, y) + 3 * fl.Focal()(logits, y)
    total.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, one + 3 * two)
    total.backward()
    torch.testing.assert_close(leaf.grad, 2 * (one + 3 * two))
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_hooks_see_the_gradient() -> None:
    x, y, _ = tensors()
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    LOSS(logits, y).backward()
    torch.testing.assert_close(seen[0], value_and_gradient(LOSS, x, y)[1])
    torch.testing.assert_close(leaf.grad, 2 * seen[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    x, y, _ = tensors()
    _, expected = value_and_gradient(LOSS, x, y)
    leaf = x.clone().requires_grad_()
    checkpoint(lambda x: LOSS(x * 1, y), leaf, use_reentrant=reentrant).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_saved_tensors_may_be_moved() -> None:
    x, y, w = tensors(weighted=True)
    _, expected = value_and_gradient(LOSS, x, y, w)
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        logits = leaf * 1
        value = LOSS(logits, y, w)
    gone = weakref.ref(logits)
    del logits
    assert gone() is None
    value.backward()
    assert torch.equal(leaf.grad, expected)


def test_logits_changed_between_the_passes() -> None:
    x, y, _ = tensors()
    logits = x.requires_grad_() * 1
    value = LOSS(logits, y)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_backward_computes_on_the_backend_of_forward() -> None:
    x, y, _ = tensors(spatial=(16, 16), dtype=np.float32)
    leaf = x.clone().requires_grad_()
    with fl.use_backend("reference"):
        value = LOSS(leaf, y)
        expected = LOSS.gradient(x, y)
    with fl.use_backend(need_backend("numba")):
        assert not torch.equal(LOSS.gradient(x, y), expected)  # or the test would show nothing
        value.backward()
    assert torch.equal(leaf.grad, expected)


def test_autocast_takes_half_logits_as_they_are() -> None:
    x, y, _ = tensors(dtype=np.float32, spatial=(4, 4, 4))
    net = torch.nn.Conv3d(3, 3, 1)
    kept = []

    def pack(tensor: Any) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
        assert logits.dtype == torch.bfloat16
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = LOSS(logits, y)
    assert value.dtype == torch.float32
    value.backward()
    assert net.weight.grad.isfinite().all()
    assert [t.data_ptr() for t in kept] == [logits.data_ptr(), y.data_ptr()]


def test_subclasses_are_tensors() -> None:
    data = need("monai.data")
    x, y, w = tensors(weighted=True)
    expected = value_and_gradient(LOSS, x, y, w)
    meta = data.MetaTensor
    got = value_and_gradient(LOSS, meta(x), meta(y), meta(w))
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.Tensor(got[1]), expected[1], rtol=0, atol=0)
    parameter = torch.nn.Parameter(x)
    LOSS(parameter, y, w).backward()
    assert torch.equal(parameter.grad, expected[1])


# ------------------------------------------------------------------ errors


def test_second_derivatives() -> None:
    x, y, _ = tensors()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSS(x, y), x, create_graph=True)
    assert torch.equal(gradient, LOSS.gradient(x, y))
    with pytest.raises(RuntimeError, match="fastloss computes first derivatives alone"):
        gradient.sum().backward()


def test_forward_mode() -> None:
    from torch.autograd import forward_ad

    x, y, _ = tensors()
    with forward_ad.dual_level():
        for logits in (x, x.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match="forward-mode"):
                LOSS(forward_ad.make_dual(logits, torch.ones_like(x)), y)
        assert LOSS(x, y).ndim == 0


def test_transforms_of_functions() -> None:
    x, y, _ = tensors()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: LOSS(x, y))(x)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(LOSS)(x[:, None], y[:, None])


def test_targets_and_weights_that_require_a_gradient() -> None:
    x, g, w = tensors(kind="soft", weighted=True)
    x.requires_grad_()
    reusing = ft.Loss(LOSS, reuse_logits=True)
    with pytest.raises(TypeError, match=r"^target: .* gradients flow to the logits alone"):
        reusing(1 * x, g.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"^voxel_weight: .* gradients flow to the logits alone"):
        LOSS(x, g, w.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(LOSS(x, g.clone().requires_grad_()), LOSS(x, g))


def test_bad_arrays_are_named() -> None:
    x, y, _ = tensors()
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"^target: expected labels in \[0, 3\)"):
        LOSS(x, y + 1)
    with pytest.raises(ValueError, match=r"^target: for logits"):
        LOSS(x, y[:1])
    with pytest.raises(TypeError, match=r"^logits: unsupported dtype torch.complex64"):
        LOSS(x.to(torch.complex64), y)
    with pytest.raises(TypeError, match=r"^logits: .*meta"):
        LOSS.value_and_grad(x.to("meta"), y)


# ------------------------------------------------------------------ memory


def test_nothing_is_kept_after_backward() -> None:
    x, y, _ = tensors()
    logits = x.requires_grad_() * 1
    value = LOSS(logits, y)
    value.backward()
    gone = weakref.ref(logits)
    del logits
    assert gone() is None
    assert value.grad_fn is not None  # while the value is alive


def test_memory_is_the_gradient_and_nothing_else() -> None:
    """Counted in PyTorch's allocator, and in Python's, which NumPy uses."""
    from torch.profiler import profile

    with fl.use_backend(need_backend("cpu")):
        x, y, _ = tensors(spatial=(64, 64, 8), dtype=np.float32)
        x.requires_grad_()
        LOSS(x, y).backward()
        x.grad = None
        with profile(profile_memory=True) as profiler:
            LOSS(x, y).backward()
        x.grad = None
        tracemalloc.start()
        LOSS(x, y).backward()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    size = x.numel() * x.element_size()
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert size <= taken < 1.01 * size
    assert peak < 0.1 * size


def test_no_leak_over_many_steps() -> None:
    if sys.platform != "linux":
        pytest.skip("/proc/self/statm: tells the resident memory, on Linux alone")
    statm = Path("/proc/self/statm")
    with fl.use_backend(need_backend("cpu")):
        x, y, _ = tensors(batch=1, spatial=(8, 8, 8), dtype=np.float32)
        x.requires_grad_()

        def steps(number: int) -> int:
            for _ in range(number):
                x.grad = None
                LOSS(x, y).backward()
            gc.collect()
            return int(statm.read_text().split()[1]) * 4096

        before = steps(1000)
        assert steps(10_000) - before < 4 << 20  # the gradients alone would be 60 MB


_WORKERS = """
import sys, torch, fastloss as fl, fastloss.torch

class Patches(torch.utils.data.Dataset):
    loss = fl.Dice() + fl.CrossEntropy()
    def __len__(self):
        return 6
    def __getitem__(self, i):
        x = torch.randn(1, 3, 24, 24, 24, generator=torch.Generator().manual_seed(i))
        x.requires_grad_()
        value = self.loss(x, torch.zeros(1, 24, 24, 24, dtype=torch.uint8))
        value.backward()
        return torch.stack([value.detach(), x.grad.max()])

if __name__ == "__main__":
    patches = Patches()
    expected = torch.stack([patches[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(
        patches, batch_size=3, num_workers=2, multiprocessing_context=sys.argv[1]
    )
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), expected)
        patches[0]
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(tmp_path: Path, method: str) -> None:
    """A worker computes after its parent has, though it does not inherit the parent's threads."""
    need_backend("cpu")
    script = tmp_path / "workers.py"
    script.write_text(_WORKERS)
    result = python(
        f"import runpy, sys; sys.argv = ['workers.py', {method!r}]; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
        if method == "fork"
        else f"import subprocess, sys; "
        f"subprocess.run([sys.executable, {str(script)!r}, 'spawn'], check=True)"
    )
    assert result.stdout.strip() == "equal", result.stderr
