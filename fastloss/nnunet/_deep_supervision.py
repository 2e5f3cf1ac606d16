"""nnU-Net's sum over outputs at several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastloss.dropin import Scheduled, times


class DeepSupervisionWrapper(Scheduled):
    """Σ_i w_i · loss(output_i, target_i, …), as nnU-Net's class of this name.

    Args:
        loss: a module or function of tensors.
        weight_factors: w, one number per output, at least one of them not 0; an output of weight
            0 is ignored. None: all are 1.

    Raises:
        AssertionError: all weights are 0; when it is called, arguments that are neither lists nor
            tuples. ValueError: not as many outputs or targets as weights.
    """

    scheduled = ("weight_factors",)

    def __init__(
        self, loss: Callable[..., Any], weight_factors: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if weight_factors is not None:
            weight_factors = tuple(float(w) for w in weight_factors)
            if not any(weight_factors):
                raise AssertionError("weight_factors: expected at least one that is not 0")
        self.weight_factors = weight_factors
        self.loss = loss

    def forward(self, *args: Any) -> Any:
        """The weighted sum; each argument is a list or tuple of one tensor per output."""
        if not all(isinstance(a, (tuple, list)) for a in args):
            kinds = [type(a).__name__ for a in args]
            raise AssertionError(f"expected lists or tuples of tensors, got {kinds}")
        weights: list[Any] = [1.0] * len(args[0])
        if self.has("weight_factors"):
            weights = self.factors("weight_factors")
        pairs = zip(weights, *args, strict=True)
        return sum(
            times(weight, self.loss(*inputs)) for weight, *inputs in pairs if weight is not None
        )
