# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishing, with the Hub's real client against a server of ours: the client runs in one subprocess, the tests read what it saw."""

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from ecvae_diffusers import ECVAEPipeline, upload
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.hub.upload import (
    UploadError,
    attempt,
    check_text,
    files_to_publish,
    folder_fingerprint,
    local_errors,
    upload_arguments,
)


CLIENT = """
import json, os, sys, traceback
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers import AutoencoderTiny
from huggingface_hub import constants

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, FlowEC, upload
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

UNREACHABLE = """
import sys

from ecvae_diffusers.hub import upload

upload.WAITS = (0.01, 0.02)
try:
    upload.upload_folder(sys.argv[1], "user/model")
except upload.UploadError as error:
    print(error)
"""


FIGURES = f"{CARD_MARKER}\n| Frechet distance | 1.0 |\n".encode()


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def files_at(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Those of a folder as they are published: the card loads from the repository."""
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
    with HubServer() as server:
        server.commit("user/ddpm", {"model_index.json": b'{"_class_name": "DDPMPipeline"}'})
        server.commit("user/data", {"train.csv": b"1,2"})
        server.commit("user/shelf", {"train.csv": b"1,2", "models/two/model_index.json": b"{}"})
        # Not UTF-8.
        edited = {
            "model_index.json": b'{"_class_name": ["pipeline", "ECVAEPipeline"]}',
            "README.md": b"My own words: \xe9.",
        }
        server.commit("user/edited", edited)
        server.commit("user/cut", {"model_index.json": b'{"_class_name": '})
        server.commit("user/list", {"model_index.json": b"[]"})
        server.commit("user/nested", {"model_index.json": b'{"_class_name": [["ECVAEPipeline"]]}'})
        evaluation = json.dumps({"weights": folder_fingerprint(saved)}).encode()
        figures = {"README.md": FIGURES, "evaluation.json": evaluation, "vae/style.v2.safetensors": b"of somebody"}
        server.commit("user/figures", {**files(saved), **figures})
        server.commit("stranger/model", files(saved))
        # A large file's upload is tried again by the client itself, the commit by us.
        server.failures = {("commit", "user/retried"): [500, 503], ("lfs_put", None): [503]}
        before = files(saved)
        command = [sys.executable, "-c", CLIENT, str(saved), str(work)]
        done = subprocess.run(
            command, env=server.environment(work / "home"), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        server.seen = json.loads((work / "seen.json").read_text())
        server.output = done.stdout + done.stderr
        server.work = work
        assert files(saved) == before
        yield server


def test_what_is_published_is_the_folder(hub, saved):
    assert "commit/" in hub.seen["first"]["url"]
    first = list(hub.repositories["user/model"].values())[1]
    assert {path: first[path] for path in files(saved)} == files_at(saved, "user/model")
    assert hub.private["user/model"] is True


def test_a_second_push_is_a_new_commit_and_loses_nothing(hub, saved):
    assert hub.seen["second"]["url"] != hub.seen["first"]["url"]
    assert len(hub.repositories["user/model"]) == 6  # empty, two pushes, the variant, two of the branch


def test_a_variant_lies_beside_the_full_weights(hub, saved):
    assert "error" not in hub.seen["variant"] and "error" not in hub.seen["half"]
    published = hub.files("user/model")
    half = "vae/diffusion_pytorch_model.fp16.safetensors"
    (hub.work / "half.safetensors").write_bytes(published[half])
    assert {value.dtype for value in load_file(hub.work / "half.safetensors").values()} == {torch.float16}
    assert (
        published["vae/diffusion_pytorch_model.safetensors"] == files(saved)["vae/diffusion_pytorch_model.safetensors"]
    )


def test_branches(hub, saved):
    assert "error" not in hub.seen["branch"] and "error" not in hub.seen["branch again"]
    assert "error" not in hub.seen["next"]
    published = hub.files("user/model", "next")
    assert {path: published[path] for path in files(saved)} == files_at(saved, "user/model")


def test_a_subfolder_of_a_repository(hub):
    """All else that lies in the repository stays, and the card of the repository is not that of the model."""
    assert "error" not in hub.seen["subfolder"], hub.seen["subfolder"]
    published = hub.files("user/shelf")
    pushed = files(hub.work / "saved")  # the same pipeline
    expected = {f"models/one/{path}": content for path, content in pushed.items() if path != "README.md"}
    assert {path: content for path, content in published.items() if path != ".gitattributes"} == {
        "train.csv": b"1,2", "models/two/model_index.json": b"{}", **expected,
    }  # fmt: skip


def test_flows_and_autoencoders_are_published_too(hub):
    """An autoencoder of diffusers is its config, weights and card, and is never laid over a pipeline, or under one."""
    for name in ("flow", "flow again", "autoencoder", "autoencoder again"):
        assert "error" not in hub.seen[name], hub.seen[name]
    weights = "diffusion_pytorch_model.safetensors"
    assert set(hub.files("user/autoencoder")) - {".gitattributes"} == {"config.json", "README.md", weights}
    assert hub.files("user/autoencoder")[weights] == (hub.work / "autoencoder" / weights).read_bytes()
    assert "holds a ECFlowPipeline, which would be lost" in hub.seen["autoencoder over a pipeline"]["error"]
    assert "holds a AutoencoderTiny, which would be lost" in hub.seen["pipeline over an autoencoder"]["error"]


def test_a_name_alone_is_one_of_ones_own(hub):
    assert "error" not in hub.seen["own name"]
    assert b'from_pretrained("user/short")' in hub.files("user/short")["README.md"]


def test_saving_publishes_what_it_saved(hub):
    assert hub.seen["saved"] == {"url": "None"} and hub.private["user/saved"] is False
    published = hub.files("user/saved")
    saved = files_at(hub.work / "saved", "user/saved")
    assert {path: published[path] for path in saved} == saved


def test_a_failed_upload_is_tried_again(hub, saved):
    assert "error" not in hub.seen["retried"] and set(map(tuple, hub.failures.values())) == {()}
    published = hub.files("user/retried")
    assert {path: published[path] for path in files(saved)} == files_at(saved, "user/retried")


def test_an_edited_card_stays(hub, saved):
    published = hub.files("user/edited")
    assert published["README.md"] == b"My own words: \xe9."
    assert published["pipeline.py"] == files(saved)["pipeline.py"]


def test_figures_stay_as_long_as_they_are_of_the_weights(hub, saved):
    for name in ("the same weights", "variant", "new weights", "variant of others", "new weights again"):
        assert "error" not in hub.seen[f"figures, {name}"], hub.seen[f"figures, {name}"]
    *before, after, _, again = hub.repositories["user/figures"].values()
    assert len(before) == 3
    for commit in before:
        assert commit["README.md"] == FIGURES and "evaluation.json" in commit
        weights = "vae/diffusion_pytorch_model.safetensors"
        assert commit[weights] == files(saved)[weights]
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in before[2]
    assert "evaluation.json" not in after
    # A variant of the weights before goes, and is named; one of these stays, and what is no variant.
    assert not any(name.endswith(".fp16.safetensors") for name in after)
    assert "Removed from 'user/figures'" in hub.output and "vae/diffusion_pytorch_model.fp16.safetensors" in hub.output
    assert "vae/diffusion_pytorch_model.other.safetensors" in again
    assert "vae/style.v2.safetensors" in after
    assert FIGURES not in after["README.md"] and b'from_pretrained("user/figures")' in after["README.md"]


@pytest.mark.parametrize(
    "case, message",
    [
        ("ddpm", "UploadError: 'user/ddpm' holds a DDPMPipeline, which would be lost: choose another name."),
        ("cut", "UploadError: 'user/cut' holds a model_index.json that is no JSON ("),
        ("list", "UploadError: 'user/list' holds a model_index.json that names no class, which would be lost"),
        ("nested", "UploadError: 'user/nested' holds a model_index.json that names no class, which would be lost"),
        ("token in two lines", "UploadError: the Hub at http"),
        ("data", "UploadError: 'user/data' holds other files, such as 'train.csv': choose another name."),
        ("stranger", "UploadError: the token may not write to 'stranger/model' (403): use one with write access"),
        ("no such user", "UploadError: the token may not create 'stranger/new' (403)"),
        ("wrong token", "UploadError: the Hub does not know the token (401): `hf auth login`, or set HF_TOKEN"),
        ("no cache", "UploadError: a file of this machine can't be read or written: "),
        ("name", "ValueError: `repo_id` must be 'user/name', but is 'a/b/c'"),
    ],
)
def test_refusals_in_one_error(hub, case, message):
    assert hub.seen[case].get("error", "").startswith(message), hub.seen[case]


def test_what_others_have_there_stays(hub, saved):
    assert list(hub.files("user/data")) == ["train.csv"] and list(hub.files("user/ddpm")) == ["model_index.json"]
    assert len(hub.repositories["stranger/model"]) == 1


def test_no_token_in_any_output_and_nothing_unknown_asked(hub):
    assert "error" not in hub.seen["token of a file"], hub.seen["token of a file"]
    # Tracebacks are seen too.
    assert "Bearer (hidden)" in hub.seen["token in two lines"]["error"]
    assert "hf_token" not in hub.output and "hf_wrong" not in json.dumps(hub.seen)
    assert hub.unknown_requests == []


def test_an_unreachable_hub(saved, tmp_path):
    with HubServer() as server:
        environment = server.environment(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(saved)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"the Hub at {server.url} can't be reached, 3 times: ")


def copy(saved: Path, folder: Path) -> Path:
    ECVAEPipeline.from_pretrained(saved).save_pretrained(folder)
    return folder


def test_a_run_folder_publishes_its_pipeline_alone(saved, tmp_path):
    folder = copy(saved, tmp_path / "run")
    expected = files_to_publish(folder)
    assert {"model_index.json", "README.md", "pipeline.py", "restoration.py", "vae/autoencoder_ec.py"} < set(expected)
    assert set(expected) == set(files(folder))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.bin").write_bytes(b"")
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "training_args.json").write_text("{}")
    assert files_to_publish(folder) == expected
    PIL.Image.new("L", (8, 8)).save(folder / "samples.png")
    assert files_to_publish(folder) == sorted([*expected, "samples.png"])
    # Nor what lies beside the files of a component.
    outside = tmp_path / "outside.json"
    outside.write_text('{"api_key": "secret"}')
    for name in ("vae", "energy_model", "scheduler"):
        for file in ("credentials.json", ".secret.json", "settings.py", "config.json.bak", "other.v2.safetensors"):
            (folder / name / file).write_bytes(b"secret")
        (folder / name / "link.json").symlink_to(outside)
        (folder / name / "__pycache__").mkdir()
    assert files_to_publish(folder) == sorted([*expected, "samples.png"])
    assert folder_fingerprint(folder) == folder_fingerprint(saved)


