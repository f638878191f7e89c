# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Metrics against independent computations in float64, in one process and sharded over two."""

import json
import math
from pathlib import Path

import fork_server
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn as nn
from scipy.spatial.distance import cdist
from transformers import Dinov2Config, Dinov2Model

from ecvae_diffusers.metrics import (
    FeatureExtractor,
    GenerationMetrics,
    lite0_features,
    nearest_neighbours,
    neighbour_measures,
    out_of_distribution_auroc,
    reconstruction_metrics,
    transformers_features,
)
from ecvae_diffusers.metrics.features import CPU_BATCH_SIZE


def images(count: int, seed: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def pixel_features() -> FeatureExtractor:
    """A random linear map of the pixels, bent so that covariances differ."""
    torch.manual_seed(7)
    return FeatureExtractor(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Softplus()), "pixels", num_channels=None)


def pixel_metrics() -> GenerationMetrics:
    return GenerationMetrics(pixel_features(), num_neighbours=3, num_kernel_subsets=1, kernel_subset_size=10_000)


def expected(x: np.ndarray, y: np.ndarray, k: int) -> dict[str, float]:
    """
    The Frechet distance; the unbiased squared MMD over whole sets, of pairs of two different images; Naeem et al. 2020,
    equations 3 to 6.
    """
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = ((one.sum() - np.trace(one)) / (len(one) * (len(one) - 1)) for one in (xx, yy))
    radius_x, radius_y = (np.sort(cdist(s, s), axis=1)[:, k] for s in (x, y))  # the first is the point itself
    between = cdist(x, y)
    inside_x = between < radius_x[:, None]
    return {
        "frechet_distance": ((x.mean(0) - y.mean(0)) ** 2).sum()
        + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root)),
        "kernel_distance": sum(within) - 2 * xy.mean(),
        "precision": inside_x.any(0).mean(),
        "recall": (between < radius_y[None]).any(1).mean(),
        "density": inside_x.sum(0).mean() / k,
        "coverage": (between.min(1) < radius_x).mean(),
    }


def test_distances_equal_independent_float64():
    real, generated = images(300, 0), (images(300, 1).float() * 0.8 + 10).to(torch.uint8)
    metrics, features = pixel_metrics(), pixel_features()
    for start in range(0, 300, 64):  # streamed, in batches that do not divide the set
        metrics.update(real[start : start + 64], real=True)
        metrics.update(generated[start : start + 64], real=False)
    values = metrics.compute()
    x, y = (features(s).double().numpy() for s in (real, generated))
    for name, value in expected(x, y, 3).items():
        assert values[name] == pytest.approx(value, rel=1e-3), name
    assert (values["num_real"], values["num_generated"]) == (300, 300)
    assert metrics.compute() == values  # the subsets are drawn from the seed


SHARDED = """
import json, sys
import torch.distributed as dist
sys.path.extend(sys.argv[1:])
from test_metrics import filled

dist.init_process_group("gloo")
values = filled(dist.get_rank(), 2).compute()
print(json.dumps(values) if dist.get_rank() == 0 else "")
dist.destroy_process_group()
"""


def filled(rank: int, num_ranks: int) -> GenerationMetrics:
    """What a process has seen of two sets of images."""
    metrics = pixel_metrics()
    for seed, real in ((0, True), (1, False)):
        metrics.update(images(200, seed)[rank::num_ranks], real=real)
    return metrics


