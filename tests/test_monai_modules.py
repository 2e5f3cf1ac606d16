"""What users of MONAI's losses rely on beyond the numbers: errors, state, copies, compilation."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import need, python

import fastloss as fl

torch = need("torch")
monai_losses = need("monai.losses")
ours = need("fastloss.monai")

NAMES = (
    "DiceLoss",
    "MaskedDiceLoss",
    "TverskyLoss",
    "GeneralizedDiceLoss",
    "FocalLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "GeneralizedDiceFocalLoss",
    "MCCLoss",
    "SoftclDiceLoss",
    "SoftDiceclDiceLoss",
)

LABELS = np.random.default_rng(1).integers(0, 3, (2, 1, 4, 5))
LOGITS = 2 * np.random.default_rng(2).normal(size=(2, 3, 4, 5))
SEVERAL = (np.random.default_rng(3).random(LOGITS.shape) < 0.4).astype(np.float64)
SOFT = np.random.default_rng(4).random(LOGITS.shape)
MASK = np.random.default_rng(5).random((2, 1, 4, 5)) < 0.6
ONE = LOGITS[:, :1]

ONE_HOT: dict[str, Any] = {"to_onehot_y": True}
SOFTMAX = ONE_HOT | {"softmax": True}
SIGMOID = ONE_HOT | {"sigmoid": True}
FOREGROUND = {"include_background": False}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    own, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ours, monai_losses))
    assert list(own) == list(theirs)
    for parameter in own:
        assert own[parameter].kind == theirs[parameter].kind
        assert own[parameter].default == theirs[parameter].default
    own, theirs = (
        inspect.signature(getattr(m, name).forward).parameters for m in (ours, monai_losses)
    )
    assert list(own) == list(theirs)


def test_import_without_monai() -> None:
    python("import sys, fastloss.monai; assert 'monai' not in sys.modules").check_returncode()


BAD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"other_act": 3}) for name in NAMES if name != "FocalLoss"),
    *((name, {"sigmoid": True, "softmax": True}) for name in NAMES if name != "FocalLoss"),
    *((name, {"reduction": "average"}) for name in NAMES),
    *((name, {"reduction": None}) for name in NAMES),
    ("MaskedDiceLoss", {"sigmoid": True, "other_act": torch.tanh}),
    ("DiceLoss", {"smooth_nr": "much"}),
    ("DiceLoss", {"weight": "heavy"}),
    ("DiceCELoss", {"reduction": "none"}),
    ("DiceCELoss", {"lambda_ce": -1.0}),
    ("DiceCELoss", {"lambda_dice": -1.0}),
    ("DiceCELoss", {"weight": [1.0, 2.0, 3.0]}),
    ("DiceCELoss", {"weight": 2.0}),
    ("DiceFocalLoss", {"lambda_focal": -1.0}),
    ("GeneralizedDiceLoss", {"w_type": "cubic"}),
    ("GeneralizedDiceFocalLoss", {"lambda_gdl": -0.1}),
    *((name, {"iter_": n}) for name in ("SoftclDiceLoss", "SoftDiceclDiceLoss") for n in (-1, 2.0)),
    *((name, {"smooth": 0.0}) for name in ("SoftclDiceLoss", "SoftDiceclDiceLoss")),
    *(("SoftDiceclDiceLoss", {"alpha": alpha}) for alpha in (-0.1, 1.1)),
]


@pytest.mark.parametrize("name", sorted({name for name, _ in BAD_OPTIONS}))
def test_bad_options(name: str) -> None:
    for options in (options for other, options in BAD_OPTIONS if other == name):
        with pytest.raises(Exception) as expected:  # noqa: PT011
            getattr(monai_losses, name)(**options)
        with pytest.raises(expected.type):
            getattr(ours, name)(**options)


BAD_CALLS: list[tuple[Any, ...]] = [
    *((name, {}, LOGITS, SEVERAL[..., :4]) for name in NAMES),
    *((name, {}, LOGITS, SEVERAL[:1]) for name in NAMES),
    *((name, {}, LOGITS, SEVERAL[:, :2]) for name in NAMES),
    *((name, {}, LOGITS, LABELS) for name in NAMES),
    *((name, ONE_HOT, LOGITS, LABELS[:, 0]) for name in NAMES),
    *((name, ONE_HOT, LOGITS, SEVERAL) for name in NAMES),
    ("DiceLoss", ONE_HOT | {"weight": [1.0, 2.0]}, LOGITS, LABELS),
    ("DiceLoss", ONE_HOT | {"weight": [1.0, 2.0, -1.0]}, LOGITS, LABELS),
    ("DiceLoss", ONE_HOT | {"weight": -1.0}, LOGITS, LABELS),
    ("DiceLoss", ONE_HOT | {"weight": [1.0] * 3, "include_background": False}, LOGITS, LABELS),
    ("DiceFocalLoss", ONE_HOT | {"weight": [1.0, 2.0]}, LOGITS, LABELS),
    ("FocalLoss", ONE_HOT | {"weight": [1.0, 2.0]}, LOGITS, LABELS),
    ("FocalLoss", ONE_HOT | {"weight": [1.0, 2.0, -1.0]}, LOGITS, LABELS),
    ("FocalLoss", ONE_HOT | {"weight": -1.0}, LOGITS, LABELS),
    ("FocalLoss", ONE_HOT | {"alpha": [0.5, 0.5]}, LOGITS, LABELS),
    ("FocalLoss", {"weight": [1.0]}, ONE, SEVERAL[:, :1]),
    ("DiceFocalLoss", {"weight": [1.0]}, ONE, SEVERAL[:, :1]),
    ("DiceCELoss", ONE_HOT | {"weight": torch.ones(2)}, LOGITS, LABELS),
    ("DiceCELoss", ONE_HOT | {"softmax": True, "label_smoothing": 2.0}, LOGITS, LABELS),
    ("GeneralizedDiceLoss", {"sigmoid": True}, LOGITS[..., 0, 0], SEVERAL[..., 0, 0]),
    ("MaskedDiceLoss", ONE_HOT, LOGITS, LABELS, np.ones((3, 1, 4, 5))),
    ("MaskedDiceLoss", ONE_HOT, LOGITS, LABELS, np.ones((2, 3, 4, 5))),
    ("MaskedDiceLoss", ONE_HOT, LOGITS, LABELS, np.ones((2, 1, 4, 4))),
    ("MaskedDiceLoss", ONE_HOT, LOGITS, LABELS, np.ones((2, 4, 5))),
]


@pytest.mark.parametrize("name", sorted({call[0] for call in BAD_CALLS}))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_calls(name: str) -> None:
    for options, *arrays in (call[1:] for call in BAD_CALLS if call[0] == name):
        tensors = [torch.tensor(a) for a in arrays]
        with pytest.raises(Exception) as expected:  # noqa: PT011
            getattr(monai_losses, name)(**options)(*tensors)
        with pytest.raises(expected.type):
            getattr(ours, name)(**options)(*tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:mask")
def test_reduction_changed_to_nonsense(name: str) -> None:
    loss = getattr(ours, name)(to_onehot_y=True)
    for part in loss.modules():
        part.reduction = "typo"
    with pytest.raises(ValueError, match="typo"):
        loss(torch.tensor(LOGITS), torch.tensor(LABELS))


def test_label_that_is_no_class() -> None:
    with pytest.raises(ValueError, match="target"):
        ours.DiceCELoss(**ONE_HOT, softmax=True)(torch.tensor(LOGITS), torch.tensor(LABELS + 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {} if name == "FocalLoss" else {"sigmoid": True}) for name in NAMES),
        # These are not fused.
        ("FocalLoss", {"reduction": "none"}),
        ("DiceLoss", {"sigmoid": True, "soft_label": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:mask")
def test_mask_of_0_and_255(name: str, options: dict[str, Any]) -> None:
    """MONAI computes something; integers that are neither 0 nor 1 are an error here."""
    loss = getattr(ours, name)(**options)
    for x, y in ((ONE, SEVERAL[:, :1]), (LOGITS, SEVERAL)):
        logits = torch.tensor(x)
        right = torch.tensor(y)
        torch.testing.assert_close(loss(logits, right.to(torch.uint8)), loss(logits, right))
        for dtype in (torch.uint8, torch.int64):
            with pytest.raises(ValueError, match=r"^target: .*the first is 255$"):
                loss(logits, (255 * right).to(dtype))
    if hasattr(loss, "ignore_index"):
        loss.ignore_index = 255
        right = torch.tensor(SEVERAL[:, :1])
        right[0, 0, 1] = 255
        value = loss(torch.tensor(ONE), right.to(torch.uint8))
        torch.testing.assert_close(value, loss(torch.tensor(ONE), right))
        right[0, 0, 2] = 254
        with pytest.raises(ValueError, match=r"^target: .*ignore_index=255.*the first is 254$"):
            loss(torch.tensor(ONE), right.to(torch.uint8))


def test_mask_of_0_and_255_compiled() -> None:
    """An error of the kernels, and NaN in a loss of PyTorch's operations."""
    x, mask = torch.tensor(ONE), 255 * torch.tensor(SEVERAL[:, :1]).byte()
    how = {"fullgraph": True, "backend": "aot_eager"}
    with pytest.raises(ValueError, match=r"target: .*the first is 255"):
        torch.compile(ours.DiceLoss(sigmoid=True), **how)(x, mask)
    value = torch.compile(ours.FocalLoss(reduction="none"), **how)(x, mask)
    assert torch.equal(value.isnan(), mask == 255)


