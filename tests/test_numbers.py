"""The numbers of a loss may change in every call: factors, class weights, alpha.

However they are written, the new ones take effect, without recompilation.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import need
from torch_support import (
    LogCoshDice,
    needs_torch,  # noqa: F401
    torch,
    value_and_gradient,
)

import fastloss as fl

if torch is not None:
    from torch._dynamo.testing import CompileCounterWithBackend

    import fastloss.monai as fm
    import fastloss.nnunet as fn
    import fastloss.torch as ft


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """Reset the recompile limit before each test."""
    yield
    if torch is not None:
        torch.compiler.reset()


def eager(function: Any) -> Any:
    return function


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


# ------------------------------------------------------------------ written in place

WEIGHTED, UNWEIGHTED = 0.145561, 0.220095  # by hand, for the case below


def small() -> tuple[Any, Any, Any]:
    """Logits, labels and class weights."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    return x, torch.tensor([[0, 1]]), torch.tensor([1.0, 9.0])


def _by_numpy(tensor: Any, numbers: Any) -> None:
    tensor.numpy()[:] = numbers.numpy()


def _by_new_memory(tensor: Any, numbers: Any) -> None:
    tensor.data = numbers.clone()


WRITES: dict[str, Callable[[Any, Any], None]] = {
    "copy_": lambda tensor, numbers: tensor.copy_(numbers),
    "data.copy_": lambda tensor, numbers: tensor.data.copy_(numbers),
    "data =": _by_new_memory,
    "numpy": _by_numpy,
}


