# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Measures what is normal for a model: the distributions of its anomaly scores, and a threshold with a known rate of false alarms.

The threshold is the j-th smallest of n scores of normal images, :math:`j = \lceil (n + 1) (1 - \alpha) \rceil`. For further normal images
drawn in the same way, the rate of false alarms is then distributed as :math:`\mathrm{Beta}(n + 1 - j, j)`, whatever the
distribution of scores, with a mean of at most :math:`\alpha` (Vovk 2012, arXiv 1209.2673). Its 2.5% and 97.5% quantiles are the
stated interval. Every other image measures the distributions of the parts, and the rest choose the threshold, so that scores of the
latter are as those of further images.
"""

import math
from typing import Any

import torch
from tqdm import tqdm

from ..anomaly import SCORE, VALUES_IN_TAIL, combine, measure_tail
from ..pipelines import ECVAEPipeline


LEVEL = 0.95
# Of pixels, a regular part is enough for the tails, which are measured down to 2^-10.
MOST_PIXELS, BATCH = 2**22, 64


def interval_of_rate(count: int, place: int) -> list[float]:
    """Return the 95% interval of the rate of false alarms, if the threshold is the `place`-th smallest of `count` scores."""
    from scipy.stats import beta

    return beta.interval(LEVEL, count + 1 - place, place)


def measure_normal(pipeline: ECVAEPipeline, images: torch.Tensor, false_alarm_rate: float) -> dict[str, Any]:
    """
    Return the config entry `anomaly_threshold` of a pipeline: distributions (`tails`), `threshold`, `false_alarm_rate`, and the
    `interval` of that rate from `count` images.

    Args:
        pipeline ([`ECVAEPipeline`]): The model.
        images (`torch.Tensor` of shape `(N, C, H, W)`, uint8): Normal images that were not trained on, in random order.
        false_alarm_rate (`float`): alpha, above 0 and below 1.

    Raises:
        ValueError: if N is too small for the rate.
    """
    count = len(images) // 2
    place = math.ceil((count + 1) * (1 - false_alarm_rate) - 1e-9)  # rounding
    if place > count or count < 2 * VALUES_IN_TAIL:
        least = 2 * max(math.ceil(1 / false_alarm_rate) - 1, 2 * VALUES_IN_TAIL)
        raise ValueError(
            f"`images` must be at least {least} for a rate of {false_alarm_rate:g}, but there are {len(images)}."
        )
    found: dict[str, list[torch.Tensor]] = {}
    stride = max(1, images[:, 0].numel() // MOST_PIXELS)
    for batch in tqdm(images.split(BATCH), desc="Normal images", unit="batch"):
        for name, part in pipeline.anomaly_parts(batch.float() / 255).items():
            found.setdefault(name, []).append(part.flatten(1)[:, ::stride].cpu() if part.ndim > 1 else part.cpu())
    parts = {name: torch.cat(each) for name, each in found.items()}
    tails = {name: measure_tail(part[::2]) for name, part in parts.items()}
    rest = {name: part[1::2] for name, part in parts.items()}
    scores = combine(rest, tails, SCORE)
    return {
        "false_alarm_rate": false_alarm_rate,
        "threshold": scores.sort().values[place - 1].item(),
        "count": count,
        "interval": [round(float(bound), 6) for bound in interval_of_rate(count, place)],
        "tails": tails,
    }