PASSES: list[tuple[int, str, dict[str, Any], np.ndarray, np.ndarray]] = [
    (1, "DiceLoss", SOFTMAX | {"jaccard": True, "weight": [1, 2, 3]}, LOGITS, LABELS),
    (1, "DiceLoss", SOFTMAX | {"soft_label": True, "ignore_index": 1}, LOGITS, LABELS),
    (1, "DiceLoss", {"sigmoid": True, "ignore_index": 1}, LOGITS, SEVERAL),
    (1, "DiceLoss", {"sigmoid": True, "ignore_index": 255}, LOGITS, SOFT),
    (1, "DiceLoss", {"sigmoid": True, "squared_pred": True, "soft_label": True}, LOGITS, SOFT),
    (0, "DiceLoss", {"sigmoid": True, "soft_label": True}, LOGITS, SOFT),
    (0, "DiceLoss", {"sigmoid": True, "ignore_index": 1}, LOGITS, SOFT),
    (1, "TverskyLoss", ONE_HOT | {"other_act": torch.tanh, "reduction": "none"}, LOGITS, LABELS),
    (1, "GeneralizedDiceLoss", SOFTMAX | FOREGROUND, LOGITS, LABELS),
    (1, "DiceCELoss", SOFTMAX | {"weight": torch.ones(3), "label_smoothing": 0.1}, LOGITS, LABELS),
    (1, "DiceCELoss", {"softmax": True}, LOGITS, SOFT),
    (1, "DiceCELoss", {"sigmoid": True, "weight": torch.ones(1)}, ONE, SOFT[:, :1]),
    (2, "DiceCELoss", SIGMOID, LOGITS, LABELS),
    (1, "DiceFocalLoss", SIGMOID | FOREGROUND, LOGITS, LABELS),
    (1, "DiceFocalLoss", {"sigmoid": True, "alpha": 0.25, "reduction": "sum"}, LOGITS, SEVERAL),
    (2, "DiceFocalLoss", SOFTMAX, LOGITS, LABELS),
    (1, "GeneralizedDiceFocalLoss", SIGMOID, LOGITS, LABELS),
    (1, "FocalLoss", ONE_HOT | FOREGROUND | {"use_softmax": True}, LOGITS, LABELS),
    (1, "FocalLoss", FOREGROUND | {"use_softmax": True, "reduction": "sum"}, LOGITS, SOFT),
    (0, "FocalLoss", {}, LOGITS, SOFT),
    (0, "FocalLoss", ONE_HOT | {"reduction": "none"}, LOGITS, LABELS),
]


