"""MONAI's losses of the longer list: values, gradients, shapes and errors as in MONAI."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from support import need

torch = need("torch")
theirs = need("monai.losses")
unified = need("monai.losses.unified_focal_loss")

import fastloss.monai as ours  # noqa: E402

FAR = np.array([[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]], np.float32)


def agree(own: Any, other: Any, x: Any, *arrays: Any, rtol: float = 2e-6) -> None:
    """Value, its shape and dtype, the gradient, and the warnings, if there are any."""
    results = []
    for module in (own, other):
        logits = x.clone().requires_grad_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = module(logits, *arrays)
        generator = torch.Generator().manual_seed(0)
        value.backward(torch.randn(value.shape, generator=generator).to(value.dtype))
        single = [str(w.message) for w in caught if "single channel" in str(w.message)]
        results.append((value.detach(), logits.grad, len(single)))
    (value, gradient, warned), (right, expected, wanted) = results
    torch.testing.assert_close(value, right, rtol=1e-6, atol=1e-6)
    assert (gradient - expected).norm() <= rtol * expected.norm() + 1e-12
    assert min(warned, 1) == min(wanted, 1)


def test_generalized_wasserstein_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    for mode, reduction, shape, far in itertools.product(
        ("default", "GDL"), ("mean", "sum", "none"), ((4, 5), (3, 4, 5)),
        (FAR, 3 * FAR.astype("float64"), torch.tensor(FAR)),
    ):  # fmt: skip
        x = torch.randn(2, 3, *shape, generator=generator)
        y = torch.randint(0, 3, (2, 1, *shape), generator=generator)
        names = ("dist_matrix", "weighting_mode", "reduction", "smooth_nr", "smooth_dr")
        options = dict(zip(names, (far, mode, reduction, 1e-3, 1e-4), strict=True))
        own = ours.GeneralizedWassersteinDiceLoss(**options)
        agree(own, theirs.GeneralizedWassersteinDiceLoss(**options), x, y)
    own, other = (m.GeneralizedWassersteinDiceLoss(FAR) for m in (ours, theirs))
    agree(own, other, x[:, :, 0, 0, 0], y[:, 0, 0, 0, 0])  # no spatial axis
    agree(own, other, x.to(memory_format=torch.channels_last_3d), y[:, 0].to(torch.uint8))
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    agree(compiled, other, x, y)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\)"):
        own(x, y + 1)
    for options in ({"dist_matrix": FAR[:2]}, {"weighting_mode": "x"}, {"reduction": "x"}):
        for module in (ours, theirs):
            with pytest.raises(ValueError, match=r"\w"):
                module.GeneralizedWassersteinDiceLoss(**{"dist_matrix": FAR, **options})


PAIRS = (
    (ours.AsymmetricFocalLoss, unified.AsymmetricFocalLoss),
    (ours.AsymmetricFocalTverskyLoss, unified.AsymmetricFocalTverskyLoss),
    (ours.AsymmetricUnifiedFocalLoss, theirs.AsymmetricUnifiedFocalLoss),
)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
def test_unified_focal(pair: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for reduction, labels, ignored, gamma, shape in itertools.product(
        ("mean", "sum", "none"), (False, True), (None, 0, 255), (0.5, 0.75), ((4, 5), (3, 4, 5))
    ):
        p = torch.rand(2, 2, *shape, generator=generator)
        p.flatten(2)[0, :, 0] = torch.tensor([1.0, 0.0])  # which is clamped
        y = torch.randint(0, 2, (2, 1, *shape), generator=generator)
        if ignored == 255:
            y.flatten(1)[0, 3] = 255
        g = y if labels else torch.cat([y == 0, y == 1], 1).float()
        options = {"reduction": reduction, "to_onehot_y": labels, "ignore_index": ignored}
        own, other = (kind(gamma=gamma, delta=0.6, **options) for kind in pair)
        agree(own, other, p, g)
    for kind in pair:
        with pytest.raises(ValueError, match=r"shape"):
            kind()(p, torch.zeros(2, 2, 3, 4, 6))
        with pytest.raises(ValueError, match=r"\w"):
            kind(reduction="x")


def test_unified_focal_of_a_single_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 1, 4, 5, generator=generator)
    y = torch.randint(0, 2, (2, 1, 4, 5), generator=generator).float()
    own, other = (m.AsymmetricUnifiedFocalLoss for m in (ours, theirs))
    for options in ({}, {"to_onehot_y": True}, {"ignore_index": 1}, {"weight": 0.2, "delta": 0.4}):
        agree(own(**options), other(**options), p, y)
    for kind in (own, other):
        with pytest.raises(ValueError, match=r"4 or 5|spatial axes"):
            kind()(p[..., 0], y[..., 0])
        with pytest.raises(ValueError, match=r"[Mm]ax|at most 1"):
            kind()(p, 2 * y + 1)
    replaced = own()
    replaced.asy_focal_loss = torch.nn.MSELoss()  # a part of the user's counts
    right = other()
    right.asy_focal_loss = torch.nn.MSELoss()
    agree(replaced, right, p, y)


def test_neighbour_aware_calibration() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim, size, how, distance in itertools.product(
        (2, 3), (3, 4), ("mean", "gaussian"), ("l1", "l2")
    ):
        shape = (6, 7, 5)[:dim]
        x = 3 * torch.randn(2, 3, *shape, generator=generator)
        y = torch.randint(0, 3, (2, *shape), generator=generator)
        arguments = (3, dim, size, how, distance, 0.4, 0.8)
        own, other = (m.NACLLoss(*arguments) for m in (ours, theirs))
        assert list(own.state_dict()) == list(other.state_dict())
        torch.testing.assert_close(own.get_constr_target(y), other.get_constr_target(y))
        agree(own, other, x, y)
    agree(torch.compile(own, backend="eager", fullgraph=True), other, x, y)
    for wrong in ({"kernel_ops": "x"}, {"dim": 1}, {"distance_type": "x"}):
        for module in (ours, theirs):
            with pytest.raises(ValueError, match=r"\w"):
                module.NACLLoss(**{"classes": 3, "dim": 2, **wrong})


def test_signatures() -> None:
    others = {kind.__name__: other for kind, other in PAIRS}
    names = ("GeneralizedWassersteinDiceLoss", "NACLLoss", *others)
    for name in names:
        pair = getattr(ours, name), others.get(name) or getattr(theirs, name)
        for part in (lambda kind: kind, lambda kind: kind.forward):
            own, other = (inspect.signature(part(kind)).parameters for kind in pair)
            assert [(p.name, p.kind) for p in own.values()] == [
                (p.name, p.kind) for p in other.values()
            ]
            assert [p.default for p in own.values()] == [p.default for p in other.values()]
