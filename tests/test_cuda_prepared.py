"""Cached launch plans, on a stand-in for a GPU."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import stand_in
from stand_in import OnDevice
from support import assert_agree, example, need, one_hot, reference

import fastloss as fl
from fastloss.backends.cuda import backend as cuda
from fastloss.loss import Passes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install(monkeypatch)


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one whenever arrays are checked and planned."""
    calls: list[Any] = []
    real = Passes.__init__

    def counted(self: Passes, *arguments: Any) -> None:
        calls.append(None)
        real(self, *arguments)

    monkeypatch.setattr(Passes, "__init__", counted)
    return calls


def shifted(array: np.ndarray, past: int) -> np.ndarray:
    """A copy that starts ``past`` bytes after the start of a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + past
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
def test_new_numbers_in_later_calls(launched: list[str], dtype: str, weighted: bool) -> None:
    loss = fl.Dice() + 0.5 * fl.CrossEntropy(weight=[1, 2, 3])
    for seed, (of_logits, of_labels) in enumerate([(0, 0), (8, 0), (0, 1), (8, 1), (0, 0)]):
        x, y = example(2, 3, (8, 8), dtype=dtype, seed=seed)
        x, y = shifted(x, of_logits), shifted(y.astype(np.uint8), of_labels)
        w = np.random.default_rng(seed).uniform(0, 2, y.shape) if weighted else None
        given = None if w is None else OnDevice(w)
        value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), given)
        assert_agree(value.values, gradient.values, reference(loss, x, y, w))
        np.testing.assert_array_equal(loss(OnDevice(x), OnDevice(y), given).values, value.values)


def test_kinds_take_turns(launched: list[str]) -> None:
    """Plans are cached for several outputs, as in deep supervision, and several kinds of target."""
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), ignore_index=2)
    shapes = [(2, 3, (8, 8)), (2, 3, (4, 4)), (1, 3, (8, 8)), (2, 4, (8, 8)), (2, 3, (64,))]
    for turn in range(3):
        for batch, classes, spatial in shapes:
            x, y = example(batch, classes, spatial, dtype="float32", seed=turn)
            back = np.ascontiguousarray(np.moveaxis(x, 1, -1))
            targets = (y, y.astype(np.int64), y[:, None], one_hot(y, classes, np.float32))
            for target in targets:
                for logits in (x, np.moveaxis(back, -1, 1)):
                    value, gradient = loss.value_and_grad(OnDevice(logits), OnDevice(target))
                    assert_agree(value.values, gradient.values, reference(loss, x, target))


def test_later_calls_are_not_planned_anew(launched: list[str], arranged: list[Any]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype="float32")
    loss.value_and_grad(OnDevice(x), OnDevice(y))
    first = len(arranged)
    for _ in range(3):
        loss.value_and_grad(OnDevice(x), OnDevice(y))
        loss(OnDevice(x), OnDevice(y))
    assert len(arranged) == first


def test_other_numbers_are_not_planned_anew(launched: list[str], arranged: list[Any]) -> None:
    """Losses that differ only in numbers share the first one's plan."""
    x, y = example(2, 3, (40,), dtype="float32")
    counts = []
    for n in (1.0, 0.0, 0.3, 2.0):
        w = [1.0, n, 0.5]
        loss = n * fl.Dice(weight=n) + fl.CrossEntropy(weight=w) + 0.5 * fl.Tversky(alpha=n)
        expected = reference(loss, x, y)
        arranged.clear()
        value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
        counts.append((len(arranged), len(cuda._programs)))
        assert_agree(value.values, gradient.values, expected)
        loss.terms[1][1].weight = [n, 1.0, 2.0]
        expected = reference(loss, x, y)
        value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
        assert_agree(value.values, gradient.values, expected)
    assert counts[1:] == [(0, counts[0][1])] * 3


