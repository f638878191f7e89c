# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The single-file pipelines: up to date in git, and written by an installed package too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
INSTALLED = """
import sys
from pathlib import Path

import torch

import ecvae_diffusers
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline

site, folder = Path(sys.argv[1]), Path(sys.argv[2])
assert Path(ecvae_diffusers.__file__).is_relative_to(site), ecvae_diffusers.__file__
vae = AutoencoderEC(sample_size=16, in_channels=1, latent_channels=8, block_out_channels=(16, 16, 16)).eval()
pipe = ECVAEPipeline(vae=vae)
pipe.save_pretrained(folder)
latents = torch.ones(2, 8, 1, 1)
images = [p(latents=latents, output_type="pt").images for p in (pipe, ECVAEPipeline.from_pretrained(folder))]
assert torch.equal(*images)
"""


def run(*arguments: str | Path, source: Path = ROOT / "src", check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_single_files_are_up_to_date_and_a_change_is_noticed(tmp_path):
    run(ROOT / "pipelines" / "generate.py", "--check")

    for name in ("pipelines", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    generate = tmp_path / "pipelines" / "generate.py"
    changed = tmp_path / "src" / "ecvae_diffusers" / "energy.py"
    text = changed.read_text(encoding="utf-8")
    assert "torch.enable_grad()" in text
    changed.write_text(text.replace("torch.enable_grad()", "torch.set_grad_enabled(True)"), encoding="utf-8")
    done = run(generate, "--check", check=False)
    assert done.returncode == 1 and "pipelines/ecvae/pipeline.py" in done.stderr
    run(generate)
    assert "torch.set_grad_enabled(True)" in (tmp_path / "pipelines" / "ecvae" / "pipeline.py").read_text()


def test_the_wheel_holds_all_that_saving_needs(tmp_path):
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    run(*build, ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, folder = tmp_path / "site", tmp_path / "saved"
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site)
    run(*install, wheel)
    run("-c", INSTALLED, site, folder, source=site)
    assert "# VAE, 16 px" in (folder / "README.md").read_text(encoding="utf-8")
    for file, name in (("pipeline.py", "ecvae"), ("restoration.py", "ecvae_restoration")):
        assert (folder / file).read_bytes() == (ROOT / "pipelines" / name / "pipeline.py").read_bytes()
