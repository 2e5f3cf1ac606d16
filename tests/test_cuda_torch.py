"""PyTorch's autograd over a stand-in for a GPU: CPU tensors are treated as device tensors."""

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


# ------------------------------------------------------------------ numbers on the device


class Coupled(fl.RegionTerm):
    """A custom term that reads its weights arbitrarily."""

    couples_classes = True

    def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
        weight = self.weight / float(np.sum(self.weight))
        size = (weight * (predicted + reference)).sum(axis=1, keepdims=True)
        dice = 2 * (weight * overlap).sum(axis=1, keepdims=True) / size
        return 1 - dice, -2 * weight / size, weight * dice / size


def losses_with_weights() -> dict[str, Any]:
    """By name, a module, and the loss that it equals with other weights."""
    import fastloss.monai as fm
    import fastloss.nnunet as fn
    import fastloss.torch as ft

    w = [0.1, 0.2, 0.3]
    hot = {"softmax": True, "to_onehot_y": True, "smooth_nr": 0.0, "smooth_dr": 0.0}
    plain = {"smooth_nr": 0.0, "smooth_dr": 0.0}
    return {
        "sum": (
            ft.DiceCE(ce_weight=w, weight=w, ce_factor=0.5),
            lambda w: fl.Dice(weight=w) + 0.5 * fl.CrossEntropy(weight=w),
        ),
        "none": (
            ft.Loss(fl.CrossEntropy(weight=w, reduction="none")),
            lambda w: fl.CrossEntropy(weight=w, reduction="none"),
        ),
        "focal": (
            ft.Focal(alpha=w, activation="sigmoid"),
            lambda w: fl.Loss(fl.Focal(alpha=w), activation="sigmoid"),
        ),
        "top-k": (
            ft.TopKCrossEntropy(weight=w, k=30), lambda w: fl.TopKCrossEntropy(weight=w, k=30),
        ),
        "own": (ft.Loss(Coupled(weight=w)), lambda w: fl.Loss(Coupled(weight=w))),
        "MONAI": (
            fm.DiceCELoss(weight=torch.tensor(w), **hot),
            lambda w: fl.Dice(weight=w, **plain) + fl.CrossEntropy(weight=w),
        ),
        "MONAI focal": (
            fm.FocalLoss(weight=w, to_onehot_y=True, use_softmax=True),
            lambda w: fl.Loss((1 / 3) * fl.Focal(alpha=w)),
        ),
        "nnU-Net": (
            fn.RobustCrossEntropyLoss(weight=torch.tensor(w)), lambda w: fl.CrossEntropy(weight=w),
        ),
    }  # fmt: skip


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records reads of device numbers that synchronise."""
    from fastloss.frameworks.torch import tensors as on_device

    calls: list[str] = []

    def watch(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(kind, name, noted)

    for name in ("item", "tolist", "cpu", "__bool__", "__float__"):
        watch(torch.Tensor, name)
    watch(on_device.TorchPlace, "numpy")
    return calls


@pytest.mark.parametrize(
    "name", ["sum", "none", "focal", "top-k", "own", "MONAI", "MONAI focal", "nnU-Net"]
)
def test_class_weights_on_the_device(launched: list[str], read: list[str], name: str) -> None:
    """They are read on the device in every call, and changing them recompiles nothing."""
    from fastloss.backends.cuda import backend as cuda

    module, loss_of = losses_with_weights()[name]
    logits, labels, x, y = tensors()
    programs = []
    for seed in range(4):
        w = np.random.default_rng(seed).uniform(0, 1, 3).astype(np.float32)
        with torch.no_grad():
            for tensor in module.buffers():
                tensor.copy_(torch.from_numpy(w))
        read.clear()
        value = module(logits, labels[:, None])
        value.sum().backward()
        if name != "own":  # whose weights must be read, as its formula may do anything with them
            assert read == []
        upstream = np.ones(value.shape)
        expected = reference(loss_of(w), x, y, upstream=upstream)
        assert_agree(value.detach().numpy(), logits.grad.numpy(), expected)
        logits.grad = None
        programs.append(len(cuda._programs))
    assert programs[1:] == programs[:1] * 3 or name == "own"


@pytest.mark.parametrize("kind", ["none", "top-k"])
def test_weights_that_change_before_the_gradient(launched: list[str], kind: str) -> None:
    """The gradient belongs to the value, with the weights of that time."""
    module, loss_of = losses_with_weights()[kind]
    logits, labels, x, y = tensors()
    w = np.array([0.1, 0.2, 0.3])
    value = module(logits, labels)
    with torch.no_grad():
        module.get_buffer("weight").fill_(5.0)
    value.sum().backward()
    expected = reference(loss_of(w), x, y, upstream=np.ones(value.shape))
    assert_agree(value.detach().numpy(), logits.grad.numpy(), expected)


def test_bad_weights_on_the_device(launched: list[str]) -> None:
    import fastloss.torch as ft

    logits, labels, *_ = tensors()
    for bad in ([1.0, -1.0, 1.0], [1.0, np.inf, 1.0], [1.0, np.nan, 1.0]):
        for make in (ft.CrossEntropy, ft.Dice):
            module = make(weight=[1, 1, 1])
            module.weight.copy_(torch.tensor(bad))
            value = module(logits, labels)
            value.backward()
            assert value.isnan()
            assert logits.grad.isnan().any()
            module = make(weight=[1, 1, 1], validate=True)
            module.weight.copy_(torch.tensor(bad))
            with pytest.raises(ValueError, match=r"^weight: .* at least 0"):
                module(logits, labels)
    module = ft.Focal(alpha=[0.5, 0.5, 0.5], activation="sigmoid")
    module.alpha.copy_(torch.tensor([0.5, 1.5, 0.5]))
    assert module(logits, labels).isnan()
    module = ft.CrossEntropy(weight=[1, 1, 1])
    module.weight = torch.ones(2)
    with pytest.raises(ValueError, match="expected 3 numbers, one per class, got 2"):
        module(logits, labels)


def test_functions_of_tensors_on_the_device(launched: list[str], read: list[str]) -> None:
    logits, labels, x, y = tensors()
    for seed in range(2):
        w = np.random.default_rng(seed).uniform(0, 1, 3)
        weight = torch.from_numpy(w)
        read.clear()
        value = fl.dice_ce_loss(logits, labels, ce_weight=weight, ce_factor=0.5, weight=weight[0])
        value.backward()
        assert read == []
        loss = fl.Dice(weight=w[0]) + 0.5 * fl.CrossEntropy(weight=w)
        assert_agree(value.detach().numpy(), logits.grad.numpy(), reference(loss, x, y))
        logits.grad = None


def test_operators_take_numbers_on_the_device(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators accept numbers on the device, as compiled code passes them."""
    from fastloss.frameworks.torch import operators

    monkeypatch.setattr(
        operators,
        "_loss_of",
        lambda structure, numbers, logits: operators.on_device(structure, numbers),
    )
    monkeypatch.setattr(operators, "_plain", lambda sums: sums)
    logits, labels, x, y = tensors()
    for loss in (
        fl.Dice(weight=0.5) + 0.5 * fl.CrossEntropy(weight=[1, 2, 3]),
        fl.Loss(fl.TopKCrossEntropy(weight=2.0, k=30)),
        fl.Loss(fl.Dice(reduction="none", weight=[1, 2, 3])),
    ):
        numbers = torch.tensor(np.concatenate(loss.operands))
        value = torch.ops.fastloss.loss(logits, labels, None, numbers, loss.structure, "", "")[0]
        value.sum().backward()
        expected = reference(loss, x, y, upstream=np.ones(value.shape))
        assert_agree(value.detach().numpy(), logits.grad.numpy(), expected)
        logits.grad = None
