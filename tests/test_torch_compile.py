"""Losses inside graphs: torch.compile, torch.export, torch.jit.trace, and their operators."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need, need_backend, python, run_python
from torch_support import (
    PARTS,
    SUMS,
    TOP_K,
    LogCoshDice,
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


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Reset the recompile limit before each test."""
    yield
    if torch is not None:
        torch.compiler.reset()


def compiled(function: Any, **how: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **how)


def operand_of(loss: Any) -> Any:
    """The numbers of a loss, as arguments of the operators."""
    return torch.tensor(np.concatenate(loss.operands))


def name_of(loss: Any) -> str:
    loss.keep_terms()
    return loss.structure


# ------------------------------------------------------------------ operators


@pytest.mark.parametrize("part", [*PARTS, *TOP_K], ids=repr)
def test_opcheck(part: Any) -> None:
    """The operators pass PyTorch's checks: schema, fake tensors, autograd, dynamic shapes."""
    import fastloss.torch  # noqa: F401  registers the operators

    x, y, w = tensors(weighted=True, dtype=np.float32)
    numbers, names = operand_of(part), (name_of(part), "", "")
    loss, gradient = torch.ops.fastloss.loss, torch.ops.fastloss.gradient
    torch.library.opcheck(loss, (x.clone().requires_grad_(), y, w, numbers, *names))
    value, sums, voxels = loss(x, y, w, numbers, *names)
    upstream = torch.ones_like(value)
    torch.library.opcheck(gradient, (x, y, w, numbers, sums, voxels, upstream, *names))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_opcheck_of_dtypes_and_layouts(dtype: str, activation: str) -> None:
    import fastloss.torch  # noqa: F401

    x, g, _ = tensors(activation, "soft", spatial=(3, 4, 5))
    x = x.to(getattr(torch, dtype))
    loss = fl.Loss(LOSS, activation=activation)
    given = (operand_of(loss), name_of(loss), "", "")
    operator = torch.ops.fastloss.loss
    for logits in (x.contiguous(memory_format=torch.channels_last_3d), x[..., 1:]):
        target = g[..., -logits.shape[-1] :]
        torch.library.opcheck(operator, (logits.detach().requires_grad_(), target, None, *given))


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_shapes_without_memory(part: Any) -> None:
    for channel_axis in (1, -1):
        x, y, _ = tensors(batch=4)
        x = x.movedim(1, channel_axis)
        loss = fl.Loss(part, channel_axis=channel_axis)
        value = loss(x, y)
        for meta in (loss(x.to("meta"), y.to("meta")), loss(x.float().to("meta"), y.to("meta"))):
            assert meta.is_meta
            assert meta.shape == value.shape
        assert meta.dtype == torch.float32
        with need("torch._subclasses.fake_tensor").FakeTensorMode() as mode:
            leaf = mode.from_tensor(x).requires_grad_()
            loss(leaf, mode.from_tensor(y)).sum().backward()
            assert leaf.grad.shape == x.shape


# ------------------------------------------------------------------ torch.compile


class Net(torch.nn.Module if torch is not None else object):  # type: ignore[misc]
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)
        self.loss = loss

    def forward(self, volume: Any, target: Any, voxel_weight: Any = None) -> Any:
        return self.loss(self.conv(volume), target, voxel_weight)


