"""Losses of every lesion through PyTorch, its ranks, nnU-Net's compounds and JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need, need_gloo

torch = need("torch")

import fastloss as fl  # noqa: E402
import fastloss.torch as ft  # noqa: E402

LOSSES = {
    "cc": lambda: fl.CCDiceCE(weight="inverse_volume") + 0.5 * fl.Dice(batch=True),
    "blob": lambda: fl.BlobLoss(),
    "apart": lambda: fl.CCDiceCE(per_class=True) + fl.Dice(),
}


def tensors() -> tuple[Any, Any]:
    """Logits of three samples, and labels: several lesions, none, and one."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 3, 5, 6, 4)))
    y = rng.integers(1, 3, (3, 5, 6, 4)) * (rng.uniform(size=(3, 5, 6, 4)) < 0.06)
    y[1] = 0
    y[2] = 0
    y[2, 1:3, 2:4, 1] = 2
    return x, torch.tensor(y)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ahead", [False, True])
def test_autograd(name: str, ahead: bool) -> None:
    x, y = tensors()
    loss = LOSSES[name]()
    right = loss.value_and_grad(x.numpy(), y.numpy())
    options = {"fields": loss.fields(y, classes=3)} if ahead else {}
    x.requires_grad_()
    for called in (loss, ft.Loss(loss)):
        value = called(x, y, **options)
        (gradient,) = torch.autograd.grad(3 * value, x)
        assert value.item() == pytest.approx(float(right[0]), rel=1e-12)
        assert np.allclose(gradient.numpy(), 3 * right[1], atol=1e-13)


def test_modules() -> None:
    x, y = tensors()
    assert torch.equal(ft.CCDiceCE(without="skip")(x, y), fl.CCDiceCE(without="skip")(x, y))
    assert torch.equal(ft.BlobLoss(beta=3.0)(x, y), fl.BlobLoss(beta=3.0)(x, y))
    assert torch.equal(fl.blob_loss(x, y, beta=3.0), fl.BlobLoss(beta=3.0)(x, y))
    y[0, 0] = 9
    ignoring = fl.Loss(fl.CCDiceCE(), ignore_index=9)
    assert torch.equal(ft.CCDiceCE(ignore_index=9)(x, y), ignoring(x, y))


def test_compiled() -> None:
    torch._dynamo.reset()
    x, y = tensors()
    x.requires_grad_()
    for loss in (LOSSES["cc"](), LOSSES["apart"](), fl.PerRegion(fl.Dice(), 2 * fl.Focal())):
        regions = loss.fields(y, classes=3)["regions"]
        module = torch.compile(ft.Loss(loss), backend="aot_eager", fullgraph=True)
        value = module(x, y, regions=regions, region_count=50)
        (gradient,) = torch.autograd.grad(value, x)
        right = loss.value_and_grad(x.detach().numpy(), y.numpy())
        assert value.item() == pytest.approx(float(right[0]), rel=1e-12)
        assert np.allclose(gradient.numpy(), right[1], atol=1e-14)
        with pytest.raises(Exception, match="regions: compiled code cannot make them"):
            module(x, y)


def test_jax() -> None:
    jax = need("jax")
    x, y = (a.numpy() for a in tensors())
    x, y = jax.numpy.asarray(x, "float32"), jax.numpy.asarray(y, "int32")
    for loss in (fl.BlobLoss(), fl.CCDiceCE(per_class=True)):
        regions = np.asarray(loss.fields(np.asarray(y), classes=3)["regions"])
        right = loss.value_and_grad(np.asarray(x), np.asarray(y))
        assert float(loss(x, y)) == pytest.approx(float(right[0]), rel=1e-6)

        def of(z: Any, loss: Any = loss, **options: Any) -> Any:
            return loss(z, y, **options)

        options = {"regions": regions, "region_count": int(regions.max()) + 1}
        compiled = jax.jit(jax.value_and_grad(lambda z, of=of, options=options: of(z, **options)))
        value, gradient = compiled(x)
        assert float(value) == pytest.approx(float(right[0]), rel=1e-6)
        assert np.allclose(gradient, right[1], atol=1e-7)
        with pytest.raises(ValueError, match="regions: a program that JAX transforms cannot make"):
            jax.grad(of)(x)


