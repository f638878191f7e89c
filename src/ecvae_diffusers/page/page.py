# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Writes a folder with a web page and a model as ONNX: the work of `ecvae page`. The folder is a static Space as well.

The page moves latents along the principal directions of the aggregated posterior: the eigenvectors of

.. math:: \mathrm{Cov}_x(E[z \mid x]),

each scaled by its standard deviation. x are images of the data or, without data, samples of the model.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData
from tqdm import tqdm

from ..atomic import is_free, replacing, to_json, write_text
from ..checks import size_as_text
from ..edits import principal_directions
from ..onnx.export import export_onnx
from ..onnx.pipeline_onnx_ecvae import MODEL_FILE, NETWORKS, OnnxECVAEPipeline, network_path
from ..pipelines import ECVAEPipeline


# The newest version whose WebAssembly stays below 3 MB compressed.
RUNTIME = "onnxruntime-web@1.21.1"
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.jsep.mjs", "ort-wasm-simd-threaded.jsep.wasm"),
}
CDN = f"https://cdn.jsdelivr.net/npm/{RUNTIME}/dist/"
MODEL_FOLDER, PAGE_FILE, VENDOR_FOLDER = "model", "page.json", "vendor"
# Above this size of the decoder, the page uses WebGPU where the browser has it. Its runtime is twice as large a download.
WEBGPU_BYTES = 4 * 2**20
NUM_DIRECTIONS = 6
NUM_BINS = 48
# Images that directions and energies are taken from, at most, and how many of them are encoded at a time.
MAX_IMAGES, CHUNK = 2000, 50
SPACE = """---
title: {title}
{license}sdk: static
app_file: index.html
pinned: false
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

# {heading}

This folder is a web page that runs the model in the browser. To see it:

```bash
python -m http.server
```

and open http://localhost:8000. Uploaded as it is, it is a static Space on the Hugging Face Hub.
The headers above let the page use several threads. It runs without them too, with one.
"""


def in_chunks(function: Callable[[np.ndarray], np.ndarray], items: np.ndarray, description: str) -> np.ndarray:
    """Apply a function to a few items at a time, with a progress bar."""
    starts = tqdm(range(0, len(items), CHUNK), desc=description, unit="chunk")
    return np.concatenate([function(items[start : start + CHUNK]) for start in starts])


def histogram(energies: np.ndarray) -> dict[str, Any]:
    """Return the counts of energies in bins of equal width."""
    counts, edges = np.histogram(energies, bins=NUM_BINS)
    return {"from": float(edges[0]), "to": float(edges[-1]), "counts": counts.tolist()}


def describe(model: Path, images: np.ndarray | None) -> dict[str, Any]:
    """
    Return what the page needs besides the networks in `model`: directions, and a histogram of energies.

    Args:
        model (`Path`): A folder that [`export_onnx`] wrote, with weights in float16.
        images (`np.ndarray` of shape (N, H, W, C), uint8, *optional*): Images of the data. If not given, the model draws some.
    """
    pipe = OnnxECVAEPipeline(model, precision="fp16")
    source = "training pictures"
    if images is None:
        source, generator = "samples of the model", np.random.default_rng(0)
        images = in_chunks(lambda some: pipe.sample(len(some), generator), np.arange(MAX_IMAGES), "Samples")
    latents = in_chunks(pipe.encode, images, "Directions").reshape(len(images), -1)
    mean, directions = principal_directions(latents.astype(np.float64), NUM_DIRECTIONS)
    networks = [name for name in NETWORKS if name in pipe.sessions]
    sizes = {name: network_path(model, name, "fp16").stat().st_size for name in networks}
    return {
        "source": source,
        "count": len(images),
        "mean": mean.round(4).tolist(),
        "directions": directions.round(4).tolist(),
        "energies": histogram(in_chunks(pipe.score, images, "Energies")) if "energy" in networks else None,
        "bytes": sizes,
        "device": "webgpu" if sizes["decoder"] > WEBGPU_BYTES else "wasm",
    }