@pytest.mark.parametrize(("passes", "name", "options", "x", "y"), PASSES)
def test_what_is_fused(
    passes: int, name: str, options: dict[str, Any], x: np.ndarray, y: np.ndarray
) -> None:
    """The number of passes each way; nothing the size of the logits is kept for backward."""
    backend = fl.backends.load_backend("reference")
    logits, target, kept = torch.tensor(x, requires_grad=True), torch.tensor(y), []
    with (
        mock.patch.object(backend, "reduce", wraps=backend.reduce) as reduce,
        mock.patch.object(backend, "apply", wraps=backend.apply) as apply,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        getattr(ours, name)(**options).double()(logits, target).sum().backward()
    assert (reduce.call_count, apply.call_count) == (passes, passes)
    if passes and "other_act" not in options:
        given = {t.untyped_storage().data_ptr() for t in (logits, target)}
        large = [t for t in kept if t.numel() > x.size / x.shape[1]]
        assert {t.untyped_storage().data_ptr() for t in large} <= given

    expected = torch.tensor(x, requires_grad=True)
    getattr(monai_losses, name)(**options).double()(expected, target).sum().backward()
    torch.testing.assert_close(logits.grad, expected.grad, rtol=1e-5, atol=1e-8)


def test_masked_is_fused() -> None:
    backend = fl.backends.load_backend("reference")
    arrays = [torch.tensor(a) for a in (LOGITS, LABELS, MASK)]
    with mock.patch.object(backend, "apply", wraps=backend.apply) as apply:
        arrays[0].requires_grad_()
        ours.MaskedDiceLoss(**ONE_HOT, softmax=True)(*arrays).backward()
    assert apply.call_count == 1


WEIGHTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DiceLoss", {"weight": [1.0, 2, 3]}, {"weight": [3.0, 0, 1]}),
    ("MaskedDiceLoss", {"weight": [1.0, 2, 3]}, {"weight": [3.0, 0, 1]}),
    ("FocalLoss", {"weight": [1.0, 2, 3]}, {"weight": [3.0, 0, 1]}),
    ("DiceFocalLoss", {"weight": [1.0, 2, 3]}, {"weight": [3.0, 0, 1]}),
    (
        "DiceCELoss",
        {"weight": torch.tensor([1.0, 2, 3])},
        {"weight": torch.tensor([3.0, 0, 1])},
    ),
]