# ------------------------------------------------------------------ ranks


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    fl.set_num_threads(1)
    x, y = tensors()
    results = {}
    for name, make in LOSSES.items():
        loss = make()
        regions = loss.fields(y, classes=3)["regions"]
        parts = {
            "batch": (slice(0, 1) if rank == 0 else slice(1, 3),),
            "empty": (slice(0, 3) if rank == 0 else slice(3, 3),),
            "volume": (..., slice(0, 2) if rank == 0 else slice(2, 6), slice(None)),
        }
        for how, part in parts.items():
            shard = "volume" if how == "volume" else "batch"
            own = x[part].clone().requires_grad_()
            options = {"regions": regions[part]} if how == "volume" else {}
            value = ft.Loss(loss, process_group=True, shard=shard)(own, y[part], **options)
            value.backward()
            results[name, how] = (value.detach(), own.grad / 2, part)
        try:
            ft.Loss(loss, process_group=True, shard="volume")(x, y)
        except ValueError as error:
            results[name, "refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Value and gradient on every rank are those of all the data."""
    need_gloo()
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    x, y = tensors()
    for name, make in LOSSES.items():
        value, gradient = make().value_and_grad(x.numpy(), y.numpy())
        for rank in range(2):
            results = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
            for how in ("batch", "empty", "volume"):
                got, got_gradient, part = results[name, how]
                assert got.item() == pytest.approx(float(value), rel=1e-12)
                assert np.allclose(got_gradient.numpy(), gradient[part], atol=1e-14)
            assert "needs the regions of the whole" in results[name, "refused"]


# ------------------------------------------------------------------ nnU-Net

OPTIONS = {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False}


@pytest.mark.parametrize(("name", "kind"), [("cc", fl.CCDiceCE), ("blob", fl.BlobDiceCE)])
@pytest.mark.parametrize("compound", ["DC_and_CE_loss", "DC_and_topk_loss"])
def test_nnunet(name: str, kind: Any, compound: str) -> None:
    ours = need("fastloss.nnunet")
    made = {"cc": ours.WithCCDiceCE, "blob": ours.WithBlobs}[name]
    x, y = tensors()
    y[0, 0] = 3  # to be ignored
    extra = {"k": 20} if compound == "DC_and_topk_loss" else {}
    loss = getattr(ours, compound)(OPTIONS, extra, ignore_label=3)
    term = fl.Loss(kind(weight="inverse_volume"), ignore_index=3)
    target = y[:, None].to(torch.int16)
    coarse, x2 = target[:, :, ::2, ::2, ::2], x[..., ::2, ::2, ::2].clone()
    deep = ours.DeepSupervisionWrapper(loss, (0.75, 0.25))
    whole = made(deep, 0.3, lesion_weight="inverse_volume")
    z, z2 = x.clone().requires_grad_(), x2.clone().requires_grad_()
    value = whole([z, z2], [target, coarse])
    value.backward()
    right = 0.0
    for weight, a, b in ((0.75, x, target), (0.25, x2, coarse)):
        a = a.clone().requires_grad_()
        one = weight * (loss(a, b) + 0.3 * term(a, b))
        one.backward()
        assert torch.allclose(a.grad, z.grad if a.shape == z.shape else z2.grad, atol=1e-10)
        right += one.item()
    assert value.item() == pytest.approx(right, rel=1e-6)

    transform = whole.append_fields(3)
    samples = [
        transform(segmentation=[t, c])["segmentation"] for t, c in zip(target, coarse, strict=True)
    ]
    batch = [torch.stack(each) for each in zip(*samples, strict=True)]
    assert len(batch) == 4
    assert batch[2].shape == y.shape
    single = made(loss, 0.3, lesion_weight="inverse_volume")
    ahead = single(x, [target, batch[2]])
    assert ahead.item() == pytest.approx(single(x, target).item(), rel=1e-9)
    assert whole([x, x2], batch).item() == pytest.approx(value.item(), rel=0.3)


def test_nnunet_refuses_regions() -> None:
    ours = need("fastloss.nnunet")
    loss = ours.DC_and_BCE_loss({}, OPTIONS)
    with pytest.raises(TypeError, match="loss: regions may overlap"):
        ours.WithCCDiceCE(loss)
    with pytest.raises(ValueError, match=r"weight: .*got 'volume'"):
        ours.WithBlobs(ours.DC_and_CE_loss(OPTIONS, {}), lesion_weight="volume")
