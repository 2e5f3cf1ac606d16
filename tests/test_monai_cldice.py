"""The drop-ins for MONAI's clDice and MCC losses, beyond what all drop-ins are tested for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import need, need_backend, reference

import fastloss as fl

torch = need("torch")
monai_losses = need("monai.losses")
ours = need("fastloss.monai")

LABELS = np.random.default_rng(1).integers(0, 3, (2, 1, 6, 5, 7))
LOGITS = 2 * np.random.default_rng(2).normal(size=(2, 3, 6, 5, 7))
SOFTMAX: dict[str, Any] = {"to_onehot_y": True, "softmax": True}
SKELETONS = ("SoftclDiceLoss", "SoftDiceclDiceLoss")


def value_and_gradient(loss: Any, x: Any, y: Any) -> tuple[Any, Any]:
    leaf = torch.tensor(x).requires_grad_()
    value = loss(leaf, torch.tensor(y))
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_as_monai(name: str, x: Any, y: Any, **options: Any) -> None:
    own, theirs = (getattr(m, name)(**options) for m in (ours, monai_losses))
    torch.testing.assert_close(
        value_and_gradient(own, x, y),
        value_and_gradient(theirs, x, y),
        rtol=2e-5,
        atol=1e-7,
        check_dtype=False,
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", [*SKELETONS, "MCCLoss"])
def test_classes_that_are_absent(name: str, reduction: str, backend: str) -> None:
    """Nothing but background in one sample, and nothing predicted in the other."""
    y = LABELS.astype(np.float32)
    y[0] = 0
    x = LOGITS.astype(np.float32)
    x[1, 0] += 200
    with fl.use_backend(need_backend(backend)):
        for include in (False, True):
            options = SOFTMAX | {"include_background": include, "reduction": reduction}
            assert_as_monai(name, x, y, **options)


@pytest.mark.parametrize("layout", ["channels last", "sliced"])
@pytest.mark.parametrize("name", [*SKELETONS, "MCCLoss"])
def test_layouts(name: str, layout: str) -> None:
    x = torch.tensor(LOGITS)
    if layout == "channels last":
        own = x.to(memory_format=torch.channels_last_3d)
    else:
        own = torch.stack([x, x - 1], -1)[..., 0]
    assert own.stride() != x.stride()
    loss, y = getattr(ours, name)(**SOFTMAX), torch.tensor(LABELS)
    with fl.use_backend(need_backend("cpu")):
        results = []
        for given in (x, own):
            leaf = given.clone() if given is x else given.detach()
            value = loss(leaf.requires_grad_(), y)
            results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", SKELETONS)
def test_finite_differences(name: str) -> None:
    y = torch.tensor(LABELS[:1, :, :3, :3, :4])
    x = torch.tensor(LOGITS[:1, :, :3, :3, :4], requires_grad=True)
    loss = getattr(ours, name)(**SOFTMAX, iter_=2)
    with fl.use_backend(need_backend("cpu")):
        assert torch.autograd.gradcheck(lambda x: loss(x, y), x)


def test_gradient_of_the_target() -> None:
    soft = np.random.default_rng(3).random(LOGITS.shape)
    results = []
    for module in (ours, monai_losses):
        x, y = (torch.tensor(a, requires_grad=True) for a in (LOGITS, soft))
        value = module.SoftclDiceLoss(sigmoid=True)(x, y)
        results.append((value.detach(), *torch.autograd.grad(value, (x, y))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", SKELETONS)
def test_lines(name: str) -> None:
    """One spatial axis, which MONAI does not take; more than three nobody does."""
    loss = getattr(ours, name)(**SOFTMAX)
    line = loss(torch.tensor(LOGITS[..., 0, 0]), torch.tensor(LABELS[..., 0, 0]))
    assert line.isfinite()
    x, y = torch.tensor(LOGITS)[..., None], torch.tensor(LABELS)[..., None]
    with pytest.raises(ValueError, match=r"^input: expected .* with 1 to 3 spatial axes"):
        loss(x, y)


def test_compiled_with_a_schedule() -> None:
    """No graph break, and nothing is compiled anew for another α."""
    torch.compiler.reset()
    loss = ours.SoftDiceclDiceLoss(**SOFTMAX, alpha=0.1)
    count = need("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for alpha in (0.1, 0.2, 0.7):
        loss.alpha = alpha
        found = value_and_gradient(compiled, LOGITS, LABELS)
        torch.testing.assert_close(found, value_and_gradient(loss, LOGITS, LABELS))
    assert count.frame_count == 1
    other = value_and_gradient(loss, LOGITS, LABELS)
    loss.alpha = 0.1
    assert not torch.isclose(other[0], loss(torch.tensor(LOGITS), torch.tensor(LABELS)))


def test_parts_that_are_changed() -> None:
    """They count, as in MONAI."""
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)

    def change(loss: Any, module: Any, which: str) -> None:
        if which == "iter":
            loss.cldice.iter = 0
        elif which == "smooth":
            loss.cldice.smooth = 0.5
        elif which == "alpha":
            loss.alpha = 0.9
        elif which == "dice":
            loss.dice = module.TverskyLoss(softmax=True)
        else:
            loss.cldice.register_forward_hook(lambda m, given, value: value / 2)

    for which in ("iter", "smooth", "alpha", "dice", "hook"):
        values = []
        for module in (ours, monai_losses):
            loss = module.SoftDiceclDiceLoss(**SOFTMAX)
            before = loss(x, y)
            change(loss, module, which)
            values.append(loss(x, y))
            assert not torch.isclose(values[-1], before, rtol=1e-4), which
        torch.testing.assert_close(*values, rtol=1e-5, atol=0, check_dtype=False)


def test_shown() -> None:
    loss = ours.SoftclDiceLoss(iter_=5, sigmoid=True)
    assert repr(loss) == "SoftclDiceLoss(iter_=5, sigmoid=True)"
    assert repr(ours.MCCLoss(batch=True)) == "MCCLoss(batch=True)"


@pytest.mark.parametrize("batch", [False, True])
def test_mcc_of_counts(batch: bool) -> None:
    """The textbook's number, of hard predictions."""
    rng = np.random.default_rng(0)
    p, g = (rng.random((2, 1, 50)) < share for share in (0.4, 0.3))
    pairs = [(p, g)] if batch else list(zip(p, g, strict=True))
    expected = [1 - np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    loss = ours.MCCLoss(batch=batch, reduction="none", smooth_dr=0.0)
    value = loss(torch.tensor(p).double(), torch.tensor(g).double())
    assert value.shape == ((1,) if batch else (2, 1))
    np.testing.assert_allclose(value.ravel(), expected, rtol=1e-12)


def test_mcc_is_fused() -> None:
    """One pass each way, and nothing is expanded."""
    backend = fl.backends.load_backend("reference")
    x, kept = torch.tensor(LOGITS, requires_grad=True), []
    with (
        mock.patch.object(backend, "reduce", wraps=backend.reduce) as reduce,
        mock.patch.object(backend, "apply", wraps=backend.apply) as apply,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        ours.MCCLoss(**SOFTMAX)(x, torch.tensor(LABELS)).backward()
    assert (reduce.call_count, apply.call_count) == (1, 1)
    assert all(t.numel() <= LABELS.size or t.data_ptr() == x.data_ptr() for t in kept)


@pytest.mark.parametrize("backend", ["cpu", "numba", "emulated cuda"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_mcc_on_every_backend(batch: bool, background: bool, reduction: str, backend: str) -> None:
    from fastloss.monai._terms import MatthewsCorrelation

    term = MatthewsCorrelation(
        include_background=background,
        batch=batch,
        smooth_nr=0.5,
        smooth_dr=1e-5,
        reduction=reduction,
    )
    shape = (1 if batch else 2, 2 + background) if reduction == "none" else ()
    assert term.value_shape(2, 3) == shape
    upstream = np.arange(1.0, 1 + np.prod(shape)).reshape(shape) if shape else 2.0
    expected, gradient = reference(term, LOGITS, LABELS[:, 0], upstream=upstream)
    assert np.shape(expected) == shape
    with fl.use_backend(need_backend(backend)):
        found = term.value_and_grad(LOGITS, LABELS[:, 0], upstream=upstream)
    np.testing.assert_allclose(found[0], expected, rtol=1e-10)
    np.testing.assert_allclose(found[1], gradient, rtol=1e-8, atol=1e-12)
