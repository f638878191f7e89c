# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishing, with the Hub's real client against a server of ours: nothing of value on the Hub is lost."""

import json
import traceback
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, files
from huggingface_hub import constants
from safetensors.torch import load

from ecvae_diffusers import ECFlowPipeline, FlowEC
from ecvae_diffusers.hub import upload
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.contents import folder_fingerprint
from ecvae_diffusers.hub.modular import MODULAR_INDEX, modular_index
from ecvae_diffusers.hub.upload import UploadError, upload_folder


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
HALF = "vae/diffusion_pytorch_model.fp16.safetensors"
OURS = b'{"_class_name": ["pipeline", "ECVAEPipeline"]}'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(upload, "WAITS", (0.0, 0.0))
    with HubServer() as server:
        yield server.use(monkeypatch, tmp_path / "cache")
    assert server.unknown_requests == []


def files_at(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Return the files of a folder as they are published: the card and the modular form load from the repository."""
    found = files(folder)
    assert b'from_pretrained("path/or/hub-id")' in found["README.md"]
    card = found["README.md"].replace(b"path/or/hub-id", repo_id.encode())
    return found | {"README.md": card, MODULAR_INDEX: modular_index(repo_id).encode()}


def test_what_is_published_is_the_folder(hub, saved):
    """Each push is a commit, and loses nothing of what was there."""
    before = files(saved)
    first = upload_folder(saved, "user/model", private=True, token="hf_token\n")
    assert "/commit/" in first != upload_folder(saved, "user/model", commit_message="Again")
    for _ in range(2):
        upload_folder(saved, "user/model", revision="next")
    assert upload_folder(saved, "short") and hub.private == {"user/model": True, "user/short": False}
    _, *commits = hub.repositories["user/model"].values()
    assert len(commits) == 4 and all(commit == files_at(saved, "user/model") for commit in commits)
    assert hub.files("user/short") == files_at(saved, "user/short") and files(saved) == before
    # A card that was edited stays.
    hub.commit("user/edited", {"model_index.json": OURS, "README.md": b"Not UTF-8: \xe9."})
    upload_folder(saved, "user/edited")
    assert hub.files("user/edited") == files_at(saved, "user/edited") | {"README.md": b"Not UTF-8: \xe9."}


def test_a_saved_pipeline_is_pushed(hub, saved, make_pipeline, tmp_path):
    """By its name if no other is given; into a subfolder without a card, beside which all else stays."""
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "tiny", push_to_hub=True)
    hub.commit("user/shelf", {"train.csv": b"1,2", "models/two/model_index.json": b"{}"})
    for _ in range(2):
        pipe.push_to_hub("user/shelf", subfolder="models/one")
    assert hub.files("user/tiny") == files_at(saved, "user/tiny")
    pushed = {f"models/one/{path}": content for path, content in files(saved).items() if path != "README.md"}
    assert hub.files("user/shelf") == {"train.csv": b"1,2", "models/two/model_index.json": b"{}", **pushed}


def test_figures_and_variants_stay_as_long_as_they_are_of_the_weights(hub, saved, make_pipeline, monkeypatch):
    warnings, pipe = [], make_pipeline()
    monkeypatch.setattr(upload.logger, "warning", warnings.append)
    figures = f"{CARD_MARKER}\n| Frechet distance | 1.0 |\n".encode()
    evaluation = json.dumps({"weights": folder_fingerprint(saved)}).encode()
    there = {"README.md": figures, "evaluation.json": evaluation, "vae/style.v2.safetensors": b"of somebody"}
    hub.commit("user/figures", files(saved) | there)
    pipe.push_to_hub("user/figures")
    pipe.to(torch.float16).push_to_hub("user/figures", variant="fp16")
    published = hub.files("user/figures")
    assert there.items() <= published.items() and published[WEIGHTS] == files(saved)[WEIGHTS] and not warnings
    assert {value.dtype for value in load(published[HALF]).values()} == {torch.float16}

    torch.nn.init.zeros_(next(pipe.to(torch.float32).vae.decoder.parameters()))
    pipe.push_to_hub("user/figures")
    published = hub.files("user/figures")
    assert not {"evaluation.json", HALF} & published.keys() and "vae/style.v2.safetensors" in published
    assert figures != published["README.md"] and b'from_pretrained("user/figures")' in published["README.md"]
    assert len(warnings) == 1 and "evaluation.json" in warnings[0] and HALF in warnings[0]
    # A variant of the weights that are there stays.
    pipe.push_to_hub("user/figures", variant="other")
    pipe.push_to_hub("user/figures")
    assert HALF.replace("fp16", "other") in hub.files("user/figures")


def test_weights_in_several_files_replace_one_and_the_other_way_round(hub, make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.push_to_hub("user/parts")
    pipe.to(torch.float16).push_to_hub("user/parts", variant="fp16")
    pipe.to(torch.float32).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    pipe.vae.save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    upload_folder(tmp_path, "user/parts")
    published = hub.files("user/parts")
    assert f"{WEIGHTS}.index.json" in published and not {WEIGHTS, HALF} & published.keys()
    pipe.push_to_hub("user/parts")
    published = hub.files("user/parts")
    assert [path for path in published if path.startswith("vae/diffusion")] == [WEIGHTS]


@pytest.mark.parametrize(
    "repo_id, there, named",
    [
        ("user/taken", {"model_index.json": b'{"_class_name": "DDPMPipeline"}'}, "DDPMPipeline"),
        ("user/taken", {"model_index.json": b'{"_class_name": [["ECVAEPipeline"]]}'}, "model_index.json"),
        ("user/taken", {"train.csv": b"1,2"}, "train.csv"),
        ("stranger/model", {"model_index.json": OURS}, "stranger/model.*HF_TOKEN"),
        ("stranger/new", None, "stranger/new.*HF_TOKEN"),
    ],
)
def test_what_others_have_there_stays(repo_id, there, named, hub, saved):
    if there is not None:
        hub.commit(repo_id, there)
    with pytest.raises(UploadError, match=named):
        upload_folder(saved, repo_id)
    assert there is None or list(hub.repositories[repo_id].values()) == [there]


def test_refused_by_the_client(hub, saved, tmp_path):
    with pytest.raises(UploadError, match="user/model.*HF_TOKEN") as raised:
        upload_folder(saved, "user/model", token="hf_wrong")
    assert "hf_wrong" not in str(raised.value)
    with pytest.raises(UploadError) as raised:  # the client quotes a token that no header may hold
        upload_folder(saved, "user/model", token="\n".join(["hf_secret", "abc"]))
    assert "Bearer hf_secret" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(ValueError, match="`repo_id`.*a/b/c"):
        upload_folder(saved, "a/b/c")
    ECFlowPipeline(flow=FlowEC(sample_size=8, num_levels=1, steps_per_level=1)).save_pretrained(tmp_path / "flow")
    (tmp_path / "flow" / "pipeline.py").unlink()
    with pytest.raises(ValueError, match="pipeline.py"):
        upload_folder(tmp_path / "flow", "user/flow")
    assert not hub.repositories


def test_only_an_error_of_the_network_is_tried_again(hub, saved, monkeypatch):
    hub.failures = {("commit", "user/model"): [500, 503], ("create", None): [429]}
    upload_folder(saved, "user/model")
    assert hub.files("user/model") == files_at(saved, "user/model") and not any(hub.failures.values())
    for statuses, left in (([500, 503, 500, 500], [500]), ([403, 403], [403])):
        hub.failures = {("commit", "user/model"): statuses}
        with pytest.raises(UploadError):
            upload_folder(saved, "user/model")
        assert hub.failures["commit", "user/model"] == left
    hub.failures = {}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/cache")  # what the Hub sends can't be kept
    with pytest.raises(UploadError, match="/dev/null"):
        upload_folder(saved, "user/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(UploadError, match="user/model"):
        upload_folder(saved, "user/model")
    assert len(waits) == 2
