"""A loss in JAX: differentiated, compiled, mapped over; values and gradients by the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_agree, example, need, need_backend, one_hot, reference, run_python

import fastloss as fl
from fastloss.backends import load_backend

jax = need("jax")
jnp = need("jax.numpy")

LOSS = fl.Dice() + 0.5 * fl.CrossEntropy(weight=[1.0, 2.0, 3.0])
LOSSES = {
    "dice": fl.Dice(squared=True, include_background=False),
    "jaccard": fl.Jaccard(batch=True, weight=[1, 2, 0.5]),
    "focal tversky": fl.Tversky(alpha=0.3, beta=0.7, gamma=1.5),
    "generalised dice": fl.GeneralizedDice(),
    "focal": fl.Focal(gamma=1.5, alpha=[0.2, 0.3, 0.5]),
    "others of voxels": fl.Brier()
    + fl.MeanAbsoluteError()
    + fl.PolyCrossEntropy()
    + fl.GeneralizedCrossEntropy(),
    "top-k": fl.TopKCrossEntropy(k=30),
    "smoothing of sigmoids": fl.Loss(
        fl.Dice(), fl.CrossEntropy(label_smoothing=0.1), activation="sigmoid"
    ),
    "boundary dou": fl.BoundaryDoU() + fl.Dice(),
    "fields of labels": fl.Dice() + 0.1 * fl.Boundary() + fl.GeneralizedSurface(),
    "fields of predictions": fl.HausdorffDT(),
    "skeleton": fl.SkeletonRecall(),
    "of every sample": fl.Dice(reduction="none"),
    "of every voxel": fl.Loss(fl.CrossEntropy(reduction="voxel"), ignore_index=2),
}


def need_interface() -> None:
    """Skip where XLA calls host functions by copies alone."""
    if not need("fastloss.frameworks.jax.ffi").is_there():
        pytest.skip("jax: this version has no jax.ffi")


def total(loss: Any) -> Any:
    """A scalar of the loss, and its derivative by the loss: weights that differ."""

    def of(logits: Any, *arrays: Any, **options: Any) -> Any:
        value = loss(logits, *arrays, **options)
        weights = jnp.arange(1.0, value.size + 1).reshape(value.shape)
        return (weights * value).sum(), value

    return of


def expect(loss: Any, x: Any, *arrays: Any, **options: Any) -> tuple[Any, np.ndarray]:
    with fl.use_backend("reference"):
        size = np.shape(loss(x, *arrays, **options))
    upstream = np.arange(1.0, np.prod(size) + 1).reshape(size)
    return reference(loss, x, *arrays, upstream=upstream, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_differentiated(name: str) -> None:
    """At once and compiled, with voxel weights, as the reference does it."""
    if name == "skeleton":
        need("skimage")
    loss = LOSSES[name]
    x, y = example(2, 3, (4, 5, 3), dtype=np.float32)
    w = np.random.default_rng(1).uniform(0.5, 2, y.shape).astype(np.float32)
    arrays = (jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
    expected = expect(loss, x, y, w)
    function = jax.value_and_grad(total(loss), has_aux=True)
    for call in (function, jax.jit(function)):
        (_, value), gradient = call(*arrays)
        assert isinstance(gradient, jax.Array)
        assert isinstance(value, jax.Array)
        assert_agree(value, gradient, expected, scale=1e-3)
    value = jax.jit(loss.__call__)(*arrays)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6, atol=1e-6)


@settings(max_examples=12)
@given(
    batch=st.integers(1, 2),
    classes=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    labels=st.sampled_from(["int32", "uint8", "bool", "float32", "dense"]),
    last=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_array(
    batch: int, classes: int, spatial: list[int], dtype: str, labels: str, last: bool,
    weighted: bool, seed: int,
) -> None:  # fmt: skip
    """Shapes, dtypes and channels last, compiled."""
    x, y = example(batch, classes, tuple(spatial), seed=seed, dtype=np.float32)
    y = y % 2 if labels == "bool" else y
    target = one_hot(y, classes, np.float32) if labels == "dense" else y.astype(labels)
    w = np.random.default_rng(seed).uniform(0.5, 2, y.shape).astype("f4") if weighted else None
    if last:
        x = np.moveaxis(x, 1, -1)
        target = np.moveaxis(target, 1, -1) if labels == "dense" else target
    loss = fl.Loss(fl.Dice(), fl.Focal(), channel_axis=-1 if last else 1)
    logits = jnp.asarray(np.ascontiguousarray(x)).astype(dtype)
    value, gradient = jax.jit(jax.value_and_grad(loss.__call__))(logits, target, w)
    assert gradient.dtype == logits.dtype
    assert value.dtype == jnp.float32
    assert_agree(value, gradient, reference(loss, np.asarray(logits), target, w), scale=1e-3)


def test_float64() -> None:
    """As exact as NumPy's, where JAX has the dtype."""
    run_python(
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from support import *\n"
        "import fastloss as fl\n"
        "x, y = example(2, 3, (4, 5))\n"
        "loss = fl.Dice() + fl.CrossEntropy()\n"
        "for f in (jax.value_and_grad(loss), jax.jit(jax.value_and_grad(loss))):\n"
        "    value, gradient = f(jnp.asarray(x), jnp.asarray(y))\n"
        "    assert value.dtype == gradient.dtype == np.float64\n"
        "    assert_agree(value, gradient, reference(loss, x, y))\n",
        JAX_ENABLE_X64="1",
    )


