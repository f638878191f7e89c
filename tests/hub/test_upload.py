# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishing, with the Hub's real client against a server of ours: the client runs in one subprocess, the tests read what it saw."""

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, files
from huggingface_hub import HfApi
from safetensors.torch import load

from ecvae_diffusers.hub import upload
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.contents import folder_fingerprint
from ecvae_diffusers.hub.upload import UploadError, attempt, local_errors


CLIENT = """
import json, os, shutil, sys, traceback
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import constants

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, FlowEC
from ecvae_diffusers.hub import upload
from ecvae_diffusers.hub.upload import upload_folder

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
upload.WAITS = (0.01, 0.02)
seen = {}


def tried(name, call):
    try:
        seen[name] = {"url": str(call())}
    except Exception as error:
        seen[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


pipe = ECVAEPipeline.from_pretrained(folder)
tried("first", lambda: upload_folder(folder, "user/model", private=True))
tried("second", lambda: upload_folder(folder, "user/model", commit_message="Again"))
tried("variant", lambda: pipe.to(torch.float16).push_to_hub("user/model", variant="fp16"))
tried("branch", lambda: upload_folder(folder, "user/model", revision="next"))
tried("branch again", lambda: upload_folder(folder, "user/model", revision="next"))
tried("own name", lambda: upload_folder(folder, "short"))
tried("saved", lambda: pipe.to(torch.float32).save_pretrained(work / "saved", push_to_hub=True, repo_id="user/saved", private=False))
tried("saved by its name", lambda: pipe.save_pretrained(work / "saved", push_to_hub=True))
tried("retried", lambda: upload_folder(folder, "user/retried"))
for _ in range(2):
    tried("subfolder", lambda: pipe.push_to_hub("user/shelf", subfolder="models/one"))
tried("card", lambda: upload_folder(folder, "user/edited"))
for taken in ("ddpm", "data", "cut", "list", "nested"):
    tried(taken, lambda: upload_folder(folder, f"user/{taken}"))
tried("stranger", lambda: upload_folder(folder, "stranger/model"))
tried("no such user", lambda: upload_folder(folder, "stranger/new"))
tried("wrong token", lambda: upload_folder(folder, "user/model", token="hf_wrong"))
cache = constants.HF_HUB_CACHE
constants.HF_HUB_CACHE = "/dev/null/cache"  # the Hub can be reached, but what it sends can't be kept
tried("no cache", lambda: upload_folder(folder, "user/model"))
constants.HF_HUB_CACHE = cache
tried("token of a file", lambda: upload_folder(folder, "user/token", token="hf_token\\n"))
tried("token in two lines", lambda: upload_folder(folder, "user/token", token="hf_wrong\\nhf_wrong"))
tried("name", lambda: upload_folder(folder, "a/b/c"))
shutil.copytree(folder, work / "no_code", ignore=shutil.ignore_patterns("*.py"))
tried("no code", lambda: upload_folder(work / "no_code", "user/code"))
ECFlowPipeline(flow=FlowEC(sample_size=8, in_channels=1, num_levels=1, steps_per_level=1)).save_pretrained(work / "flow")
autoencoder = AutoencoderTiny(
    encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,), num_decoder_blocks=(1,)
)
autoencoder.save_pretrained(work / "autoencoder")
(work / "autoencoder" / "README.md").write_text("A card.")
(work / "autoencoder" / "training_args.json").write_text("{}")
tried("flow", lambda: upload_folder(work / "flow", "user/flow"))
tried("autoencoder", lambda: upload_folder(work / "autoencoder", "user/autoencoder"))
tried("autoencoder over a pipeline", lambda: upload_folder(work / "autoencoder", "user/flow"))
tried("pipeline over an autoencoder", lambda: upload_folder(folder, "user/autoencoder"))
tried("flow again", lambda: ECFlowPipeline.from_pretrained("user/flow"))
tried("autoencoder again", lambda: AutoencoderTiny.from_pretrained("user/autoencoder"))
evaluated = ECVAEPipeline.from_pretrained(folder)
tried("figures, the same weights", lambda: evaluated.push_to_hub("user/figures"))
tried("figures, variant", lambda: evaluated.to(torch.float16).push_to_hub("user/figures", variant="fp16"))
evaluated.to(torch.float32).vae.decoder.requires_grad_(False)
next(evaluated.vae.decoder.parameters()).add_(1)
tried("figures, new weights", lambda: evaluated.push_to_hub("user/figures"))
tried("figures, variant of others", lambda: evaluated.push_to_hub("user/figures", variant="other"))
tried("figures, new weights again", lambda: evaluated.push_to_hub("user/figures"))
tried("half", lambda: DiffusionPipeline.from_pretrained("user/model", variant="fp16"))
tried("next", lambda: ECVAEPipeline.from_pretrained("user/model", revision="next"))
(work / "seen.json").write_text(json.dumps(seen))
"""
# The cases that are refused, with what the error must name; all others succeed.
REFUSED = {
    "ddpm": "UploadError: .*DDPMPipeline",
    "cut": "UploadError: .*model_index.json",
    "list": "UploadError: .*model_index.json",
    "nested": "UploadError: .*model_index.json",
    "data": "UploadError: .*train.csv",
    "autoencoder over a pipeline": "UploadError: .*ECFlowPipeline",
    "pipeline over an autoencoder": "UploadError: .*AutoencoderTiny",
    "token in two lines": "UploadError: .*Bearer .hidden",
    "stranger": "UploadError: .*stranger/model.*403",
    "no such user": "UploadError: .*stranger/new.*403",
    "wrong token": "UploadError: .*401.*HF_TOKEN",
    "no cache": "UploadError: .*/dev/null",
    "name": "ValueError: .*`repo_id`.*a/b/c",
    "no code": "ValueError: .*pipeline.py",
}
FIGURES = f"{CARD_MARKER}\n| Frechet distance | 1.0 |\n".encode()