def volumes(batch: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(batch, 1, size, size, size, generator=generator)
    return volume, torch.randint(0, 3, (batch, size, size, size), generator=generator)


def gradients(net: Any, *arguments: Any) -> list[Any]:
    net.zero_grad()
    value = net(*arguments)
    value.sum().backward()
    return [value.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize(
    "loss", [*SUMS, *TOP_K, fl.Dice(), LogCoshDice(), fl.Loss(LOSS, activation="sigmoid")], ids=repr
)
def test_model_and_loss_in_one_graph_of_any_shape(loss: Any) -> None:
    loss = copy.deepcopy(loss)  # a copy that was never called
    net = Net(loss)
    fast = compiled(net, dynamic=True)
    for batch, size in ((2, 5), (3, 6), (2, 7)):
        volume, labels = volumes(batch, size)
        got = gradients(fast, volume, labels)
        torch.testing.assert_close(got, gradients(net, volume, labels), rtol=1e-5, atol=1e-6)


def test_compiled_by_inductor_in_channels_last() -> None:
    with fl.use_backend(need_backend("cpu")):
        net = Net(LOSS).to(memory_format=torch.channels_last_3d)
        volume, labels = volumes(2, 8)
        volume = volume.contiguous(memory_format=torch.channels_last_3d)
        weight = torch.rand(labels.shape)
        expected = gradients(net, volume, labels, weight)
        got = gradients(torch.compile(net, fullgraph=True), volume, labels, weight)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_every_way_of_calling() -> None:
    x, y, w = tensors(weighted=True)
    term = fl.Tversky(alpha=0.3, beta=0.7)  # called here for the first time
    for function in (
        lambda x: term(x, y),
        lambda x: fl.dice_ce_loss(x, y, w, ce_factor=0.5, ce_weight=[1, 2, 3], label_smoothing=0.1),
        lambda x: fl.dice_focal_loss(x, y, gamma=1.5) + fl.dice_loss(x, y, batch=True),
        lambda x: fl.generalized_dice_loss(x, y, reduction="none"),
        lambda x: fl.tversky_loss(x, y) + fl.tversky_loss(x, y, beta=0.3, activation="sigmoid"),
        lambda x: fl.brier_loss(x, y) + fl.poly_cross_entropy_loss(x, y, w, epsilon=2),
        lambda x: LOSS(x, y) * term(x, y),
    ):
        got = value_and_gradient(compiled(function), x)
        torch.testing.assert_close(got, value_and_gradient(function, x))


def test_the_first_tensor_that_arrives_is_traced() -> None:
    """Tracing works though the PyTorch adapter is not imported before the first tensor."""
    run_python(
        "import fastloss as fl\n"
        "loss, term = fl.Dice() + fl.CrossEntropy(), fl.Focal()\n"
        "import torch\n"
        "fast = torch.compile(lambda x, y: loss(x, y) + fl.dice_loss(x, y) + term(x, y),\n"
        "                     fullgraph=True, backend='aot_eager')\n"
        "x = torch.zeros(1, 2, 8, requires_grad=True)\n"
        "fast(x, torch.zeros(1, 8, dtype=torch.int64)).backward()\n"
        "assert x.grad.any()\n"
    )


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_loss_made_inside_a_compiled_function(fullgraph: bool) -> None:
    x, y, _ = tensors()
    weighted, foreign = fl.CrossEntropy(weight=[1, 2, 3]), LogCoshDice(smooth_nr=0.5)
    for function in (
        lambda x, n: fl.Dice(batch=True, reduction="sum")(x, y),
        lambda x, n: (fl.Dice() + fl.CrossEntropy(weight=2.0))(x, y),
        lambda x, n: (0.5 * fl.Tversky(alpha=n, beta=0.3) + fl.Focal(gamma=n) / 2)(x, y),
        lambda x, n: fl.Loss(fl.Dice(), fl.CrossEntropy(), activation="sigmoid")(x, y),
        lambda x, n: (fl.Dice() + weighted - n * foreign)(x, y),
        lambda x, n: sum([fl.TopKCrossEntropy(k=30), LogCoshDice()])(x, y),
        lambda x, n: ft.DiceCE(ce_factor=0.5, reduction="none")(x, y),
    ):
        fast = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
        for n in (0.1, 0.2, 0.3):
            got = value_and_gradient(fast, x, n)
            torch.testing.assert_close(got, value_and_gradient(function, x, n), rtol=0, atol=0)


def test_class_weights_inside_a_compiled_function() -> None:
    x, y, _ = tensors()

    def function(x: Any) -> Any:
        return (fl.Dice() + fl.CrossEntropy(weight=[1, 2, 3]))(x, y)

    with pytest.raises(RuntimeError, match="make it outside, and call it inside"):
        compiled(function)(x)
    assert torch.equal(torch.compile(function, backend="aot_eager")(x), function(x))


def test_backend_of_a_compiled_loss() -> None:
    """The backend is chosen when the loss runs, not when it is compiled."""
    x, y, _ = tensors(spatial=(16, 16), dtype=np.float32)
    fast = compiled(LOSS.__call__)
    seen = {}
    for name in ("reference", "numba"):
        with fl.use_backend(need_backend(name)):
            seen[name] = value_and_gradient(fast, x, y)[1]
            assert torch.equal(seen[name], LOSS.gradient(x, y))
    assert not torch.equal(seen["reference"], seen["numba"])


def test_errors_of_a_compiled_loss() -> None:
    x, y, _ = tensors()
    fast = compiled(LOSS.__call__)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\)"):
        fast(x, y + 1)
    one = compiled(fl.Loss(LOSS, activation="sigmoid").__call__)
    with pytest.raises(ValueError, match=r"target: expected 0 or 1 in a mask .* first is 255"):
        one(x[:, :1], 255 * (y > 0))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        torch.ops.fastloss.loss(leaf, y, None, operand_of(LOSS), name_of(LOSS), "", "")[0],
        leaf,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="fastloss computes first derivatives alone"):
        gradient.sum().backward()