def test_fields_and_regions_are_operands() -> None:
    loss = fl.Dice() + 0.1 * fl.Boundary()
    x, y = example(2, 3, (6, 5), dtype=np.float32)
    fields = {"boundary": np.random.default_rng(0).normal(size=x.shape).astype(np.float32)}
    regions = np.where(np.arange(6)[None, :, None] < 3, 0, 1) + np.zeros(y.shape, int)

    @jax.jit
    def step(x: Any, y: Any, fields: Any, regions: Any) -> Any:
        def of(x: Any) -> Any:
            return loss(x, y, fields=fields, regions=regions, region_count=2)

        return jax.value_and_grad(of)(x)

    found = step(x, y, fields, regions)
    assert_agree(*found, reference(loss, x, y, fields=fields, regions=regions), scale=1e-3)
    with pytest.raises(ValueError, match=r"^region_count: "):
        jax.jit(lambda x, r: loss(x, y, regions=r))(jnp.asarray(x), regions)


def test_mapped_over() -> None:
    """vmap of value and gradient, over several axes, over one argument, and over fields."""
    x, y = example(6, 3, (4, 5), dtype=np.float32)
    xs, ys = jnp.asarray(x.reshape(2, 3, 1, 3, 4, 5)), jnp.asarray(y.reshape(2, 3, 1, 4, 5))
    function = jax.value_and_grad(LOSS.__call__)
    for call in (jax.vmap(jax.vmap(function)), jax.jit(jax.vmap(jax.vmap(function)))):
        values, gradients = call(xs, ys)
        for i in np.ndindex(2, 3):
            expected = reference(LOSS, np.asarray(xs[i]), np.asarray(ys[i]))
            assert_agree(values[i], gradients[i], expected)
    values = jax.vmap(LOSS.__call__, (0, None))(xs[0], ys[0, 0])
    expected = [reference(LOSS, np.asarray(a), np.asarray(ys[0, 0]))[0] for a in xs[0]]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # One gradient, for several upstream gradients.
    per_sample = fl.Dice(reduction="none", batch=True)
    value, pull = jax.vjp(lambda x: per_sample(x, y), jnp.asarray(x))
    rows = jax.vmap(pull)(jnp.eye(value.size).reshape(-1, *value.shape))[0]
    for row, upstream in zip(rows, np.eye(value.size), strict=True):
        wanted = reference(per_sample, x, y, upstream=upstream.reshape(value.shape))
        assert_agree(value, row, wanted)
    boundary = fl.Boundary()
    made = jax.jit(jax.vmap(boundary.__call__))(xs[0], ys[0])
    expected = [
        reference(boundary, np.asarray(a), np.asarray(b))[0]
        for a, b in zip(xs[0], ys[0], strict=True)
    ]
    np.testing.assert_allclose(made, expected, rtol=1e-6)


def test_in_the_middle_of_a_program() -> None:
    """Checkpointed, in a loop, scaled, after a layer and before another operation."""
    x, y = example(2, 3, (4, 5), dtype=np.float32)

    def of(scale: Any) -> Any:
        def one(sum: Any, factor: Any) -> Any:
            return sum + jax.checkpoint(LOSS.__call__)(scale * factor * x, y) ** 2, None

        return jax.lax.scan(one, 0.0, jnp.array([1.0, 2.0]))[0]

    value, slope = jax.jit(jax.value_and_grad(of))(0.7)
    parts = [reference(LOSS, 0.7 * f * x.astype(np.float64), y) for f in (1, 2)]
    np.testing.assert_allclose(value, sum(v**2 for v, _ in parts), rtol=1e-6)
    expected = sum(2 * v * f * (g * x).sum() for f, (v, g) in zip((1, 2), parts, strict=True))
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_compiled_once_per_shape() -> None:
    traced = []

    @jax.jit
    def step(x: Any, y: Any) -> Any:
        traced.append(x.shape)
        return jax.value_and_grad(LOSS.__call__)(x, y)

    for size in (3, 4, 3, 4):
        x, y = example(2, 3, (size, 5), dtype=np.float32)
        assert_agree(*step(x, y), reference(LOSS, x, y))
    assert len(traced) == 2


