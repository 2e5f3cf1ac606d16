"""Fields, regions and losses of every voxel through PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import example, need, need_gloo

torch = need("torch")

import fastloss as fl  # noqa: E402
import fastloss.torch as ft  # noqa: E402

PHI = fl.Sum("one", "p", 0.0, "distance")


class Boundary(fl.VoxelwiseTerm):
    requires = frozenset({PHI})
    reduction = "mean"

    def linear(self, statistics: fl.Statistics) -> tuple[dict[Any, Any], np.ndarray]:
        return {PHI: 1.0}, statistics.voxels


def tensors(dtype: Any = torch.float64) -> tuple[Any, Any, Any, Any]:
    """Logits, labels, a field of every class, and regions: three and two, and voxels of −1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (2, 5, 6), generator=generator)
    phi = torch.randn(2, 3, 5, 6, generator=generator).half()
    regions = torch.zeros(2, 5, 6, dtype=torch.int16)
    regions[:, 2:] = 1
    regions[0, 4] = 2
    regions[:, 0, 0] = -1
    return x, y, phi, regions


CALLS = {
    "fields": (Boundary() + fl.Dice(), ("fields",)),
    "regions": (fl.Dice() + fl.CrossEntropy(), ("regions",)),
    "both": (Boundary() + fl.Dice(batch=True), ("fields", "regions")),
    "every region": (fl.Dice(reduction="none"), ("regions",)),
    "voxels": (2 * fl.CrossEntropy(reduction="voxel") + fl.Focal(reduction="voxel"), ()),
}


def options(names: tuple[str, ...]) -> dict[str, Any]:
    _, _, phi, regions = tensors()
    known = {"fields": {"distance": phi}, "regions": regions}
    given = {name: known[name] for name in names}
    return {**given, "region_count": 3} if "regions" in names else given


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("as_module", [False, True])
def test_autograd(name: str, as_module: bool) -> None:
    loss, names = CALLS[name]
    x, y, _, _ = tensors()
    x.requires_grad_()
    given = options(names)
    called = ft.Loss(loss) if as_module else loss
    value = called(x, y, **given)
    upstream = torch.rand(value.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    arrays: dict[str, Any] = {k: v.numpy() for k, v in given.items() if k == "regions"}
    if "fields" in given:
        arrays["fields"] = {"distance": given["fields"]["distance"].numpy()}
    right = loss.value_and_grad(x.detach().numpy(), y.numpy(), upstream=upstream.numpy(), **arrays)
    assert np.allclose(value.detach().numpy(), right[0], rtol=1e-12)
    assert np.allclose(gradient.numpy(), right[1], atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: called(z, y, **given), (x,))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()  # Dynamo recompiles a function only a few times
    loss, names = CALLS[name]
    x, y, _, _ = tensors(torch.float32)
    given = options(names)
    fast = torch.compile(
        lambda z, g: loss(z, y, **g).sum(), fullgraph=True, backend=backend, dynamic=False
    )
    found = []
    for function in (fast, lambda z, g: loss(z, y, **g).sum()):
        leaf = x.clone().requires_grad_()
        value = function(leaf, given)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", [fl.boundary_loss, fl.hausdorff_dt_loss])
@pytest.mark.parametrize("given", [False, True])
def test_compiled_functions_of_boundaries(function: Any, given: bool) -> None:
    torch._dynamo.reset()
    x, y = (torch.as_tensor(a) for a in example(2, 3, (5, 6), dtype="float32"))
    loss = fl.Boundary() + fl.HausdorffDT()
    name = "boundary" if function is fl.boundary_loss else "distance"
    fields = {name: loss.fields(y, classes=3)[name]} if given else None

    def called(z: Any) -> Any:
        return function(z, y, spacing=(2, 1), fields=fields)

    fast = torch.compile(called, fullgraph=True, backend="aot_eager")
    found = []
    for call in (fast, called):
        leaf = x.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_exported(name: str) -> None:
    loss, names = CALLS[name]

    class Model(torch.nn.Module):
        def forward(self, z: Any, y: Any, phi: Any, regions: Any) -> Any:
            known = {"fields": {"distance": phi}, "regions": regions}
            given = {name: known[name] for name in names}
            if "regions" in names:
                given["region_count"] = 3
            return loss(z, y, **given)

    arrays = tensors(torch.float32)
    exported = torch.export.export(Model(), arrays).module()
    torch.testing.assert_close(exported(*arrays), Model()(*arrays), rtol=0, atol=0)


def test_saved_tensors_may_be_moved_away() -> None:
    x, y, phi, regions = tensors()
    loss = Boundary() + fl.Dice()
    right = x.clone().requires_grad_()
    loss(right, y, fields={"distance": phi}, regions=regions).backward()
    leaf = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        value = loss(leaf, y, fields={"distance": phi}, regions=regions)
    value.backward()
    assert torch.equal(leaf.grad, right.grad)


def test_errors_name_the_argument() -> None:
    x, y, phi, regions = tensors()
    with pytest.raises(TypeError, match=r"fields\['distance'\]: got a tensor that requires a grad"):
        Boundary()(x, y, fields={"distance": phi.float().requires_grad_()})
    with pytest.raises(ValueError, match=r"fields\['distance'\]: expected"):
        Boundary()(x, y, fields={"distance": phi[:1]})
    with pytest.raises(TypeError, match="regions: expected integers, got float32"):
        fl.Dice()(x, y, regions=regions.float())
    fast = torch.compile(lambda z: fl.Dice()(z, y, regions=regions), backend="aot_eager")
    with pytest.raises(ValueError, match=r"region_count: .* compiled code cannot look for"):
        fast(x)


def _rank(rank: int, address: str, shard: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    x, y, phi, regions = tensors()
    part = (slice(rank, rank + 1),) if shard == "batch" else (slice(None), slice(0, 2))
    if shard == "volume" and rank == 1:
        part = (slice(None), slice(2, 5))
    channels = (part[0], slice(None), *part[1:])
    for loss in (fl.Dice() + Boundary(), fl.Dice(batch=True) + Boundary()):
        whole = x.clone().requires_grad_()
        given = {"fields": {"distance": phi}, "regions": regions}
        right = loss(whole, y, **given)
        right.backward()
        own = x[channels].clone().requires_grad_()
        value = ft.Loss(loss, process_group=True, shard=shard)(
            own,
            y[part],
            fields={"distance": phi[channels]},
            regions=regions[part],
            region_count=3,
        )
        value.backward()
        torch.testing.assert_close(value, right)
        torch.testing.assert_close(own.grad, 2 * whole.grad[channels])
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["batch", "volume"])
def test_ranks(tmp_path: Any, shard: str) -> None:
    need_gloo()
    address = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(_rank, (address, shard), nprocs=2)