def fetch_runtime(folder: Path, files: Iterable[str]) -> None:
    """Download files of onnxruntime-web by npm into a folder. Raises `ValueError` if npm fails."""
    npm = shutil.which("npm") or "npm"
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, "pack", RUNTIME, "--silent", "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split())
            raise ValueError(f"`vendor`: npm can't download {RUNTIME}: {reason or f'exit code {done.returncode}'}")
        (package,) = Path(temporary).glob("*.tgz")
        folder.mkdir()
        with tarfile.open(package) as archive:
            for name in files:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())


def write_page(
    pipeline: ECVAEPipeline,
    output_dir: str | os.PathLike,
    images: np.ndarray | None = None,
    vendor: bool = False,
    card: ModelCardData | None = None,
) -> None:
    """
    Write a web page that runs a pipeline's networks in the browser. The folder is complete or absent.

    Args:
        pipeline ([`ECVAEPipeline`]): The model, of square gray or RGB images.
        output_dir (`str`): Where to write: a new or empty folder.
        images (`np.ndarray` of shape (N, H, W, C), uint8, *optional*):
            Images like the training data, for the directions and energies that the page shows. If not given, samples of the model.
        vendor (`bool`, *optional*, defaults to `False`): Put onnxruntime-web into the folder (by npm), instead of loading a CDN.
        card (`ModelCardData`, *optional*): The model card's data, whose title and licence the page shows.

    Raises:
        ValueError: if `output_dir` holds something, the model's images are not square or have neither 1 nor 3 channels, or there is no npm.
        RuntimeError: if a network gives other outputs as ONNX than in torch.
        WriteError: if the folder can't be written.
    """
    if not is_free(output_dir):
        raise ValueError(f"`output_dir` must be a new or empty folder, but {str(output_dir)!r} holds something.")
    config = pipeline.vae.config
    if config.in_channels not in (1, 3) or not isinstance(config.sample_size, int):
        found = f"{size_as_text(config.sample_size)} and {config.in_channels} channel(s)"
        raise ValueError(f"`pipeline` must have square images of 1 or 3 channels for a page, but has {found}.")
    if vendor and shutil.which("npm") is None:
        raise ValueError(
            "`vendor` requires npm (of Node.js), which is not installed. Without it, the page loads a CDN."
        )
    with replacing(output_dir) as unfinished:
        unfinished.mkdir()
        model = unfinished / MODEL_FOLDER
        export_onnx(pipeline, model, card)
        for name in NETWORKS:
            network_path(model, name, "fp32").unlink(missing_ok=True)
        described = describe(model, images)
        if vendor:  # the page falls back to WebAssembly
            devices = ("wasm",) if described["device"] == "wasm" else ("wasm", "webgpu")
            fetch_runtime(unfinished / VENDOR_FOLDER, [name for device in devices for name in RUNTIME_FILES[device]])
        described["runtime"] = f"{VENDOR_FOLDER}/" if vendor else CDN
        write_text(unfinished / PAGE_FILE, to_json(described) + "\n")
        files = resources.files(__package__)
        html, worker = (files.joinpath(name).read_text(encoding="utf-8") for name in ("index.html", "sw.js"))
        write_text(unfinished / "index.html", html)
        # model.json has the fingerprint of the weights.
        parts = (model / MODEL_FILE).read_bytes(), (unfinished / PAGE_FILE).read_bytes(), html.encode()
        version = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        write_text(unfinished / "sw.js", worker.replace("VERSION", version))
        title = (card.model_name if card is not None else None) or "EC-VAE"
        licence = f"license: {card.license}\n" if card is not None and card.license is not None else ""
        space = SPACE.format(title=json.dumps(title, ensure_ascii=False), license=licence, heading=title)
        write_text(unfinished / "README.md", space)
