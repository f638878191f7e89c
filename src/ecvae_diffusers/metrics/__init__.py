# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measures of generated and reconstructed images. Requires the extra `metrics`, and is not imported with the package."""

try:
    import prdc  # noqa: F401
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError("Metrics require: pip install 'ecvae-diffusers[metrics]'.") from error

from .classifier import ClassifierFeatures
from .features import FeatureExtractor, InceptionFeatures, lite0_features, transformers_features
from .generation import GenerationMetrics, nearest_neighbours, neighbour_measures
from .out_of_distribution import out_of_distribution_auroc
from .reconstruction import reconstruction_metrics


__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "GenerationMetrics",
    "InceptionFeatures",
    "lite0_features",
    "nearest_neighbours",
    "neighbour_measures",
    "out_of_distribution_auroc",
    "reconstruction_metrics",
    "transformers_features",
]