def test_own_terms_with_other_numbers(launched: list[str]) -> None:
    class Squared(fl.RegionTerm):
        """A term whose use of its weights cannot be recorded."""

        def combine(self, statistics: Any) -> Any:
            value, pullback = super().combine(statistics)
            factor = float(np.square(self.weight).sum())
            return value * factor, lambda upstream: pullback(upstream * factor)

        def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
            return -overlap, -np.ones_like(overlap), np.zeros_like(overlap)

    x, y = example(2, 3, (40,), dtype="float32")
    several, one = Squared(weight=[1, 1, 1]), Squared(weight=1)
    for w in ([1, 2, 3], [0.5, 1, 2], [1, 2, 3]):
        several.weight, one.weight = w, w[0]
        for term in (several, one):
            loss = 0.5 * term + fl.CrossEntropy(weight=w)
            for _ in range(2):
                value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
                assert_agree(value.values, gradient.values, reference(loss, x, y))


def test_more_numbers_than_a_launch_takes_along(launched: list[str]) -> None:
    x, y = example(1, 900, (3, 4), dtype="float32")
    for seed in range(2):
        w = np.random.default_rng(seed).uniform(0, 1, 900)
        for loss in (
            fl.CrossEntropy(weight=w) + 0.5 * fl.Dice(weight=w[1:], include_background=False),
            fl.Loss(fl.TopKCrossEntropy(weight=w, k=50)),
        ):
            value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
            assert_agree(value.values, gradient.values, reference(loss, x, y))


