# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The example server under load, in a process without torch: each picture is that of its seed. Slow: `make test-slow`."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from example_server import fetch, serving

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.onnx.export import export_onnx


THREADS, REQUESTS = 32, 320
CLASSES = {"0": "cat", "1": "dog"}


@pytest.fixture(scope="module", params=["gray", "colour with classes"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    more = {"in_channels": 1}
    if request.param != "gray":
        more = {"in_channels": 3, "num_class_embeds": 2, "id2label": CLASSES, "class_frequencies": [0.25, 0.75]}
    vae = AutoencoderEC(sample_size=16, latent_channels=8, block_out_channels=(16, 16), **more).eval()
    folder = tmp_path_factory.mktemp("server") / "onnx"
    export_onnx(ECVAEPipeline(vae), folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder, folder.parent / "log.txt") as (address, _):
        yield address


def test_each_picture_is_that_of_its_seed(folder, address):
    """Under load, for seeds that come once and often, with each class and without."""
    pipe = OnnxECVAEPipeline(folder)
    labels = [None] if pipe.config["num_class_embeds"] is None else [None, "cat", "dog", 0, 1, 2]
    asked = [(seed % 200, labels[seed % len(labels)]) for seed in range(REQUESTS)]
    paths = [f"/sample?seed={seed}" + ("" if label is None else f"&class_label={label}") for seed, label in asked]
    answers = fetch(address, paths, THREADS)
    assert [answer[0] for answer in answers] == [200] * REQUESTS
    for (seed, label), (_, body) in zip(asked, answers):
        expected = pipe.sample(1, np.random.default_rng(seed), class_labels=label)[0]
        found = np.asarray(PIL.Image.open(io.BytesIO(body)))
        assert found.dtype == np.uint8 and np.array_equal(found, expected.squeeze())
    assert len({body for _, body in answers}) > 100


def test_threads_share_the_pipeline(folder):
    pipe = OnnxECVAEPipeline(folder)

    def draw(seed: int) -> np.ndarray:
        return pipe.sample(1 + seed % 3, np.random.default_rng(seed))

    expected = [draw(seed) for seed in range(REQUESTS)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(draw, range(REQUESTS)))
    assert all(map(np.array_equal, found, expected))


def test_bad_input_gets_a_line_that_names_it(folder, address):
    known = OnnxECVAEPipeline(folder).config["num_class_embeds"] is not None
    label = {"class_label=bird": "class_label", "class_label=9": "class_label", "class_label=": "class_label"}
    for query, name in {"": "seed", "seed=x": "seed", "seed=-1": "seed", f"seed={2**63}": "seed"}.items():
        check_refused(address, query, name)
    for query, name in (label if known else label | {"class_label=0": "class_label"}).items():
        check_refused(address, f"seed=0&{query}", name)
    assert fetch(address, ["/sample?seed=0"], 1)[0][0] == 200


def check_refused(address: str, query: str, name: str) -> None:
    status, body = fetch(address, [f"/sample?{query}"], 1)[0]
    detail = json.loads(body)["detail"]
    assert status == 422 and f"`{name}" in detail and "\n" not in detail
