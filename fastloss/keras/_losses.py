"""What Keras lacks: any loss of the library, and the common ones by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import keras
import numpy as np
from keras import ops

from fastloss import loss as losses
from fastloss.keras import _inputs, _reduce
from fastloss.naming import loss_of
from fastloss.options import check_choice
from fastloss.terms import boundary, distribution, region

registered = keras.saving.register_keras_serializable(package="fastloss")


class _Fused(keras.losses.Loss):
    """A loss of the library as one of Keras'.

    A subclass makes the loss; the value is the mean over samples (and classes) with the mean
    reductions, else each sample's value, or their sum.
    """

    def __init__(
        self,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axis: expected an integer, got {axis!r}")
        self.axis = axis

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axis": self.axis}

    def _read(self, y_pred: Any) -> tuple[losses.Loss, Any]:
        """The loss, and the logits or probabilities that it reads."""
        raise NotImplementedError(f"{type(self).__name__} must define _read")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Each sample's value, (B,); the value itself where the loss joins the samples."""
        y_pred = _inputs.predictions(y_pred, self.dtype)
        loss, y_pred = self._read(y_pred)
        return self._of_samples(loss, _inputs.tensor(y_true), y_pred, None)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = _reduce.mask_of(y_pred)
        with keras.name_scope(self.name):
            y_pred = _inputs.predictions(y_pred, self.dtype)
            loss, y_pred = self._read(y_pred)
            y_true = _inputs.tensor(y_true)
            rank = len(y_pred.shape)
            of_voxels = _as_voxels(mask, rank, y_pred, self.axis)
            of_samples = None
            if sample_weight is not None:
                weight = ops.convert_to_tensor(sample_weight, dtype="float32")
                if _is_of_samples(weight):
                    of_samples = ops.reshape(weight, (-1,))
                else:
                    weight = _as_voxels(weight, rank, y_pred, self.axis)
                    of_voxels = weight if of_voxels is None else of_voxels * weight
            if self.reduction in _reduce.MEANS and of_samples is None:
                value = loss(y_pred, y_true, of_voxels)
                if len(value.shape):
                    value = ops.mean(value)
                value = _reduce.for_replicas(value)
            else:
                values = self._of_samples(loss, y_true, y_pred, of_voxels)
                if of_samples is not None and not len(values.shape):
                    raise ValueError(
                        "sample_weight: a loss that joins the samples has no value of each to "
                        "weigh; give weights of voxels"
                    )
                value = _reduce.reduced(values, of_samples, None, self.reduction, self.dtype)
            return ops.cast(value, self.dtype)

    def _of_samples(self, loss: losses.Loss, y_true: Any, y_pred: Any, weight: Any) -> Any:
        values = _each(loss)(y_pred, y_true, weight)
        rank = len(values.shape)
        return ops.mean(values, axis=list(range(1, rank))) if rank > 1 else values


def _each(loss: losses.Loss) -> losses.Loss:
    """The same with a value for every sample, where its terms have one."""
    terms = []
    for factor, term in loss.terms:
        if getattr(term, "batch", False) or getattr(term, "reduction", "none") == "none":
            terms.append((factor, term))
            continue
        own = copy.copy(term)
        vars(own).pop("_loss", None)
        own.reduction = "none"
        terms.append((factor, own))
    return loss.with_terms(tuple(terms))


def _is_of_samples(weight: Any) -> bool:
    """(B,), or (B, 1, …, 1)."""
    return len(weight.shape) == 1 or all(n == 1 for n in weight.shape[1:])


def _as_voxels(weight: Any, rank: int, y_pred: Any, axis: int) -> Any:
    """Weights of voxels, (B, *spatial), without an axis of channels."""
    if weight is None:
        return None
    found = ops.cast(weight, "float32")
    if len(found.shape) == rank and found.shape[axis] == 1:
        found = ops.squeeze(found, axis)
    if len(found.shape) == rank - 1 and tuple(found.shape) != tuple(ops.shape(y_pred)[:-1]):
        shape = list(ops.shape(y_pred))
        del shape[axis]
        found = ops.broadcast_to(found, shape)
    return found


