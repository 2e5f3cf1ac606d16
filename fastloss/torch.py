"""The losses as modules of PyTorch.

Every module is called as ``module(logits, target, voxel_weight=None)`` with arrays as
`fastloss.Loss` takes them, ``fields=``, ``regions=`` and ``region_count=`` included, and takes
besides the options of its terms

- activation, ignore_index, channel_axis, validate: as `fastloss.Loss`.
- reuse_logits: write the gradient over the logits' memory in the backward pass, which then
  allocates nothing. The logits' values are gone after it: autograd raises RuntimeError if another
  operation of the graph needs them, and so does a second backward pass. ValueError for logits that
  are a leaf, share memory with one, or repeat elements (expanded). Under `torch.compile` and
  `torch.jit.trace` the gradient takes memory of its own.
- process_group: a group of `torch.distributed`, or True for the default one, whose processes hold
  parts of one loss: the sums over voxels are joined between the two passes. The value is the
  joined one on every rank. The gradient is multiplied by the number of ranks, as
  `DistributedDataParallel` divides by it: together they train as one process on all the data.
  A rank that holds nothing calls it too, with an empty batch, and gets the same value.
- shard: "batch" if every rank holds other samples, in numbers that may differ; "volume" if every
  rank holds a part of the voxels of the same samples.

Class weights (``weight``, ``alpha``) that are one number per class are buffers: they follow
``.to()``, are kept in ``state_dict``, and are read in every call, so that what is loaded or written
there in whatever way is computed with. In a sum of several terms their names are ``term0_weight``,
``term1_weight``, …. `torch.compile` makes nothing anew for other numbers. On a GPU nobody looks at
class weights that lie there: negative ones make the value NaN, or with ``validate=True`` an error.

>>> import torch, fastloss.torch
>>> criterion = fastloss.torch.DiceCE(include_background=False, ce_weight=[0.5, 1.0, 2.0])
>>> logits = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
>>> criterion(logits, torch.zeros(1, 4, 4, 4, dtype=torch.uint8)).backward()
>>> list(criterion.state_dict())
['term1_weight']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

import fastloss
from fastloss.borrowed import Extras
from fastloss.dropin import Scheduled, times
from fastloss.frameworks.torch import operators as torch_operators  # noqa: F401  registers what exported graphs call
from fastloss.frameworks.torch.adapter import ADAPTER
from fastloss.frameworks.torch.centerline import share_within, side
from fastloss.frameworks.torch.distributed import ranks
from fastloss.frameworks.torch.neighbours import neighbour_shares
from fastloss.frameworks.torch.skeleton import soft_skeleton
from fastloss.frameworks.torch.tensors import bytes_of, is_traced, refuse_gradient
from fastloss.functional import dice_ce, dice_focal
from fastloss.loss import Term
from fastloss.options import (
    check_choice,
    check_class_weight,
    check_count,
    check_number,
    check_switch,
)
from fastloss.structure import options_of

__all__ = [
    "BlobLoss",
    "CCDiceCE",
    "CbDice",
    "Combo",
    "CrossEntropy",
    "DeepSupervision",
    "Dice",
    "DiceCE",
    "DiceFocal",
    "DiceSemimetric",
    "ExponentialLogarithmic",
    "Focal",
    "GeneralizedDice",
    "GeneralizedWassersteinDice",
    "Jaccard",
    "KLDivergence",
    "LogCoshDice",
    "Loss",
    "LovaszHinge",
    "LovaszSoftmax",
    "NeighborAwareCE",
    "OHEMCrossEntropy",
    "SensitivitySpecificity",
    "SymmetricCrossEntropy",
    "TopKCrossEntropy",
    "Tversky",
    "UnifiedFocal",
    "soft_skeleton",
]


class Loss(torch.nn.Module):
    """Any loss as a module: ``Loss(fl.Dice() + 0.5 * fl.CrossEntropy())``.

    Args:
        *terms: terms and losses of `fastloss`, summed.
        **options: see `fastloss.torch`.
    """

    def __init__(
        self,
        *terms: Any,
        activation: str | None = None,
        ignore_index: int | None = None,
        channel_axis: int | None = None,
        validate: bool | None = None,
        reuse_logits: bool = False,
        process_group: Any = None,
        shard: str = "batch",
    ) -> None:
        super().__init__()
        self.loss = fastloss.Loss(
            *terms,
            activation=activation,
            ignore_index=ignore_index,
            channel_axis=channel_axis,
            validate=validate,
        )
        """The loss that the module computes."""
        self.reuse_logits = check_switch("reuse_logits", reuse_logits)
        self._ranks = ranks(process_group, shard)
        self._hold_numbers()

    def _hold_numbers(self) -> None:
        """Make buffers of the class weights of the loss."""
        places: dict[str, tuple[int, str]] = {}
        for i, (_, term) in enumerate(self.loss.terms):
            for option, value in options_of(term).items():
                if isinstance(value, np.ndarray):
                    name = option if len(self.loss.terms) == 1 else f"term{i}_{option}"
                    self.register_buffer(name, torch.tensor(value))
                    places[name] = (i, option)
        self._places = places  # from a buffer's name to its term and option
        self._seen: list[Any] = []  # in the buffers, when the loss was made with their numbers

    def forward(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
    ) -> torch.Tensor:
        """The value: a scalar, or as ``reduction="none"`` and "voxel" of the terms say."""
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
        given = self._given(logits) if self._places else ()
        value: torch.Tensor = ADAPTER.value(
            self.loss,
            logits,
            target,
            voxel_weight,
            extras=Extras.of(fields, regions, region_count),
            given=given,
            reuse_logits=self.reuse_logits,
            ranks=self._ranks,
        )
        return value

    def _given(self, logits: torch.Tensor) -> Sequence[Any]:
        """The buffers that are not read here but where the loss is computed, as `Loss.operands` of
        `fastloss` has their numbers."""
        buffers = {name: getattr(self, name) for name in self._places}
        for name, buffer in buffers.items():
            refuse_gradient(buffer, name)
        if not is_traced(logits):
            # A few numbers: read whenever they are needed, as not all that writes there leaves a
            # trace.
            seen = [bytes_of(buffer) for buffer in buffers.values()]
            if None not in seen:
                if seen != self._seen:
                    self._follow_buffers()
                    self._seen = seen
                return ()
        of_place = {place: buffers[name] for name, place in self._places.items()}
        given = [None]
        for i, (_, term) in enumerate(self.loss.terms):
            given += [of_place.get((i, option)) for option in term.described.names]
        return given

    def _follow_buffers(self, *, read: bool = True) -> None:
        """Make the loss anew if the numbers in the buffers are not those that it has.

        Where they are not to be ``read``, of those on a device the shape alone is followed.
        """
        terms = list(self.loss.terms)
        for name, (i, option) in self._places.items():
            buffer = getattr(self, name)
            factor, term = terms[i]
            known, numbers = getattr(term, option), None
            if buffer is not None:
                if not (buffer.is_meta or (bytes_of(buffer) is None and not read)):
                    numbers = check_class_weight(name, buffer.detach())
                elif known is None or known.shape != buffer.shape:
                    numbers = np.ones(tuple(buffer.shape))
                else:
                    continue
            if not np.array_equal(known, numbers):  # type: ignore[arg-type]
                terms[i] = (factor, term.with_options({option: numbers}))
        if any(new is not old for new, old in zip(terms, self.loss.terms, strict=True)):
            vars(self)["loss"] = self.loss.with_terms(tuple(terms))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        self._follow_buffers()
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_buffers()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in vars(self).get("_places", ()):
            self._follow_buffers(read=False)
        elif name == "loss" and "_places" in vars(self):
            for old in self._places:
                delattr(self, old)
            self._hold_numbers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = []
        self._follow_buffers()

    def extra_repr(self) -> str:
        parts = [repr(self.loss).removeprefix("Loss(").removesuffix(")")]
        if self.reuse_logits:
            parts.append("reuse_logits=True")
        if self._ranks is not None:
            parts.append(f"process_group={self._ranks.group!r}, shard={self._ranks.shard!r}")
        return ", ".join(parts)


_LOSS_OPTIONS = (
    "activation", "ignore_index", "channel_axis", "validate", "reuse_logits", "process_group",
    "shard",
)  # fmt: skip


class _Term(Loss):
    """One term; its options and those of `Loss` are keyword arguments."""

    term: ClassVar[type[Term]]

    def __init__(self, **options: Any) -> None:
        whole = {k: options.pop(k) for k in _LOSS_OPTIONS if k in options}
        super().__init__(self.term(**options), **whole)


class CrossEntropy(_Term):
    """`fastloss.CrossEntropy`: weight, label_smoothing, reduction."""

    term = fastloss.CrossEntropy


class TopKCrossEntropy(_Term):
    """`fastloss.TopKCrossEntropy`: k, weight."""

    term = fastloss.TopKCrossEntropy


class OHEMCrossEntropy(_Term):
    """`fastloss.OHEMCrossEntropy`: threshold, min_kept, weight."""

    term = fastloss.OHEMCrossEntropy


class LovaszSoftmax(_Term):
    """`fastloss.LovaszSoftmax`: classes, per_sample, method."""

    term = fastloss.LovaszSoftmax


class LovaszHinge(_Term):
    """`fastloss.LovaszHinge`: classes, per_sample, method; the activation is "sigmoid"."""

    term = fastloss.LovaszHinge

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"activation": "sigmoid", **options})


class Focal(_Term):
    """`fastloss.Focal`: gamma, alpha, reduction."""

    term = fastloss.Focal


class Dice(_Term):
    """`fastloss.Dice`: the options of `fastloss.RegionTerm`."""

    term = fastloss.Dice


class Jaccard(_Term):
    """`fastloss.Jaccard`: the options of `fastloss.RegionTerm`."""

    term = fastloss.Jaccard


class Tversky(_Term):
    """`fastloss.Tversky`: alpha, beta, gamma, and the options of `fastloss.RegionTerm`."""

    term = fastloss.Tversky


class GeneralizedDice(_Term):
    """`fastloss.GeneralizedDice`: weighting, and the options of `fastloss.RegionTerm`."""

    term = fastloss.GeneralizedDice


class CCDiceCE(_Term):
    """`fastloss.CCDiceCE`: Dice + cross-entropy of every lesion, and its options."""

    term = fastloss.CCDiceCE


class LogCoshDice(_Term):
    """`fastloss.LogCoshDice`: the options of `fastloss.RegionTerm`."""

    term = fastloss.LogCoshDice


class SensitivitySpecificity(_Term):
    """`fastloss.SensitivitySpecificity`: r, smooth_dr, and the options of a region term."""

    term = fastloss.SensitivitySpecificity


class DiceSemimetric(_Term):
    """`fastloss.DiceSemimetric`: jaccard, and the options of a region term."""

    term = fastloss.DiceSemimetric


class SymmetricCrossEntropy(_Term):
    """`fastloss.SymmetricCrossEntropy`: alpha, beta, log_zero, weight, reduction."""

    term = fastloss.SymmetricCrossEntropy


class KLDivergence(_Term):
    """`fastloss.KLDivergence`: weight, reduction."""

    term = fastloss.KLDivergence


class GeneralizedWassersteinDice(_Term):
    """`fastloss.GeneralizedWassersteinDice`: distances, weighting, smooth_nr, smooth_dr,
    reduction."""

    term = fastloss.GeneralizedWassersteinDice


class _Sum(Loss):
    """A sum of terms with options of its own, and those of `Loss`."""

    kind: ClassVar[type[fastloss.Loss]]

    def __init__(self, **options: Any) -> None:
        whole = {k: options.pop(k) for k in _LOSS_OPTIONS if k in options}
        super().__init__(self.kind(**options), **whole)


class BlobLoss(_Sum):
    """`fastloss.BlobLoss`: alpha, beta, dice_factor, ce_factor, and its other options."""

    kind = fastloss.BlobLoss


class Combo(_Sum):
    """`fastloss.Combo`: alpha, beta, and its other options."""

    kind = fastloss.Combo


class ExponentialLogarithmic(_Sum):
    """`fastloss.ExponentialLogarithmic`: dice_factor, ce_factor, gamma_dice, gamma_ce, ce_weight,
    and its other options."""

    kind = fastloss.ExponentialLogarithmic


class UnifiedFocal(_Sum):
    """`fastloss.UnifiedFocal`: focal_share, delta, gamma, symmetric, and its other options."""

    kind = fastloss.UnifiedFocal


class NeighborAwareCE(torch.nn.Module):
    """Cross-entropy + α · the mean over voxels and classes of |u − x|, or of (u − x)².

    x are the logits, and u the shares of the classes among the neighbours of a voxel, outside the
    array 0: it keeps a network from being too sure of itself. As the penalty is on logits, it is no
    term of a `fastloss.Loss`: the kernels compute both parts, each in two passes, and u takes the
    memory of the logits in float32, with another as much while it is made. Softmax of label maps.

    Args:
        alpha: α, at least 0.
        distance: "l1" or "l2".
        size: the edge of the cube of neighbours, at least 1.
        sigma: the standard deviation of a Gaussian in voxels, above 0, in place of the cube.
        ignore_index: voxels of this label count for nothing, and are no neighbours.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Murugesan et al. 2023, "Trust your neighbours: penalty-based constraints for model
    calibration".
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        distance: str = "l1",
        size: int = 3,
        sigma: float | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha)
        self.distance = check_choice("distance", distance, ("l1", "l2"))
        self.size = check_count("size", size)
        self.sigma = None if sigma is None else check_number("sigma", sigma)
        if self.sigma == 0:
            raise ValueError("sigma: expected a number above 0, got 0")
        self.ignore_index = ignore_index
        term = fastloss.AbsoluteError if distance == "l1" else fastloss.Brier
        self.entropy = fastloss.Loss(fastloss.CrossEntropy(), ignore_index=ignore_index)
        self.penalty = fastloss.Loss(term(), activation="none")

    def forward(
        self, logits: torch.Tensor, target: torch.Tensor, voxel_weight: Any = None
    ) -> torch.Tensor:
        """The value.

        Args:
            logits: (B, C, *spatial), with 1 to 3 spatial axes.
            target: a label map, (B, *spatial) or (B, 1, *spatial).
            voxel_weight: as in `fastloss.Loss`.
        """
        value: torch.Tensor = self.entropy(logits, target, voxel_weight)
        labels = target[:, 0] if target.ndim == logits.ndim else target
        if self.ignore_index is not None:
            counted = labels != self.ignore_index
            labels = torch.where(counted, labels, -1)
            if voxel_weight is None:
                voxel_weight = counted
            else:
                voxel_weight = voxel_weight.reshape(-1, *counted.shape[1:]) * counted
        classes = logits.shape[1]
        shares = neighbour_shares(labels, classes, size=self.size, sigma=self.sigma)
        penalty: torch.Tensor = self.penalty(logits, shares, voxel_weight)
        return value + (self.alpha / classes) * penalty

    def extra_repr(self) -> str:
        how = f"size={self.size}" if self.sigma is None else f"sigma={self.sigma}"
        return f"alpha={self.alpha}, distance={self.distance!r}, {how}"


