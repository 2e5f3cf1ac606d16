"""One loss over two processes: they train like one process with all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import need_gloo
from torch_support import PARTS, needs_torch, torch, value_and_gradient  # noqa: F401

import fastloss as fl

pytestmark = pytest.mark.slow

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
EMPTY = [(shard, 0, rank) for shard in ("batch", "volume") for rank in (0, 1)]
EMPTY += [("volume", 1, 1)]
"""The kind of shard; the axis, of samples or space, along which a rank is empty; the rank."""
NNUNET = {
    "DC_and_CE_loss": ({}, {}),
    "DC_and_topk_loss": ({}, {"k": 100}),
    "DC_and_BCE_loss": ({}, {}),
}


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
    """The samples of a rank, or its slab of every sample: unequal parts."""
    if shard == "batch":
        return (slice(0, 1) if rank == 0 else slice(1, 3),)
    return (..., slice(0, 2) if rank == 0 else slice(2, 6), slice(None), slice(None))


def logits_and_more() -> tuple[Any, Any, Any]:
    volumes, labels, weight = data()
    return torch.cat([volumes, -volumes, volumes**2], dim=1), labels, weight


def without(arrays: Any, axis: int) -> list[Any]:
    """Logits, labels and weights that are empty along an axis of samples or of space."""
    logits, *others = arrays
    return [logits.narrow(axis + (axis > 0), 0, 0), *(a.narrow(axis, 0, 0) for a in others)]


def nnunet(name: str, ddp: bool) -> Any:
    import fastloss.nnunet

    options = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": ddp}
    arguments = ({}, options) if name == "DC_and_BCE_loss" else (options, NNUNET[name][1])
    return getattr(fastloss.nnunet, name)(*arguments)


def nnunet_target(name: str, labels: Any) -> Any:
    if name != "DC_and_BCE_loss":
        return labels[:, None]
    return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)


def is_compiled(i: int, shard: str) -> bool:
    """Whether to compile: a few losses, as it is slow; it cannot count other ranks' samples."""
    return not i % 4 and (shard == "volume" or fl.Loss(PARTS[i]).sums_over_batch)


def steps_of_empty_rank(rank: int) -> dict[Any, Any]:
    """Value and gradient by this rank's logits, for every loss with an empty rank."""
    import fastloss.torch as ft

    results: dict[Any, Any] = {}
    for i, part in enumerate(PARTS):
        for j, (shard, axis, empty) in enumerate(EMPTY):
            arrays = without(logits_and_more(), axis) if rank == empty else logits_and_more()
            module = ft.Loss(part, process_group=True, shard=shard)
            results[i, j] = value_and_gradient(module, *arrays)
            if is_compiled(i, shard):
                torch.compiler.reset()
                fast = torch.compile(module, backend="aot_eager", fullgraph=True)
                try:
                    results[i, j, "compiled"] = value_and_gradient(fast, *arrays)
                except RuntimeError as error:
                    results[i, j, "refused"] = str(error)
    arrays = logits_and_more()
    for name in NNUNET:
        for compiled in (False, True):
            logits, labels, _ = arrays if rank == 0 else without(arrays, 0)
            module = nnunet(name, ddp=True)
            if compiled:
                torch.compiler.reset()
                module = torch.compile(module, backend="aot_eager")
            target = nnunet_target(name, labels)
            results[name, compiled] = value_and_gradient(module, logits, target)
    return results


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
    results |= steps_of_empty_rank(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of each of two processes, for all cases."""
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


@pytest.mark.parametrize("i", range(len(PARTS)), ids=lambda i: repr(PARTS[i]))
def test_a_rank_that_holds_nothing(ranks: Any, i: int) -> None:
    """Value and gradient on every rank are those of all the data, even if a rank is empty."""
    arrays = logits_and_more()
    value, gradient = value_and_gradient(fl.Loss(PARTS[i]), *arrays)
    for rank, results in enumerate(ranks):
        for j, (shard, axis, empty) in enumerate(EMPTY):
            own = without((gradient,), axis)[0] if rank == empty else gradient
            seen = [results[i, j]]
            if (i, j, "refused") in results:
                assert rank == empty
                assert "a rank without samples cannot know" in results[i, j, "refused"]
            elif is_compiled(i, shard):
                seen.append(results[i, j, "compiled"])
            for got, got_gradient in seen:
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)
                # DistributedDataParallel divides by the number of ranks.
                torch.testing.assert_close(got_gradient / 2, own, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NNUNET)
def test_nnunets_dice_of_all_ranks_where_one_holds_nothing(
    ranks: Any, name: str, compiled: bool
) -> None:
    logits, labels, _ = logits_and_more()
    module = nnunet(name, ddp=False)
    target = nnunet_target(name, labels)
    value, gradient = value_and_gradient(module, logits, target)
    dice, of_dice = value_and_gradient(module.dc, logits, target)
    got, got_gradient = ranks[0][name, compiled]
    torch.testing.assert_close(got, value)
    torch.testing.assert_close(got_gradient, gradient + of_dice)  # times two ranks
    got, got_gradient = ranks[1][name, compiled]
    torch.testing.assert_close(got, dice)
    assert got_gradient.shape == (0, *logits.shape[1:])


def test_modules_that_older_versions_pickled_load() -> None:
    import pickle

    from fastloss import torch as ft

    module = ft.Loss(fl.Dice(), process_group=True, shard="volume")
    text = pickle.dumps(module, protocol=0)
    place = b"cfastloss.frameworks.torch.distributed\n"
    assert place in text
    older = text.replace(place, b"cfastloss.frameworks.torch_distributed\n")
    assert repr(pickle.loads(older)) == repr(module)
