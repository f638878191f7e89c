# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Paints defects into images: strokes, blobs and missing parts, the same ones at each call."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch


KINDS = ("stroke", "blob", "missing part")
# A pixel is defective if painting has changed it by more than this many 8-bit levels.
LEAST_CHANGE = 16
# Defects are drawn this many times as large, and reduced, so that their edges are smooth.
SCALE = 4


def shape_of(kind: str, size: int, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a shape near a pixel, and return how much of each pixel it covers, (size, size), from 0 to 1."""
    canvas = PIL.Image.new("L", (size * SCALE, size * SCALE))
    pen, center = PIL.ImageDraw.Draw(canvas), center * SCALE
    if kind == "stroke":
        half = rng.normal(size=2)
        half *= rng.uniform(0.15, 0.3) * size * SCALE / np.linalg.norm(half)
        bend = rng.normal(size=2) * 0.05 * size * SCALE
        points = [tuple(point) for point in (center - half, center + bend, center + half)]
        pen.line(points, fill=255, width=max(1, round(0.08 * size * SCALE)), joint="curve")
    else:
        radii = rng.uniform(0.08, 0.16, 2) * size * SCALE
        box = [*(center - radii), *(center + radii)]
        (pen.ellipse if kind == "blob" else pen.rectangle)(box, fill=255)
    return np.asarray(canvas.resize((size, size), PIL.Image.Resampling.BOX)) / 255


def paint_defects(images: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """
    Paint one defect into each image. A stroke or a blob has a random level, at least a third of the range from what it covers. A missing
    part has the level of the image's border. It lies on what the image shows, so that something is missing.

    Args:
        images (`torch.Tensor` of shape `(N, C, S, S)`, uint8).
        seed (`int`, *optional*, defaults to 0): Chooses the defects.

    Returns:
        `tuple`: The painted images, which pixels are defective (N, S, S), bool, and the kind of each defect.
    """
    painted, masks, kinds = images.clone(), [], []
    size = images.shape[-1]
    for i, image in enumerate(images.numpy().astype(np.float64)):
        rng = np.random.default_rng([seed, i])
        kind = KINDS[i % len(KINDS)]
        border = np.median(np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1))
        shown = np.argwhere(np.abs(image - border).max(0) > 3 * LEAST_CHANGE)[:, ::-1]
        while True:
            center = shown[rng.integers(len(shown))] if kind == "missing part" else rng.uniform(0.2, 0.8, 2) * size
            cover = shape_of(kind, size, center + 0.5, rng)
            level, covered = border, np.average(image.mean(0), weights=cover)
            if kind != "missing part":
                level = rng.uniform(0, 255)
            result = (image * (1 - cover) + level * cover).round()
            mask = np.abs(result - image).max(0) > LEAST_CHANGE
            if mask.sum() >= 4 and (kind == "missing part" or abs(level - covered) > 85):
                break
        painted[i] = torch.from_numpy(result).to(torch.uint8)
        masks.append(torch.from_numpy(mask))
        kinds.append(kind)
    return painted, torch.stack(masks), kinds
