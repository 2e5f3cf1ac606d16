"""PyTorch's autograd over a stand-in for a GPU: tensors that are taken to lie on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in
from support import assert_agree, example, need, need_gloo, reference

import fastloss as fl

torch = need("torch")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install_for_torch(monkeypatch)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    need_gloo()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def tensors(dtype: Any = np.float32) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    x, y = example(2, 3, (5, 8), dtype=dtype)
    return torch.from_numpy(x.copy()).requires_grad_(), torch.from_numpy(y), x, y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward(launched: list[str], dtype: Any) -> None:
    loss = fl.Dice() + fl.CrossEntropy(weight=[0.5, 1, 2])
    logits, labels, x, y = tensors(dtype)
    value = loss(logits, labels)
    assert launched[-1] == "fastloss_combine"
    (3 * value).backward()
    assert launched[-1] == "fastloss_apply"
    assert_agree(value.detach().numpy(), logits.grad.numpy(), reference(loss, x, y, upstream=3.0))


def test_one_weight_for_all_samples(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    logits, labels, x, y = tensors()
    w = np.random.default_rng(0).uniform(size=(1, 1, 5, 8)).astype(np.float32)
    for _ in range(2):  # the second call's launch is prepared
        value = loss(logits, labels, torch.from_numpy(w))
        logits.grad = None
        value.backward()
        expected = reference(loss, x, y, w[:, 0].repeat(2, axis=0))
        assert_agree(value.detach().numpy(), logits.grad.numpy(), expected)


def test_a_loss_scale_that_float16_could_not_hold(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    logits, labels, x, y = tensors(np.float16)
    (65536.0 * loss(logits, labels)).backward()
    value, gradient = reference(loss, x, y, upstream=65536.0)
    assert_agree(np.float32(value), logits.grad.numpy(), (value, gradient))


def test_one_value_per_sample_and_class(launched: list[str]) -> None:
    loss = fl.Dice(reduction="none")
    logits, labels, x, y = tensors()
    u = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    value = loss(logits, labels)
    value.backward(torch.from_numpy(u))
    expected = reference(loss, x, y, upstream=u.astype(np.float64))
    assert_agree(value.detach().numpy(), logits.grad.numpy(), expected)


def test_gradients_of_many_upstreams_at_once(launched: list[str]) -> None:
    logits, labels, x, y = tensors()
    for loss in (fl.Dice() + fl.CrossEntropy(), fl.Dice(reduction="none")):
        value = loss(logits, labels)
        upstream = torch.eye(value.numel()).reshape(-1, *value.shape)
        (got,) = torch.autograd.grad(value, logits, upstream, is_grads_batched=True)
        for u, gradient in zip(upstream.double().numpy(), got.numpy(), strict=True):
            assert_agree(value.detach().numpy(), gradient, reference(loss, x, y, upstream=u))


def test_reuse_of_the_logits(launched: list[str]) -> None:
    logits, labels, x, y = tensors()
    from fastloss.torch import DiceCE

    output = logits * 1.0
    address = output.data_ptr()
    DiceCE(reuse_logits=True)(output, labels).backward()
    _, expected = reference(fl.Dice() + fl.CrossEntropy(), x, y)
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-7)
    assert output.data_ptr() == address


def test_top_k_backward_without_what_forward_kept(launched: list[str]) -> None:
    loss = fl.TopKCrossEntropy(k=25) + fl.Dice()
    logits, labels, x, y = tensors()
    value = loss(logits, labels)
    value.backward(retain_graph=True)
    first = logits.grad.clone()
    logits.grad = None
    value.backward()
    np.testing.assert_array_equal(logits.grad.numpy(), first.numpy())
    assert_agree(value.detach().numpy(), first.numpy(), reference(loss, x, y))


@pytest.mark.parametrize("shard", ["batch", "volume"])
@pytest.mark.parametrize("batch", [False, True])
def test_sums_joined_over_ranks(
    launched: list[str], one_rank: None, shard: str, batch: bool
) -> None:
    import fastloss.torch

    loss = fl.Dice(batch=batch) + fl.CrossEntropy()
    module = fastloss.torch.Loss(loss, process_group=True, shard=shard)
    logits, labels, x, y = tensors()
    value = module(logits, labels)
    value.backward()
    assert_agree(value.detach().numpy(), logits.grad.numpy(), reference(loss, x, y))


@pytest.mark.parametrize("shard", ["batch", "volume"])
@pytest.mark.parametrize("batch", [False, True])
def test_a_rank_without_samples(
    launched: list[str], one_rank: None, shard: str, batch: bool
) -> None:
    import fastloss.torch

    module = fastloss.torch.Loss(fl.Dice(batch=batch), process_group=True, shard=shard)
    logits, labels, *_ = tensors()
    logits = logits.detach()[:0].requires_grad_()
    value = module(logits, labels[:0])
    value.backward()
    assert value.detach() == pytest.approx(0, abs=1e-12)
    assert logits.grad.shape == logits.shape


def test_a_term_that_joins_ranks_by_itself(launched: list[str], one_rank: None) -> None:
    from fastloss.nnunet import DC_and_CE_loss

    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False}
    logits, labels, *_ = tensors()
    values, gradients = [], []
    for ddp in (True, False):
        module = DC_and_CE_loss({**options, "ddp": ddp}, {})
        value = module(logits, labels[:, None])
        value.backward()
        values.append(float(value.detach()))
        gradients.append(logits.grad.numpy().copy())
        logits.grad = None
    assert values[0] == values[1]
    np.testing.assert_array_equal(gradients[0], gradients[1])


def test_bad_labels_make_nan(launched: list[str]) -> None:
    logits, labels, *_ = tensors()
    labels[0, 0] = 17
    value = (fl.Dice() + fl.CrossEntropy())(logits, labels)
    value.backward()
    assert value.isnan()
    assert logits.grad.isnan().any()
