"""The losses as modules: results, state, copies and repr; and reuse of the logits' memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from support import need_backend
from torch_support import (
    LogCoshDice,
    needs_torch,  # noqa: F401
    tensors,
    torch,
    value_and_gradient,
)

import fastloss as fl

if torch is not None:
    import fastloss.torch as ft

W = [0.5, 1.0, 2.0]


def same(module: Any, loss: Any, *arrays: Any) -> None:
    torch.testing.assert_close(
        value_and_gradient(module, *arrays), value_and_gradient(loss, *arrays), rtol=0, atol=0
    )


def test_every_module_computes_its_loss() -> None:
    x, y, w = tensors(weighted=True)
    masked = y.clone()
    masked[0, 0] = 255
    sigmoid = {"activation": "sigmoid", "ignore_index": 255}
    for module, loss in (
        (
            ft.CrossEntropy(weight=W, label_smoothing=0.1),
            fl.CrossEntropy(weight=W, label_smoothing=0.1),
        ),
        (ft.Focal(gamma=1.5, alpha=W), fl.Focal(gamma=1.5, alpha=W)),
        (
            ft.Dice(include_background=False, **sigmoid),
            fl.Loss(fl.Dice(include_background=False), **sigmoid),
        ),
        (ft.TopKCrossEntropy(k=20, weight=W), fl.TopKCrossEntropy(k=20, weight=W)),
        (ft.Jaccard(batch=True), fl.Jaccard(batch=True)),
        (ft.Tversky(alpha=0.3, beta=0.7), fl.Tversky(alpha=0.3, beta=0.7)),
        (ft.GeneralizedDice(weighting="simple"), fl.GeneralizedDice(weighting="simple")),
        (ft.Loss(fl.Dice() + 0.5 * fl.Focal()), fl.Dice() + 0.5 * fl.Focal()),
        (ft.Loss(LogCoshDice(), fl.Dice()), LogCoshDice() + fl.Dice()),
    ):
        arrays = (x, masked if "255" in repr(loss) else y, w)
        same(module, loss, *arrays)
    options = {"include_background": False, "label_smoothing": 0.1, "ce_weight": W, "ce_factor": 2}
    same(ft.DiceCE(**options), lambda *a: fl.dice_ce_loss(*a, **options), x, y, w)
    options = {"gamma": 3, "alpha": W, "dice_factor": 0.5}
    same(ft.DiceFocal(**options), lambda *a: fl.dice_focal_loss(*a, **options), x, y, w)


def test_class_weights_are_buffers() -> None:
    x, y, _ = tensors()
    module = ft.DiceCE(ce_weight=W)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == ["term1_weight"]
    assert module.to(torch.float32).term1_weight.dtype == torch.float32
    other = ft.DiceCE(ce_weight=[1, 1, 1])
    other.load_state_dict(module.state_dict())
    same(other, module, x, y)

    changed = [3.0, 2.0, 1.0]
    expected = fl.Dice() + fl.CrossEntropy(weight=changed)
    before = module(x, y)
    with torch.no_grad():
        module.term1_weight.copy_(torch.tensor(changed))
    same(module, expected, x, y)
    other.term1_weight = torch.tensor(changed)
    same(other, expected, x, y)
    third = ft.Focal(alpha=[0.1, 0.2, 0.3]).half()  # rounds them
    same(third, fl.Focal(alpha=np.float16([0.1, 0.2, 0.3])), x, y)
    assert before != module(x, y)
    with pytest.raises(ValueError, match=r"^weight: .* at least 0"):
        ft.CrossEntropy(weight=W).load_state_dict({"weight": torch.tensor([1.0, -1.0, 1.0])})


def test_loaded_weights_reach_compiled_code() -> None:
    x, y, _ = tensors()
    module = ft.CrossEntropy(weight=W)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    same(fast, module, x, y)
    module.load_state_dict({"weight": torch.tensor([3.0, 2.0, 1.0])})
    same(fast, fl.CrossEntropy(weight=[3, 2, 1]), x, y)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(again: Any) -> None:
    x, y, _ = tensors()
    module = ft.Loss(
        LogCoshDice() + 0.5 * fl.CrossEntropy(weight=W),
        ignore_index=1,
        process_group=True,
        shard="volume",
    )
    twin = again(module)
    assert repr(twin) == repr(module)
    twin._ranks = module._ranks = None  # in a single process
    same(twin, module, x, y)
    before = module(x, y)
    with torch.no_grad():
        twin.term1_weight.mul_(torch.tensor([1, 2, 3]))
    assert module(x, y) == before != twin(x, y)


def test_repr() -> None:
    shown = repr(torch.nn.Sequential(ft.Dice(batch=True, reuse_logits=True)))
    assert "batch=True" in shown
    assert "reuse_logits=True" in shown
    assert "0.5 * CrossEntropy(" in repr(ft.DiceCE(ce_factor=0.5, ignore_index=7))
    assert "ignore_index=7" in repr(ft.DiceCE(ignore_index=7))


def test_bad_arguments_of_modules() -> None:
    x, y, _ = tensors()
    with pytest.raises(TypeError, match=r"^logits: expected a tensor, got ndarray"):
        ft.Dice()(x.numpy(), y)
    with pytest.raises(ValueError, match=r"^shard: "):
        ft.Dice(shard="channel")
    with pytest.raises(TypeError, match=r"^process_group: "):
        ft.Dice(process_group=3)
    with pytest.raises(TypeError, match="smoothing"):
        ft.Dice(smoothing=3)
    with pytest.raises(ValueError, match=r"^process_group: TopKCrossEntropy"):
        ft.TopKCrossEntropy(process_group=True)(x, y)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ft.Dice(process_group=True)(x, y)


# ------------------------------------------------------------------ deep supervision


def pyramid(x: Any, steps: int) -> list[Any]:
    return [x[..., :: 2**i, :: 2**i] for i in range(steps)]


def nearest(labels: Any, size: tuple[int, ...]) -> Any:
    """PyTorch's nearest-neighbour interpolation, on numbers that it can resize."""
    resized = torch.nn.functional.interpolate(
        labels[:, None].double(), size=size, mode="nearest-exact"
    )
    return resized[:, 0].long()


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_deep_supervision_with_one_target(size: tuple[int, int]) -> None:
    x, y, w = tensors(spatial=size, weighted=True)
    outputs = pyramid(x, 3)
    shapes = [o.shape[2:] for o in outputs]
    loss = fl.Dice() + fl.CrossEntropy()
    expected = sum(
        f * loss(o, nearest(y, s))
        for f, o, s in zip((4 / 7, 2 / 7, 1 / 7), outputs, shapes, strict=True)
    )
    torch.testing.assert_close(ft.DeepSupervision(loss)(outputs, y), expected)
    torch.testing.assert_close(ft.DeepSupervision(loss)(outputs, y[:, None].byte()), expected)
    one_hot = torch.nn.functional.one_hot(y).movedim(-1, 1).double()
    torch.testing.assert_close(
        ft.DeepSupervision(ft.Dice())(outputs, one_hot), ft.DeepSupervision(ft.Dice())(outputs, y)
    )
    weighted = sum(
        f
        * loss(
            o, nearest(y, s), torch.nn.functional.interpolate(w[:, None], s, mode="nearest-exact")
        )
        for f, o, s in zip((1.0, 0.25), outputs[::2], shapes[::2], strict=True)
    )
    got = ft.DeepSupervision(loss, weights=[1, 0, 0.25])(outputs, y, w)
    torch.testing.assert_close(got, weighted)


