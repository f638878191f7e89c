# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Inception features with torch-fidelity's own class and random weights: its real ones can't be fetched everywhere.

torch-fidelity needs torchvision, which does not run beside every build of torch, and torchmetrics would not be imported
beside it then. So it is installed into a folder of the test's own, without what it needs, and of its modules only that
of Inception-v3 is imported, which does not use torchvision.
"""

import json
import subprocess
import sys


SCRIPT = """
import json, sys, types
from pathlib import Path

import torch

from ecvae_diffusers.metrics import GenerationMetrics, InceptionFeatures

folder, weights = Path(sys.argv[1]), Path(sys.argv[2])
try:
    InceptionFeatures()
    missing = ""
except ImportError as error:
    missing = str(error)
package = types.ModuleType("torch_fidelity")
package.__path__ = [str(folder / "torch_fidelity")]
sys.modules["torch_fidelity"] = package
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class RandomWeights(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict):
        return None


torch.manual_seed(0)
torch.save({}, weights)
torch.save(RandomWeights("random", ["2048"], feature_extractor_weights_path=weights).state_dict(), weights)
direct = FeatureExtractorInceptionV3("direct", ["2048"], feature_extractor_weights_path=weights)
features = InceptionFeatures(weights)
gray = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
colour = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
opaque = torch.cat([colour, torch.full((8, 1, 16, 16), 255, dtype=torch.uint8)], dim=1)
metrics = GenerationMetrics(features)
metrics.update(gray, real=True)
metrics.update(colour, real=False)
print(json.dumps({
    "missing": missing,
    "shape": list(features(colour).shape),
    "colour": torch.allclose(features(colour), direct(colour)[0], atol=1e-4),
    "gray": torch.allclose(features(gray), direct(gray.expand(-1, 3, -1, -1))[0], atol=1e-4),
    "opaque": torch.equal(features(opaque), features(colour)),
    "measures": metrics.compute(),
}))
"""


def test_inception_features(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    subprocess.run([*install, "torch-fidelity==0.4.0"], check=True)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "packages"), str(tmp_path / "weights.pth")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert "pip install torch-fidelity" in found["missing"]
    assert found["shape"] == [8, 2048]
    assert found["colour"] and found["gray"] and found["opaque"]
    assert found["measures"]["frechet_distance"] is None and found["measures"]["num_real"] == 8