@pytest.mark.parametrize(("name", "options", "others"), WEIGHTED)
@pytest.mark.filterwarnings("ignore:No mask", "ignore:mask")
def test_state_dict(name: str, options: dict[str, Any], others: dict[str, Any]) -> None:
    """State is exchanged with MONAI, both ways, and decides what is computed."""
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS).long()
    y = torch.nn.functional.one_hot(y[:, 0], 3).movedim(-1, 1).to(x)
    loss = getattr(ours, name)(**options).double()
    theirs = getattr(monai_losses, name)(**others).double()
    before = loss(x, y)
    state = copy.deepcopy(loss.state_dict())
    loss.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(loss(x, y), theirs(x, y), rtol=1e-6, atol=0, check_dtype=False)
    assert not torch.isclose(loss(x, y), before)
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs(x, y), before, rtol=1e-6, atol=0, check_dtype=False)


def test_class_weight_changed_in_place() -> None:
    loss = ours.DiceLoss(**ONE_HOT, softmax=True, weight=[1.0, 1, 1])
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    before = loss(x, y)
    loss.class_weight.mul_(2)
    torch.testing.assert_close(loss(x, y), 2 * before)
    loss.class_weight = None
    torch.testing.assert_close(loss(x, y), before)


@pytest.mark.parametrize(("name", "options", "_"), WEIGHTED)
@pytest.mark.filterwarnings("ignore:mask")
def test_copies(name: str, options: dict[str, Any], _: Any) -> None:
    loss = getattr(ours, name)(to_onehot_y=True, **options).double()
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    value = loss(x, y)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    for again in [*copies, torch.load(buffer, weights_only=False)]:
        assert torch.equal(again(x, y), value)
        assert repr(again) == repr(loss)
        for weight in again.buffers():  # its own
            weight.zero_()
        assert not torch.equal(again(x, y), value)
        assert torch.equal(loss(x, y), value)


