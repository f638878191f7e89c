# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measures how well a score tells images of another kind from images like the training data."""

import torch
from torchmetrics.functional.classification import binary_auroc


def out_of_distribution_auroc(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """
    Compute the area under the ROC curve: the probability that an image of another kind has a higher score, such as its
    energy or reconstruction error. Ties count one half. 1 means that the score tells the two kinds apart, 0.5 that it
    tells nothing. Below 0.5, the other kind has the lower scores.

    Args:
        inside (`torch.Tensor` of shape `(N,)`): Scores of images like the training data.
        outside (`torch.Tensor` of shape `(M,)`): Scores of images of another kind.

    Raises:
        ValueError: if `inside` or `outside` is empty or holds a value that is not finite.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.numel() == 0 or not scores.isfinite().all():
            raise ValueError(f"`{name}` must hold finite scores, but holds {scores.tolist()[:5]}.")
    scores = torch.cat([inside.flatten(), outside.flatten()]).cpu().double()
    # AUROC depends on ranks alone. torchmetrics would apply a sigmoid to scores beyond [0, 1], which makes ties of them.
    ranks = scores.unique(return_inverse=True)[1].double() / len(scores)
    labels = torch.cat([torch.zeros(inside.numel(), dtype=torch.int), torch.ones(outside.numel(), dtype=torch.int)])
    # The sum of float32 areas may be slightly above 1.
    return min(binary_auroc(ranks, labels).item(), 1.0)