@registered
class Loss(_Fused):
    """Any `fastloss.Loss` as a loss of Keras, fused: ``Loss(fl.Dice() + fl.CrossEntropy())``.

    y_pred is what the loss reads: logits, or probabilities where its activation is "none". y_true
    is a label map (B, *spatial) or (B, *spatial, 1), or of y_pred's shape. Terms that read a field
    of the target make it in the call.

    Args:
        loss: a term or loss. Where it names no ``channel_axis``, that is ``axis``.
        axis: the axis of the channels.
        reduction: with the mean reductions the loss's own value; "sum" and "none" take each
            sample's.
        name, dtype: as in Keras.

    ``sample_weight`` of shape (B,) weighs the samples' values, any other the voxels. A model whose
    loss has terms of your own is loaded with ``compile=False``, and compiled again.

    Raises:
        TypeError: ``loss`` is none.
    """

    def __init__(
        self,
        loss: Any,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(axis, reduction, name, dtype)
        if not isinstance(loss, (losses.Loss, losses.Term)):
            raise TypeError(f"loss: expected a loss or term of fastloss, got {loss!r}")
        self.loss = losses.Loss(loss)
        if "channel_axis" not in self.loss._options:
            self.loss = losses.Loss(self.loss, channel_axis=axis)
        self.axis = self.loss.channel_axis

    def _read(self, y_pred: Any) -> tuple[losses.Loss, Any]:
        return self.loss, y_pred

    def get_config(self) -> dict[str, Any]:
        for _, term in self.loss.terms:
            if term.described.identity:
                raise ValueError(
                    f"loss: the term {type(term).__name__} is not one of fastloss, and has no "
                    "configuration"
                )
        numbers = np.concatenate(self.loss.operands).tolist()
        described = {"structure": json.loads(self.loss.structure), "numbers": numbers}
        return {**super().get_config(), "loss": described}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Loss:
        described = config["loss"]
        text = json.dumps(described["structure"])
        loss = loss_of(text, np.array(described["numbers"], np.float64))
        return cls(**{**config, "loss": loss})


class _Named(_Fused):
    """A loss by name, of logits or probabilities.

    Options that all of these share:

    - from_logits: whether y_pred holds logits; else probabilities. On the TensorFlow backend the
      logits of a softmax or sigmoid that ends the model are found.
    - activation: "softmax" or "sigmoid", by which logits become probabilities; None: softmax where
      there is more than one channel.
    - ignore_class: a label whose voxels count for nothing; None: none.
    - axis: the axis of the channels.
    - reduction, name, dtype: as in Keras. The means are over samples and classes; "sum" and "none"
      take each sample's value, the mean over its classes.

    y_true is a label map (B, *spatial) or (B, *spatial, 1), or of y_pred's shape (one-hot, soft or
    multi-label). ``sample_weight`` of shape (B,) weighs the samples' values, any other the voxels.
    """

    def __init__(
        self,
        from_logits: bool = False,
        activation: str | None = None,
        ignore_class: int | None = None,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(axis, reduction, name, dtype)
        if activation is not None:
            check_choice("activation", activation, ("softmax", "sigmoid"))
        self.from_logits, self.activation = bool(from_logits), activation
        self.ignore_class = ignore_class
        self._made: dict[str, losses.Loss] = {}
        self._terms()  # so that options out of their range raise now

    _options: tuple[str, ...] = ()
    """The names of a subclass's own options, kept as attributes."""
    _reads_logarithms = False
    """Whether probabilities of 0 would have infinite losses."""

    def _terms(self) -> Any:
        """The loss, without activation and axes."""
        raise NotImplementedError(f"{type(self).__name__} must define _terms")

    def _read(self, y_pred: Any) -> tuple[losses.Loss, Any]:
        channels = y_pred.shape[self.axis]
        activation = self.activation or ("sigmoid" if channels == 1 else "softmax")
        found = _inputs.logits_of(y_pred, activation, self.from_logits, type(self).__name__)
        if found is not None:
            y_pred = found
        elif not self.from_logits:
            activation = "none"
            if self._reads_logarithms:
                y_pred = _inputs.clipped(y_pred)
        if activation not in self._made:
            self._made[activation] = losses.Loss(
                self._terms(),
                activation=activation,
                channel_axis=self.axis,
                ignore_index=self.ignore_class,
            )
        return self._made[activation], y_pred

    def get_config(self) -> dict[str, Any]:
        names = ("from_logits", "activation", "ignore_class", *self._options)
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _numbers(weight: Any) -> Any:
    """Class weights as a configuration holds them."""
    return weight if weight is None or isinstance(weight, float) else np.asarray(weight).tolist()


@registered
class DiceCE(_Named):
    """Dice + cross-entropy, fused; the loss that most 3D segmentation is trained with.

    Args:
        dice_weight, ce_weight: the factors of the two.
        include_background: whether class 0 counts for Dice.
        batch: one Dice of the batch rather than one of each sample.
        class_weight: a weight per class for cross-entropy, (C,); None: 1.
        label_smoothing: of cross-entropy, in [0, 1].
        smooth: added to Dice's numerator and denominator.
        options: those of all losses here: from_logits, activation, ignore_class, axis, reduction,
            name, dtype.
    """

    _options = (
        "dice_weight", "ce_weight", "include_background", "batch", "class_weight",
        "label_smoothing", "smooth",
    )  # fmt: skip
    _reads_logarithms = True

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        include_background: bool = True,
        batch: bool = False,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        smooth: float = 1e-5,
        name: str | None = "dice_ce",
        **options: Any,
    ) -> None:
        self.dice_weight, self.ce_weight = float(dice_weight), float(ce_weight)
        self.include_background, self.batch = include_background, batch
        self.class_weight = _numbers(class_weight)
        self.label_smoothing, self.smooth = label_smoothing, smooth
        super().__init__(name=name, **options)

    def _terms(self) -> Any:
        dice = region.Dice(
            include_background=self.include_background,
            batch=self.batch,
            smooth_nr=self.smooth,
            smooth_dr=self.smooth,
        )
        entropy = distribution.CrossEntropy(
            weight=self.class_weight, label_smoothing=self.label_smoothing
        )
        return self.dice_weight * dice + self.ce_weight * entropy


class _RegionOptions(_Named):
    """A loss of overlap and sizes.

    The options are those of `fastloss.RegionTerm`, but for ``class_weight``, a weight per class,
    and ``smooth``, which is added to numerator and denominator.
    """

    _options: tuple[str, ...] = ("include_background", "batch", "class_weight", "smooth")

    def __init__(
        self,
        include_background: bool = True,
        batch: bool = False,
        class_weight: Any = None,
        smooth: float = 1e-5,
        **options: Any,
    ) -> None:
        self.include_background, self.batch = include_background, batch
        self.class_weight, self.smooth = _numbers(class_weight), smooth
        super().__init__(**options)

    def _shared(self) -> dict[str, Any]:
        return {
            "include_background": self.include_background,
            "batch": self.batch,
            "weight": self.class_weight,
            "smooth_nr": self.smooth,
            "smooth_dr": self.smooth,
        }


@registered
class Jaccard(_RegionOptions):
    """Soft Jaccard (intersection over union) loss, as `fastloss.Jaccard`.

    Args:
        include_background, batch, class_weight, smooth: as in `fastloss.RegionTerm`.
        options: those of all losses here, as in `DiceCE`.
    """

    def __init__(self, name: str | None = "jaccard", **options: Any) -> None:
        super().__init__(name=name, **options)

    def _terms(self) -> Any:
        return region.Jaccard(**self._shared())


@registered
class FocalTversky(_RegionOptions):
    """Focal Tversky loss, (1 − TI)^γ, as `fastloss.Tversky`.

    Args:
        alpha: the weight of false positives.
        beta: that of false negatives.
        gamma: γ, above 0.
        include_background, batch, class_weight, smooth: as in `fastloss.RegionTerm`.
        options: those of all losses here, as in `DiceCE`.
    """

    _options = (*_RegionOptions._options, "alpha", "beta", "gamma")

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        name: str | None = "focal_tversky",
        **options: Any,
    ) -> None:
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        super().__init__(name=name, **options)

    def _terms(self) -> Any:
        how = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        return region.Tversky(**how, **self._shared())