def test_the_gradient_takes_donated_logits() -> None:
    """reuse_logits: in their memory where they are donated, right where they are not."""
    need_interface()
    value_of = need("fastloss.jax").value
    x, y = example(2, 3, (64, 64), dtype=np.float32)
    expected = reference(LOSS, x, y)

    def step(x: Any, y: Any) -> Any:
        return jax.value_and_grad(lambda x: value_of(LOSS, x, y, reuse_logits=True))(x)

    logits = jnp.asarray(x)
    assert_agree(*jax.jit(step)(logits, y), expected)
    np.testing.assert_array_equal(logits, x)  # not donated: as they were
    address = logits.unsafe_buffer_pointer()
    value, gradient = jax.jit(step, donate_argnums=0)(logits, y)
    assert_agree(value, gradient, expected)
    assert gradient.unsafe_buffer_pointer() == address
    assert logits.is_deleted()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_backend_is_the_one_chosen_while_it_is_traced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = example(2, 3, (7, 9), dtype=np.float32)
    backend, ran = load_backend(need_backend(name)), []
    apply = backend.apply
    with fl.use_backend(name):
        call = jax.jit(jax.value_and_grad(LOSS.__call__)).lower(x, y).compile()
    expected = reference(LOSS, x, y)
    monkeypatch.setattr(backend, "apply", lambda *a: ran.append(name) or apply(*a))
    assert_agree(*call(x, y), expected)
    assert ran == [name]


def test_a_loss_of_a_users_own_term() -> None:
    class Cubed(fl.RegionTerm):
        def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
            return overlap**3, 3 * overlap**2, np.zeros_like(predicted)

    loss = 1e-2 * Cubed()
    x, y = example(2, 3, (4, 5), dtype=np.float32)
    assert_agree(*jax.jit(jax.value_and_grad(loss.__call__))(x, y), reference(loss, x, y))
    found = jax.grad(lambda x: fl.dice_ce_loss(x, y, ce_factor=2.0))(jnp.asarray(x))
    assert_agree(0, found, (0, reference(fl.Dice() + 2 * fl.CrossEntropy(), x, y)[1]))


def test_what_is_not_computed_is_refused() -> None:
    x, y = example(2, 3, (4, 5), dtype=np.float32)
    x, g = jnp.asarray(x), jnp.asarray(one_hot(y, 3, np.float32))
    with pytest.raises(TypeError, match=r"forward-mode|jvp"):
        jax.jvp(lambda x: LOSS(x, y), (x,), (x,))
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(RuntimeError, match="no derivative of a gradient"):
            wrap(jax.grad(lambda x: jax.grad(LOSS.__call__)(x, y).sum()))(x)
        with pytest.raises(TypeError, match=r"^target: .*stop_gradient"):
            wrap(jax.grad(LOSS.__call__, argnums=1))(x, g)
        with pytest.raises(TypeError, match=r"^voxel_weight: "):
            wrap(jax.grad(LOSS.__call__, argnums=2))(x, g, jnp.ones(y.shape))
    # What only looks as if: a target that depends on the parameters, and is held constant.
    held = jax.grad(lambda x: LOSS(x, jax.lax.stop_gradient(jax.nn.softmax(x, 1))))(x)
    soft = np.asarray(jax.nn.softmax(x, 1))
    assert_agree(0, held, (0, reference(LOSS, np.asarray(x), soft)[1]), scale=1.0)
    with pytest.raises(TypeError, match=r"^logits: .*tracer"):
        jax.jit(LOSS.value_and_grad)(x, y)
    with pytest.raises(TypeError, match=r"^target: .*tracer"):
        jax.jit(lambda y: LOSS(np.asarray(x), y))(y)