def test_repr() -> None:
    loss = ours.DiceLoss(softmax=True, weight=[1.0, 2.0], batch=True)
    assert repr(loss) == "DiceLoss(softmax=True, batch=True, weight=[1.0, 2.0])"
    assert "FocalLoss(gamma=3.0)" in repr(ours.DiceFocalLoss(sigmoid=True, gamma=3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:No mask", "ignore:mask")
def test_half(name: str, reduction: str, dtype: Any) -> None:
    """Half logits are computed in float32, fused or not."""
    options = ONE_HOT | ({"reduction": reduction} if name != "DiceCELoss" else {})
    if name == "MCCLoss":  # of no meaning without
        options |= {"sigmoid": True}
    x = torch.tensor(LOGITS).to(dtype).requires_grad_()
    value = getattr(ours, name)(**options)(x, torch.tensor(LABELS))
    exact = getattr(monai_losses, name)(**options)(x.detach().float(), torch.tensor(LABELS))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), exact, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceLoss", {"sigmoid": True, "soft_label": True}),
        ("DiceCELoss", {"softmax": True}),
        ("DiceFocalLoss", {"sigmoid": True, "alpha": 0.25}),
    ],
)
def test_gradient_of_the_target(name: str, options: dict[str, Any]) -> None:
    gradients = []
    for module in (ours, monai_losses):
        x, y = (torch.tensor(a, requires_grad=True) for a in (LOGITS, SOFT))
        value = getattr(module, name)(**options)(x, y)
        gradients.append(torch.autograd.grad(value, (x, y)))
    for own, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-7)  # MONAI's is of float32


def test_factors_that_are_learned() -> None:
    factor = torch.tensor(0.7, requires_grad=True)
    loss = ours.DiceCELoss(**ONE_HOT, softmax=True, lambda_ce=factor)
    loss(torch.tensor(LOGITS), torch.tensor(LABELS)).backward()
    ce = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS)[:, 0])
    torch.testing.assert_close(factor.grad, ce.float())


def test_factor_changed_while_training() -> None:
    loss = ours.DiceCELoss(**ONE_HOT, softmax=True)
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    loss.lambda_dice, loss.lambda_ce = 0.0, 2.0
    ce = torch.nn.functional.cross_entropy(x, y[:, 0])
    torch.testing.assert_close(loss(x, y), 2 * ce)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:No mask", "ignore:mask")
def test_meta_tensors(name: str) -> None:
    """What MONAI's transforms make of arrays."""
    meta = need("monai.data").MetaTensor
    x = torch.tensor(LOGITS, requires_grad=True)
    loss = getattr(ours, name)(**(ONE_HOT if name == "FocalLoss" else SIGMOID))
    value = loss(meta(x), meta(torch.tensor(LABELS)))
    assert torch.equal(value, loss(x, torch.tensor(LABELS)))
    value.backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceCELoss", ONE_HOT | {"softmax": True, "weight": torch.tensor([1.0, 2, 3])}),
        ("DiceFocalLoss", ONE_HOT | {"sigmoid": True, "weight": [1.0, 2, 3]}),
        ("FocalLoss", ONE_HOT | FOREGROUND | {"use_softmax": True}),
        ("DiceLoss", ONE_HOT | {"other_act": torch.tanh, "reduction": "none"}),
    ],
)
def test_compiled(name: str, options: dict[str, Any]) -> None:
    """No graph break, any size, and the weights of the loaded state."""
    loss = getattr(ours, name)(**options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 4, 3):
        results = []
        for function in (loss, compiled):
            x = torch.tensor(LOGITS[..., :size], requires_grad=True)
            value = function(x, torch.tensor(LABELS[..., :size]))
            results.append((value, *torch.autograd.grad(value.sum(), x)))
        torch.testing.assert_close(*results)
    if "weight" in options:
        state = {k: v.flip(0) for k, v in loss.state_dict().items()}
        loss.load_state_dict(state)
        x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
        assert not torch.isclose(compiled(x, y), compiled(x.flip(0), y))
        changed = compiled(x, y)
        torch.testing.assert_close(changed, loss(x, y))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_traced(name: str, soft: bool) -> None:
    """Of other sizes, and of other targets: what the example holds decides nothing."""
    options = {} if name == "FocalLoss" else {"sigmoid": True}
    loss = getattr(ours, name)(**options)
    hard = torch.nn.functional.one_hot(torch.tensor(LABELS)[:, 0], 3).movedim(-1, 1).double()
    example = [torch.tensor(LOGITS), hard]
    if name == "MaskedDiceLoss":
        example.append(torch.ones_like(example[0][:, :1]))
    traced = torch.jit.trace(loss, tuple(example))
    x, y = (a[:1, ..., 1:] for a in example[:2])
    arrays = [x, y * 0.7 if soft else y.flip(1), *(0.5 * x[:, :1].sigmoid() for _ in example[2:])]
    results = []
    for function in (traced, loss, getattr(monai_losses, name)(**options)):
        leaf = arrays[0].clone().requires_grad_()
        value = function(leaf, *arrays[1:])
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6, check_dtype=False)


