# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How well a score tells images of another kind from those a model knows."""

import torch
from torchmetrics.functional.classification import binary_auroc


def out_of_distribution_auroc(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """
    Compute the area under the ROC curve: the probability that an image of another kind has the higher score (energy,
    reconstruction error). Ties count one half. 0.5 tells nothing, 1 tells the kinds apart, and below 0.5 the score is
    inverted.

    Args:
        inside (`torch.Tensor` of shape `(N,)`), outside (`torch.Tensor` of shape `(M,)`): Scores of images like the
            training data, and of others.

    Raises:
        ValueError: if one is empty or holds a value that is not finite.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.numel() == 0 or not scores.isfinite().all():
            raise ValueError(f"`{name}` must hold finite scores, but holds {scores.tolist()[:5]}.")
    scores = torch.cat([inside.flatten(), outside.flatten()]).cpu().double()
    # Ranks say all: torchmetrics would squeeze scores beyond [0, 1] through a sigmoid, where they become ties.
    ranks = scores.unique(return_inverse=True)[1].double() / len(scores)
    labels = torch.cat([torch.zeros(inside.numel(), dtype=torch.int), torch.ones(outside.numel(), dtype=torch.int)])
    # Its sum of float32 areas may come to a little more than 1.
    return min(binary_auroc(ranks, labels).item(), 1.0)