def test_buffers_for_the_gradient(launched: list[str], arranged: list[Any]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    last = np.empty((2, 8, 8, 3), np.float32)
    buffers = [np.empty((2, 3, 8, 8), np.float32), np.moveaxis(last, -1, 1), None]
    planned = []
    for seed in range(3):
        arranged.clear()
        for buffer in buffers:
            x, y = example(2, 3, (8, 8), dtype="float32", seed=seed)
            expected, kept = reference(loss, x, y), x.copy()
            logits = OnDevice(x)
            out = logits if buffer is None else OnDevice(buffer)
            value, gradient = loss.value_and_grad(logits, OnDevice(y), out=out)
            assert gradient is out
            assert_agree(value.values, out.values, expected)
            if buffer is not None:
                np.testing.assert_array_equal(x, kept)
        planned.append(len(arranged))
    assert planned[1:] == [len(buffers)] * 2  # by the reference
    assert planned[0] > len(buffers)


def test_buffers_of_later_calls_are_checked(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(1, 3, (40,), dtype="float32")
    memory = np.zeros(400, np.float32)
    logits = memory[:120].reshape(x.shape)
    logits[...] = x
    w = memory[130:170].reshape(y.shape)
    w[...] = 1
    given = [OnDevice(a) for a in (logits, y, w)]
    expected = reference(loss, x, y, w)
    for start in (200, 4, 100, 240, 168, 172):
        out = memory[start : start + 120].reshape(x.shape)
        if start < 120 or start < 170:
            what = "logits without" if start < 120 else "voxel_weight, which"
            with pytest.raises(ValueError, match=f"^out: overlaps the {what}"):
                loss.value_and_grad(*given, out=OnDevice(out))
            np.testing.assert_array_equal(logits, x)
        else:
            value, _ = loss.value_and_grad(*given, out=OnDevice(out))
            assert_agree(value.values, out, expected)
    with pytest.raises(ValueError, match=r"^out: expected the logits' shape"):
        loss.value_and_grad(*given, out=OnDevice(np.empty((1, 3, 41), np.float32)))
    with pytest.raises(ValueError, match=r"^out: expected an array in the memory of CUDA device 0"):
        loss.value_and_grad(*given, out=OnDevice(np.empty_like(x), ordinal=1))


def test_later_calls_are_checked(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype="float32")
    loss.value_and_grad(OnDevice(x), OnDevice(y))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^target: for logits \(2, 3, 40\)"):
            loss(OnDevice(x), OnDevice(y[:, :-1]))
        with pytest.raises(TypeError, match=r"^logits: expected float16"):
            loss(OnDevice(x.astype(np.int32)), OnDevice(y))
        with pytest.raises(ValueError, match=r"^target: expected an array in the memory of CUDA"):
            loss(OnDevice(x), OnDevice(y, ordinal=1))
        with pytest.raises(ValueError, match=r"^target: .* like the logits, got one in CPU memory"):
            loss(OnDevice(x), y)
        assert np.isnan(loss(OnDevice(x), OnDevice(np.where(y == 1, 3, y))).values)


def test_arrays_are_let_go(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = (OnDevice(a) for a in example(2, 3, (40,), dtype="float32"))
    loss.value_and_grad(x, y)
    gone = [weakref.ref(a) for a in (x, y)]
    del x, y
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_loss_that_was_used_can_be_pickled(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = (OnDevice(a) for a in example(2, 3, (40,), dtype="float32"))
    value, _ = loss.value_and_grad(x, y)
    again, _ = pickle.loads(pickle.dumps(loss)).value_and_grad(x, y)
    np.testing.assert_array_equal(again.values, value.values)


def test_threads_share_a_loss(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    cases = [example(1, 3, (20 + i % 2,), dtype="float32", seed=i) for i in range(8)]
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = loss.value_and_grad(*(OnDevice(a) for a in cases[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (x, y) in enumerate(cases):
        value, gradient = results[i]
        assert_agree(value.values, gradient.values, reference(loss, x, y))


# ------------------------------------------------------------------ PyTorch


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = need("torch")
    stand_in.install_for_torch(monkeypatch)
    return module


def train(torch: Any, loss: Any, seed: int, dtype: str = "float32") -> None:
    x, y = example(2, 3, (5, 8), dtype=dtype, seed=seed)
    logits = torch.from_numpy(x.copy()).requires_grad_()
    value = loss(logits, torch.from_numpy(y))
    (3 * value).backward()
    assert_agree(value.detach().numpy(), logits.grad.numpy(), reference(loss, x, y, upstream=3.0))
    value, gradient = loss.value_and_grad(logits.detach(), torch.from_numpy(y))
    assert_agree(value.numpy(), gradient.numpy(), reference(loss, x, y))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_steps_of_training(torch: Any, arranged: list[Any], dtype: str) -> None:
    loss = fl.Dice() + fl.CrossEntropy(weight=[0.5, 1, 2])
    train(torch, loss, 0, dtype)
    arranged.clear()
    x, y = example(2, 3, (5, 8), dtype=dtype)
    for seed in (1, 2):
        train(torch, loss, seed, dtype)
    # Except by the reference, which `train` compares with.
    assert len(arranged) == 4
    with torch.no_grad():
        value = loss(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(value.numpy(), reference(loss, x, y)[0], rtol=1e-6)


def test_several_values_before_their_gradients(torch: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    cases = [example(2, 3, (5, 8), dtype="float32", seed=seed) for seed in range(3)]
    logits = [torch.from_numpy(x.copy()).requires_grad_() for x, _ in cases]
    total = sum(
        (i + 1) * loss(a, torch.from_numpy(y))
        for i, (a, (_, y)) in enumerate(zip(logits, cases, strict=True))
    )
    total.backward()
    for i, (a, (x, y)) in enumerate(zip(logits, cases, strict=True)):
        _, expected = reference(loss, x, y, upstream=float(i + 1))
        np.testing.assert_allclose(a.grad.numpy(), expected, atol=1e-7)


def test_saved_arrays_that_hooks_moved(torch: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (5, 8), dtype="float32")
    _, expected = reference(loss, x, y)
    for copy in (torch.clone, lambda a: a.transpose(0, -1).contiguous().transpose(0, -1)):
        logits = torch.from_numpy(x.copy()).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda a: a.numpy().copy(), torch.from_numpy):
            value = loss(logits * 1.0, torch.from_numpy(y))
        value.backward()
        np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-7)
        logits.grad = None
        with torch.autograd.graph.saved_tensors_hooks(lambda a: a.detach(), copy):
            value = loss(logits * 1.0, torch.from_numpy(y))
        value.backward()
        np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-7)


def test_logits_that_were_changed_since(torch: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    for _ in range(2):
        x, y = (torch.from_numpy(a) for a in example(2, 3, (5, 8), dtype="float32"))
        output = x.requires_grad_() * 1.0
        value = loss(output, y)
        output += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_targets_that_require_a_gradient(torch: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (5, 8), dtype="float32")
    g = torch.from_numpy(one_hot(y, 3, np.float32))
    with pytest.raises(TypeError, match=r"^target: .* requires a gradient"):
        loss.value_and_grad(torch.from_numpy(x), g.clone().requires_grad_())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        soft = g.to(dtype, copy=True).requires_grad_()
        logits = torch.from_numpy(x.copy()).requires_grad_()
        (3 * loss(logits, soft)).backward()
        expected = loss.value_and_grad(x, g.numpy(), upstream=3.0, target_grad=True)
        np.testing.assert_allclose(logits.grad.numpy(), expected[1], 1e-5, 1e-7)
        assert soft.grad.dtype is dtype
        scale, step = np.abs(expected[2]).max(), 1e-5 if dtype is torch.float32 else 1e-2
        np.testing.assert_allclose(soft.grad.float().numpy(), expected[2], atol=step * scale)


def test_no_second_derivative(torch: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (5, 8), dtype="float32")
    for _ in range(2):
        logits = torch.from_numpy(x.copy()).requires_grad_()
        (gradient,) = torch.autograd.grad(
            loss(logits, torch.from_numpy(y)), logits, create_graph=True
        )
        with pytest.raises(RuntimeError, match="no second backward"):
            gradient.sum().backward()


def test_reuse_of_the_logits(torch: Any, arranged: list[Any]) -> None:
    import fastloss.torch as ft

    module = ft.Loss(fl.Dice() + fl.CrossEntropy(), reuse_logits=True)
    planned = []
    for seed in range(3):
        x, y = example(2, 3, (5, 8), dtype="float32", seed=seed)
        _, expected = reference(fl.Dice() + fl.CrossEntropy(), x, y, upstream=2.0)
        arranged.clear()
        given = torch.from_numpy(x.copy()).requires_grad_()
        output = given + 0.0
        value = module(output, torch.from_numpy(y))
        version = output._version
        (2 * value).backward(retain_graph=True)
        np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-7)
        np.testing.assert_allclose(given.grad.numpy(), expected, atol=1e-7)
        assert output._version > version
        planned.append(len(arranged))
        with pytest.raises(RuntimeError, match="there can be no second"):
            value.backward()
        with pytest.raises(ValueError, match="values of a leaf"):
            module(given, torch.from_numpy(y))
    assert planned[1:] == [0, 0]
    assert planned[0] > 0


def test_reuse_of_logits_that_hooks_moved(torch: Any) -> None:
    import fastloss.torch as ft

    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (5, 8), dtype="float32")
    _, expected = reference(loss, x, y)
    for _ in range(2):
        logits = torch.from_numpy(x.copy()).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda a: a.numpy().copy(), torch.from_numpy):
            value = ft.Loss(loss, reuse_logits=True)(logits + 0.0, torch.from_numpy(y))
        value.backward()
        np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-7)


def test_logits_that_cannot_be_reused(torch: Any) -> None:
    import fastloss.torch as ft

    module = ft.Loss(fl.Dice() + fl.CrossEntropy(), reuse_logits=True)
    x, y = example(1, 3, (40,), dtype="float32")
    for _ in range(2):
        one = (torch.from_numpy(x[:, :1].copy()).requires_grad_() + 0.0).expand(1, 3, 40)
        with pytest.raises(ValueError, match=r"^logits: reuse_logits=True cannot write here"):
            module(one, torch.from_numpy(y))