@pytest.mark.parametrize(
    "path", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler", "README.md", "picture.png"]
)
def test_a_link_is_not_published(path, saved, tmp_path):
    folder = copy(saved, tmp_path / "run")
    PIL.Image.new("L", (8, 8)).save(folder / "picture.png")
    (folder / path).rename(tmp_path / "outside")
    (folder / path).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=Path(path).name):
        files_to_publish(folder)
    # Nor one to another file of the folder, which may be one that is not to be published.
    (folder / path).unlink()
    (tmp_path / "outside").rename(folder / "elsewhere")
    (folder / path).symlink_to(folder / "elsewhere")
    with pytest.raises(ValueError, match=Path(path).name):
        files_to_publish(folder)


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", "/tmp", "vae/../../x", "vae/", "~", "extra", "pipeline.py"]
)
def test_a_component_that_the_pipeline_does_not_have_is_not_published(name, saved, tmp_path):
    folder = copy(saved, tmp_path / "a" / "b" / "run")
    (tmp_path / "a" / "x").mkdir()
    (tmp_path / "a" / "x" / "scheduler_config.json").write_text("{}")
    name_component(folder, ["diffusers", "DDPMScheduler"], name)
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        files_to_publish(folder)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: (folder / "vae" / "pytorch_model.bin").write_bytes(b""), "holds pytorch_model.bin, a pickle"),
        (lambda folder: cut(folder / "vae" / "diffusion_pytorch_model.safetensors"), "is damaged"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "'vae' has no weights"),
        (lambda folder: change(folder, float("nan")), "must hold finite weights only, but '.*' has some that are not"),
        (lambda folder: change(folder, float("inf")), "must hold finite weights only"),
        (lambda folder: (evaluate(folder), change(folder, 1.0)), "evaluation.json' must be an evaluation of the weights"),
        (lambda folder: (folder / "evaluation.json").write_text("[]"), "must be an evaluation of the weights"),
        (lambda folder: (folder / "evaluation.json").write_text("{"), "must be an evaluation of the weights"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "holds a model_index.json that names no class"),
        (lambda folder: name_component(folder, [None, None]), "vae"),
        (lambda folder: name_component(folder, "x"), "vae"),
        (lambda folder: name_component(folder, float("nan")), "vae"),
        (lambda folder: name_component(folder, float("nan"), "scheduler"), "scheduler"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "vae"),
        (lambda folder: (folder / "id.png").write_text("-----BEGIN KEY-----"), "id.png"),
        (lambda folder: PIL.Image.new("L", (8, 8)).save(folder / "id.png", "jpeg"), "id.png"),
        (lambda folder: name_component(folder, []), r"`vae` of its model_index.json must be a library and a class, but is \[\]"),
        (lambda folder: name_component(folder, [["a", "b"]]), "`vae` of its model_index.json must be a library and a class"),
        (lambda folder: name_component(folder, ["../../x", "AutoencoderEC"]), "vae"),
        (lambda folder: name_component(folder, ["/x", "AutoencoderEC"]), "vae"),
        (lambda folder: (folder / "README.md").write_bytes(b"\xe9"), "README.md' must be text in UTF-8"),
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
        (lambda folder: (folder / "README.md").write_text(f"made in {Path.home()}"), "a path of this machine"),
        (lambda folder: (folder / "README.md").write_text(f"see {folder}"), "a path of this machine"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "its model_index.json can't be read"),
        (lambda folder: (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}'), "holds a DDPMPipeline"),
    ],
)  # fmt: skip
def test_what_may_not_be_published(harm, message, saved, tmp_path):
    folder = copy(saved, tmp_path / "run")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        files_to_publish(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change(folder: Path, value: float) -> None:
    """One weight."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[min(weights)].view(-1)[0] = value
    save_file(weights, path)


def evaluate(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"weights": folder_fingerprint(folder)}))


def name_component(folder: Path, value, name: str = "vae") -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: value}))


def test_an_evaluation_of_the_weights_beside_it_is_published(saved, tmp_path):
    """Its fingerprint is the pipeline's, in full and in half precision, which may lie beside each other."""
    folder = copy(saved, tmp_path / "run")
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
    check_text(tmp_path / "README.md", tmp_path)


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
        check_text(tmp_path / "README.md", tmp_path)


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


@pytest.mark.parametrize("fails", [missing_file, full_disk, no_temporary_folder])
def test_an_error_of_this_machine_is_none_of_the_hub(fails, tmp_path):
    tries = []

    def call():
        tries.append(None)
        fails(tmp_path)

    with pytest.raises(UploadError) as raised, local_errors():
        attempt("write to", "user/model", HfApi(), call)
    assert len(tries) == 1 and isinstance(raised.value.__cause__, OSError)
    assert str(raised.value.__cause__) in str(raised.value)


@pytest.mark.parametrize("fails", [refused_connection, unknown_host])
def test_an_error_of_the_network_is_tried_again(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "WAITS", (0.0, 0.0))
    tries = []

    def call():
        tries.append(None)
        fails(tmp_path)

    with pytest.raises(UploadError, match=re.escape(HfApi().endpoint)), local_errors():
        attempt("write to", "user/model", HfApi(), call)
    assert len(tries) == 3


def test_arguments_of_an_upload_are_taken_out():
    kwargs = {"push_to_hub": True, "repo_id": "user/x", "private": True, "variant": "fp16"}
    assert upload_arguments("folder", kwargs) == {"repo_id": "user/x", "private": True}
    assert kwargs == {"variant": "fp16"}
    assert upload_arguments("some/folder", {"push_to_hub": True}) == {"repo_id": "folder"}
    assert upload_arguments("folder", {"push_to_hub": False, "variant": None}) is None
    assert issubclass(UploadError, RuntimeError)