def files_at(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Return the files of a folder as they are published: the card loads from the repository."""
    found = files(folder)
    assert b'from_pretrained("path/or/hub-id")' in found["README.md"]
    return found | {"README.md": found["README.md"].replace(b"path/or/hub-id", repo_id.encode())}


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("upload") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(saved, tmp_path_factory):
    work = tmp_path_factory.mktemp("client")
    before = files(saved)
    with HubServer() as server:
        named = b'{"_class_name": ["pipeline", "ECVAEPipeline"]}'
        evaluation = json.dumps({"weights": folder_fingerprint(saved)}).encode()
        figures = {"README.md": FIGURES, "evaluation.json": evaluation, "vae/style.v2.safetensors": b"of somebody"}
        for id, content in {
            "user/ddpm": {"model_index.json": b'{"_class_name": "DDPMPipeline"}'},
            "user/data": {"train.csv": b"1,2"},
            "user/shelf": {"train.csv": b"1,2", "models/two/model_index.json": b"{}"},
            "user/edited": {"model_index.json": named, "README.md": b"Not UTF-8: \xe9."},
            "user/cut": {"model_index.json": b'{"_class_name": '},
            "user/list": {"model_index.json": b"[]"},
            "user/nested": {"model_index.json": b'{"_class_name": [["ECVAEPipeline"]]}'},
            "user/figures": {**before, **figures},
            "stranger/model": before,
        }.items():
            server.commit(id, content)
        # A large file's upload is tried again by the client itself, the commit by us.
        server.failures = {("commit", "user/retried"): [500, 503], ("lfs_put", None): [503]}
        command = [sys.executable, "-c", CLIENT, str(saved), str(work)]
        environment = server.environment(work / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        server.seen = json.loads((work / "seen.json").read_text())
        server.output, server.work = done.stdout + done.stderr, work
        assert files(saved) == before
        yield server


def test_refusals_in_one_error_and_all_else_succeeds(hub):
    assert {name for name, case in hub.seen.items() if "error" in case} == set(REFUSED), hub.seen
    assert hub.unknown_requests == []


@pytest.mark.parametrize("case, named", REFUSED.items())
def test_what_refusals_name(hub, case, named):
    assert re.match(named, hub.seen[case]["error"], flags=re.DOTALL), hub.seen[case]["error"]


def test_what_is_published_is_the_folder(hub, saved):
    """Each push is a commit, and loses nothing of what was there."""
    _, first, *others = hub.repositories["user/model"].values()
    assert len(others) == 4  # the second push, the variant, two of the branch
    for commit in (first, others[0], hub.files("user/model", "next")):
        assert {path: commit[path] for path in files(saved)} == files_at(saved, "user/model")
    assert "commit/" in hub.seen["first"]["url"] != hub.seen["second"]["url"]
    assert hub.private == hub.private | {"user/model": True, "user/saved": False}
    for id, folder in (("user/retried", saved), ("user/short", saved), ("user/saved", hub.work / "saved")):
        published = hub.files(id)
        assert {path: published[path] for path in files(folder)} == files_at(folder, id)
    assert set(map(tuple, hub.failures.values())) == {()}


def test_a_variant_lies_next_to_the_full_weights(hub, saved):
    published = hub.files("user/model")
    half = load(published["vae/diffusion_pytorch_model.fp16.safetensors"])
    assert {value.dtype for value in half.values()} == {torch.float16}
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert published[weights] == files(saved)[weights]


def test_a_subfolder_of_a_repository(hub):
    """All else in the repository stays, and the card of the repository is not that of the model."""
    pushed = files(hub.work / "saved")  # the same pipeline
    expected = {f"models/one/{path}": content for path, content in pushed.items() if path != "README.md"}
    assert hub.files("user/shelf") == {"train.csv": b"1,2", "models/two/model_index.json": b"{}", **expected}


def test_an_autoencoder_is_its_config_its_weights_and_its_card(hub):
    published, weights = hub.files("user/autoencoder"), "diffusion_pytorch_model.safetensors"
    assert set(published) == {"config.json", "README.md", weights}
    assert published[weights] == (hub.work / "autoencoder" / weights).read_bytes()


def test_what_others_have_there_stays(hub, saved):
    assert hub.files("user/edited")["README.md"] == b"Not UTF-8: \xe9."
    assert hub.files("user/edited")["pipeline.py"] == files(saved)["pipeline.py"]
    assert list(hub.files("user/data")) == ["train.csv"] and list(hub.files("user/ddpm")) == ["model_index.json"]
    assert len(hub.repositories["stranger/model"]) == 1


def test_figures_stay_as_long_as_they_are_of_the_weights(hub, saved):
    *before, after, _, again = hub.repositories["user/figures"].values()
    assert len(before) == 3
    for commit in before:
        assert commit["README.md"] == FIGURES and "evaluation.json" in commit
        weights = "vae/diffusion_pytorch_model.safetensors"
        assert commit[weights] == files(saved)[weights]
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in before[2]
    assert "evaluation.json" not in after
    # A variant of the weights before goes, and is named. One of these stays, and what is no variant.
    assert not any(name.endswith(".fp16.safetensors") for name in after)
    assert "Removed from 'user/figures'" in hub.output and "vae/diffusion_pytorch_model.fp16.safetensors" in hub.output
    assert "vae/diffusion_pytorch_model.other.safetensors" in again
    assert "vae/style.v2.safetensors" in after
    assert FIGURES not in after["README.md"] and b'from_pretrained("user/figures")' in after["README.md"]


def test_no_token_in_any_output(hub):
    """Nor in a traceback."""
    assert "hf_token" not in hub.output and "hf_wrong" not in json.dumps(hub.seen)


def missing_file(tmp_path: Path) -> bytes:
    return (tmp_path / "missing").read_bytes()


def full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as file:
        file.write("a byte")


def no_temporary_folder(tmp_path: Path) -> None:
    tempfile.TemporaryDirectory(dir=tmp_path / "missing")


def refused_connection(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        socket.create_connection(unused.getsockname(), timeout=5)


def unknown_host(tmp_path: Path) -> None:
    socket.getaddrinfo("hub.invalid", 443)


@pytest.mark.parametrize(
    "fails, is_local",
    [(missing_file, True), (full_disk, True), (no_temporary_folder, True), (refused_connection, False), (unknown_host, False)],
)  # fmt: skip
def test_only_an_error_of_the_network_is_tried_again(fails, is_local, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "WAITS", (0.0, 0.0))
    tries = []

    def call():
        tries.append(None)
        fails(tmp_path)

    with pytest.raises(UploadError) as raised, local_errors():
        attempt("write to", "user/model", HfApi(), call)
    assert len(tries) == (1 if is_local else 3) and isinstance(raised.value.__cause__, OSError)
    assert (str(raised.value.__cause__) if is_local else HfApi().endpoint) in str(raised.value)