def test_two_processes_give_the_figures_of_one(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    places = Path(__file__).parent, Path(fork_server.__file__).parent
    result = fork_server.run(tmp_path / "sharded.py", *places, ranks=2)
    assert result.returncode == 0, result.stderr[-2000:]
    sharded = json.loads(result.stdout)
    assert sharded == pytest.approx(filled(0, 1).compute(), rel=1e-3, abs=1e-6) and sharded["num_real"] == 200


def test_too_few_images_are_refused():
    metrics = GenerationMetrics(pixel_features(), num_neighbours=5)
    metrics.update(images(6, 0), real=True)
    metrics.update(images(50, 1), real=False)
    with pytest.raises(ValueError, match="`num_neighbours`.*6 real and 50 generated"):
        metrics.compute()
    metrics.update(images(1, 2), real=True)
    assert 0 <= metrics.compute()["coverage"] <= 1
    metrics.reset()
    with pytest.raises(ValueError, match="`update`"):
        metrics.compute()
    with pytest.raises(ValueError, match="`num_neighbours`"):
        GenerationMetrics(pixel_features(), num_neighbours=0)


def test_nearest_neighbours_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(30, 4, generator=generator), torch.randn(50, 4, generator=generator)
    distances, indices = nearest_neighbours(queries, bank, num_neighbours=3)
    nearest = torch.cdist(queries, bank).sort()
    assert torch.equal(indices, nearest.indices[:, :3])
    torch.testing.assert_close(distances, nearest.values[:, :3])
    disjoint = neighbour_measures(bank, bank + 1000)
    assert set(disjoint) == {"precision", "recall", "density", "coverage"} and not any(disjoint.values())


def test_reconstruction_metrics():
    """PSNR by its formula; SSIM of a constant shift has a closed form (variances equal, structure 1)."""
    originals = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    shift = torch.tensor([0.1, 0.2, 0.0]).view(3, 1, 1, 1)
    values = reconstruction_metrics(originals + shift, originals)
    for psnr, s in zip(values["psnr"].tolist(), (0.1, 0.2)):
        assert psnr == pytest.approx(-20 * math.log10(s), rel=1e-4)
    assert math.isinf(values["psnr"][2]) and values["ssim"][2] == pytest.approx(1, abs=1e-5)
    assert values["ssim"][0] > values["ssim"][1] and values["ssim"].shape == (3,)
    flat = torch.full((1, 1, 16, 16), 0.4)
    expected = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert reconstruction_metrics(flat + 0.2, flat)["ssim"].item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="`originals`"):
        reconstruction_metrics(originals, originals[:2])
    with pytest.raises(ValueError, match="`images`.*11"):
        reconstruction_metrics(originals[..., :8, :8], originals[..., :8, :8])
    for name in ("images", "originals"):
        for wrong in (originals * 255, originals * 2 - 1, originals / 0):
            with pytest.raises(ValueError, match=f"`{name}`"):
                reconstruction_metrics(**{"images": originals, "originals": originals, name: wrong})


def test_transformers_features_of_a_saved_dinov2(tmp_path):
    """A random-weight model of the class that users load by id: the published weights can't be fetched in tests."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=7, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = {"crop_size": {"height": 28, "width": 28}, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    features = transformers_features(tmp_path)
    gray = images(3, 0, size=20)
    found = features(gray)
    assert found.shape == (3, 16) and found.dtype == torch.float32 and "28 px" in features.name
    assert torch.equal(found, features(gray.expand(-1, 3, -1, -1)))  # gray is repeated
    sized = images(2, 1, channels=3, size=28)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path).eval()((sized / 255 - mean) / std).pooler_output
    torch.testing.assert_close(features(sized), expected)


def test_features_of_any_network():
    """On a CPU images go through the network a few at a time: same features, same order. White is behind transparency."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    probe, sent = FeatureExtractor(network, "conv", mean=0.0, std=1.0), images(2 * CPU_BATCH_SIZE + 3, 3, channels=3)
    with torch.no_grad():
        torch.testing.assert_close(probe(sent), network(sent.float() / 255))
    clear = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    torch.testing.assert_close(probe(clear), probe(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="uint8"):
        probe(clear.float())
    gray = FeatureExtractor(nn.Flatten(), "gray", num_channels=1)
    with pytest.raises(ValueError, match="2 channels"):
        gray(clear[:, :2])


def test_features_of_more_channels_are_those_of_groups_of_three():
    """The last group is filled up with its last channel, so that every channel counts."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    probe, sent = FeatureExtractor(network, "conv"), images(4, 3, channels=5)
    groups = [sent[:, :3], sent[:, [3, 4, 4]]]
    torch.testing.assert_close(probe(sent), torch.cat([probe(group) for group in groups], dim=1))
    torch.testing.assert_close(probe(sent[:, :2]), probe(sent[:, [0, 1, 1]]))


def test_lite0_features_tell_noise_from_structure():
    """The trained weights, from their package: a picture's features move more under noise than under a small shift."""
    features = lite0_features(image_size=64)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    picture = (127 + 120 * torch.sin(x / 6) * torch.cos(y / 9)).to(torch.uint8).expand(1, 3, 64, 64)
    noise = 40 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = (picture.float() + noise).clamp(0, 255)
    base = features(picture)
    assert base.shape == (1, 1280)
    assert (features(noise.to(torch.uint8)) - base).norm() > 2 * (features(picture.roll(1, 3)) - base).norm()


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(40, generator=generator)
    outside = torch.randn(30, generator=generator) + 1
    outside[:5] = inside[:5]  # ties
    larger = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert out_of_distribution_auroc(inside, outside) == pytest.approx(larger.mean().item(), abs=1e-6)
    # Only the order counts: far from [0, 1] too, where a sigmoid would see ties.
    assert out_of_distribution_auroc(1000 * inside, 1000 * outside) == out_of_distribution_auroc(inside, outside)
    assert out_of_distribution_auroc(inside, inside) == pytest.approx(0.5)
    # A share of pairs, where a sum of float32 areas comes to 1.0000001.
    assert out_of_distribution_auroc(torch.arange(297.0), torch.arange(297.0, 1297.0)) == 1
    for scores in (torch.tensor([]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="`outside`"):
            out_of_distribution_auroc(torch.ones(2), scores)
