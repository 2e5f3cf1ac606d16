"""The drop-ins for MONAI's modules around a loss."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
from support import need

torch = need("torch")
monai_losses = need("monai.losses")
ours = need("fastloss.monai")

BOTH = (ours, monai_losses)
SOFTMAX: dict[str, Any] = {"to_onehot_y": True, "softmax": True}


def levels(dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 7, 6), (4, 4, 3), (3, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1)]
    return [torch.randn(2, 3, *s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def labels() -> Any:
    return torch.randint(0, 3, (2, 1, 8, 7, 6), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("name", ["DeepSupervisionLoss", "MaskedLoss"])
def test_signature(name: str) -> None:
    for member in ("__init__", "forward"):
        own, theirs = (
            inspect.signature(getattr(getattr(m, name), member)).parameters for m in BOTH
        )
        assert [(p.name, p.default, p.kind) for p in own.values()] == [
            (p.name, p.default, p.kind) for p in theirs.values()
        ]


@pytest.mark.parametrize("mode", ["exp", "two", "same", "unknown"])
@pytest.mark.parametrize("of", [ours, monai_losses, None])
def test_deep_supervision(of: Any, mode: str) -> None:
    """Around losses of both libraries, and a function."""
    for weights in (None, [3.0, 2.0, 0.5], [0.1] * 6, [1.0] * 8):
        results = []
        for module in BOTH:
            inner = (lambda x, y: (x.mean(1) - y[:, 0]).abs().mean()) if of is None else (
                of.DiceCELoss(**SOFTMAX)
            )  # fmt: skip
            loss = module.DeepSupervisionLoss(inner, weight_mode=mode, weights=weights)
            inputs = levels()
            value = loss(inputs, labels())
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
            for count in range(8):
                assert len(loss.get_weights(count)) == max(count, 1)
            results[-1] += (torch.tensor(loss.get_weights(3)), loss(inputs[0], labels()).detach())
        torch.testing.assert_close(*results)


def test_deep_supervision_of_other_dtypes() -> None:
    """Half outputs, and labels of integers, which MONAI cannot resize."""
    loss = ours.DeepSupervisionLoss(ours.DiceCELoss(**SOFTMAX))
    expected = loss([x.half().float() for x in levels()], labels())
    half = levels(torch.float16)
    for dtype in (torch.uint8, torch.int64, torch.int16):
        value = loss(half, labels().to(dtype))
        torch.testing.assert_close(value, expected)
    value.backward()
    assert all(x.grad.dtype == torch.float16 for x in half)
    theirs = ours.DeepSupervisionLoss(monai_losses.DiceCELoss(**SOFTMAX))
    torch.testing.assert_close(theirs(half, labels()), expected, rtol=1e-5, atol=1e-6)


def test_deep_supervision_compiled() -> None:
    torch.compiler.reset()
    loss = ours.DeepSupervisionLoss(ours.SoftDiceclDiceLoss(**SOFTMAX))
    inputs = levels()[:3]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, labels()), loss(inputs, labels()))


def test_deep_supervision_subclass() -> None:
    """Its methods are called, as MONAI's are."""
    values = []
    for module in BOTH:
        base = module.DeepSupervisionLoss
        kind = type("Own", (base,), {"get_weights": lambda self, levels=1: [2.0] * levels})
        values.append(kind(module.DiceLoss(**SOFTMAX))(levels(), labels()).detach())
    torch.testing.assert_close(*values)


def test_no_input() -> None:
    for module in BOTH:
        with pytest.raises(ValueError, match="None"):
            module.DeepSupervisionLoss(module.DiceLoss())(None, labels())


MASK = torch.rand(2, 1, 8, 7, 6, generator=torch.Generator().manual_seed(2)) < 0.6


@pytest.mark.parametrize("mask", [MASK, MASK[:1].float(), MASK[:1, :, 0], None])
@pytest.mark.parametrize("kind", ["class", "module", "other module", "function"])
def test_masked(kind: str, mask: Any) -> None:
    results = []
    for module in BOTH:
        x = levels()[0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if kind == "class":
                loss = module.MaskedLoss(module.TverskyLoss, False, to_onehot_y=True, alpha=0.3)
            elif kind == "function":
                loss = module.MaskedLoss(lambda x, y: (x * y).mean())
            else:
                of = module if kind == "module" else monai_losses
                loss = module.MaskedLoss(of.DiceLoss(**SOFTMAX))
            value = loss(x, labels(), mask)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
        results[-1] += (torch.tensor(len(caught)),)
        assert {w.category for w in caught} <= {UserWarning}
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "mask", [MASK[:, 0], MASK.expand(2, 3, 8, 7, 6), MASK.repeat(2, 1, 1, 1, 1)]
)
@pytest.mark.filterwarnings("ignore:mask", "ignore:Dim")
def test_bad_masks(mask: Any) -> None:
    for module in BOTH:
        with pytest.raises(ValueError, match=r"(?i)mask"):
            module.MaskedLoss(module.DiceLoss, to_onehot_y=True)(levels()[0], labels(), mask)


def test_no_loss() -> None:
    for module in BOTH:
        with pytest.raises(ValueError, match="callable"):
            module.MaskedLoss(3)
