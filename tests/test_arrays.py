"""Arrays of other frameworks give the same numbers, read in place."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from support import (
    assert_agree,
    example,
    need,
    need_backend,
    need_lazy_free,
    norm,
    one_hot,
    python,
    reference,
    run_python,
)

import fastloss as fl

LOSS = fl.Dice() + fl.CrossEntropy()


class Exporter:
    """An array of a framework that supports only DLPack."""

    def __init__(self, array: Any, versioned: bool = True) -> None:
        self.array, self.versioned = array, versioned

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if options and not self.versioned:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**options)


def as_numpy(array: Any) -> np.ndarray:
    """As a NumPy array; a bfloat16 tensor in float64."""
    if type(array).__module__.startswith("torch"):
        return array.double().numpy()
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dense", [False, True])
def test_torch(backend: str, dtype: str, dense: bool) -> None:
    torch = need("torch")
    x, y = example(2, 3, (300,), dtype=dtype)
    target = one_hot(y, 3) if dense else y
    w = np.random.default_rng(0).uniform(size=y.shape)
    value, gradient = LOSS.value_and_grad(x, target, w)
    value_torch, gradient_torch = LOSS.value_and_grad(
        torch.tensor(x), torch.tensor(target), torch.tensor(w)
    )
    assert value_torch == value
    assert isinstance(gradient_torch, torch.Tensor)
    assert gradient_torch.dtype == torch.tensor(x).dtype
    np.testing.assert_array_equal(gradient_torch, gradient)


def test_torch_labels_of_every_type(backend: str) -> None:
    torch = need("torch")
    integers = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32")
    for type_ in ("bool", *integers, "bfloat16"):
        x, y = example(2, 2, (300,), dtype=np.float32)
        labels = torch.tensor(y).to(getattr(torch, type_))
        assert LOSS(torch.tensor(x), labels) == LOSS(x, y)


def test_torch_bfloat16(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 3, (300,), dtype=np.float32)
    half = torch.tensor(x).bfloat16()
    expected = reference(LOSS, half.double().numpy(), y)

    out = torch.full_like(half, 7)
    value, gradient = LOSS.value_and_grad(half, torch.tensor(y), out=out)
    assert gradient is out
    bfloat16 = need("ml_dtypes").bfloat16
    assert_agree(value, as_numpy(out).astype(bfloat16), expected)

    returned = LOSS.gradient(half, y)
    assert returned.dtype == torch.bfloat16
    np.testing.assert_array_equal(as_numpy(returned), as_numpy(out))


def test_bfloat16_without_ml_dtypes_asks_for_out() -> None:
    need("jax")
    run_python(
        "import jax.numpy as jnp, numpy as np, pytest, sys, fastloss as fl\n"
        "x, y = jnp.zeros((1, 2, 9), jnp.bfloat16), np.zeros((1, 9), int)\n"
        "out = np.empty((1, 2, 9), jnp.bfloat16)\n"
        "sys.modules['ml_dtypes'] = None\n"
        "with pytest.raises(TypeError, match='out.*ml_dtypes'):\n"
        "    fl.Dice().gradient(x, y)\n"
        "assert fl.Dice().gradient(x, y, out=out) is out\n",
        FASTLOSS_BACKEND="reference",
    )


def test_torch_in_any_layout(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 3, (4, 6, 5), dtype=np.float32)
    expected = reference(LOSS, x, y)
    tensor, labels = torch.tensor(x), torch.tensor(y)
    last = tensor.contiguous(memory_format=torch.channels_last_3d)
    assert not last.is_contiguous()
    value, gradient = LOSS.value_and_grad(last, labels)
    assert_agree(value, gradient, expected)
    assert gradient.stride() == last.stride()
    turned = tensor.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    assert_agree(*LOSS.value_and_grad(turned, labels), expected)
    wide = torch.nn.functional.pad(tensor, (1, 2, 3, 1))
    assert_agree(*LOSS.value_and_grad(wide[..., 3:-1, 1:-2], labels), expected)
    repeated = tensor[:1].expand(4, -1, -1, -1, -1)
    assert_agree(
        *LOSS.value_and_grad(repeated, labels[:1].expand(4, -1, -1, -1)),
        reference(LOSS, np.repeat(x[:1], 4, axis=0), np.repeat(y[:1], 4, axis=0)),
    )


def test_torch_out_in_place_and_elsewhere(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 3, (4, 6, 5), dtype=np.float32)
    expected = LOSS.gradient(x, y)
    tensor = torch.tensor(x)
    out = torch.empty_like(tensor, memory_format=torch.channels_last_3d)
    assert LOSS.gradient(tensor, y, out=out) is out
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-9)
    assert LOSS.value_and_grad(tensor, y, out=tensor)[1] is tensor
    np.testing.assert_array_equal(tensor.numpy(), expected)
    # A NumPy buffer for a tensor, and a tensor for an array.
    buffer = np.empty_like(x)
    assert LOSS.gradient(torch.tensor(x), y, out=buffer) is buffer
    assert LOSS.gradient(x, y, out=out) is out


def test_overlap_is_seen_across_frameworks() -> None:
    torch = need("torch")
    x, y = example(2, 3, (30,), dtype=np.float32)
    g = one_hot(y, 3, np.float32)
    with pytest.raises(ValueError, match="overlaps the target"):
        LOSS.gradient(x, g, out=torch.from_numpy(g))
    same = torch.from_numpy(x)
    assert LOSS.gradient(x, y, out=same) is same


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_jax(backend: str, dtype: str) -> None:
    jnp = need("jax.numpy")
    x, y = example(2, 3, (300,), dtype=np.float32)
    logits = jnp.asarray(x).astype(dtype)
    expected = reference(LOSS, np.asarray(logits), y)
    value, gradient = LOSS.value_and_grad(logits, jnp.asarray(y.astype(np.int32)))
    assert isinstance(gradient, np.ndarray)
    assert gradient.dtype.name == dtype
    assert_agree(value, gradient, expected)


def test_jax_arrays_are_not_written() -> None:
    jnp = need("jax.numpy")
    x, y = example(2, 3, (30,), dtype=np.float32)
    logits = jnp.asarray(x)
    for given in (logits, x):
        with pytest.raises(ValueError, match=r"^out: .*immutable"):
            LOSS.gradient(given, y, out=logits)
    np.testing.assert_array_equal(np.asarray(logits), x)


@pytest.mark.parametrize("versioned", [False, True])
def test_any_exporter_of_dlpack(backend: str, versioned: bool) -> None:
    x, y = example(2, 3, (300,), dtype=np.float32)
    w = np.ones(y.shape, np.float32)
    value, gradient = LOSS.value_and_grad(x, y, w)
    exported = [Exporter(a, versioned) for a in (x, y, w)]
    value_again, gradient_again = LOSS.value_and_grad(*exported)
    assert value_again == value
    np.testing.assert_array_equal(gradient_again, gradient)
    out = Exporter(np.empty_like(x), versioned)
    assert LOSS.gradient(*exported, out=out) is out
    np.testing.assert_array_equal(out.array, gradient)


def test_read_only_exporter_takes_no_gradient() -> None:
    x, y = example(2, 3, (30,), dtype=np.float32)
    out = np.empty_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*writable"):
        LOSS.gradient(x, y, out=Exporter(out))
    assert LOSS(Exporter(x), y) == LOSS(x, y)


def test_exporter_on_another_device() -> None:
    class Elsewhere(Exporter):
        def __dlpack_device__(self) -> Any:
            return (8, 0)  # Metal

    x, y = example(2, 3, (30,), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^target: .*CPU .* type 8"):
        LOSS(x, Elsewhere(y))


def test_exporter_that_fails() -> None:
    class Broken(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("not today")

    x, y = example(2, 3, (30,), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^logits: .*not today"):
        LOSS(Broken(x), y)


def test_borrowed_memory_is_let_go(backend: str) -> None:
    x, y = example(2, 3, (300,), dtype=np.float32)
    exporter = Exporter(x.copy())
    kept = weakref.ref(exporter.array)
    value, gradient = LOSS.value_and_grad(exporter, Exporter(y))
    statistics = LOSS.statistics(exporter, y)
    del exporter
    gc.collect()
    assert kept() is None
    assert LOSS.value(statistics) == value == LOSS(x, y)
    np.testing.assert_array_equal(gradient, LOSS.gradient(x, y))


def test_temporaries_live_long_enough(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 3, (3000,), dtype=np.float32)
    expected = LOSS(x, y)
    for _ in range(20):
        assert LOSS(Exporter(torch.tensor(x)), Exporter(torch.tensor(y))) == expected
        torch.full((2, 3, 3000), np.nan)  # would reuse the memory if it had been freed


def test_memory_that_lives_with_its_export_alone(backend: str) -> None:
    """An exporter may create the array on request and keep no reference to it."""
    torch = need("torch")

    class Lazy(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            return torch.tensor(self.array).__dlpack__(**options)

    x, y = example(2, 3, (3000,), dtype=np.float32)
    expected, gradient = LOSS.value_and_grad(x, y)
    for _ in range(5):
        value, gradient_again = LOSS.value_and_grad(Lazy(x), Lazy(y))
        assert value == expected
        np.testing.assert_array_equal(gradient_again, gradient)


def test_changes_to_the_memory_are_seen(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 3, (300,), dtype=np.float32)
    tensor = torch.tensor(x)
    before = LOSS(tensor, y)
    tensor.mul_(2)
    assert LOSS(tensor, y) == LOSS(2 * x, y) != before


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_large_gradients_lie_as_their_logits(
    native_backend: str, kind: str, order: tuple[int, ...]
) -> None:
    """Gradients of 8 MiB and more, which have a separate allocator, have their logits' layout."""
    shape = (2, 4, 1024, 1024 * (2 if kind == "bfloat16" else 1) + 1)
    x = np.ones([shape[axis] for axis in order], np.float32).transpose(np.argsort(order))
    x[:, 1] = 2.0
    y = np.zeros((shape[0], *shape[2:]), np.uint8)
    logits: Any = x
    if kind == "torch":
        logits = need("torch").from_numpy(x)
    elif kind == "bfloat16":
        logits = x.astype(need("ml_dtypes").bfloat16)
    gradient: Any = LOSS.gradient(logits, y)
    assert type(gradient) is type(logits)
    assert gradient.dtype == logits.dtype
    strides = (lambda a: a.stride()) if kind == "torch" else (lambda a: a.strides)
    assert strides(gradient) == strides(logits)
    small = LOSS.gradient(x[:, :, :2, :2], y[:, :2, :2])
    expected = small[:, :, :1, :1] * (4 / y[0].size)
    for part in (slice(0, 2), slice(-2, None)):
        got = as_numpy(gradient[:, :, part, part])
        np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=5e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_channels_last_has_the_bits_of_channels_first(dtype: Any) -> None:
    """In place and in a new array, over borders of tiles, where one label is and where many are."""
    need_backend("cpu")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 4, 5, 8, 9, 14, 17, 70):
        voxels = 40_000 // classes
        x = rng.normal(size=(2, classes, voxels)).astype(dtype)
        x[1, :, voxels // 2 :] *= 30  # some tiles have logits that are far from 0
        y = rng.integers(0, classes, (2, voxels)).astype(np.uint8)
        y[:, : voxels // 3] = classes - 1
        y[:, ::97] = 255
        terms = fl.Dice() + fl.CrossEntropy() + fl.Focal()
        for loss in (LOSS, fl.Loss(terms, ignore_index=255)):
            target = y if loss is not LOSS else np.minimum(y, classes - 1)
            value, expected = loss.value_and_grad(x, target)
            last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
            own = fl.Loss(loss, channel_axis=-1)
            for out in (None, np.empty_like(last), last):
                got, gradient = own.value_and_grad(last, target, out=out)
                assert got == value
                np.testing.assert_array_equal(np.moveaxis(gradient, -1, 1), expected)


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "cropped"])
def test_arrays_are_read_in_place(fast_backend: str, kind: str, layout: str) -> None:
    """No large array is copied: NumPy's allocations are traced.

    The scratch memory of a thread is the same for any size.
    """
    x, y = example(1, 4, (64, 64, 128), dtype=np.float32)
    labels: Any = y.astype(np.uint8)
    if layout == "channels last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    elif layout == "cropped":
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1)))[:, :, 1:-1, 1:-1, 1:-1]
    logits: Any = x
    out: Any = np.empty_like(x)
    if kind == "torch":
        logits, labels, out = (need("torch").from_numpy(a) for a in (x, labels, out))
    elif kind == "jax":
        if layout != "contiguous":
            pytest.skip("JAX arrays are contiguous")
        logits = need("jax.numpy").asarray(x)
    elif kind == "bfloat16":
        logits = x.astype(need("ml_dtypes").bfloat16)
        out = np.empty_like(logits)
    LOSS.value_and_grad(logits, labels, out=out)  # compile, and fill the caches
    before = fl.get_num_threads()
    fl.set_num_threads(1)
    tracemalloc.start()
    try:
        LOSS.value_and_grad(logits, labels, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        fl.set_num_threads(before)
    assert peak < x.nbytes / 10


LARGE = 1_200_007
"""Voxels of two classes with a large float32 gradient: see `fastloss.frameworks.memory`."""


def large_case(kind: str = "numpy") -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(size=(1, 2, LARGE)).astype(np.float32)
    y = np.zeros((1, LARGE), np.uint8)
    if kind == "torch":
        torch = need("torch")
        return torch.from_numpy(x), torch.from_numpy(y)
    return x, y


def bounds(array: Any) -> tuple[int, int]:
    """The first and last address of a contiguous array."""
    view = np.asarray(array)
    start = view.__array_interface__["data"][0]
    return start, start + view.nbytes


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_large_gradients_share_no_memory(native_backend: str, kind: str) -> None:
    """Even if several threads allocate at once, or a view of a freed gradient is still alive."""
    x, y = large_case(kind)

    def compute(_: int) -> Any:
        with fl.use_backend(native_backend):
            return LOSS.gradient(x, y)

    with ThreadPoolExecutor(4) as pool:
        alive = list(pool.map(compute, range(12)))
    expected = np.asarray(alive[0]).copy()
    part = alive.pop(0)[0, 1, 1_000_000:]
    alive += [compute(0), compute(0)]
    for gradient in alive:
        np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(part, expected[0, 1, 1_000_000:])
    places = sorted(map(bounds, [*alive, part]))
    assert all(a[1] <= b[0] for a, b in pairwise(places))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_memory_of_large_gradients_serves_again(native_backend: str, kind: str) -> None:
    need_lazy_free()
    x, y = large_case(kind)
    gc.collect()
    gradient = LOSS.gradient(x, y)
    place = bounds(gradient)
    part = gradient[0, 1, 5:]
    del gradient
    assert bounds(LOSS.gradient(x, y)) != place  # as a view of it is alive
    del part
    assert bounds(LOSS.gradient(x, y)) == place


def test_kept_memory_is_free_for_the_system() -> None:
    need_lazy_free()
    result = python(
        "import numpy as np, fastloss as fl\n"
        "from support import lazily_freed\n"
        "x = np.zeros((1, 4, 4_000_000), np.float32)\n"
        "gradient = fl.Dice().gradient(x, np.ones((1, 4_000_000), np.uint8))\n"
        "before = lazily_freed()\n"
        "del gradient\n"
        "assert lazily_freed() - before > 0.9 * x.nbytes, (before, lazily_freed())\n"
        "kept = fl.Dice().gradient(x, x)  # alive when the process ends\n",
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_kept_memory_makes_room_for_other_gradients() -> None:
    """Cached memory is freed for new gradients under a memory limit."""
    need_lazy_free()
    run_python(
        "import resource, numpy as np, fastloss as fl\n"
        "def gradient(voxels):\n"
        "    x = np.broadcast_to(np.float32(0), (1, 2, voxels))\n"
        "    return fl.CrossEntropy().gradient(x, np.broadcast_to(np.uint8(0), (1, voxels)))\n"
        "gradients = [gradient(8 << 20) for _ in range(4)]\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)\n"
        "gradients.clear()\n"
        "gradient(16 << 20)\n"
    )


def test_large_gradients_under_another_default_device() -> None:
    torch = need("torch")
    x, y = large_case("torch")
    expected = LOSS.gradient(x, y)
    with torch.device("meta"):
        gradient = LOSS.gradient(x, y)
    assert gradient.device.type == "cpu"
    assert torch.equal(gradient, expected)


def test_memory_of_the_process(native_backend: str) -> None:
    """A call needs next to nothing beyond the logits, the labels and the gradient."""
    out = run_python(
        "import resource, sys\n"
        "import numpy as np, fastloss as fl\n"
        "loss = fl.Dice() + fl.CrossEntropy()\n"
        "x = np.zeros((1, 4, 4_000_000), np.float32)\n"
        "x[:] = np.arange(4, dtype=np.float32)[:, None]\n"
        "y = np.zeros((1, 4_000_000), np.uint8); y[:] = 1\n"
        "loss.value_and_grad(x[..., :9999].copy(), y[..., :9999].copy())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "loss.value_and_grad(x, y, out=x)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n",
        FASTLOSS_BACKEND=native_backend,
    )
    assert int(out) * 1024 < 16e6  # a quarter of the logits


@pytest.mark.parametrize(("classes", "order"), [(2, "first"), (3, "first"), (3, "last")])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_large_gradient_fits_any_place_in_memory(
    fast_backend: str, name: str, classes: int, order: str
) -> None:
    """Large gradients need no alignment, though non-temporal stores do."""
    # Only the C++ kernels have such stores.
    voxels = 400_001 if fast_backend == "cpu" else 5_001
    for shift in (0, 1, 4, 15):
        x, y = example(1, classes, (voxels,), dtype=name)
        if order == "last":
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        loss = fl.Loss(fl.Dice() + fl.CrossEntropy())
        expected = reference(loss, x, y)[1]
        memory = np.full(x.size + 32, 7, name)
        flat = memory[shift:][: x.size]
        out = flat.reshape(x.shape)
        if order == "last":
            out = np.moveaxis(flat.reshape(1, -1, classes), -1, 1)
        loss.gradient(x, y, out=out)
        assert norm(out - expected) <= 1e-6 * norm(expected)
        assert (memory[:shift] == 7).all()
        assert (memory[shift + x.size :] == 7).all()


def test_any_integer_is_ignored(backend: str) -> None:
    """An ignored label that the labels' dtype cannot hold does not occur."""
    for name in ("uint8", "int8", "uint16", "int16", "int32", "int64", "uint64"):
        for ignore_index in (255, -1, 1 << 40):
            x, y = example(1, 3, (700,), dtype=np.float32)
            labels = y.astype(name)
            info = np.iinfo(name)
            if info.min <= ignore_index <= info.max:
                labels[:, ::5] = ignore_index
            loss = fl.Loss(fl.Dice() + fl.CrossEntropy(), ignore_index=ignore_index)
            value, gradient = loss.value_and_grad(x, labels)
            expected = reference(loss, x, labels)
            assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
            assert norm(gradient - expected[1]) <= 1e-6 * norm(expected[1])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_one_weight_for_all_samples(backend: str, activation: str, classes: int) -> None:
    """A voxel weight with a batch of one is broadcast over the samples."""
    for dtype in ("float32", "float64", "bool"):
        x, y = example(3, classes, (17, 24), dtype=np.float32, activation=activation)
        w = np.random.default_rng(0).uniform(size=(1, 17, 24)).round().astype(dtype)
        each = np.repeat(w, 3, axis=0)
        losses = [fl.Loss(LOSS, activation=activation)]
        if activation == "softmax":
            losses.append(fl.Loss(fl.TopKCrossEntropy(k=30)))
        for loss in losses:
            for target in (y, one_hot(y, classes)):
                if target.ndim > 3 and not loss.additive:
                    continue
                expected = reference(loss, x, target, each)
                for one in (w, w[:, None], np.asfortranarray(w)):
                    assert_agree(
                        *loss.value_and_grad(x, target, one), expected, 1 / np.sqrt(x.size)
                    )
        last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        loss = fl.Loss(LOSS, activation=activation, channel_axis=-1)
        assert loss(last, y, w[..., None]) == pytest.approx(loss(last, y, each), rel=1e-6)
        with pytest.raises(ValueError, match=r"^voxel_weight: "):
            loss(last, y, -w[..., None] if dtype != "bool" else w[:, 1:])


def test_one_weight_for_all_samples_in_torch(backend: str) -> None:
    torch = need("torch")
    import fastloss.torch as ft

    x, y = (torch.tensor(a) for a in example(3, 3, (4, 6)))
    w = torch.rand(1, 1, 4, 6)
    each = w.expand(3, -1, -1, -1).contiguous()
    for call in (
        LOSS.__call__,
        ft.Loss(LOSS),
        torch.compile(LOSS.__call__, fullgraph=True, backend="aot_eager"),
        torch.compile(LOSS.__call__, fullgraph=True, backend="aot_eager", dynamic=True),
        torch.jit.trace(LOSS.__call__, (x, y, w)),
    ):
        results = []
        for weight in (w, w[0], each):
            if call is not LOSS.__call__ and weight.ndim < 4:
                continue
            leaf = x.clone().requires_grad_()
            value = call(leaf, y, weight)
            results.append((value, *torch.autograd.grad(value, leaf)))
        for result in results[:-1]:
            torch.testing.assert_close(result, results[-1], rtol=0, atol=0)
    assert LOSS(x.to("meta"), y.to("meta"), w.to("meta")).shape == ()
    program = torch.export.export(ft.Loss(LOSS), (x, y, w))
    assert torch.equal(program.module()(x, y, w), LOSS(x, y, each))