# ------------------------------------------------------------------ torch.export


@pytest.mark.parametrize("strict", [False, True])
def test_export(tmp_path: Path, strict: bool) -> None:
    """An exported loss accepts any batch, and runs from a file in another process."""
    net = Net(fl.Dice(weight=[1, 2, 3]) + 0.5 * fl.CrossEntropy(weight=[0.5, 1, 2]))
    volume, labels = volumes(2, 4)
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        net, (volume, labels), dynamic_shapes=(batch, batch), strict=strict
    )
    again = volumes(3, 4, seed=1)
    with torch.no_grad():
        expected = net(*again)
        torch.testing.assert_close(program.module()(*again), expected)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(again, tmp_path / "volumes.pt")
    printed = run_python(
        "import torch, fastloss.torch\n"
        f"volumes = torch.load({str(tmp_path / 'volumes.pt')!r})\n"
        f"program = torch.export.load({str(tmp_path / 'net.pt2')!r})\n"
        "print(program.module()(*volumes).item())\n"
    )
    assert float(printed) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.slow
def test_export_of_a_foreign_term_stays_in_its_process(tmp_path: Path) -> None:
    net = Net(fl.Loss(LogCoshDice()))
    volume, labels = volumes(2, 4)
    program = torch.export.export(net, (volume, labels))
    torch.testing.assert_close(program.module()(volume, labels), net(volume, labels))
    torch.export.save(program, tmp_path / "net.pt2")
    result = python(
        "import torch, fastloss.torch\n"
        f"torch.export.load({str(tmp_path / 'net.pt2')!r}).module()"
        "(torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.int64))\n"
    )
    assert result.returncode != 0
    assert "the term LogCoshDice of torch_support is not one of fastloss" in result.stderr


# ------------------------------------------------------------------ torch.jit.trace


@pytest.mark.parametrize("part", [*PARTS, *TOP_K], ids=repr)
def test_traced(part: Any) -> None:
    """A trace records the loss for any arrays, and no number of the example."""
    x, y, w = tensors(weighted=True)
    traced = torch.jit.trace(part.__call__, (x, y, w))
    for seed, batch, spatial in ((1, 2, (2, 3)), (2, 3, (4, 2))):
        arrays = tensors(weighted=True, seed=seed, batch=batch, spatial=spatial)
        for _ in range(3):  # the runtime optimises after a few calls
            got = value_and_gradient(traced, *arrays)
        torch.testing.assert_close(got, value_and_gradient(part, *arrays), rtol=0, atol=0)