def places() -> dict[str, tuple[Any, Callable[[Any], Any], bool]]:
    """By name, a cross-entropy module, its weights, and whether its labels have a channel axis."""
    ones = torch.ones(2)
    dice = {"softmax": True, "to_onehot_y": True, "lambda_dice": 0.0}
    return {
        "CrossEntropy": (ft.CrossEntropy(weight=[1, 1]), lambda m: m.weight, False),
        "DiceCE": (
            ft.DiceCE(dice_factor=0, ce_weight=[1, 1]), lambda m: m.term1_weight, False,
        ),
        "Focal": (ft.Loss(fl.Focal(gamma=0, alpha=[0.5, 0.5])), lambda m: m.alpha, False),
        "MONAI": (fm.DiceCELoss(**dice, weight=ones), lambda m: m.cross_entropy.weight, True),
        "nnU-Net": (fn.RobustCrossEntropyLoss(weight=ones), lambda m: m.weight, True),
        "nnU-Net's sum": (
            fn.DC_and_CE_loss({"ddp": False}, {"weight": ones}, weight_dice=0),
            lambda m: m.ce.weight,
            True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("how", [eager, compiled])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", ["CrossEntropy", "DiceCE", "MONAI", "nnU-Net", "nnU-Net's sum"])
def test_weights_written_in_place(place: str, write: str, how: Any) -> None:
    x, y, w = small()
    module, weights, channel = places()[place]
    y = y[:, None] if channel else y
    call = how(copy.deepcopy(module))
    assert float(call(x, y)) == pytest.approx(UNWEIGHTED, abs=1e-6)
    with torch.no_grad():
        WRITES[write](weights(call), w.to(weights(call).dtype))
    assert float(call(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)


@pytest.mark.parametrize("how", [eager, compiled])
def test_weights_given_for_one_call(how: Any) -> None:
    x, y, w = small()
    module = ft.CrossEntropy(weight=[1, 1])
    call = how(lambda weight: torch.func.functional_call(module, {"weight": weight}, (x, y)))
    for weight, expected in ((w, WEIGHTED), (torch.ones(2), UNWEIGHTED), (w, WEIGHTED)):
        assert float(call(weight)) == pytest.approx(expected, abs=1e-6)
        assert float(module(x, y)) == pytest.approx(UNWEIGHTED, abs=1e-6)


@pytest.mark.parametrize("how", [eager, compiled])
def test_weights_made_in_inference_mode(how: Any) -> None:
    x, y, w = small()
    with torch.inference_mode():
        module = ft.CrossEntropy(weight=[1, 1])
    call = how(module)
    assert float(call(x, y)) == pytest.approx(UNWEIGHTED, abs=1e-6)
    with torch.inference_mode():
        module.weight.copy_(w)
    assert float(call(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)


@pytest.mark.parametrize("how", [eager, compiled])
def test_attributes_that_are_set(how: Any) -> None:
    x, y, w = small()
    module = ft.CrossEntropy(weight=[1, 1])
    call = how(module)
    for weight, expected in ((w, WEIGHTED), (None, UNWEIGHTED), (w.double(), WEIGHTED)):
        module.weight = weight
        assert float(call(x, y)) == pytest.approx(expected, abs=1e-6)
    module.loss = fl.Loss(0.5 * fl.CrossEntropy(weight=[2, 2]))
    assert float(call(x, y)) == pytest.approx(UNWEIGHTED / 2, abs=1e-6)
    term = fl.CrossEntropy(weight=[1, 1])
    call = how(term.__call__)
    assert float(call(x, y)) == pytest.approx(UNWEIGHTED, abs=1e-6)
    term.weight = w
    assert float(call(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)
    with pytest.raises(ValueError, match=r"^weight: .* at least 0"):
        term.weight = [1, -1]


def test_bad_weights_that_are_written() -> None:
    x, y, _ = small()
    module = ft.CrossEntropy(weight=[1, 1])
    for call in (module, compiled(module)):
        module.weight.data = torch.tensor([1.0, -1.0])
        with pytest.raises(ValueError, match=r"weight: .* at least 0"):
            call(x, y)
    module.weight.data = torch.ones(3)
    with pytest.raises(ValueError, match="expected 2 numbers, one per class, got 3"):
        module(x, y)
    module = ft.CrossEntropy(weight=[1, 1])
    module.weight.data = torch.ones(3)
    with pytest.raises(ValueError, match="expected 3 numbers for its terms, got 4"):
        compiled(module)(x, y)


# ------------------------------------------------------------------ another number in every epoch

NUMBERS = (1.0, 0.9, 0.5, 0.0, 1.0, 2.0, 0.3, 0.25, 0.0, 0.7, 1, 0.1)
"""The numbers of twelve epochs, including 0, 1 and an integer."""


def weights(epoch: int) -> Any:
    return torch.tensor([1.0, epoch + 1.0, 0.5 * epoch])


def writes(*names: str) -> Callable[[Any, int], None]:
    """A function that writes the class weights of these names in place."""

    def change(module: Any, epoch: int) -> None:
        for name in names:
            tensor = module.get_buffer(name)
            tensor.copy_(weights(epoch)[: tensor.numel()].reshape(tensor.shape))

    return change


def sets(*names: str) -> Callable[[Any, int], None]:
    """A function that sets these attributes to different numbers."""

    def change(module: Any, epoch: int) -> None:
        for i, name in enumerate(names):
            setattr(module, name, NUMBERS[epoch - i])

    return change


def both(*changes: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    def change(module: Any, epoch: int) -> None:
        for one in changes:
            one(module, epoch)

    return change


def _sets_weight(module: Any, epoch: int) -> None:
    module.weight = weights(epoch)


def _sets_loss(module: Any, epoch: int) -> None:
    module.loss = NUMBERS[epoch] * fl.Dice() + fl.CrossEntropy(weight=weights(epoch))


def _sets_outputs(module: Any, epoch: int) -> None:
    module.weights = [1, NUMBERS[epoch], NUMBERS[epoch] ** 2]


def _switches_outputs_on(module: Any, epoch: int) -> None:
    module.weights = [1, min(epoch, 4) / 4, max(0, epoch - 4) / 8]


def _sets_factors(module: Any, epoch: int) -> None:
    module.weight_factors = (1, NUMBERS[epoch], 0)


def _sets_focal_alpha(module: Any, epoch: int) -> None:
    module.focal.alpha = NUMBERS[epoch] / 2


W = [0.1, 0.2, 0.3]
HOT = {"to_onehot_y": True}
RANK = {"ddp": False}

SCHEDULES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], None], str]] = {
    "CrossEntropy": (lambda: ft.CrossEntropy(weight=W), writes("weight"), "labels"),
    "CrossEntropy, set": (lambda: ft.CrossEntropy(weight=W), _sets_weight, "labels"),
    "Focal": (lambda: ft.Focal(alpha=W), writes("alpha"), "labels"),
    "Dice": (lambda: ft.Dice(weight=W, batch=True), writes("weight"), "labels"),
    "GeneralizedDice": (lambda: ft.GeneralizedDice(weight=W), writes("weight"), "labels"),
    "TopK": (lambda: ft.TopKCrossEntropy(weight=W, k=30), writes("weight"), "labels"),
    "none": (lambda: ft.CrossEntropy(weight=W, reduction="none"), writes("weight"), "labels"),
    "DiceCE": (
        lambda: ft.DiceCE(ce_weight=W, weight=W),
        writes("term0_weight", "term1_weight"),
        "labels",
    ),
    "own": (
        lambda: ft.Loss(LogCoshDice(weight=W) + fl.CrossEntropy()),
        writes("term0_weight"),
        "labels",
    ),
    "loss": (lambda: ft.Loss(fl.Dice() + fl.CrossEntropy(weight=W)), _sets_loss, "labels"),
    "DeepSupervision": (lambda: ft.DeepSupervision(ft.DiceCE()), _sets_outputs, "outputs"),
    "DeepSupervision, on": (
        lambda: ft.DeepSupervision(ft.DiceCE(), weights=[1, 0, 0]),
        _switches_outputs_on,
        "outputs",
    ),
    "MONAI factors": (
        lambda: fm.DiceCELoss(softmax=True, **HOT), sets("lambda_dice", "lambda_ce"), "labels",
    ),
    "MONAI factors, two losses": (
        lambda: fm.DiceCELoss(sigmoid=True, **HOT), sets("lambda_dice", "lambda_ce"), "labels",
    ),
    "MONAI weights": (
        lambda: fm.DiceCELoss(softmax=True, weight=weights(1), **HOT),
        writes("cross_entropy.weight", "dice.class_weight"),
        "labels",
    ),
    "MONAI pos_weight": (
        lambda: fm.DiceCELoss(sigmoid=True, weight=torch.tensor([2.0])),
        lambda m, epoch: m.binary_cross_entropy.pos_weight.fill_(epoch),
        "mask",
    ),
    "MONAI focal": (
        lambda: fm.DiceFocalLoss(sigmoid=True, weight=W, alpha=0.3, **HOT),
        both(
            sets("lambda_dice", "lambda_focal"), writes("focal.class_weight"), _sets_focal_alpha
        ),
        "labels",
    ),
    "MONAI focal alone": (
        lambda: fm.FocalLoss(alpha=W, use_softmax=True, **HOT),
        lambda m, epoch: m.alpha.copy_(weights(epoch)),
        "labels",
    ),
    "MONAI focal of voxels": (
        lambda: fm.FocalLoss(alpha=0.3, reduction="none", **HOT), sets("alpha"), "labels",
    ),
    "MONAI generalised": (
        lambda: fm.GeneralizedDiceFocalLoss(sigmoid=True, **HOT),
        sets("lambda_gdl", "lambda_focal"),
        "labels",
    ),
    "MONAI Dice": (
        lambda: fm.DiceLoss(softmax=True, weight=2.0, **HOT),
        lambda m, epoch: m.class_weight.fill_(epoch),
        "labels",
    ),
    "MONAI Tversky": (
        lambda: fm.TverskyLoss(softmax=True, **HOT), sets("alpha", "beta"), "labels",
    ),
    "nnU-Net": (
        lambda: fn.DC_and_CE_loss(RANK, {"weight": weights(1)}),
        both(sets("weight_ce", "weight_dice"), writes("ce.weight")),
        "labels",
    ),
    "nnU-Net, two losses": (
        lambda: fn.DC_and_CE_loss(RANK, {"ignore_index": 1}),
        sets("weight_ce", "weight_dice"),
        "labels",
    ),
    "nnU-Net, on": (
        lambda: fn.DC_and_CE_loss(RANK, {}, weight_ce=0),
        lambda m, epoch: setattr(m, "weight_ce", epoch / 10),
        "labels",
    ),
    "nnU-Net top-k": (
        lambda: fn.DC_and_topk_loss(RANK, {"weight": weights(1), "k": 30}),
        both(sets("weight_ce", "weight_dice"), writes("ce.weight")),
        "labels",
    ),
    "nnU-Net regions": (
        lambda: fn.DC_and_BCE_loss({"pos_weight": weights(1).view(3, 1, 1)}, RANK),
        both(sets("weight_ce", "weight_dice"), writes("ce.pos_weight")),
        "regions",
    ),
    "nnU-Net outputs": (
        lambda: fn.DeepSupervisionWrapper(fn.DC_and_CE_loss(RANK, {}), [1, 0.5, 0]),
        _sets_factors,
        "pairs",
    ),
}  # fmt: skip


def arrays(kind: str) -> tuple[Any, Any]:
    """Logits and target, and how to call a module with them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator)
    y = torch.randint(0, 3, (2, 1, 4, 5), generator=generator)
    return {
        "labels": (x, lambda m: lambda x: m(x, y)),
        "mask": (x[:, :1], lambda m: lambda x: m(x, y.clamp(max=1))),
        "regions": (x, lambda m: lambda x: m(x, (x.detach() > 0).float())),
        "outputs": (x, lambda m: lambda x: m([x, x[..., :3], x[..., :2]], y)),
        "pairs": (x, lambda m: lambda x: m([x, x * 2, x], [y, y, y])),
    }[kind]


def check_schedule(name: str, backend: str) -> None:
    make, change, kind = SCHEDULES[name]
    x, call = arrays(kind)
    module = make()
    twin = copy.deepcopy(module)
    counter = CompileCounterWithBackend(backend)
    fast = call(torch.compile(module, fullgraph=True, backend=counter))
    values = set()
    for epoch in range(12):
        if epoch:
            with torch.no_grad():
                change(module, epoch)
                change(twin, epoch)
        got = value_and_gradient(fast, x)
        torch.testing.assert_close(got, value_and_gradient(call(twin), x), rtol=1e-5, atol=1e-6)
        values.add(float(got[0].sum()))
    assert counter.frame_count <= 2
    assert len(values) > 6


@pytest.mark.parametrize("name", SCHEDULES)
def test_twelve_epochs_are_two_graphs_at_most(name: str) -> None:
    check_schedule(name, "aot_eager")


@pytest.mark.parametrize("name", ["DiceCE", "nnU-Net"])
def test_twelve_epochs_compiled_by_inductor(name: str) -> None:
    check_schedule(name, "inductor")


LOSSES: dict[str, Callable[[Any], Any]] = {
    "sum": lambda n: n * fl.Dice() + fl.CrossEntropy(weight=[1, n, 2]),
    "term": lambda n: fl.Focal(alpha=n),
    "tversky": lambda n: fl.Tversky(alpha=n, beta=1 + n),
    "module": lambda n: ft.DiceCE(ce_factor=n, ce_weight=[1, n, 2]),
}
FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "factors": lambda x, y, n: fl.dice_ce_loss(x, y, ce_factor=n, dice_factor=n + 1),
    "list": lambda x, y, n: fl.dice_ce_loss(x, y, ce_weight=[1.0, n, 2.0]),
    "tensor": lambda x, y, n: fl.cross_entropy_loss(x, y, weight=torch.ones(3) * n),
    "one": lambda x, y, n: fl.focal_loss(x, y, alpha=n),
    "several": lambda x, y, n: fl.tversky_loss(x, y, alpha=n, beta=n + 1, weight=[1, 2, 3]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_made_anew(name: str) -> None:
    """Losses recreated outside a compiled function and passed to it are not recompiled."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, generator=generator), torch.zeros(2, 4, 5, dtype=torch.long)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda loss, x: loss(x, y), fullgraph=True, backend=counter)
    for n in NUMBERS:
        loss = LOSSES[name](n)
        got = value_and_gradient(lambda x, loss=loss: step(loss, x), x)
        torch.testing.assert_close(got, value_and_gradient(loss, x, y))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_other_numbers(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 4, 5, generator=generator), torch.zeros(2, 4, 5, dtype=torch.long)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda x, n: FUNCTIONS[name](x, y, n), fullgraph=True, backend=counter)
    for n in (0.1 * epoch + 0.05 for epoch in range(12)):
        got = value_and_gradient(lambda x, n=n: fast(x, n), x)
        expected = value_and_gradient(lambda x, n=n: FUNCTIONS[name](x, y, n), x)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


def test_outputs_of_weight_0_are_left_out_of_compiled_code() -> None:
    x, y, _ = small()
    seen: list[Any] = []
    dice = fl.Dice()

    def loss(logits: Any, target: Any) -> Any:
        seen.append(logits)
        return dice(logits, target)

    for module, targets in (
        (ft.DeepSupervision(loss, weights=[1, 0]), y),
        (fn.DeepSupervisionWrapper(loss, [1, 0]), [y, None]),
    ):
        seen.clear()
        compiled(module)([x, None], targets)
        assert len(seen) == 1


# ------------------------------------------------------------------ from any framework's array


def of_anybody() -> dict[str, Any]:
    ml_dtypes = need("ml_dtypes")
    numbers = torch.tensor([1.0, 9.0])
    return {
        "bfloat16": numbers.bfloat16(),
        "float16": numbers.half(),
        "tensors": [numbers[0].bfloat16(), numbers[1]],
        "NumPy's bfloat16": np.array([1, 9], ml_dtypes.bfloat16),
        "JAX": need("jax.numpy").array([1, 9], "bfloat16"),
    }


@pytest.mark.parametrize("name", ["bfloat16", "float16", "tensors", "NumPy's bfloat16", "JAX"])
def test_class_weights_of_any_floating_dtype(name: str) -> None:
    x, y, _ = small()
    weight = of_anybody()[name]
    for loss in (
        fl.CrossEntropy(weight=weight),
        ft.CrossEntropy(weight=weight),
        ft.DiceCE(dice_factor=0, ce_weight=weight),
        lambda x, y: fl.cross_entropy_loss(x, y, weight=weight),
    ):
        assert float(loss(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)
    module = ft.CrossEntropy(weight=[1, 1]).bfloat16()
    module.weight.copy_(torch.tensor([1.0, 9.0]))
    assert float(module(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)


def test_class_weights_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import stand_in

    ml_dtypes = need("ml_dtypes")
    stand_in.install(monkeypatch)
    x, y, _ = small()
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weight = stand_in.OnDevice(np.array([1, 9], dtype))
        loss = fl.CrossEntropy(weight=weight)
        weight.values[:] = 1  # a copy was taken
        assert float(loss(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)


def test_class_weights_that_require_a_gradient() -> None:
    x, y, w = small()
    w.requires_grad_()
    refused = r"^{}: got a tensor that requires a gradient.*; pass {}\.detach\(\)"
    for name, make in (
        ("weight", lambda: fl.CrossEntropy(weight=w)),
        ("alpha", lambda: fl.Focal(alpha=w)),
        ("weight", lambda: fl.Dice(weight=[w[0], 1.0])),
        ("alpha", lambda: fl.Tversky(alpha=w[0])),
        ("ce_weight", lambda: fl.dice_ce_loss(x, y, ce_weight=w)),
        ("ce_weight", lambda: ft.DiceCE(ce_weight=w)),
        ("weight", lambda: fn.RobustCrossEntropyLoss(weight=w)(x, y)),
        (
            "weight",
            lambda: fm.DiceCELoss(softmax=True, to_onehot_y=True, weight=w)(x, y[:, None]),
        ),
    ):
        with pytest.raises(TypeError, match=refused.format(name, name)):
            make()
    module = ft.CrossEntropy(weight=[1, 1])
    for weight in (w, torch.nn.Parameter(w.detach())):
        module.weight = weight
        with pytest.raises(TypeError, match=refused.format("weight", "weight")):
            module(x, y)
        with torch.no_grad():
            assert float(module(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)


# ------------------------------------------------------------------ kept


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_their_numbers(tmp_path: Any, strict: bool) -> None:
    x, y, w = small()
    for module, target in (
        (ft.Loss(0.5 * fl.CrossEntropy(weight=w) + 0.25 * fl.Dice(weight=3)), y),
        (fm.DiceFocalLoss(sigmoid=True, to_onehot_y=True, weight=w, alpha=0.3), y[:, None]),
        (fn.DC_and_CE_loss(RANK, {"weight": w}, weight_ce=0.5), y[:, None]),
        (ft.DeepSupervision(fl.CrossEntropy(weight=w), [0.5, 0.25]), y),
    ):
        given = ([x, x], target) if isinstance(module, ft.DeepSupervision) else (x, target)
        program = torch.export.export(module, given, strict=strict)
        torch.export.save(program, tmp_path / "loss.pt2")
        again = torch.export.load(tmp_path / "loss.pt2").module()
        torch.testing.assert_close(again(*given), module(*given))


def test_pickles_of_former_versions() -> None:
    """Pickles of former versions load: losses had caches, and modules counters of changes."""
    x, y, w = small()
    term = fl.CrossEntropy(weight=w)
    options = {k: v for k, v in vars(term).items() if k != "_described"}
    old = fl.CrossEntropy.__new__(fl.CrossEntropy)
    loss = fl.Loss.__new__(fl.Loss)
    old.__setstate__({**options, "_loss": loss})  # the term's own loss, which refers back to it
    loss.__setstate__(
        {
            "terms": ((1.0, old),),
            "_options": {},
            "needs": frozenset({"cross_entropy"}),
            "term_of_voxels": None,
            "_checked": {2},
        }
    )
    for one in (old, loss, pickle.loads(pickle.dumps(loss))):
        assert float(one(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)
    module = ft.CrossEntropy(weight=w)
    state = {k: v for k, v in vars(module).items() if k != "_seen"} | {"_versions": [0]}
    again = ft.CrossEntropy.__new__(ft.CrossEntropy)
    again.__setstate__(state | {"loss": loss})
    assert float(again(x, y)) == pytest.approx(WEIGHTED, abs=1e-6)
    module = fn.DC_and_CE_loss(RANK, {"weight": w}, weight_ce=2)
    state = {k: v for k, v in vars(module).items() if not k.startswith(("_array", "_off"))}
    again = fn.DC_and_CE_loss.__new__(fn.DC_and_CE_loss)
    again.__setstate__(state)
    for call in (again, compiled(again)):
        torch.testing.assert_close(call(x, y[:, None]), module(x, y[:, None]))