class CbDice(torch.nn.Module):
    """Centerline boundary Dice (cbDice): clDice that knows the radius of what a centerline is in.

    1 − 2 T S / (T + S) of the foreground, all classes above 0 as one, over the whole batch. With v
    a volume (p of the foreground, or the target's g), s its soft skeleton, D the distance of v > ½
    to the rest in voxels, and R the largest D on the line s > ½ of a sample, at least 1, there are

    - the depth a = v · min(D, R) / R,
    - on the line, the radius r = v · D / R,
    - on the line, the skeleton l = s / (D / R), in 3D s / (D / R)²: thin vessels count for more.

    T = (Σ l_p a_g + ε) / (Σ l_p r + ε), r being that of the target, and that of the prediction
    where the target has none; S is T with the sides changed. Add Dice and cross-entropy to it.

    D, R and the lines are constants: the gradient comes through p in a and r, and through s(p), as
    in the authors' code. They do the same but for the value, which is 1 less there. Where a
    volume fills a sample, D is 1.

    Args:
        iterations: of the skeleton, about the radius of the thickest structure in voxels.
        smooth: ε, above 0.
        ignore_index: voxels of this label are outside of both volumes.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Shi et al. 2024, "Centerline Boundary Dice Loss for Vascular Segmentation" (MICCAI).

    >>> import torch, fastloss.torch
    >>> labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    >>> labels[:, 2:5] = 1
    >>> logits = 20.0 * torch.stack([1 - labels, labels], 1)
    >>> print(round(fastloss.torch.CbDice()(logits, labels).item(), 4))
    0.0
    """

    def __init__(
        self, *, iterations: int = 10, smooth: float = 1.0, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.iterations = check_count("iterations", iterations)
        self.smooth = check_number("smooth", smooth)
        if self.smooth == 0:
            raise ValueError("smooth: expected a number above 0, got 0")
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The value.

        Args:
            logits: (B, C, *spatial), with 2 or 3 spatial axes: of a softmax, or where C is 1 of a
                sigmoid.
            target: a label map, (B, *spatial) or (B, 1, *spatial).

        Raises:
            ValueError: other shapes.
        """
        if logits.ndim not in (4, 5):
            raise ValueError(
                "logits: expected (batch, channels, *spatial) with 2 or 3 spatial axes, got shape "
                f"{tuple(logits.shape)}"
            )
        one = (logits.shape[0], 1, *logits.shape[2:])
        if tuple(target.shape) not in (one, (one[0], *one[2:])):
            raise ValueError(
                f"target: expected a label map {(one[0], *one[2:])} or {one}, got shape "
                f"{tuple(target.shape)}"
            )
        x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if x.shape[1] > 1:  # softmax of the background and the likeliest other class
            x = x[:, 1:].amax(1, keepdim=True) - x[:, :1]
        p, labels = torch.sigmoid(x), target.reshape(one)
        inside = labels > 0
        if self.ignore_index is not None:
            counted = labels != self.ignore_index
            p, inside = p * counted, inside & counted
        g = inside.to(p.dtype)
        ours = side(p, soft_skeleton(p, self.iterations), _depth(p > 0.5, p.dtype))
        theirs = side(g, soft_skeleton(g, self.iterations), _depth(inside, p.dtype))
        precision = share_within(ours, theirs, self.smooth)
        sensitivity = share_within(theirs, ours, self.smooth)
        return 1.0 - 2.0 * precision * sensitivity / (precision + sensitivity)

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, smooth={self.smooth}"


@torch.compiler.disable
def _depth(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance to the nearest voxel outside of a mask, (B, 1, *spatial); 1 if there is none."""
    found = fastloss.distance_transform(mask, batch_axes=2).to(dtype)
    return torch.where(torch.isinf(found), 1.0, found)


class DiceCE(Loss):
    """Dice + cross-entropy: dice_factor, ce_factor, and options as `fastloss.dice_ce_loss`."""

    def __init__(self, *, dice_factor: float = 1.0, ce_factor: float = 1.0, **options: Any) -> None:
        whole = {k: options.pop(k) for k in _LOSS_OPTIONS if k in options}
        super().__init__(dice_ce(dice_factor=dice_factor, ce_factor=ce_factor, **options), **whole)


class DiceFocal(Loss):
    """Dice + focal loss: dice_factor, focal_factor, and options as `fastloss.dice_focal_loss`."""

    def __init__(
        self, *, dice_factor: float = 1.0, focal_factor: float = 1.0, **options: Any
    ) -> None:
        whole = {k: options.pop(k) for k in _LOSS_OPTIONS if k in options}
        loss = dice_focal(dice_factor=dice_factor, focal_factor=focal_factor, **options)
        super().__init__(loss, **whole)


class DeepSupervision(Scheduled):
    """A weighted sum of one loss over outputs at several resolutions.

    Args:
        loss: a module or function of (logits, target), or (logits, target, voxel_weight).
        weights: one number per output. None: 1, ½, ¼, … divided by their sum, as nnU-Net weighs
            them. An output of weight 0 is not looked at. The attribute ``weights`` may be set to
            others before every call. `torch.compile` makes nothing anew for them, but once where
            an output that was left out counts; it then computes those of weight 0 too.
    """

    scheduled = ("weights",)

    def __init__(self, loss: Callable[..., Any], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.weights = None if weights is None else tuple(float(w) for w in weights)

    def forward(self, outputs: Any, target: Any, voxel_weight: Any = None) -> Any:
        """The weighted sum.

        Args:
            outputs: a list or tuple of logits, or one tensor, whose loss it then is.
            target: a list or tuple of one target per output; or one target, a label map or
                dense, of which an output of another size gets the nearest voxels. Tensors, or
                arrays of NumPy or with ``__dlpack__``, if the loss takes them.
            voxel_weight: None, or as ``target``.

        Raises:
            ValueError: not one weight, target or voxel weight per output. TypeError: a target
                or voxel weight of another kind.
        """
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        count = len(outputs)
        weights: list[Any] = [2.0**-i / (2 - 2.0 ** (1 - count)) for i in range(count)]
        if self.has("weights"):
            weights = self.factors("weights")
        if len(weights) != count or count == 0:
            raise ValueError(f"outputs: expected {len(weights)}, one per weight, got {count}")
        targets = self._per_output("target", target, outputs)
        voxel_weights = self._per_output("voxel_weight", voxel_weight, outputs)
        total = None
        for weight, logits, y, w in zip(weights, outputs, targets, voxel_weights, strict=True):
            if weight is not None:
                part = self.loss(logits, y()) if w is None else self.loss(logits, y(), w())
                part = times(weight, part)
                total = part if total is None else total + part
        if total is None:
            raise ValueError("weights: expected at least one that is not 0")
        return total

    def _per_output(self, name: str, given: Any, outputs: Any) -> list[Any]:
        """For every output a function that makes its array, so that none is made for nothing."""
        if given is None:
            return [None] * len(outputs)
        if not isinstance(given, (list, tuple)):
            if not isinstance(given, (torch.Tensor, np.ndarray)):
                if not hasattr(given, "__dlpack__"):
                    kind = type(given).__name__
                    raise TypeError(f"{name}: expected a tensor, an array, or a list, got {kind}")
                given = torch.from_dlpack(given)
            axis = getattr(getattr(self.loss, "loss", self.loss), "channel_axis", 1)
            return [lambda x=x: _nearest(given, x, axis) for x in outputs]
        if len(given) != len(outputs):
            raise ValueError(f"{name}: expected {len(outputs)}, one per output, got {len(given)}")
        return [lambda a=a: a for a in given]

    def extra_repr(self) -> str:
        return "" if self.weights is None else f"weights={self.weights}"


def _nearest(array: Any, logits: torch.Tensor, channel_axis: int) -> Any:
    """The array at the spatial size of the logits: of each voxel there, the one at its centre."""
    channel_axis %= logits.ndim
    axes = [i for i in range(1, logits.ndim) if i != channel_axis]
    shift = logits.ndim - array.ndim  # 1 for an array without a channel axis
    for axis in axes:
        own = axis - (shift if axis > channel_axis else 0)
        size, wanted = array.shape[own], logits.shape[axis]
        if not torch.jit.is_tracing() and size == wanted:  # a trace cannot choose
            continue
        if isinstance(array, np.ndarray):
            array = array.take((np.arange(wanted) * 2 + 1) * size // (2 * wanted), own)
        else:
            centres = (torch.arange(wanted, device=array.device) * 2 + 1) * size // (2 * wanted)
            array = array.index_select(own, centres)
    return array
