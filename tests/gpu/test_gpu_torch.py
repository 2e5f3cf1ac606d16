"""CUDA tensors: value and gradient are right and stay on the device, and bad input is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gpu_support import (
    FLOATS,
    check,
    need_gpus,
    need_torch_gpu,
    on_gpu,
    to_numpy,
    torch,
    value_and_gradient,
)
from support import need, norm, one_hot, python, reference, run_python
from torch_support import LogCoshDice

import fastloss as fl

LOSS = fl.Dice() + fl.CrossEntropy()
W3 = [0.5, 1.0, 2.0]
PARTS = [
    fl.CrossEntropy(weight=W3, label_smoothing=0.1),
    fl.Focal(gamma=1.5, alpha=[0.25, 0.5, 0.75]),
    fl.Dice(squared=True, batch=True, include_background=False),
    fl.Jaccard(weight=W3),
    fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75),
    fl.GeneralizedDice(weighting="simple"),
    LogCoshDice(),
    fl.Dice() + 0.5 * fl.CrossEntropy() + fl.Focal(gamma=2.0),
]


@pytest.fixture(autouse=True)
def _torch() -> None:
    need_torch_gpu()


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("classes", [2, 14, 105])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_classes(dtype: str, classes: int) -> None:
    x, y = on_gpu(2, classes, (9, 10, 11), dtype=dtype)
    value, gradient = value_and_gradient(LOSS, x, y)
    assert value.device == gradient.device == x.device
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert gradient.dtype == x.dtype
    check(LOSS, value, gradient, x, y)


@pytest.mark.parametrize("layout", ["channels last", "slice", "reversed axes"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(dtype: str, layout: str) -> None:
    x, y = on_gpu(2, 4, (6, 7, 8), dtype=dtype, layout=layout)
    value, gradient = value_and_gradient(LOSS, x, y)
    check(LOSS, value, gradient, x, y)
    if layout != "slice":
        assert gradient.stride() == x.stride()


@pytest.mark.parametrize("classes", [33, 300])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_many_classes(classes: int, layout: str) -> None:
    x, y = on_gpu(1, classes, (5, 9, 13), layout=layout, labels="int64")
    check(LOSS, *value_and_gradient(LOSS, x, y), x, y)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_terms(part: Any) -> None:
    x, y = on_gpu()
    w = torch.rand(y.shape, device="cuda") + 0.5
    check(part, *value_and_gradient(part, x, y, w), x, y, w)


@pytest.mark.parametrize("k", [10, 100])
def test_the_hardest_voxels(k: float) -> None:
    loss = fl.Loss(fl.Dice(), fl.TopKCrossEntropy(k=k))
    x, y = on_gpu(2, 3, (20, 21, 22))
    check(loss, *value_and_gradient(loss, x, y), x, y)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_dense_targets(activation: str) -> None:
    loss = fl.Loss(LOSS, activation=activation)
    x, y = on_gpu(activation=activation)
    target = torch.tensor(one_hot(to_numpy(y), 3)).to("cuda", torch.float32)
    check(loss, *value_and_gradient(loss, x, target), x, target)


@pytest.mark.parametrize("labels", ["int64", "int32", "uint8", "float32"])
def test_labels_and_those_that_are_ignored(labels: str) -> None:
    loss = fl.Loss(LOSS, ignore_index=255)
    x, y = on_gpu(labels="int64")
    y[:, 1] = 255
    given = y.to(getattr(torch, labels))[:, None]
    check(loss, *value_and_gradient(loss, x, given), x, y)


def test_value_of_every_class_with_upstream_weights() -> None:
    loss = fl.Loss(fl.Dice(reduction="none"), fl.CrossEntropy())
    x, y = on_gpu(2, 5)
    upstream = torch.randn(loss(x, y).shape, device="cuda")
    value, gradient = value_and_gradient(loss, x, y, upstream=upstream)
    assert value.device == x.device
    check(loss, value, gradient, x, y, upstream=to_numpy(upstream).astype(np.float64))


def test_a_term_of_the_users_own() -> None:
    class SquaredDice(fl.RegionTerm):
        """(1 − Dice)²."""

        def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
            size = predicted + reference + self.smooth_dr
            rest = 1 - (2 * overlap + self.smooth_nr) / size
            return rest**2, -4 * rest / size, 2 * rest * (1 - rest) / size

    loss = fl.Loss(SquaredDice(include_background=False), fl.CrossEntropy())
    x, y = on_gpu()
    check(loss, *value_and_gradient(loss, x, y), x, y)


def test_modules_follow_their_weights() -> None:
    import fastloss.torch as ft

    x, y = on_gpu()
    module = ft.CrossEntropy(weight=W3).to("cuda")
    loss = fl.Loss(fl.CrossEntropy(weight=W3))
    check(loss, *value_and_gradient(module, x, y), x, y)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([2.0, 1.0, 0.5]))
    loss = fl.Loss(fl.CrossEntropy(weight=[2.0, 1.0, 0.5]))
    check(loss, *value_and_gradient(module, x, y), x, y)


def test_methods_give_tensors_on_the_device() -> None:
    x, y = on_gpu()
    value, gradient = LOSS.value_and_grad(x, y)
    out = torch.empty_like(x)
    again, same = LOSS.value_and_grad(x, y, out=out)
    assert same is out
    assert torch.equal(gradient, out)
    assert torch.equal(value, again)
    total = sum(LOSS.statistics(x[:, :, i : i + 2], y[:, i : i + 2]) for i in range(0, 5, 2))
    assert total.sums.device == x.device
    torch.testing.assert_close(LOSS.value(total), value, rtol=1e-6, atol=0)
    part = LOSS.gradient(x[:, :, :2], y[:, :2], statistics=total)
    torch.testing.assert_close(part, gradient[:, :, :2], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_to_sum(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device="cuda")
    y = torch.zeros((shape[0], *shape[2:]), dtype=torch.uint8, device="cuda")
    expected, _ = reference(LOSS, to_numpy(x), to_numpy(y))
    value, gradient = value_and_gradient(LOSS, x, y)
    np.testing.assert_allclose(to_numpy(value), expected, rtol=1e-6)
    assert gradient.shape == x.shape


# ------------------------------------------------------------------ bad input


def bad_labels() -> tuple[Any, Any]:
    x, y = on_gpu(labels="int64")
    y[1, 2, 3, 4] = 7
    return x, y


def test_a_label_that_is_no_class() -> None:
    """A bad label makes the value NaN without other harm; validate=True raises the CPU's error."""
    x, y = bad_labels()
    value, gradient = value_and_gradient(LOSS, x, y)
    assert torch.isnan(value)
    assert torch.isnan(gradient[1]).all()
    y[1, 2, 3, 4] = 0
    check(LOSS, *value_and_gradient(LOSS, x, y), x, y)

    x, y = bad_labels()
    with pytest.raises(ValueError, match=r"^target: ") as on_cpu:
        LOSS(to_numpy(x), to_numpy(y))
    with pytest.raises(ValueError, match=r"^target: ") as on_device:
        fl.Loss(LOSS, validate=True)(x, y)
    assert str(on_device.value) == str(on_cpu.value)


