"""Losses inside graphs: torch.compile, torch.export, fake tensors, and the operators they call."""

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

LOSS = fl.Dice() + 0.5 * fl.CrossEntropy(label_smoothing=0.1)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Recompilations of one test do not count against the limit of the next."""
    yield
    if torch is not None:
        torch.compiler.reset()


def compiled(function: Any, **how: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **how)


def name_of(loss: Any) -> str:
    from fastloss.naming import text_of

    return text_of(loss)


# ------------------------------------------------------------------ operators


@pytest.mark.parametrize("part", [*PARTS, *TOP_K], ids=repr)
def test_opcheck(part: Any) -> None:
    """PyTorch's own tests of an operator: schema, fake tensors, autograd, dynamic shapes."""
    import fastloss.torch  # noqa: F401  registers the operators

    x, y, w = tensors(weighted=True, dtype=np.float32)
    name = name_of(part)
    loss, gradient = torch.ops.fastloss.loss, torch.ops.fastloss.gradient
    torch.library.opcheck(loss, (x.clone().requires_grad_(), y, w, name, "", ""))
    value, sums, voxels = loss(x, y, w, name, "", "")
    upstream = torch.ones_like(value)
    torch.library.opcheck(gradient, (x, y, w, sums, voxels, upstream, name, "", ""))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_opcheck_of_dtypes_and_layouts(dtype: str, activation: str) -> None:
    import fastloss.torch  # noqa: F401

    x, g, _ = tensors(activation, "soft", spatial=(3, 4, 5))
    x = x.to(getattr(torch, dtype))
    name = name_of(fl.Loss(LOSS, activation=activation))
    operator = torch.ops.fastloss.loss
    for logits in (x.contiguous(memory_format=torch.channels_last_3d), x[..., 1:]):
        target = g[..., -logits.shape[-1] :]
        torch.library.opcheck(
            operator, (logits.detach().requires_grad_(), target, None, name) + ("",) * 2
        )


@pytest.mark.parametrize("part", PARTS, ids=repr)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_shapes_without_memory(part: Any, channel_axis: int) -> None:
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
    loss = copy.deepcopy(loss)  # that nothing has called yet
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
        lambda x: LOSS(x, y) * term(x, y),
    ):
        got = value_and_gradient(compiled(function), x)
        torch.testing.assert_close(got, value_and_gradient(function, x))


def test_the_first_tensor_that_arrives_is_traced() -> None:
    """Nothing of what serves PyTorch has been imported then, as no tensor was there before."""
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


def test_a_loss_made_inside_a_compiled_function() -> None:
    x, y, _ = tensors()
    for make in (fl.Dice, lambda: fl.Loss(LOSS)):
        with pytest.raises(RuntimeError, match="make it outside, and call it inside"):
            compiled(lambda x, make=make: make()(x, y))(x)


def test_backend_of_a_compiled_loss() -> None:
    """Chosen where it runs, not where it was compiled."""
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
        torch.ops.fastloss.loss(leaf, y, None, name_of(LOSS), "", "")[0], leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="fastloss computes first derivatives alone"):
        gradient.sum().backward()


# ------------------------------------------------------------------ torch.export


@pytest.mark.parametrize("strict", [False, True])
def test_export(tmp_path: Path, strict: bool) -> None:
    """Exported with any batch, saved, and run by a process that knows no more than the file."""
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


# ------------------------------------------------------------------ names of losses


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_a_name_is_the_loss(part: Any) -> None:
    from fastloss.naming import loss_of

    loss = fl.Loss(part, **options("sigmoid", "ignored"))
    name = name_of(loss)
    x, y, w = tensors("sigmoid", "ignored", weighted=True)
    np.testing.assert_array_equal(loss_of(name)(x, y, w), loss(x, y, w))
    if "LogCosh" not in name:
        assert name_of(fl.Loss(copy.deepcopy(part), **options("sigmoid", "ignored"))) == name


def test_bad_names() -> None:
    from fastloss.naming import loss_of

    calls = ("os:getcwd", "fastloss:Loss", "fastloss.backends:os.getcwd", "fastloss:Dice.mro")
    for bad in ("", "{}", "[]", *(f'{{"terms": [[1, "{call}", {{}}]]}}' for call in calls)):
        with pytest.raises(ValueError, match=r"^loss: "):
            loss_of(bad)


def test_a_pickled_loss_is_named_anew() -> None:
    loss = LogCoshDice() + fl.Dice()
    name = name_of(loss)
    assert name_of(pickle.loads(pickle.dumps(loss))) != name  # another term, not known by that name
    assert name_of(loss) == name
