"""One loss over two processes: they train as one process with all the data does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import need_gloo
from torch_support import needs_torch, torch  # noqa: F401

import fastloss as fl

W = [0.5, 1.0, 2.0]
LOSSES = {
    "sums over the batch": lambda: fl.Dice(batch=True) + fl.CrossEntropy(weight=W),
    "value of each sample": lambda: fl.Dice(include_background=False) + fl.CrossEntropy(weight=W),
    "reduction none": lambda: fl.Tversky(alpha=0.3, beta=0.7, reduction="none"),
    "sum": lambda: fl.GeneralizedDice(reduction="sum") + fl.Focal(reduction="sum"),
}
CASES = [(loss, shard, "eager") for loss in LOSSES for shard in ("batch", "volume")]
CASES += [
    ("sums over the batch", "batch", "compiled"),
    ("sums over the batch", "volume", "compiled"),
    ("value of each sample", "volume", "compiled"),
]


def data() -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(3, 1, 6, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (3, 6, 5, 4), generator=generator)
    return volumes, labels, torch.rand(3, 6, 5, 4, generator=generator)


def network() -> Any:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 1), torch.nn.Tanh(), torch.nn.Conv3d(4, 3, 1)
    ).double()


def one_step(net: Any, value: Any) -> tuple[Any, list[Any]]:
    """The value and the parameters after a step of gradient descent."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    value.sum().backward()
    optimizer.step()
    return value.detach(), [p.detach().clone() for p in net.parameters()]


def part_of(rank: int, shard: str) -> tuple[Any, ...]:
    """The samples, or the slab of every sample, that a rank holds: unequal parts."""
    if shard == "batch":
        return (slice(0, 1) if rank == 0 else slice(1, 3),)
    return (..., slice(0, 2) if rank == 0 else slice(2, 6), slice(None), slice(None))


def work(rank: int, folder: str) -> None:
    import fastloss.torch as ft

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    fl.set_num_threads(1)
    group = torch.distributed.new_group([0, 1])
    results = {}
    arrays = data()
    for name, shard, how in CASES:
        torch.compiler.reset()
        process_group = group if how == "eager" else True
        module = ft.Loss(LOSSES[name](), process_group=process_group, shard=shard)
        net = torch.nn.parallel.DistributedDataParallel(network())

        def step(
            volumes: Any, labels: Any, weight: Any, net: Any = net, module: Any = module
        ) -> Any:
            return module(net(volumes), labels, weight)

        if how == "compiled":
            step = torch.compile(step, backend="aot_eager")
        value = step(*(a[part_of(rank, shard)] for a in arrays))
        results[name, shard, how] = one_step(net, value)
    module = ft.Loss(LOSSES["value of each sample"](), process_group=True)
    logits = torch.zeros(1, 3, 4)
    try:
        torch.compile(module, backend="aot_eager")(logits, torch.zeros(1, 4, dtype=torch.int64))
    except Exception as error:
        results["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes computed, for all cases."""
    need_gloo()
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("name", "shard", "how"), CASES)
def test_two_ranks_train_as_one_process(ranks: Any, name: str, shard: str, how: str) -> None:
    net = network()
    volumes, labels, weight = data()
    value, parameters = one_step(net, LOSSES[name]()(net(volumes), labels, weight))
    for results in ranks:
        got_value, got_parameters = results[name, shard, how]
        torch.testing.assert_close(got_value, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_parameters, parameters, rtol=1e-12, atol=1e-12)


def test_counting_samples_under_compile_is_refused(ranks: Any) -> None:
    for results in ranks:
        assert "process_group: under torch.compile" in results["refused"]
