"""Fields that are made in the workers of nnU-Net's data loader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss.loss import Loss


class AppendFields:
    """A transform that appends fields of a sample's target to the list of its targets.

    nnU-Net's loader takes of a sample its image and its segmentation, nothing else; of a list of
    segmentations, which deep supervision has, it makes batches one by one, whatever their shapes
    and dtypes. So fields travel at the end of that list, and the loss finds them there. It comes
    after all other transforms, and is called as those of batchgeneratorsv2 are.

    Args:
        loss: the fields that its terms make are appended, in the order of their names.
        classes: the number of channels of the logits.
        regions: the target is dense; an ignore channel may follow the regions.
        everywhere: a field for every target of the list: that of the first at the nearest voxels,
            by which deep supervision makes targets. If not, for the first alone.
        dtype: "float32" or "float16", of fields of floating numbers.
    """

    def __init__(
        self, loss: Loss, classes: int, *, regions: bool, everywhere: bool, dtype: str
    ) -> None:
        self.loss = loss
        self.classes = classes
        self.regions = regions
        self.everywhere = everywhere
        self.dtype = dtype

    def __call__(self, **sample: Any) -> dict[str, Any]:
        """The sample with its segmentation as a list: the targets, (C, *spatial), and fields."""
        target = sample["segmentation"]
        targets = list(target) if isinstance(target, (list, tuple)) else [target]
        full = targets[0][: self.classes if self.regions else 1]
        fields = self.loss.fields(
            full[None].numpy(),
            classes=self.classes,
            dtype=self.dtype,
            dense=self.regions,
            spatial_axes=full.ndim - 1,
        )
        appended = []
        for field in fields.values():
            whole = torch.from_numpy(field[0])
            appended += [
                _nearest(whole, other.shape[1:])
                for other in (targets if self.everywhere else targets[:1])
            ]
        return {**sample, "segmentation": [*targets, *appended]}

    def __repr__(self) -> str:
        return f"AppendFields({self.loss!r}, {self.classes})"


def _nearest(field: Tensor, size: torch.Size) -> Tensor:
    """A field, (*spatial) or (C, *spatial), at this size."""
    lead = field.ndim - len(size)
    if field.shape[lead:] == size:
        return field
    channels = field if lead else field[None]
    # As nnU-Net resizes targets, so that each voxel of both comes from the same place.
    resized = torch.nn.functional.interpolate(
        channels[None].float(), list(size), mode="nearest-exact"
    )[0].to(field.dtype)
    return resized if lead else resized[0]