def test_deep_supervision_with_arrays_of_other_kinds() -> None:
    x, y, w = tensors(spatial=(8, 8), weighted=True)
    outputs, module = pyramid(x, 3), ft.DeepSupervision(ft.Dice())
    expected = module(outputs, y, w)
    fixed = y.numpy().astype(np.uint8)
    fixed.flags.writeable = False
    one_hot = torch.nn.functional.one_hot(y).movedim(-1, 1).numpy()
    for target in (y.numpy(), fixed, fixed[:, None], one_hot, DlpackOnly(y)):
        assert torch.equal(module(outputs, target, w.numpy()), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(outputs, y.numpy(), w.numpy()), expected)
    with pytest.raises(
        TypeError, match=r"^target: expected a tensor, an array, or a list, got int"
    ):
        module(outputs, 3)


class DlpackOnly:
    """An array of a framework that supports only DLPack."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_deep_supervision_in_channels_last_arrays() -> None:
    x, y, _ = tensors(spatial=(8, 8))
    expected = ft.DeepSupervision(fl.Dice())(pyramid(x, 2), y)
    last = [o.movedim(1, -1) for o in pyramid(x, 2)]
    for loss in (fl.Loss(fl.Dice(), channel_axis=-1), ft.Dice(channel_axis=-1)):
        torch.testing.assert_close(ft.DeepSupervision(loss)(last, y), expected)


def test_deep_supervision_with_a_target_per_output() -> None:
    x, y, _ = tensors(spatial=(8, 8))
    outputs = pyramid(x.requires_grad_(), 2)
    targets = [y, y[:, 1::2, ::2]]
    module = ft.DeepSupervision(torch.nn.CrossEntropyLoss(), weights=(0.7, 0.3))
    value = module(outputs, targets)
    loss = torch.nn.functional.cross_entropy
    expected = 0.7 * loss(outputs[0], targets[0]) + 0.3 * loss(outputs[1], targets[1])
    torch.testing.assert_close(value, expected)
    assert torch.equal(ft.DeepSupervision(fl.Dice())(x, y), fl.Dice()(x, y))
    for bad in ((outputs[:1], y), (outputs, targets[:1]), ([], y)):
        with pytest.raises(ValueError, match=r"^(outputs|target): expected"):
            module(*bad)
    with pytest.raises(ValueError, match=r"^weights: "):
        ft.DeepSupervision(fl.Dice(), weights=[0])(x, y)


def test_deep_supervision_compiled() -> None:
    x, y, _ = tensors(spatial=(8, 8))
    module = ft.DeepSupervision(ft.DiceCE(ce_weight=W))
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(lambda x: fast(pyramid(x, 3), y), x),
        value_and_gradient(lambda x: module(pyramid(x, 3), y), x),
    )


# ------------------------------------------------------------------ reuse_logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("view", ["whole", "channels last", "slice"])
def test_reuse_logits(dtype: str, view: str, fast_backend: str) -> None:
    """The gradient is the same, and overwrites the logits."""
    x, y, w = tensors(weighted=True, spatial=(4, 6, 5))
    x = x.to(getattr(torch, dtype))
    if view == "channels last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if view == "slice":
        y, w = y[..., 1:], w[..., 1:]

    def network(leaf: Any) -> Any:
        return (leaf * 1)[..., 1:] if view == "slice" else leaf * 1

    seen = []
    leaf = x.clone().requires_grad_()
    logits = network(leaf)
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    value = ft.DiceCE(reuse_logits=True)(logits, y, w)
    value.backward()
    assert seen == [logits.data_ptr()]
    expected = value_and_gradient(lambda x: fl.dice_ce_loss(network(x), y, w), x)
    torch.testing.assert_close((value.detach(), leaf.grad), expected, rtol=0, atol=0)


def test_reused_logits_and_others_who_need_them() -> None:
    x, y, _ = tensors()
    module = ft.Dice(reuse_logits=True)
    x.requires_grad_()
    value = module(x * 1, y)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^reuse_logits=True: the first backward"):
        value.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(x.exp(), y).backward()  # exp needs its result
    logits = x * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (fl.CrossEntropy()(logits, y) + module(logits, y)).backward()  # the last runs first

    def in_a_good_order(x: Any) -> Any:
        logits = x * 1
        return module(logits, y) + fl.CrossEntropy()(logits, y)

    _, gradient = value_and_gradient(in_a_good_order, x)
    _, expected = value_and_gradient(lambda x: fl.dice_ce_loss(x, y), x)
    torch.testing.assert_close(gradient, expected)


def test_logits_that_cannot_be_reused() -> None:
    x, y, _ = tensors()
    module = ft.Dice(reuse_logits=True)
    kept = x.clone()
    x.requires_grad_()
    for logits in (x, x[:, :, :1], x.view(2, 3, 3, 2)):
        target = (
            y.reshape(2, *logits.shape[2:])
            if logits.shape == (2, 3, 3, 2)
            else y[:, : logits.shape[2]]
        )
        with pytest.raises(ValueError, match=r"^logits: .*leaf"):
            module(logits, target)
    with pytest.raises(ValueError, match=r"^logits: reuse_logits=True cannot write"):
        module((x[:1] * 1).expand(2, -1, -1, -1), y)
    with torch.no_grad():
        module(x, y)
    assert not module(kept, y).requires_grad
    assert torch.equal(x, kept)


def test_reuse_logits_compiled() -> None:
    """Under torch.compile the memory is not reused, and results are the same."""
    x, y, _ = tensors()
    module = ft.DiceCE(reuse_logits=True)
    fast = torch.compile(lambda x: module(x * 1, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(fast, x), value_and_gradient(lambda x: module(x * 1, y), x)
    )


def test_reuse_logits_takes_no_memory() -> None:
    from torch.profiler import profile

    with fl.use_backend(need_backend("cpu")):
        x, y, _ = tensors(spatial=(64, 64, 8), dtype=np.float32)
        module = ft.DiceCE(reuse_logits=True)
        logits = torch.nn.Identity()(x.requires_grad_() * 1)
        value = module(logits, y)
        with profile(profile_memory=True) as profiler:
            torch.autograd.grad(value, logits)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    assert taken < 0.01 * x.numel() * x.element_size()