# --------------------------------------------------------------------------- parts that are changed


def attribute(path: str, value: Any) -> Any:
    def change(loss: Any, _: Any) -> None:
        *parts, last = path.split(".")
        for part in parts:
            loss = getattr(loss, part)
        setattr(loss, last, value)

    return change


def hook(part: str, kind: str) -> Any:
    halves: dict[str, Any] = {
        "forward_pre": lambda module, given: (given[0] / 2, given[1]),
        "forward": lambda module, given, value: value / 2,
        "full_backward_pre": lambda module, gradients: (gradients[0] / 2,),
        "full_backward": lambda module, inner, outer: (inner[0] / 2, *inner[1:]),
    }
    return lambda loss, _: getattr(getattr(loss, part), f"register_{kind}_hook")(halves[kind])


class Twice(torch.nn.CrossEntropyLoss):
    def forward(self, input: Any, target: Any) -> Any:
        return 2 * super().forward(input, target)


class Spread(torch.nn.Module):
    """A loss of a user's own."""

    def forward(self, input: Any, target: Any) -> Any:
        return input.var() + target.float().mean()


def replaced(part: str, make: Any) -> Any:
    return lambda loss, module: setattr(loss, part, make(module))


def squared(module: Any, name: str, **options: Any) -> Any:
    """A subclass of one of the losses, ours or MONAI's."""
    base = getattr(module, name)
    return type(name, (base,), {"forward": lambda s, x, y: base.forward(s, x, y) ** 2})(**options)


def other_weights(module: Any) -> Any:
    base = module.GeneralizedDiceLoss
    kind = type("Other", (base,), {"w_func": lambda self, volume: 1 / (volume + 1)})
    return kind(to_onehot_y=True, softmax=True)


def of_any_part(part: str) -> dict[str, Any]:
    changes = {
        f"hook {kind}": hook(part, kind)
        for kind in ("forward_pre", "forward", "full_backward_pre", "full_backward")
    }
    changes |= {
        f"reduction {name}": attribute(f"{part}.reduction", name) for name in ("none", "sum")
    }
    changes["module"] = replaced(part, lambda module: Spread())
    changes["its forward"] = lambda loss, _: setattr(
        getattr(loss, part), "forward", lambda x, y: x.var() + y.float().mean()
    )
    return {f"{part} {name}": change for name, change in changes.items()}