def test_bad_input() -> None:
    """Shapes and dtypes while it is traced; numbers when they are there."""
    x, y = example(2, 3, (4, 5), dtype=np.float32)
    x = jnp.asarray(x)
    for wrap in (lambda f: f, jax.jit, jax.grad):
        with pytest.raises(ValueError, match=r"^target: for logits"):
            wrap(LOSS.__call__)(x, y[:, 1:])
        with pytest.raises(ValueError, match=r"^voxel_weight: expected"):
            wrap(LOSS.__call__)(x, y, np.ones((3, 4, 5), np.float32))
        with pytest.raises(ValueError, match=r"^fields: "):
            wrap(lambda x: LOSS(x, y, fields={"extra": x}))(x)
        with pytest.raises(ValueError, match=r"^weight: "):
            wrap(fl.Dice(weight=[1, 2]).__call__)(x, y)
    with pytest.raises(TypeError, match=r"^logits: expected float"):
        jax.jit(LOSS.__call__)(x.astype(jnp.int32), y)
    for call in (LOSS.__call__, jax.grad(LOSS.__call__)):
        with pytest.raises(ValueError, match=r"^target: .*40 labels are not; the first is"):
            call(x, y + 5)
    with pytest.raises(Exception, match=r"target: .*40 labels are not; the first is") as caught:
        jax.block_until_ready(jax.jit(LOSS.__call__)(x, y + 5))
    assert "RuntimeError" in type(caught.value).__name__  # XLA's
    assert np.isfinite(LOSS(x, y))


def test_many_steps_take_no_memory() -> None:
    """2,000 compiled steps and 200 at once leave nothing behind."""
    run_python(
        "import jax, numpy as np, resource, fastloss as fl\n"
        "from support import *\n"
        "x, y = example(2, 3, (32, 32), dtype=np.float32)\n"
        "x, y = jax.numpy.asarray(x), jax.numpy.asarray(y)\n"
        "loss = fl.Dice() + fl.CrossEntropy()\n"
        "once = jax.value_and_grad(loss.__call__)\n"
        "step = jax.jit(once)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for _ in range(50): jax.block_until_ready((step(x, y), once(x, y)))\n"
        "before = peak()\n"
        "for _ in range(2000): jax.block_until_ready(step(x, y))\n"
        "for _ in range(200): jax.block_until_ready(once(x, y))\n"
        "grown = peak() - before\n"
        "assert grown < 8 * 1024, grown\n",  # KiB; the gradients would be 50 MiB
        FASTLOSS_BACKEND=None,
        OMP_NUM_THREADS="1",
    )


def test_memory_that_is_kept() -> None:
    """keep_memory: later steps need hardly a new page, where they needed all of the gradient's."""
    out = run_python(
        "import jax, numpy as np, platform, resource, fastloss as fl, fastloss.jax\n"
        "from support import *\n"
        "kept = fastloss.jax.keep_memory()\n"
        "assert kept == (platform.libc_ver()[0] == 'glibc')\n"
        "x, y = example(1, 2, (1000, 1000), dtype=np.float32)\n"  # below where pages are huge
        "x, y = jax.numpy.asarray(x), jax.numpy.asarray(y)\n"
        "step = jax.jit(jax.value_and_grad((fl.Dice() + fl.CrossEntropy()).__call__))\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): jax.block_until_ready(step(x, y))\n"
        "before = faults()\n"
        "for _ in range(20): jax.block_until_ready(step(x, y))\n"
        "print(faults() - before if kept else 0)\n",
        FASTLOSS_BACKEND=None,
        OMP_NUM_THREADS="1",
    )
    assert int(out) < 20 * 1953 / 10  # pages of 4 KiB


def test_without_the_interface_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pure_callback, as with versions of JAX that have none."""
    ffi = need("fastloss.frameworks.jax.ffi")
    monkeypatch.setattr(ffi, "is_there", lambda: False)
    x, y = example(2, 3, (4, 5), dtype=np.float32)
    function = jax.value_and_grad(LOSS.__call__)
    assert_agree(*jax.jit(lambda *a: function(*a))(x, y), reference(LOSS, x, y))
    values, gradients = jax.jit(jax.vmap(function))(x[:, None], y[:, None])
    for i in range(2):
        assert_agree(values[i], gradients[i], reference(LOSS, x[i : i + 1], y[i : i + 1]))


def test_a_program_that_another_process_has_compiled(tmp_path: Any) -> None:
    """JAX's cache of programs: what to compute is in the program, not in a process."""
    need_interface()
    script = (
        "import jax, numpy as np\n"
        "from support import *\n"
        "import fastloss as fl\n"
        "if {first}: jax.jit(fl.Focal().__call__)(*map(jax.numpy.asarray, example()))\n"
        "x, y = example(2, 3, (4, 5), dtype=np.float32)\n"
        "loss = fl.Dice() + 0.3 * fl.CrossEntropy(weight=[1, 2, 3])\n"
        "step = jax.jit(jax.value_and_grad(loss.__call__))\n"
        "assert_agree(*step(x, y), reference(loss, x, y))\n"
    )
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run_python(script.format(first=True), **cache)
    made = {p.name for p in tmp_path.iterdir() if "step" in p.name or p.name.endswith("-cache")}
    assert made
    run_python(script.format(first=False), **cache)
    assert made == {p.name for p in tmp_path.iterdir() if p.name in made or "-cache" in p.name}
