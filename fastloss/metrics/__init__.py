"""What a segmentation is judged by: overlap, surfaces, lesions, each by a named definition."""

from fastloss.metrics.evaluate import METRICS, evaluate
from fastloss.metrics.scores import Scores
from fastloss.metrics.surface import SurfaceDistances, surface_distances

__all__ = ["METRICS", "Scores", "SurfaceDistances", "evaluate", "surface_distances"]