def test_a_negative_weight() -> None:
    x, y = on_gpu()
    w = torch.ones(y.shape, device="cuda")
    w[0, 0, 0, 0] = -1
    assert torch.isnan(LOSS(x, y, w))
    with pytest.raises(ValueError, match=r"^voxel_weight: "):
        fl.Loss(LOSS, validate=True)(x, y, w)


@pytest.mark.parametrize("name", ["target", "voxel_weight", "out"])
def test_arrays_in_two_memories(name: str) -> None:
    x, y = on_gpu()
    arrays = {"target": y, "voxel_weight": torch.ones(y.shape, device="cuda"), "out": x.clone()}
    arrays[name] = arrays[name].cpu()
    with pytest.raises(ValueError, match=rf"^{name}: .*CUDA device 0.*CPU memory"):
        LOSS.value_and_grad(x, arrays["target"], arrays["voxel_weight"], out=arrays["out"])
    with pytest.raises(ValueError, match=r"^target: .*CPU memory.*CUDA device 0"):
        LOSS(x.cpu(), y)


# ------------------------------------------------------------------ in training


def test_mixed_precision_with_a_scaled_loss() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv3d(2, 3, 3, padding=1).cuda()
    volume = torch.randn(1, 2, 12, 12, 12, device="cuda")
    _, y = on_gpu(1, 3, (12, 12, 12))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    with torch.autocast("cuda", torch.float16):
        logits = net(volume)
        assert logits.dtype == torch.float16
        logits.retain_grad()
        value = LOSS(logits, y)
    scaler.scale(value).backward()
    check(LOSS, value, logits.grad, logits, y, upstream=65536.0)
    before = net.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0  # no gradient overflowed
    assert not torch.equal(before, net.weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv3d(1, 3, 3, padding=1).cuda()
    volume = torch.randn(2, 1, 8, 8, 8, device="cuda")
    _, y = on_gpu(2, 3, (8, 8, 8))

    def step(volume: Any, labels: Any) -> Any:
        return LOSS(net(volume), labels)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        net.zero_grad()
        value = function(volume, y)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in net.parameters())])
    torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_reuse_of_the_logits() -> None:
    import fastloss.torch as ft

    x, y = on_gpu()
    leaf = x.clone().requires_grad_()
    module = ft.Loss(LOSS, reuse_logits=True)
    module(leaf * 1, y).backward()
    check(LOSS, LOSS(x, y), leaf.grad, x, y)


