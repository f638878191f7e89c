"""deepinv runs our models: the Python block of its guide, in an environment of its own."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from environments import make_environment


ROOT = Path(__file__).resolve().parents[2]
# deepinv asks for torchvision, which does not run next to the tested torch: it gets a stub, after diffusers has looked for it.
BEFORE = "import ecvae_diffusers.integrations.deepinv, stub_torchvision\n"
AFTER = """
import json

psnr = deepinv.metric.PSNR()
images = {"measured": physics.A_adjoint(y), "restored": restored, "solved": solved}
result = {name: psnr(image, x).mean().item() for name, image in images.items()}
result["found"], result["shape"] = psnr(found, x[:1]).item(), list(restored.shape)
exact = deepinv.physics.Downsampling((1, 16, 16), factor=2, filter="gaussian")
answer = ECVAEReconstructor(ECVAERestorationPipeline.from_pipe(pipe), num_restorations=1, num_inference_steps=10)
measured = exact.A(x)
error = exact.A(answer(measured, exact)) - measured
result["error"] = error.abs().median().item()
print("RESULT", json.dumps(result))
"""


def test_the_guide_runs(tmp_path):
    programs = make_environment(tmp_path / "environment", inherits=True)(
        "--no-deps", "deepinv", "einops", "h5py", "natsort"
    )
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/guides/deepinv.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "guide.py").write_text(BEFORE + code + AFTER)
    done = subprocess.run(
        [programs / "python", tmp_path / "guide.py"], cwd=ROOT, env={"PYTHONPATH": f"{ROOT}/tests/support:{ROOT}/src", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    assert result["shape"] == [4, 1, 16, 16]
    for name in ("restored", "solved", "found"):
        assert result[name] > result["measured"] + 3, result
    # Without noise the answer has the measurement that was asked for, but for the clamping of a few pixels.
    assert result["error"] == pytest.approx(0, abs=1e-3), result
