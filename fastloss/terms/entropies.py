"""Relatives of cross-entropy that are linear in sums over voxels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.loss import Loss
from fastloss.options import check_number
from fastloss.statistics import Statistics
from fastloss.sums import CROSS_ENTROPY, CROSS_ENTROPY_REST, family
from fastloss.terms.linear import ClassWeighted
from fastloss.terms.region import Dice

_LEAST = float(np.finfo(np.float32).min)


class SymmetricCrossEntropy(ClassWeighted):
    """Symmetric cross-entropy, −α Σ_c w_c g_c log p_c − β Σ_c w_c p_c log g_c with log 0 := A.

    The second part, which bears wrong labels, is −A Σ_c g_c (1 − p_c) for hard targets, and is
    taken so for soft ones too. Of a sigmoid both are those of the two outcomes of every channel.

    Args:
        alpha, beta: α and β, at least 0.
        log_zero: A, at most 0.
        weight, reduction: as in `ClassWeighted`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Wang et al. 2019, "Symmetric cross entropy for robust learning with noisy labels".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.SymmetricCrossEntropy(alpha=1), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([0]))), 3))  # −log 0.8 + 4 · 0.2
    1.023
    """

    requires = frozenset({"cross_entropy", "region"})

    def __init__(
        self, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.alpha = check_number("alpha", alpha)
        self.beta = check_number("beta", beta)
        self.log_zero = check_number("log_zero", log_zero, _LEAST, 0.0)

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        reverse = -self.log_zero * self.beta
        both = {"cross_entropy": self.alpha, "reference": reverse}
        if statistics.request.activation == "sigmoid":
            both["cross_entropy_rest"] = self.alpha
            return {**both, "predicted": reverse, "overlap": -2.0 * reverse}
        return {**both, "overlap": -reverse}


class BalancedCrossEntropy(ClassWeighted):
    """Cross-entropy of both outcomes, −Σ_c w_c [β g_c log p_c + (1−β) (1−g_c) log(1−p_c)].

    Its mean is over voxels and classes, of any activation.

    Args:
        beta: β in [0, 1]; above ½ it costs more to miss a class than to find it in vain.
        weight, reduction: as in `ClassWeighted`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Taghanaki et al. 2019, "Combo loss: handling input and output imbalance in multi-organ
    segmentation".
    """

    requires = frozenset({CROSS_ENTROPY, CROSS_ENTROPY_REST})

    def __init__(self, *, beta: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.beta = check_number("beta", beta, 0.0, 1.0)

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return {CROSS_ENTROPY: self.beta, CROSS_ENTROPY_REST: 1.0 - self.beta}

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        return super().linear(statistics)[0], statistics.voxels * statistics.classes


class Combo(Loss):
    """Combo loss, α · `BalancedCrossEntropy` + (1−α) · `Dice`.

    It is the paper's, which subtracts the Dice coefficient, plus 1 − α: 0 where all is right.

    Args:
        alpha: α in [0, 1].
        beta: β of the cross-entropy, in [0, 1].
        include_background, batch, smooth_nr, smooth_dr, weight: of Dice, as in `RegionTerm`.
        reduction: of both, "mean", "sum" or "none".
        **options: activation, ignore_index, channel_axis and validate of `Loss`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Taghanaki et al. 2019, "Combo loss: handling input and output imbalance in multi-organ
    segmentation".
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: Any = None,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        share = check_number("alpha", alpha, 0.0, 1.0)
        entropy = BalancedCrossEntropy(beta=beta, reduction=reduction)
        dice = Dice(
            include_background=include_background,
            batch=batch,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            weight=weight,
            reduction=reduction,
        )
        super().__init__(share * entropy, (1.0 - share) * dice, **options)


class KLDivergence(ClassWeighted):
    """Kullback–Leibler divergence of the prediction from a soft target, Σ_c w_c g_c log(g_c / p_c).

    It is cross-entropy less the entropy of the target: 0 where they are equal, with the same
    gradient by the logits. Of a label map it is cross-entropy. Of a sigmoid it is that of the two
    outcomes of every channel. As in ``torch.nn.KLDivLoss`` with ``reduction="batchmean"``, a class
    of g = 0 adds 0; but the mean is over voxels.

    Options as in `ClassWeighted`.

    Source: Kullback & Leibler 1951, "On information and sufficiency".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.KLDivergence(), activation="none")
    >>> print(round(float(loss(np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]]))), 3))
    0.131
    """

    requires = frozenset({"divergence"})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return dict.fromkeys(family("divergence", statistics.request.activation), 1.0)
