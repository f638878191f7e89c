# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Inception features with torch-fidelity's own class and random weights: its real ones can't be fetched everywhere.

torch-fidelity needs torchvision, which does not run beside every build of torch, and torchmetrics would not be imported
beside it then. So it is installed into a folder of the test's own, without what it needs, and of its modules only that
of Inception-v3 is imported, which does not use torchvision.
"""

import importlib
import subprocess
import sys
import types

import pytest
import torch

from ecvae_diffusers.metrics import GenerationMetrics, InceptionFeatures


def test_inception_features(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        InceptionFeatures()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, "torch-fidelity==0.4.0"], check=True)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(tmp_path / "torch_fidelity")]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    network = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state_dict: None)
        torch.save(network("random", ["2048"], feature_extractor_weights_path=weights).state_dict(), weights)
    direct = network("direct", ["2048"], feature_extractor_weights_path=weights)
    features = InceptionFeatures(weights)
    gray = torch.randint(256, (7, 1, 16, 16), dtype=torch.uint8)
    colour = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8)
    opaque = torch.cat([colour, torch.full_like(gray, 255)], dim=1)
    for images, as_rgb in ((gray, gray.expand(-1, 3, -1, -1)), (colour, colour), (opaque, colour)):
        expected = direct(as_rgb[:1])[0]
        assert expected.shape == (1, 2048)
        torch.testing.assert_close(features(images[:1]), expected, atol=1e-4, rtol=1e-5)
    metrics = GenerationMetrics(features)
    metrics.update(gray, real=True)
    metrics.update(colour, real=False)
    measures = metrics.compute()
    assert measures["frechet_distance"] is None and measures["num_real"] == 7
