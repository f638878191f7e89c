"""The folder that `ecvae page` writes. What a browser makes of it: `tests/slow/test_page_in_browser.py`."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler
from ecvae_diffusers.cli import main
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.page.page import RUNTIME_FILES


# Stands in for npm: packs a file for each of onnxruntime-web's.
NPM = f"""#!{sys.executable}
import io, sys, tarfile
with tarfile.open(sys.argv[-1] + "/package.tgz", "w:gz") as archive:
    for name in {[name for names in RUNTIME_FILES.values() for name in names] + ["another.wasm"]}:
        member = tarfile.TarInfo("package/dist/" + name)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
"""


def make_model(folder: Path, with_energy: bool = True, **config) -> Path:
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), **config}
    pipeline = ECVAEPipeline(
        vae=AutoencoderEC(latent_channels=6, **config).eval(),
        energy_model=EnergyModel(**config).eval() if with_energy else None,
        scheduler=LangevinScheduler() if with_energy else None,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(70):
        PIL.Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def page(model, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "page"
    main(["page", model, "--output_dir", folder, "--data", images])
    return folder


def refusal(capsys, *argv) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code
    message = capsys.readouterr().err.splitlines()[-1] if isinstance(ended.value.code, int) else ended.value.code
    assert "\n" not in message
    return message


def test_files_of_a_page(page):
    found = {str(path.relative_to(page)) for path in page.rglob("*") if path.is_file()}
    networks = {f"model/{name}_fp16.onnx" for name in ("decoder", "encoder", "energy")}
    assert found == networks | {"index.html", "sw.js", "page.json", "README.md", "model/model.json"}
    assert sum((page / name).stat().st_size for name in ("index.html", "sw.js")) < 60_000
    card = yaml.safe_load((page / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "static" and (page / card["app_file"]).is_file()
    assert card["custom_headers"] == {
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "cross-origin",
    }


def test_directions_and_energies_are_those_of_the_data(page, images):
    described, pipe = json.loads((page / "page.json").read_text()), OnnxECVAEPipeline(page / "model", "fp16")
    pictures = np.stack([np.asarray(PIL.Image.open(path))[..., None] for path in images.iterdir()])
    latents, energies = pipe.encode(pictures).reshape(70, 6), pipe.score(pictures)
    covariance = np.cov(latents.T, bias=True)
    directions = np.array(described["directions"])
    assert described["count"] == sum(described["energies"]["counts"]) == 70
    np.testing.assert_allclose(described["mean"], latents.mean(axis=0), atol=1e-3)
    # Each is an eigenvector, and its square length the variance along it.
    lengths = (directions**2).sum(axis=1)
    np.testing.assert_allclose(lengths, np.linalg.eigvalsh(covariance)[::-1], rtol=0.05, atol=1e-6)
    np.testing.assert_allclose(directions[0] @ covariance, lengths[0] * directions[0], rtol=0.05, atol=1e-3)
    assert described["energies"]["from"] == pytest.approx(energies.min(), abs=1e-5)
    assert described["energies"]["to"] == pytest.approx(energies.max(), abs=1e-5)
    for name, count in described["bytes"].items():
        assert (page / "model" / f"{name}_fp16.onnx").stat().st_size == count


def test_without_data_and_energy_model_samples_are_described(tmp_path):
    model = make_model(tmp_path / "model", with_energy=False, num_class_embeds=3, in_channels=3)
    main(["page", model, "--output_dir", tmp_path / "page"])
    described = json.loads((tmp_path / "page" / "page.json").read_text())
    assert "samples" in described["source"] and described["energies"] is None
    assert set(described["bytes"]) == {"decoder", "encoder"}


def test_another_model_has_another_cache(page, images, tmp_path):
    other = make_model(tmp_path / "model", sample_size=16)
    main(["page", other, "--output_dir", tmp_path / "page", "--data", images])
    assert (tmp_path / "page" / "sw.js").read_text() != (page / "sw.js").read_text()


def test_vendor_takes_the_files_that_the_page_loads(model, images, tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM)
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    main(["page", model, "--output_dir", tmp_path / "page", "--data", images, "--vendor"])
    assert {path.name for path in (tmp_path / "page" / "vendor").iterdir()} == set(RUNTIME_FILES["wasm"])
    assert json.loads((tmp_path / "page" / "page.json").read_text())["runtime"] == "vendor/"


def test_what_is_refused(model, page, images, tmp_path, monkeypatch, capsys):
    before = sorted(path.stat().st_mtime_ns for path in page.rglob("*"))
    assert "output_dir" in refusal(capsys, "page", str(model), "-o", str(page))
    assert sorted(path.stat().st_mtime_ns for path in page.rglob("*")) == before
    target = tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert "--data" in refusal(capsys, "page", str(model), "-o", str(target), "--data", str(tmp_path / "empty"))
    rgba = make_model(tmp_path / "rgba", in_channels=4)
    assert "channels" in refusal(capsys, "page", str(rgba), "-o", str(target), "--data", str(images))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm" in refusal(capsys, "page", str(model), "-o", str(target), "--data", str(images), "--vendor")
    assert not target.exists()
