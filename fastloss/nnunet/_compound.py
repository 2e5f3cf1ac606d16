"""nnU-Net's sums of a Dice loss and a voxel-wise one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastloss.dropin import (
    Fused,
    Recipe,
    Scheduled,
    Values,
    are_sizes,
    as_built,
    at_least_float32,
    evaluate,
    has_hooks,
    kernels_take,
    numbers_of,
    on_device,
    product,
    recipe,
    times,
)
from fastloss.nnunet._dice import (
    Dice,
    MemoryEfficientSoftDiceLoss,
    SoftDiceLoss,
    softmax_helper_dim1,
)
from fastloss.nnunet._entropy import RobustCrossEntropyLoss, TopKLoss
from fastloss.nnunet._terms import BinaryCrossEntropy

_DICE_CLASSES = (SoftDiceLoss, MemoryEfficientSoftDiceLoss)
DICE_CLASSES: dict[str, type[Dice]] = {kind.__name__: kind for kind in _DICE_CLASSES}


class Compound(Scheduled):
    """weight_ce · ``self.ce`` + weight_dice · ``self.dc``."""

    scheduled = ("weight_ce", "weight_dice")

    ce: Any
    dc: Any

    def __init__(self, weight_ce: float, weight_dice: float) -> None:
        super().__init__()
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice

    def _own_dice(self) -> Dice | None:
        """The Dice loss if it is one of ours, torch.compile'd or not, and so can be fused."""
        dice = self.dc
        if hasattr(dice, "_orig_mod") and not has_hooks(dice):
            dice = dice._orig_mod
        return dice if as_built(dice, *_DICE_CLASSES) else None

    def request(self, term: Recipe, net_output: Tensor, target: Tensor) -> Fused:
        """A request for another term on what this loss reads."""
        raise NotImplementedError(f"{type(self).__name__} must define request")

    def fused(self, net_output: Tensor, target: Tensor) -> tuple[tuple[Any, Fused], ...] | None:
        """Factors and requests of the whole sum, which others may be added to.

        None if it is not one fused loss.
        """
        return self._joined(*self._requests(net_output, target))

    def _requests(self, net_output: Tensor, target: Tensor) -> tuple[Fused | None, Fused | None]:
        """Those for the voxel-wise loss and for the Dice loss; None for one that is not fused."""
        raise NotImplementedError(f"{type(self).__name__} must define _requests")

    def _joined(
        self, ce: Fused | None, dc: Fused | None
    ) -> tuple[tuple[Any, Fused], tuple[Any, Fused]] | None:
        """Both with their factors; None if the parts do not read the same arrays."""
        if ce is None or dc is None:
            return None
        weight_ce, weight_dice = self.operand("weight_ce"), self.operand("weight_dice")
        if weight_ce is None or weight_dice is None:
            return None
        same = (
            ce.logits is dc.logits
            and ce.activation == dc.activation
            and ce.voxel_weight is dc.voxel_weight
            and ce.ignore_index == dc.ignore_index
        )
        if not same:
            return None
        return (weight_dice, dc), (weight_ce, ce)

    def _sum(self, entropy: Any, dice: Any) -> Any:
        """The sum of two values; None for a part that is not computed."""
        total: Any = 0
        if entropy is not None:
            total = total + times(self.factor("weight_ce"), entropy)
        if dice is not None:
            total = total + times(self.factor("weight_dice"), dice)
        return total


def dice_class_of(kind: Any) -> Any:
    """Our class of the same name as nnU-Net's."""
    if getattr(kind, "__module__", "") == "nnunetv2.training.loss.dice":
        return DICE_CLASSES.get(kind.__name__, kind)
    return kind


