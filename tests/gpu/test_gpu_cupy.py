"""CuPy arrays, and device arrays of other frameworks through DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_support import check, need_torch_gpu, on_gpu, to_numpy
from support import example, need, packed

import fastloss as fl

LOSS = fl.Dice() + fl.CrossEntropy()


@pytest.fixture
def cupy() -> Any:
    return need("cupy")


def arrays(cupy: Any, dtype: str = "float32", **shape: Any) -> tuple[Any, Any]:
    x, y = example(2, 4, (7, 8, 9), dtype=dtype, **shape)
    return cupy.asarray(x), cupy.asarray(y.astype(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_value_and_gradient(cupy: Any, dtype: str) -> None:
    x, y = arrays(cupy, dtype)
    value, gradient = LOSS.value_and_grad(x, y)
    assert isinstance(value, cupy.ndarray)
    assert isinstance(gradient, cupy.ndarray)
    assert value.shape == ()
    assert value.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert gradient.dtype == x.dtype
    check(LOSS, value, gradient, x, y)
    alone = LOSS(x, y)
    assert isinstance(alone, cupy.ndarray)
    assert alone.shape == ()
    assert float(alone) == float(value)


def test_into_a_buffer(cupy: Any) -> None:
    x, y = arrays(cupy)
    expected, gradient = LOSS.value_and_grad(x, y)
    out = cupy.full_like(x, np.nan)
    value, same = LOSS.value_and_grad(x, y, out=out)
    assert same is out
    assert float(value) == float(expected)
    assert (out == gradient).all()
    _, over = LOSS.value_and_grad(x, y, out=x)
    assert over is x
    assert (x == gradient).all()


@pytest.mark.parametrize("layout", ["channels last", "slice", "channel_axis"])
def test_layouts(cupy: Any, layout: str) -> None:
    x, y = arrays(cupy)
    loss: Any = fl.Loss(LOSS)
    given = x
    if layout == "channels last":
        given = cupy.moveaxis(cupy.ascontiguousarray(cupy.moveaxis(x, 1, -1)), -1, 1)
    elif layout == "slice":
        given = cupy.pad(x, [(0, 0)] * 4 + [(2, 1)])[..., 2:-1]
    else:
        loss, given = (
            fl.Loss(LOSS, channel_axis=-1),
            cupy.ascontiguousarray(cupy.moveaxis(x, 1, -1)),
        )
    value, gradient = loss.value_and_grad(given, y)
    assert gradient.shape == given.shape
    check(loss, value, gradient, given, y)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_memory_that_is_not_aligned(cupy: Any, dtype: str) -> None:
    """Misaligned fields of packed records work, though CuPy itself cannot read them."""
    x, y = example(2, 4, (7, 8, 9), dtype=dtype)
    w = np.random.default_rng(0).uniform(0, 2, y.shape).astype(np.float32)

    def there(array: np.ndarray) -> tuple[Any, Any]:
        """The bytes of the records, and a view of the field."""
        field = packed(array)
        raw = cupy.asarray(np.ascontiguousarray(field.base).view(np.uint8).reshape(-1))
        shape, start = array.shape, raw.data + 1
        return raw, cupy.ndarray(shape, array.dtype, start, field.strides)

    raw, out = there(np.full_like(x, np.nan))
    for _ in range(2):  # the second time with the cached plan
        given = [there(array)[1] for array in (x, y.astype(np.int32), w)]
        value, gradient = LOSS.value_and_grad(*given)
        check(LOSS, value, gradient, x, y, w)
        LOSS.value_and_grad(*given, out=out)
        records = raw.get().view([("skipped", "u1"), ("numbers", dtype)]).reshape(x.shape)
        np.testing.assert_array_equal(records["numbers"], to_numpy(gradient))
        assert not records["skipped"].any()


def test_statistics_add_over_chunks(cupy: Any) -> None:
    x, y = arrays(cupy)
    chunks = [(x[:, :, i : i + 3], y[:, i : i + 3]) for i in range(0, 7, 3)]
    total = sum(LOSS.statistics(*chunk) for chunk in chunks)
    assert isinstance(total.sums, cupy.ndarray)
    value = LOSS.value(total)
    assert isinstance(value, cupy.ndarray)
    gradient = cupy.concatenate([LOSS.gradient(*c, statistics=total) for c in chunks], axis=2)
    check(LOSS, value, gradient, x, y)


def test_upstream_and_no_reduction(cupy: Any) -> None:
    loss = fl.Loss(fl.Dice(reduction="none"), fl.CrossEntropy())
    x, y = arrays(cupy)
    upstream = cupy.random.default_rng(0).standard_normal(loss(x, y).shape)
    value, gradient = loss.value_and_grad(x, y, upstream=upstream)
    check(loss, value, gradient, x, y, upstream=to_numpy(upstream))


def test_on_a_stream_of_its_own(cupy: Any) -> None:
    x, y = arrays(cupy)
    late = cupy.empty_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        late.fill(np.nan)
        late[...] = x
        value, gradient = LOSS.value_and_grad(late, y)
    stream.synchronize()
    check(LOSS, value, gradient, x, y)


def test_bad_input(cupy: Any) -> None:
    x, y = arrays(cupy)
    with pytest.raises(ValueError, match=r"^target: .*CUDA device 0.*CPU memory"):
        LOSS(x, y.get())
    with pytest.raises(ValueError, match=r"^target: .*CPU memory.*CUDA device 0"):
        LOSS(x.get(), y)
    y[0, 0, 0, 0] = 9
    assert np.isnan(float(LOSS(x, y)))
    with pytest.raises(ValueError, match="1 label is not; the first is 9"):
        fl.Loss(LOSS, validate=True)(x, y)
    y[0, 0, 0, 0] = 0
    assert np.isfinite(float(LOSS(x, y)))


def test_the_same_bits_as_tensors(cupy: Any) -> None:
    """CuPy and PyTorch give the same bits for the same memory, shared by DLPack."""
    need_torch_gpu()
    x, y = on_gpu()
    value, gradient = LOSS.value_and_grad(x, y)
    other, other_gradient = LOSS.value_and_grad(cupy.from_dlpack(x), cupy.from_dlpack(y))
    assert float(other) == float(value)
    np.testing.assert_array_equal(to_numpy(other_gradient), to_numpy(gradient))
    # Labels of one framework beside logits of another.
    np.testing.assert_array_equal(float(LOSS(x, cupy.from_dlpack(y))), float(value))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax(cupy: Any, dtype: str) -> None:
    jax = need("jax")
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"jax has no CUDA device: {str(error).splitlines()[0]}")
    if dtype == "bfloat16" and int(cupy.__version__.partition(".")[0]) < 14:
        pytest.skip(f"CuPy {cupy.__version__} has no bfloat16")
    x, y = example(2, 4, (7, 8, 9))
    logits = jax.device_put(jax.numpy.asarray(x, dtype), device)
    labels = jax.device_put(jax.numpy.asarray(y, "uint8"), device)
    value, gradient = LOSS.value_and_grad(logits, labels)
    assert isinstance(value, cupy.ndarray)
    assert gradient.shape == logits.shape
    check(LOSS, value, gradient, np.asarray(logits), np.asarray(labels))