CHANGES: dict[str, dict[str, Any]] = {
    "DiceCELoss": {
        **of_any_part("dice"),
        **of_any_part("cross_entropy"),
        **of_any_part("binary_cross_entropy"),
        "ignored class": attribute("cross_entropy.ignore_index", 0),
        "ignored by both": lambda loss, _: [
            setattr(part, "ignore_index", 1) for part in (loss.dice, loss.cross_entropy)
        ],
        "ignored by dice": attribute("dice.ignore_index", 2),
        "ignored number": attribute("cross_entropy.ignore_index", 255),
        "smoothing": attribute("cross_entropy.label_smoothing", 0.3),
        "weight": attribute("cross_entropy.weight", torch.tensor([1.0, 2, 3]).double()),
        "weight of every voxel": attribute("binary_cross_entropy.weight", torch.tensor(2.0)),
        "weight of positives": attribute("binary_cross_entropy.pos_weight", torch.tensor(2.0)),
        "another activation": attribute("dice.other_act", torch.sigmoid),
        "subclass": replaced("cross_entropy", lambda module: Twice()),
        "subclass of dice": replaced("dice", lambda m: squared(m, "DiceLoss", **SOFTMAX)),
        "another loss": replaced("dice", lambda m: m.TverskyLoss(**SOFTMAX, reduction="none")),
        "ce": attribute("ce", lambda x, y: x.var() + y.float().mean()),
        "bce": attribute("bce", lambda x, y: x.var() + y.float().mean()),
    },
    "DiceFocalLoss": {
        **of_any_part("dice"),
        **of_any_part("focal"),
        "gamma": attribute("focal.gamma", 0.5),
        "alpha": attribute("focal.alpha", [0.1, 0.2, 0.7]),
        "softmax": attribute("focal.use_softmax", True),
        "smooth_nr": attribute("dice.smooth_nr", 1.0),
        "ignored by dice": attribute("dice.ignore_index", 1),
        "ignored by focal": attribute("focal.ignore_index", 1),
        "subclass": replaced("focal", lambda m: squared(m, "FocalLoss")),
        "subclass of dice": replaced("dice", lambda m: squared(m, "DiceLoss", softmax=True)),
    },
    "GeneralizedDiceFocalLoss": {
        **of_any_part("generalized_dice"),
        **of_any_part("focal"),
        "w_type": attribute("generalized_dice.w_type", "simple"),
        "w_func": replaced("generalized_dice", other_weights),
        "subclass": replaced("focal", lambda m: squared(m, "FocalLoss", **ONE_HOT)),
    },
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*single channel")
def test_changed_parts(name: str, how: str) -> None:
    """Whatever a user does to a part of a sum does what it does in MONAI."""
    several = [(LOGITS, LABELS), (ONE, LABELS.clip(0, 1))]
    for data in several[:1] if how == "compiled" else several:
        x, y = (torch.tensor(a) for a in data)
        changes = CHANGES[name]
        if how == "compiled":  # backward hooks it refuses
            changes = {k: v for k, v in list(changes.items())[::5] if "backward" not in k}
        for label, change in changes.items():
            results = []
            for module in (ours, monai_losses):
                loss = getattr(module, name)(**SOFTMAX).double()
                if label == "alpha" and x.shape[1] == 1:
                    continue
                change(loss, module)
                if how == "compiled" and module is ours:
                    torch.compiler.reset()
                    loss = torch.compile(loss, backend="aot_eager")
                leaf = x.clone().requires_grad_()
                value = loss(leaf, y)
                results.append((value, *torch.autograd.grad(value.sum(), leaf)))
            if results:
                torch.testing.assert_close(
                    *results,
                    rtol=1e-5,
                    atol=1e-6,  # MONAI computes in float32
                    check_dtype=False,
                    msg=lambda text, label=label: f"{label}: {text}",
                )


def test_overridden_methods_of_a_compound() -> None:
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)

    def subclass(module: Any) -> Any:
        class Sharper(module.DiceCELoss):  # type: ignore[misc, name-defined]
            def ce(self, input: Any, target: Any) -> Any:
                return super().ce(3 * input, target)

        return Sharper(**SOFTMAX)

    torch.testing.assert_close(subclass(ours)(x, y), subclass(monai_losses)(x, y))


def test_parts_whose_options_changed_are_fused() -> None:
    backend = fl.backends.load_backend("reference")
    x, y = torch.tensor(LOGITS), torch.tensor(LABELS)
    for change, passes in (
        (attribute("cross_entropy.label_smoothing", 0.3), 1),
        (attribute("cross_entropy.ignore_index", 255), 1),
        (attribute("dice.smooth_nr", 1.0), 1),
        (attribute("cross_entropy.ignore_index", 0), 2),  # which the Dice loss counts
        (hook("dice", "forward"), 2),
    ):
        loss = ours.DiceCELoss(**SOFTMAX)
        change(loss, ours)
        with mock.patch.object(backend, "apply", wraps=backend.apply) as apply:
            loss(x.requires_grad_(), y).backward()
        assert apply.call_count == passes


def test_state_of_a_sum_with_another_part() -> None:
    loss = ours.DiceCELoss(**SOFTMAX)
    loss.cross_entropy = Spread()
    loss.load_state_dict(copy.deepcopy(loss).state_dict())