class OfLabels(Compound):
    """A sum for label maps and softmax.

    Args:
        ignore_label: voxels of this label are ignored; or None.
    """

    def __init__(self, weight_ce: float, weight_dice: float, ignore_label: int | None) -> None:
        super().__init__(weight_ce, weight_dice)
        self.ignore_label = ignore_label

    def forward(self, net_output: Tensor, target: Tensor) -> Any:
        """The loss.

        Args:
            net_output: logits, (B, C, *spatial).
            target: a label map, (B, 1, *spatial), of any dtype.
        """
        ce, dc = self._requests(net_output, target)
        joined = self._joined(ce, dc)
        if joined is not None:
            return evaluate(*joined)
        dice = entropy = None
        if dc is not None:
            dice = evaluate((1.0, dc))
        elif self.is_on("weight_dice"):
            dice = self._other_dice(net_output, target)
        if ce is not None:
            entropy = evaluate((1.0, ce))
        elif self.is_on("weight_ce"):
            entropy = self._entropy_of_what_counts(net_output, target)
        return self._sum(entropy, dice)

    def request(self, term: Recipe, net_output: Tensor, target: Tensor) -> Fused:
        return Fused(term, "softmax", net_output, target.detach(), None, self.ignore_label)

    def _requests(self, net_output: Tensor, target: Tensor) -> tuple[Fused | None, Fused | None]:
        with_ce, own = self.is_on("weight_ce"), self._own_dice()
        self._check(net_output, target, with_ce)
        dc = ce = None
        if own is not None and self.is_on("weight_dice"):
            dc = own.fused(net_output, target, ignore_index=self.ignore_label)
        if with_ce:
            ce = self._fused_entropy(net_output, target)
        if ce is not None and dc is not None and dc.ignore_index is None:
            ce = _counting_all(ce)
        return ce, dc

    def _check(self, net_output: Tensor, target: Tensor, with_ce: bool) -> None:
        labels = target.ndim == net_output.ndim and target.shape[1] == 1
        if self.ignore_label is not None and not labels:
            raise AssertionError(
                "target: with an ignore label expected a label map (B, 1, *spatial), got shape "
                f"{tuple(target.shape)}"
            )
        if with_ce and not labels and self.weight_ce != 0:
            raise ValueError(
                f"target: for {tuple(net_output.shape)} expected a label map (B, 1, *spatial), "
                f"got shape {tuple(target.shape)}"
            )

    def _entropy_of_what_counts(self, net_output: Tensor, target: Tensor) -> Any:
        if self.ignore_label is None:
            return self._entropy(net_output, target)
        counts = (target != self.ignore_label).any()
        if torch.jit.is_tracing():  # a trace cannot branch
            return torch.where(counts, self._entropy(net_output, target), 0.0)
        return self._entropy(net_output, target) if counts else 0

    def _other_dice(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The value of a Dice loss that is not ours."""
        mask = None
        if self.ignore_label is not None:
            mask = target != self.ignore_label
            target = torch.where(mask, target, 0)
        value: Tensor = self.dc(net_output, target, loss_mask=mask)
        return value

    def _fused_entropy(self, net_output: Tensor, target: Tensor) -> Fused | None:
        if not as_built(self.ce, RobustCrossEntropyLoss, TopKLoss):
            return None
        fused: Fused | None = self.ce.fused(net_output, target)
        return fused

    def _entropy(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The value of a voxel-wise loss that is not fused."""
        value: Tensor = self.ce(net_output, target)
        return value


def _counting_all(ce: Fused) -> Fused:
    """The cross-entropy beside a Dice loss that counts all voxels.

    A label that is no class is then an error, even if the cross-entropy ignores it.
    """
    is_class = ce.ignore_index in range(ce.logits.shape[1])
    return ce if is_class else ce._replace(ignore_index=None)


def with_ignore_index(ce_kwargs: dict[str, Any], ignore_label: int | None) -> dict[str, Any]:
    return ce_kwargs if ignore_label is None else {**ce_kwargs, "ignore_index": ignore_label}


class DC_and_CE_loss(OfLabels):
    """weight_ce · cross-entropy + weight_dice · Dice of softmax, as nnU-Net's class of this name.

    Args:
        soft_dice_kwargs: for ``dice_class``, without ``apply_nonlin``.
        ce_kwargs: for `RobustCrossEntropyLoss`.
        weight_ce, weight_dice: a part of weight 0 is not computed.
        ignore_label: voxels of this label are ignored; or None.
        dice_class: `SoftDiceLoss` or `MemoryEfficientSoftDiceLoss`, ours or nnU-Net's, which are
            fused with the cross-entropy; or another, which is computed separately.

    Raises:
        AssertionError: when it is called with an ignore label and a target that is no label map.
        ValueError: as the parts.
    """

    def __init__(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: Any = SoftDiceLoss,
    ) -> None:
        super().__init__(weight_ce, weight_dice, ignore_label)
        self.ce = RobustCrossEntropyLoss(**with_ignore_index(ce_kwargs, ignore_label))
        self.dc = dice_class_of(dice_class)(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs)

    def _entropy(self, net_output: Tensor, target: Tensor) -> Tensor:
        return super()._entropy(net_output, target[:, 0])


class DC_and_topk_loss(OfLabels):
    """weight_ce · top-k cross-entropy + weight_dice · Dice of softmax.

    As nnU-Net's class of this name. Arguments and errors as `DC_and_CE_loss`, ``ce_kwargs`` for
    `TopKLoss`; the Dice loss is `SoftDiceLoss`.
    """

    def __init__(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(weight_ce, weight_dice, ignore_label)
        self.ce = TopKLoss(**with_ignore_index(ce_kwargs, ignore_label))
        self.dc = SoftDiceLoss(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs)


class DC_and_BCE_loss(Compound):
    """weight_ce · binary cross-entropy + weight_dice · Dice of sigmoid, for regions.

    As nnU-Net's class of this name. With an ignore channel the binary cross-entropy is divided by
    the number of voxels that count, without it by voxels times channels.

    Args:
        bce_kwargs: for ``torch.nn.BCEWithLogitsLoss``; ``weight`` and ``pos_weight`` are fused if
            they are one number, or one per channel with axes of 1 in place of the spatial ones.
        soft_dice_kwargs: for ``dice_class``, without ``apply_nonlin``.
        weight_ce, weight_dice: the factors.
        use_ignore_label: the last channel of the target is 1 at ignored voxels.
        dice_class: as for `DC_and_CE_loss`.

    Raises:
        ValueError: when it is called, tensors that do not fit each other.
    """

    def __init__(
        self,
        bce_kwargs: dict[str, Any],
        soft_dice_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: Any = MemoryEfficientSoftDiceLoss,
    ) -> None:
        super().__init__(weight_ce, weight_dice)
        self.use_ignore_label = use_ignore_label
        if use_ignore_label:
            bce_kwargs = {**bce_kwargs, "reduction": "none"}
        self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
        self.dc = dice_class_of(dice_class)(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            net_output: logits, (B, C, *spatial).
            target: the regions, dense: (B, C, *spatial), or (B, C + 1, *spatial) with
                ``use_ignore_label``.
        """
        target, mask = self._split(net_output, target)
        ce, dc = self._requests_of(net_output, target, mask)
        joined = self._joined(ce, dc)
        if joined is not None:
            return evaluate(*joined)
        dice = self.dc(net_output, target, loss_mask=mask)
        if ce is not None:
            entropy = evaluate((1.0, ce))
        else:
            logits = net_output
            if type(self.ce) is nn.BCEWithLogitsLoss:
                logits = at_least_float32(net_output)
                target = target.to(logits.dtype)
            entropy = self.ce(logits, target)
            if mask is not None:
                entropy = (entropy * mask).sum() / mask.sum().clip(min=1)
        total: Tensor = self._sum(entropy, dice)
        return total

    def request(self, term: Recipe, net_output: Tensor, target: Tensor) -> Fused:
        target, mask = self._split(net_output, target)
        return Fused(term, "sigmoid", net_output, target.detach(), mask)

    def _requests(self, net_output: Tensor, target: Tensor) -> tuple[Fused | None, Fused | None]:
        return self._requests_of(net_output, *self._split(net_output, target))

    def _requests_of(
        self, net_output: Tensor, target: Tensor, mask: Tensor | None
    ) -> tuple[Fused | None, Fused | None]:
        own = self._own_dice()
        dc = None if own is None else own.fused(net_output, target, mask)
        return self._fused_entropy(net_output, target, mask), dc

    def _split(self, net_output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The regions, and the mask of the voxels that count."""
        channels = net_output.shape[1] + int(self.use_ignore_label)
        wanted = (net_output.shape[0], channels, *net_output.shape[2:])
        if target.shape != wanted:
            raise ValueError(f"target: expected shape {wanted}, got {tuple(target.shape)}")
        if not self.use_ignore_label:
            return target, None
        last = target[:, -1:]
        return target[:, :-1], ~last if last.dtype == torch.bool else last != 1

    def _fused_entropy(self, logits: Tensor, target: Tensor, mask: Tensor | None) -> Fused | None:
        reductions = ("mean", "sum") if mask is None else ("none",)
        if not as_built(self.ce, nn.BCEWithLogitsLoss) or self.ce.reduction not in reductions:
            return None
        if not kernels_take(logits, target):
            return None
        weight: Values | None = (1.0,) * logits.shape[1]
        if self.ce.weight is not None:
            weight = self._per_channel(self.ce.weight, logits)
        positive = weight
        if weight is not None and self.ce.pos_weight is not None:
            positive = self._per_channel(self.ce.pos_weight, logits)
            if positive is not None:
                own = None if self.ce.weight is None else weight
                positive = product(own, positive, logits.device)
        if weight is None or positive is None:
            return None
        term = recipe(
            BinaryCrossEntropy,
            positive=positive,
            negative=weight,
            per_voxel=mask is not None,
            reduction="sum" if self.ce.reduction == "sum" else "mean",
        )
        return Fused(term, "sigmoid", logits, target.detach(), mask)

    def _per_channel(self, tensor: Tensor, logits: Tensor) -> Values | None:
        """A number per channel; None for weights of another kind."""
        channels = logits.shape[1]
        shape = (1,) * (logits.ndim - tensor.ndim) + tuple(tensor.shape)
        of_channels = shape[1] in (1, channels) and tensor.numel() == shape[1]
        if len(shape) != logits.ndim or not of_channels or tensor.requires_grad:
            return None
        numbers = numbers_of(tensor)
        if not are_sizes(numbers):
            return None
        if isinstance(numbers, Tensor):
            return on_device(numbers, logits.device).reshape(-1).expand(channels)
        return numbers * (channels // len(numbers))


def remember_weights(module: Any, _: Any = None) -> None:
    """Does nothing: pickles of older versions name it."""
