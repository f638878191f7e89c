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


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contents") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "a" / "b" / "run")


def change(path: Path, value: float) -> None:
    weights = load_file(path)
    weights[min(weights)].view(-1)[0] = value
    save_file(weights, path)


def evaluate(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"weights": folder_fingerprint(folder)}))


def name_component(folder: Path, value, name: str = "vae") -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: value}))


def test_a_run_folder_publishes_its_pipeline_alone(folder, tmp_path):
    expected = files_to_publish(folder)
    assert {"model_index.json", "README.md", "pipeline.py", "restoration.py", "vae/autoencoder_ec.py"} < set(expected)
    assert set(expected) == set(files(folder))
    PIL.Image.new("L", (8, 8)).save(folder / "samples.png")
    (folder / "checkpoint-5").mkdir()
    for file in ("checkpoint-5/optimizer.bin", "metrics.jsonl", "training_args.json"):
        (folder / file).write_bytes(b"secret")
    (tmp_path / "outside.json").write_text('{"api_key": "secret"}')
    for name in ("vae", "energy_model", "scheduler"):
        for file in (
            "credentials.json",
            ".secret.json",
            "settings.py",
            "config.json.bak",
            "a.v2.safetensors",
            "a.bin",
            "a.pt",
        ):
            (folder / name / file).write_bytes(b"secret")
        (folder / name / "link.json").symlink_to(tmp_path / "outside.json")
        (folder / name / "__pycache__").mkdir()
    assert files_to_publish(folder) == sorted([*expected, "samples.png"])


@pytest.mark.parametrize("path", ["vae/config.json", WEIGHTS, "scheduler", "README.md", "picture.png"])
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
    "name", ["../../x", "..", ".", "", "/tmp", "vae/../../x", "vae/", "~", "extra", "pipeline.py"]
)
def test_a_component_that_the_pipeline_does_not_have_is_not_published(name, folder):
    (folder.parents[1] / "x").mkdir()
    (folder.parents[1] / "x" / "scheduler_config.json").write_text("{}")
    name_component(folder, ["diffusers", "DDPMScheduler"], name)
    with pytest.raises(ValueError) as raised:
        files_to_publish(folder)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    "value", [[None, None], "x", float("nan"), [], [["a", "b"]], ["../../x", "A"], ["/x", "A"], ["x", None]]
)
def test_a_component_is_a_library_and_a_class(value, folder):
    name_component(folder, value)
    with pytest.raises(ValueError, match="`vae`"):
        files_to_publish(folder)


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10]), WEIGHTS),
        (lambda folder: (folder / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin"), "vae'"),
        (lambda folder: change(folder / WEIGHTS, float("nan")), WEIGHTS),
        (lambda folder: change(folder / WEIGHTS, float("inf")), WEIGHTS),
        (lambda folder: (evaluate(folder), change(folder / WEIGHTS, 1.0)), "evaluation.json"),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), "evaluation.json"),
        (lambda folder: (folder / "evaluation.json").write_text("{"), "evaluation.json"),
        (lambda folder: name_component(folder, float("nan"), "scheduler"), "`scheduler`"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "vae'"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "scheduler'"),
        (lambda folder: (folder / "id.png").write_text("-----BEGIN KEY-----"), "id.png"),
        (lambda folder: PIL.Image.new("L", (8, 8)).save(folder / "id.png", "jpeg"), "id.png"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xe9"), "README.md"),
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


@pytest.mark.parametrize(
    "words",
    [
        "{home}-made", "https://example.org{home}", "[a page](https://example.org/~ann{home}/page)", "<http://example.org/-{home}>",
        "data{home}/images", "../..{home}", "~{home}", "s3://bucket{home}/images",
    ],
)  # fmt: skip
def test_links_and_other_names_are_no_paths_of_this_machine(tmp_path, words):
    (tmp_path / "README.md").write_text(words.format(home=Path.home()))
    check_file(tmp_path / "README.md", tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "{home}", "({home}/images)", "path={home}/images", "file://{home}/images", "git+file://{home}", "sqlite:///{home}/runs.db",
        '{{"link":"https://example.org/","path":"{home}"}}', "[a page](https://example.org){home}", "host:{home}",
    ],
)  # fmt: skip
def test_paths_of_this_machine_next_to_links(tmp_path, words):
    (tmp_path / "README.md").write_text(words.format(home=Path.home()))
    with pytest.raises(ValueError, match="README.md"):
        check_file(tmp_path / "README.md", tmp_path)
