"""Metrics of segmentations: overlap, surfaces and lesions, each by a named definition."""

from fastloss.metrics.confusion import ConfusionAccumulator, confusion_matrix
from fastloss.metrics.evaluate import METRICS, evaluate
from fastloss.metrics.lesion import Lesion, lesions
from fastloss.metrics.scores import Scores
from fastloss.metrics.surface import SurfaceDistances, surface_distances

__all__ = [
    "METRICS",
    "ConfusionAccumulator",
    "Lesion",
    "Scores",
    "SurfaceDistances",
    "confusion_matrix",
    "evaluate",
    "lesions",
    "surface_distances",
]
