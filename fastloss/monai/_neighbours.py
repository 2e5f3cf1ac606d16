"""The loss that keeps the logits of a voxel near the labels of its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastloss.dropin import Fused, as_built, evaluate, is_size, kernels_take, recipe
from fastloss.frameworks.torch.neighbours import neighbour_shares
from fastloss.monai._module import Module
from fastloss.terms import AbsoluteError, Brier, CrossEntropy


class NACLLoss(Module):
    """Neighbour-aware calibration loss, as ``monai.losses.NACLLoss``.

    Cross-entropy + α · the mean over voxels and classes of |u − x| ("l1") or (u − x)² ("l2"), x
    being the logits and u the shares of the classes among the neighbours of a voxel.

    Args:
        classes: the number of classes.
        dim: the number of spatial axes, 2 or 3.
        kernel_size: the edge of the square or cube of neighbours, for "mean".
        kernel_ops: "mean", or "gaussian".
        distance_type: "l1" or "l2".
        alpha: α.
        sigma: the standard deviation for "gaussian", in voxels.

    Raises:
        ValueError: an option that is none of these; in a call, a label that is no class.

    Source: Murugesan et al. 2023, "Trust your neighbours: penalty-based constraints for model
    calibration".
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        kernel_size: int = 3,
        kernel_ops: str = "mean",
        distance_type: str = "l1",
        alpha: float = 0.1,
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        if kernel_ops not in ("mean", "gaussian"):
            raise ValueError(f"kernel_ops: expected 'mean' or 'gaussian', got {kernel_ops!r}")
        if dim not in (2, 3):
            raise ValueError(f"dim: expected 2 or 3, got {dim!r}")
        if distance_type not in ("l1", "l2"):
            raise ValueError(f"distance_type: expected 'l1' or 'l2', got {distance_type!r}")
        self.nc = classes
        self.dim = dim
        self.cross_entropy = nn.CrossEntropyLoss()
        self.distance_type = distance_type
        self.alpha = alpha
        self.ks = kernel_size
        self.svls_layer = _Filter(dim, kernel_size if kernel_ops == "mean" else None, sigma)

    def get_constr_target(self, mask: Tensor) -> Tensor:
        """The shares of the classes among the neighbours, (B, C, *spatial), of labels
        (B, *spatial)."""
        if type(self.svls_layer) is _Filter:
            return self.svls_layer.of_labels(mask, self.nc)
        one_hot = neighbour_shares(mask, self.nc, size=1)
        smoothed: Tensor = self.svls_layer(one_hot)
        return smoothed

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss.

        Args:
            inputs: logits, (B, C, *spatial).
            targets: labels, (B, *spatial).
        """
        if inputs.ndim != self.dim + 2 or inputs.shape[1] != self.nc:
            raise ValueError(
                f"inputs: expected (B, {self.nc}, …) of {self.dim} spatial axes, got shape "
                f"{tuple(inputs.shape)}"
            )
        shares = self.get_constr_target(targets)
        taken = kernels_take(inputs, targets) and not shares.requires_grad and inputs.numel() > 0
        usual = taken and self._is_usual()
        entropy: Tensor
        if usual:
            entropy = evaluate((1.0, Fused(recipe(CrossEntropy), "softmax", inputs, targets)))
        else:
            entropy = self.cross_entropy(inputs, targets.long())
        if taken and is_size(self.alpha):
            # The logits take the place of probabilities, the shares that of the target.
            term = AbsoluteError if self.distance_type == "l1" else Brier
            penalty = Fused(recipe(term), "none", inputs, shares)
            return entropy + evaluate((self.alpha / self.nc, penalty))
        difference = shares - inputs
        mean = difference.abs().mean() if self.distance_type == "l1" else (difference**2).mean()
        return entropy + self.alpha * mean

    def _is_usual(self) -> bool:
        """Whether the cross-entropy is as it was made."""
        own = self.cross_entropy
        plain = as_built(own, nn.CrossEntropyLoss) and own.weight is None
        return plain and (own.reduction, own.ignore_index, own.label_smoothing) == ("mean", -100, 0)


class _Filter(nn.Module):
    """The mean over a square or cube, or a Gaussian, whose widths are parameters as in MONAI."""

    def __init__(self, dim: int, size: int | None, sigma: float) -> None:
        super().__init__()
        self.size = size
        if size is None:
            for i in range(dim):
                width = nn.Parameter(torch.tensor(float(sigma)), requires_grad=False)
                self.register_parameter(f"kernel_sigma_{i}", width)

    def of_labels(self, labels: Tensor, classes: int) -> Tensor:
        if self.size is not None:
            return neighbour_shares(labels, classes, size=self.size)
        return neighbour_shares(labels, classes, sigma=self.get_parameter("kernel_sigma_0").item())
