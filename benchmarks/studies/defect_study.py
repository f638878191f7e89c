#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Do anomaly maps find painted defects? `python benchmarks/studies/defect_study.py --ecvae RUN` (or with `--fashion_mnist DATASET`).

Half of the held-out images measure what is normal for the model, as `ecvae calibrate-threshold` does. The rest are fresh: the share that
is called anomalous is compared with the stated interval of the rate. Into each fresh image, one defect is painted
(`benchmarks/common/defects.py`). A row has the pixel AUROC of a map, its best Dice coefficient over all thresholds, and the AUROC of the
image's score between fresh images with and without defects.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.defects import paint_defects
from common.machine import machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.anomaly import bits, local_mean
from ecvae_diffusers.evaluation.anomaly import LEVEL, measure_normal
from ecvae_diffusers.metrics import out_of_distribution_auroc
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits


def best_dice(values: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the largest Dice coefficient of {values > t} and the mask, over all t."""
    right = mask.flatten()[values.flatten().argsort(descending=True)].double().cumsum(0)
    return (2 * right / (torch.arange(1, len(right) + 1) + mask.sum())).max().item()


def maps_and_scores(pipeline: ECVAEPipeline, tails: dict, images: torch.Tensor) -> dict[str, tuple]:
    """Return the map (N, H, W) and the score (N,) of each method for uint8 images."""
    images = images.float() / 255
    parts, found = pipeline.anomaly_parts(images), pipeline.anomaly(images)
    error = 2 * (images - pipeline.reconstruct(images, output_type="pt").images)
    smooth = local_mean(error.square())[:, 0]
    return {
        "error of the reconstruction": (error.abs().mean(1), error.square().flatten(1).mean(1)),
        "its mean over 3x3 pixels": (smooth, F.max_pool2d(smooth, smooth.shape[-1]).flatten()),
        "residual": (bits(parts["pixel_residual"], tails["pixel_residual"]), parts["largest"]),
        "energy": (parts["pixel_energy"], parts["energy"]),
        "anomaly": (found.map, found.score),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ecvae", required=True, help="pipeline's folder")
    parser.add_argument("--fashion_mnist", dest="dataset", metavar="DATASET", help="this instead of digits")
    parser.add_argument("--num_images", type=int, default=4000, help="held-out images, at most")
    parser.add_argument("--false_alarm_rate", type=float, default=0.05)
    args = parser.parse_args()
    if args.dataset is None:
        images = load_digits()[0][NUM_TRAIN:][: args.num_images]
    else:
        images = study.fashion_images(args.dataset, "test", args.num_images)
    normal, fresh = images[::2], images[1::2]
    pipeline = ECVAEPipeline.from_pretrained(args.ecvae)
    measured = measure_normal(pipeline, normal, args.false_alarm_rate)
    pipeline.register_to_config(anomaly_threshold=measured)
    print(f"{len(images)} images of {args.dataset or 'digits'}; {machine('cpu')}")

    from scipy.stats import betabinom

    alarms, count = int(pipeline.anomaly(fresh.float() / 255).is_anomalous.sum()), measured["count"]
    above = round((count + 1) * args.false_alarm_rate)
    low, high = betabinom.interval(LEVEL, len(fresh), above, count + 1 - above)
    print(
        f"false alarms: {alarms} of {len(fresh)} ({alarms / len(fresh):.2%}), {low:.0f} to {high:.0f} expected; asked for "
        f"{args.false_alarm_rate:.2%}, interval of the rate {measured['interval'][0]:.2%} to {measured['interval'][1]:.2%}"
    )
    painted, masks, kinds = paint_defects(fresh)
    without, defective = (maps_and_scores(pipeline, measured["tails"], some) for some in (fresh, painted))
    rows = []
    for name, (values, scores) in defective.items():
        pixels = out_of_distribution_auroc(values[~masks], values[masks])
        by_kind = [
            best_dice(values[chosen], masks[chosen])
            for kind in sorted(set(kinds))
            if (chosen := torch.tensor([one == kind for one in kinds])).any()
        ]
        of_images = out_of_distribution_auroc(without[name][1], scores)
        figures = [pixels, best_dice(values, masks), *by_kind, of_images]
        rows.append([name, *(f"{figure:.3f}" for figure in figures)])
    print(
        table(
            ["map", "pixel AUROC", "best Dice", *(f"Dice, {kind}" for kind in sorted(set(kinds))), "AUROC of images"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
