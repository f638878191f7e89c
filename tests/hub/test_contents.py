# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What of a folder is published, and what is refused: never a secret, a link, a pickle, a damaged file or a path of this machine."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from hub_server import files
from safetensors.torch import load_file, save_file

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.hub.contents import check_file, files_to_publish, folder_fingerprint
from ecvae_diffusers.hub.saving import weights_fingerprint


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "a" / "b" / "run")


def change(path: Path, value: float) -> None:
    weights = load_file(path)
    weights[min(weights)].view(-1)[0] = value
    save_file(weights, path)


def evaluate(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"weights": folder_fingerprint(folder)}))


def test_a_run_folder_publishes_its_pipeline_alone(folder, tmp_path):
    expected = files_to_publish(folder)
    assert {"model_index.json", "README.md", "pipeline.py", "restoration.py", "vae/autoencoder_ec.py"} < set(expected)
    assert set(expected) == set(files(folder))
    PIL.Image.new("L", (8, 8)).save(folder / "samples.png")
    (folder / "checkpoint-5").mkdir()
    for file in ("checkpoint-5/optimizer.bin", "metrics.jsonl", "training_args.json"):
        (folder / file).write_bytes(b"secret")
    (tmp_path / "outside.json").write_text('{"api_key": "secret"}')
    for file in ("credentials.json", ".secret.json", "settings.py", "config.json.bak", "a.v2.safetensors", "a.pt"):
        (folder / "vae" / file).write_bytes(b"secret")
    (folder / "vae" / "link.json").symlink_to(tmp_path / "outside.json")
    assert files_to_publish(folder) == sorted([*expected, "samples.png"])


@pytest.mark.parametrize("path", ["vae/config.json", WEIGHTS, "scheduler", "picture.png"])
def test_a_link_is_not_published(path, folder, tmp_path):
    """Nor one to another file of the folder, which may be one that is not to be published."""
    PIL.Image.new("L", (8, 8)).save(folder / "picture.png")
    for target in (tmp_path / "outside", folder / "elsewhere"):
        (folder / path).rename(target)
        (folder / path).symlink_to(target)
        with pytest.raises(ValueError, match=Path(path).name):
            files_to_publish(folder)
        (folder / path).unlink()
        target.rename(folder / path)


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, ["diffusers", "DDPMScheduler"]) for name in ("../../x", "", "/tmp", "pipeline.py")),
        *(("vae", value) for value in ([None, None], float("nan"), [["a", "b"]], ["x", None])),
    ],
)
def test_a_component_is_one_of_the_pipeline_by_a_library_and_a_class(name, value, folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: value}))
    with pytest.raises(ValueError, match=f"`{name}`"):
        files_to_publish(folder)


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10]), WEIGHTS),
        (lambda folder: (folder / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin"), "vae'"),
        (lambda folder: change(folder / WEIGHTS, float("nan")), WEIGHTS),
        (lambda folder: (evaluate(folder), change(folder / WEIGHTS, 1.0)), "evaluation.json"),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), "evaluation.json"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "scheduler'"),
        (lambda folder: (folder / "README.md").unlink(), "README.md"),
        (lambda folder: (folder / "README.md").write_text(f"see {folder}"), "README.md"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}'), "DDPMPipeline"),
    ],
)  # fmt: skip
def test_what_may_not_be_published(harm, named, folder):
    harm(folder)
    with pytest.raises(ValueError, match=named):
        files_to_publish(folder)


def test_an_evaluation_of_the_weights_next_to_it_is_published(folder):
    """Its fingerprint is the pipeline's, in full and in half precision, which may lie next to each other."""
    pipe = ECVAEPipeline.from_pretrained(folder)
    assert folder_fingerprint(folder) == weights_fingerprint(pipe)
    evaluate(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    assert {"evaluation.json", "vae/diffusion_pytorch_model.fp16.safetensors"} <= set(files_to_publish(folder))
    for path in folder.glob("*/diffusion_pytorch_model.safetensors"):
        path.unlink()
    assert "evaluation.json" in files_to_publish(folder)


def test_a_path_of_this_machine_is_told_from_links_and_other_names(tmp_path):
    card, home = tmp_path / "README.md", Path.home()
    for words in (
        f"{home}-made", f"https://example.org{home}", f"[a page](https://example.org/~ann{home}/page)",
        f"data{home}/images", f"../..{home}", f"~{home}", f"s3://bucket{home}/images",
    ):  # fmt: skip
        card.write_text(words)
        check_file(card, tmp_path)
    for words in (
        f"{home}", f"({home}/images)", f"path={home}/images", f"file://{home}/images", f"sqlite:///{home}/runs.db",
        f'{{"link":"https://example.org/","path":"{home}"}}', f"[a page](https://example.org){home}", f"host:{home}",
    ):  # fmt: skip
        card.write_text(words)
        with pytest.raises(ValueError, match="README.md"):
            check_file(card, tmp_path)