def test_every_way_of_calling_traced() -> None:
    x, y, w = tensors(weighted=True, spatial=(4, 4))
    other = tensors(weighted=True, spatial=(4, 4), seed=1)
    soft = tensors(kind="soft", spatial=(4, 4), seed=2)[1]
    module = ft.DiceCE(ce_weight=[1, 2, 3], ignore_index=7)
    for function in (
        LOSS.__call__,
        lambda x, y, w: fl.dice_ce_loss(x, y, w, ce_weight=[1, 2, 3]),
        module,
        lambda x, y, w: ft.DiceCE(reuse_logits=True)(x * 1, y, w),
    ):
        traced = torch.jit.trace(function, (x, y, w))
        for arrays in (other, (other[0], soft, other[2])):
            torch.testing.assert_close(
                value_and_gradient(traced, *arrays), value_and_gradient(function, *arrays)
            )


def test_deep_supervision_traced() -> None:
    x, y, w = tensors(weighted=True, spatial=(4, 4))
    module = ft.DeepSupervision(ft.DiceCE())

    def outputs(x: Any, y: Any, w: Any) -> Any:
        return module([x, x[..., ::2, ::2]], y, w)

    traced = torch.jit.trace(outputs, (x, y, w))
    other = tensors(weighted=True, batch=3, spatial=(6, 8), seed=1)
    torch.testing.assert_close(
        value_and_gradient(traced, *other), value_and_gradient(outputs, *other)
    )


def test_a_traced_model_is_saved(tmp_path: Path) -> None:
    net = Net(ft.DiceCE(ce_weight=[0.5, 1, 2]))
    traced = torch.jit.trace(net, volumes(2, 4))
    again = volumes(3, 5, seed=1)
    torch.testing.assert_close(gradients(traced, *again), gradients(net, *again))
    torch.jit.save(traced, tmp_path / "net.pt")
    torch.save(again, tmp_path / "volumes.pt")
    printed = run_python(
        "import torch, fastloss.torch\n"
        f"net = torch.jit.load({str(tmp_path / 'net.pt')!r})\n"
        f"value = net(*torch.load({str(tmp_path / 'volumes.pt')!r}))\n"
        "value.backward()\n"
        "print(value.item(), next(net.parameters()).grad.sum().item())\n"
    )
    value, *grads = gradients(net, *again)
    expected = [value.item(), grads[0].sum().item()]
    assert [float(n) for n in printed.split()] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_a_trace_cannot_record_is_refused() -> None:
    x, y, _ = tensors()
    statistics = LOSS.statistics(x, y)
    for function in (
        LOSS.value_and_grad,
        LOSS.gradient,
        fl.Dice().gradient,
        lambda x, y: torch.tensor(LOSS.statistics(x, y).sums),
        lambda x, y: LOSS.gradient(x, y, statistics=statistics),
    ):
        with pytest.raises(RuntimeError, match=r"^logits: torch\.jit\.trace .* torch\.export"):
            torch.jit.trace(function, (x, y))


# ------------------------------------------------------------------ names of losses


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_a_name_is_the_loss(part: Any) -> None:
    from fastloss.naming import loss_of

    loss = fl.Loss(part, **options("sigmoid", "ignored"))
    name = name_of(loss)
    x, y, w = tensors("sigmoid", "ignored", weighted=True)
    again = loss_of(name, np.concatenate(loss.operands))
    np.testing.assert_array_equal(again(x, y, w), loss(x, y, w))
    if "LogCosh" not in name:
        assert name_of(fl.Loss(copy.deepcopy(part), **options("sigmoid", "ignored"))) == name


def test_bad_names() -> None:
    from fastloss.naming import loss_of

    calls = ("os:getcwd", "fastloss:Loss", "fastloss.backends:os.getcwd", "fastloss:Dice.mro")
    terms = (f'{{"terms": [["{call}", {{}}, {{}}]], "options": {{}}}}' for call in calls)
    for bad in ("", "{}", "[]", *terms):
        with pytest.raises(ValueError, match=r"^loss: "):
            loss_of(bad)


def test_a_pickled_loss_is_named_anew() -> None:
    loss = LogCoshDice() + fl.Dice()
    name = name_of(loss)
    assert name_of(pickle.loads(pickle.dumps(loss))) != name  # not registered under that name
    assert name_of(loss) == name
