"""Losses for 3D segmentation, value and gradient, fused into two passes over the logits."""

from fastloss import metrics
from fastloss.backends import use_backend
from fastloss.distance import distance_transform, signed_distance
from fastloss.functional import (
    brier_loss,
    cross_entropy_loss,
    dice_ce_loss,
    dice_focal_loss,
    dice_loss,
    focal_loss,
    generalized_cross_entropy_loss,
    generalized_dice_loss,
    jaccard_loss,
    mcc_loss,
    mean_absolute_error_loss,
    poly_cross_entropy_loss,
    top_k_cross_entropy_loss,
    tversky_loss,
)
from fastloss.functional_boundary import (
    boundary_dou_loss,
    boundary_loss,
    generalized_surface_loss,
    hausdorff_dt_loss,
    skeleton_recall_loss,
)
from fastloss.functional_distillation import distillation_loss
from fastloss.functional_lesions import blob_loss, cc_dice_ce_loss
from fastloss.functional_more import (
    combo_loss,
    dice_semimetric_loss,
    exponential_logarithmic_loss,
    generalized_wasserstein_dice_loss,
    kl_divergence_loss,
    log_cosh_dice_loss,
    sensitivity_specificity_loss,
    symmetric_cross_entropy_loss,
    unified_focal_loss,
)
from fastloss.functional_ranking import (
    lovasz_hinge_loss,
    lovasz_softmax_loss,
    ohem_cross_entropy_loss,
)
from fastloss.instances import Components, components, voronoi
from fastloss.loss import Loss
from fastloss.statistics import Statistics
from fastloss.sums import Sum
from fastloss.terms import *  # noqa: F403
from fastloss.terms import __all__ as _terms
from fastloss.threads import get_num_threads, set_num_threads
from fastloss.version import __version__

__all__ = [
    "Components",
    "Loss",
    "Statistics",
    "Sum",
    "__version__",
    "blob_loss",
    "boundary_dou_loss",
    "boundary_loss",
    "brier_loss",
    "cc_dice_ce_loss",
    "combo_loss",
    "components",
    "cross_entropy_loss",
    "dice_ce_loss",
    "dice_focal_loss",
    "dice_loss",
    "dice_semimetric_loss",
    "distance_transform",
    "distillation_loss",
    "exponential_logarithmic_loss",
    "focal_loss",
    "generalized_cross_entropy_loss",
    "generalized_dice_loss",
    "generalized_surface_loss",
    "generalized_wasserstein_dice_loss",
    "get_num_threads",
    "hausdorff_dt_loss",
    "jaccard_loss",
    "kl_divergence_loss",
    "log_cosh_dice_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "mcc_loss",
    "mean_absolute_error_loss",
    "metrics",
    "ohem_cross_entropy_loss",
    "poly_cross_entropy_loss",
    "sensitivity_specificity_loss",
    "set_num_threads",
    "signed_distance",
    "skeleton_recall_loss",
    "symmetric_cross_entropy_loss",
    "top_k_cross_entropy_loss",
    "tversky_loss",
    "unified_focal_loss",
    "use_backend",
    "voronoi",
]
__all__ += _terms
__all__.sort()
