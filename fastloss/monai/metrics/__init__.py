"""MONAI's segmentation metrics, computed by this library.

A pipeline changes one import::

    from fastloss.monai.metrics import DiceMetric  # was: from monai.metrics import DiceMetric

Signatures, defaults, results, buffers, reductions, warnings and errors are those of MONAI 1.6.1,
which need not be installed. Tensors may lie on any device; results lie on the prediction's.

What ``ignore_index`` does, as in MONAI:

- DiceMetric: voxels do not count whose label it is; of masks, those of this channel, or where there
  is no such channel, those that are in no mask of the reference.
- MeanIoU, ConfusionMatrixMetric: a channel of this index is taken as empty in both, and the voxels
  of it count for the others. Where there is no such channel: as DiceMetric.
- GeneralizedDiceScore: as DiceMetric, and a channel of this index is left out of the result.
- SurfaceDistanceMetric, SurfaceDiceMetric and `compute_surface_dice`: such voxels are in no mask,
  so that surfaces run along them.
- HausdorffDistanceMetric: the same, and a channel of this index gives NaN.
- `compute_hausdorff_distance`, `compute_average_surface_distance`: voxels of it count all the same.

What differs from MONAI:

- float64 gives float64, and all else float32; half types are summed without overflow. Sums are
  exact for masks of any size. Results have no gradient.
- Masks of bool are taken in every option. (MONAI's confusion matrix finds no true positive in them,
  and its ``ignore_index`` raises RuntimeError.)
- Confusion matrices and surfaces of other numbers than 0 and 1: the matrix is made of their sums
  and products; in a surface metric only 1 is inside, as in MONAI.
- Tensors that do not fit, and options out of range, are a ValueError before anything is computed,
  whatever the masks hold; so are sizes in ``spacing`` that are not positive.
- Integers and floating numbers may be mixed in ``spacing``, and ``use_subvoxels`` takes one number.
- Surface metrics take up to three spatial axes.
- DiceHelper with ``per_component`` does not warn that it computes on the CPU. It needs SciPy, as do
  the distances "chessboard" and "taxicab", and a ``match_iou_threshold`` below ½: ImportError.
- Panoptic quality takes numbers of instances with gaps also with ``remap=False``.
- `do_metric_reduction` leaves its argument as it is; ``aggregate(None)`` of GeneralizedDiceScore
  does not warn. ``Cumulative.extend`` takes lists of tensors.
- On a GPU the surface metrics copy the masks to CPU memory.
"""

from fastloss.monai.metrics._confusion import (
    ConfusionMatrixMetric,
    compute_confusion_matrix_metric,
    get_confusion_matrix,
)
from fastloss.monai.metrics._cumulative import (
    Cumulative,
    CumulativeIterationMetric,
    IterationMetric,
    Metric,
)
from fastloss.monai.metrics._dice import DiceHelper, DiceMetric, compute_dice
from fastloss.monai.metrics._generalized import GeneralizedDiceScore, compute_generalized_dice
from fastloss.monai.metrics._hausdorff import HausdorffDistanceMetric, compute_hausdorff_distance
from fastloss.monai.metrics._iou import MeanIoU, compute_iou
from fastloss.monai.metrics._panoptic import (
    PanopticQualityMetric,
    compute_mean_iou,
    compute_panoptic_quality,
)
from fastloss.monai.metrics._reduction import do_metric_reduction
from fastloss.monai.metrics._surface_dice import SurfaceDiceMetric, compute_surface_dice
from fastloss.monai.metrics._surface_distance import (
    SurfaceDistanceMetric,
    compute_average_surface_distance,
)

__all__ = [
    "ConfusionMatrixMetric",
    "Cumulative",
    "CumulativeIterationMetric",
    "DiceHelper",
    "DiceMetric",
    "GeneralizedDiceScore",
    "HausdorffDistanceMetric",
    "IterationMetric",
    "MeanIoU",
    "Metric",
    "PanopticQualityMetric",
    "SurfaceDiceMetric",
    "SurfaceDistanceMetric",
    "compute_average_surface_distance",
    "compute_confusion_matrix_metric",
    "compute_dice",
    "compute_generalized_dice",
    "compute_hausdorff_distance",
    "compute_iou",
    "compute_mean_iou",
    "compute_panoptic_quality",
    "compute_surface_dice",
    "do_metric_reduction",
    "get_confusion_matrix",
]