@registered
class GeneralizedDice(_RegionOptions):
    """Generalised Dice loss, whose classes weigh as their size tells; `fastloss.GeneralizedDice`.

    Args:
        weighting: "square", "simple" or "uniform".
        include_background, batch, class_weight, smooth: as in `fastloss.RegionTerm`.
        options: those of all losses here, as in `DiceCE`.
    """

    _options = (*_RegionOptions._options, "weighting")

    def __init__(
        self, weighting: str = "square", name: str | None = "generalized_dice", **options: Any
    ) -> None:
        self.weighting = weighting
        super().__init__(name=name, **options)

    def _terms(self) -> Any:
        return region.GeneralizedDice(weighting=self.weighting, **self._shared())


@registered
class Boundary(_Named):
    """Boundary loss, the mean of p times the signed distance to the boundary; `fastloss.Boundary`.

    The distances are measured in each call, of y_true. It is meant as an addition: ``Loss(fl.Dice()
    + fl.CrossEntropy() + 0.01 * fl.Boundary())`` fuses the three.

    Args:
        spacing: the size of a voxel, one number or one for each spatial axis.
        include_background: whether class 0 counts.
        options: those of all losses here, as in `DiceCE`.
    """

    _options = ("spacing", "include_background")

    def __init__(
        self,
        spacing: Any = None,
        include_background: bool = True,
        name: str | None = "boundary",
        **options: Any,
    ) -> None:
        self.spacing = list(spacing) if isinstance(spacing, (tuple, list)) else spacing
        self.include_background = include_background
        super().__init__(name=name, **options)

    def _terms(self) -> Any:
        return boundary.Boundary(spacing=self.spacing, include_background=self.include_background)