DISTRIBUTED = """
import torch, torch.distributed as dist, tempfile
import fastloss as fl, fastloss.torch as ft
dist.init_process_group(
    "nccl", init_method=f"file://{tempfile.mkdtemp()}/meet", rank=0, world_size=1,
    device_id=torch.device("cuda", 0),
)
torch.cuda.set_device(0)
terms = fl.Dice(batch=True) + fl.CrossEntropy(), fl.Dice() + fl.CrossEntropy()
for term in terms:
    torch.manual_seed(0)
    net = torch.nn.Conv3d(1, 3, 1).cuda()
    volume = torch.randn(2, 1, 6, 6, 6, device="cuda")
    labels = torch.randint(0, 3, (2, 6, 6, 6), device="cuda")
    alone = term(net(volume), labels)
    alone.backward()
    wanted = [alone.detach(), *(p.grad.clone() for p in net.parameters())]
    for group, shard in ((None, "batch"), (True, "batch"), (True, "volume")):
        net.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(net, device_ids=[0])
        value = ft.Loss(term, process_group=group, shard=shard)(parallel(volume), labels)
        value.backward()
        got = [value.detach(), *(p.grad for p in net.parameters())]
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
dist.destroy_process_group()
print("the same")
"""


def test_data_parallel_over_nccl() -> None:
    """The sums are reduced on the device, by NCCL; with one process."""
    distributed = need("torch.distributed")
    if not (distributed.is_available() and distributed.is_nccl_available()):
        pytest.skip("torch.distributed: built without NCCL")
    assert run_python(DISTRIBUTED).strip().endswith("the same")


def test_a_device_that_is_not_the_current_one() -> None:
    need_gpus(2)
    x, y = on_gpu()
    expected = value_and_gradient(LOSS, x, y)
    value, gradient = value_and_gradient(LOSS, x.to("cuda:1"), y.to("cuda:1"))
    assert value.device == gradient.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(value.to("cuda:0"), expected[0])
    assert torch.equal(gradient.to("cuda:0"), expected[1])
    with pytest.raises(ValueError, match=r"^target: .*CUDA device 1.*CUDA device 0"):
        LOSS(x.to("cuda:1"), y)


def test_without_cupy() -> None:
    """Without CuPy the error names it and the remedy; on a CPU it is not needed."""
    result = python(
        "import sys\nsys.modules['cupy'] = None\nimport torch, fastloss as fl\n"
        "loss, x = fl.Loss(fl.Dice()), torch.zeros(1, 2, 4, 4)\n"
        "y = torch.zeros(1, 4, 4, dtype=torch.uint8)\nloss(x, y)\n"
        "loss(x.cuda(), y.cuda())\n"
    )
    assert result.returncode != 0
    assert "ImportError: arrays on a GPU need CuPy" in result.stderr
    assert "pip install 'fastloss[cuda13]'" in result.stderr


def test_gradients_point_downhill() -> None:
    """Independently of the reference, a step against the gradient lowers the loss as predicted."""
    x, y = on_gpu(2, 4, (16, 16, 16), dtype="float64")
    value, gradient = LOSS.value_and_grad(x, y)
    step = 1e-5 / norm(to_numpy(gradient))
    lower = LOSS(x - step * gradient, y)
    assert float(value - lower) == pytest.approx(step * norm(to_numpy(gradient)) ** 2, rel=1e-4)
