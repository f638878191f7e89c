# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""From training to the Hub, each step as a user runs it: train with --push_to_hub, evaluate.py, publish.py, load by id."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import PIL.Image
import pytest
import torch
import yaml
from hub_server import HubServer, files
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import SCRIPT, TINY, write_autoencoder, write_images

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline, FlowEC
from ecvae_diffusers.hub import publish
from ecvae_diffusers.hub.card import CARD_MARKER, figure
from ecvae_diffusers.hub.publish import parse_args


TRAINING = SCRIPT.parent
DETAILS = {
    "title": "Disks, 16 px",
    "license": "apache-2.0",
    "data": {"name": "disks", "license": "CC0", "description": "Drawn by a test."},
    "known_failures": "Two steps of training: noise.",
    "training": {"command": "`accelerate launch training/train_ecvae.py`"},
}
LOADED = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images, sys.argv[2])
"""


def run(script: str, *arguments, environment: dict) -> subprocess.CompletedProcess:
    return fork_server.run(TRAINING / script, *arguments, environment=environment)


def succeed(*arguments, **kwargs) -> subprocess.CompletedProcess:
    result = run(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    return hub.environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def work(tmp_path_factory, environment) -> Path:
    """Two runs, the first pushed; their evaluations; details; and what is published of the first."""
    folder = tmp_path_factory.mktemp("publish")
    images = write_images(folder / "images")
    for seed in (0, 1):
        push = ["--push_to_hub", "--hub_model_id", "user/trained", "--hub_private_repo"] if seed == 0 else []
        result = succeed(
            "train_ecvae.py", "--train_data_dir", images, "--output_dir", folder / f"run{seed}", *TINY,
            "--max_train_steps", 2, "--seed", seed, "--log_steps", 1, *push, environment=environment,
        )  # fmt: skip
        (folder / f"train{seed}.log").write_text(result.stderr)
        succeed(
            "evaluate.py", "--pretrained_model_name_or_path", folder / f"run{seed}", "--train_data_dir", images,
            "--num_samples", 20, "--seeds", 0, 1, "--output_dir", folder / f"evaluation{seed}", environment=environment,
        )  # fmt: skip
    (folder / "details.yaml").write_text(yaml.safe_dump(DETAILS))
    result = succeed("publish.py", *arguments(folder), environment=environment)
    (folder / "publish.log").write_text(result.stdout + result.stderr)
    return folder


def arguments(folder: Path) -> list:
    return [
        folder / "run0", "--evaluation", folder / "evaluation0", "--details", folder / "details.yaml",
        "--baseline", f"another seed={folder / 'evaluation1'}", "--training_seeds", f"0={folder / 'evaluation0'}",
        f"1={folder / 'evaluation1'}", "--dtype", "float16", "--output_dir", folder / "card", "--hub_model_id",
        "user/published",
    ]  # fmt: skip


def test_a_run_is_pushed_at_its_end(hub, work):
    pushed, weights = hub.files("user/trained"), "vae/diffusion_pytorch_model.safetensors"
    assert pushed[weights] == (work / "run0" / weights).read_bytes()
    assert {path.split("/")[0] for path in pushed} == {
        "README.md", "energy_model", "model_index.json", "pipeline.py", "restoration.py", "scheduler", "vae",
    }  # fmt: skip
    assert hub.private["user/trained"] is True
    log = (work / "train0.log").read_text()
    assert "Published: " in log and "hf_token" not in log
    assert "hf_token" not in (work / "run0" / "training_args.json").read_text()
    assert b'from_pretrained("user/trained")' in pushed["README.md"]


def test_what_is_uploaded_is_what_is_kept(hub, work):
    assert hub.files("user/published") == files(work / "card")
    assert "hf_token" not in (work / "publish.log").read_text()


def test_the_published_model_is_the_trained_one_in_half_precision(work):
    weights = load_file(work / "card" / "vae" / "diffusion_pytorch_model.safetensors")
    before = load_file(work / "run0" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert all(torch.equal(weights[name], value.half()) for name, value in before.items())
    pipe = ECVAEPipeline.from_pretrained(work / "card")
    assert pipe.vae.dtype == torch.float32 and pipe.vae.config.reconstruction_variance > 0


def test_loads_by_id_without_a_word_of_the_package(work, environment, tmp_path):
    command = [sys.executable, "-c", LOADED, "user/published", str(tmp_path / "images.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = ECVAEPipeline.from_pretrained(work / "card")
    images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(torch.load(tmp_path / "images.pt"), images)


def test_figures_of_the_card_are_those_of_its_evaluation(work):
    evaluation = json.loads((work / "card" / "evaluation.json").read_text())
    card = ModelCard.load(work / "card" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    measures = evaluation["generation"]["measures"]
    assert found == {name: measures[name]["mean"] for name in found} and "kernel_distance" in found
    assert "frechet_distance" not in found  # fewer images than features
    for name in ("precision", "coverage"):
        assert f"| {name} | {figure(measures[name]['mean'])} |" in card.text
    assert evaluation["baseline"]["name"] == "another seed" and "Against another seed" in card.text
    assert evaluation["training_seeds"]["published"] == "0"
    assert [run["seed"] for run in evaluation["training_seeds"]["runs"]] == ["0", "1"]
    assert "Two steps of training: noise." in card.text and "licence CC0" in card.text
    assert "seed: 0" in card.text and "max train steps: 2" in card.text and "averaged weights (EMA): yes" in card.text
    for name in ("samples.png", "neighbours.png", "curves.png"):
        assert f"]({name})" in card.text and (work / "card" / name).is_file()


def test_the_snippets_of_the_card_run(work, tmp_path):
    card = (work / "card" / "README.md").read_text()
    assert 'from_pretrained("user/published")' in card
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks).replace("user/published", str(work / "card")) + "\nassert len(restored) == 4\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_published_again_in_the_same_place(hub, work, environment):
    before = files(work / "card")
    (work / "card" / "README.md").write_text(before["README.md"].decode().replace(CARD_MARKER, "") + "By hand.\n")
    result = succeed("publish.py", *arguments(work)[:-2], environment=environment)
    assert str(work / "card" / "README.md") in result.stdout
    assert files(work / "card")["README.md"].decode().endswith("By hand.\n")
    (work / "card" / "README.md").write_bytes(before["README.md"])

    (work / "card" / "mine.txt").write_text("mine")
    result = run("publish.py", *arguments(work)[:-2], environment=environment)
    assert result.returncode == 1 and "mine.txt" in result.stderr
    (work / "card" / "mine.txt").unlink()
    assert files(work / "card") == before


def test_what_lies_beside_an_earlier_one_stays(work, tmp_path):
    """An absolute folder is not named in the card: it is of this machine."""
    card = tmp_path / "card"
    listed = ["--evaluation", work / "evaluation0", "--details", work / "details.yaml", "--output_dir", card]
    publish.run(parse_args(list(map(str, [work / "run0", *listed]))))
    assert 'from_pretrained("card")' in (card / "README.md").read_text()
    (card / "LICENSE").write_text("Mine.")
    PIL.Image.new("L", (8, 8), 7).save(card / "teaser.png")
    teaser = (card / "teaser.png").read_bytes()
    # Without an evaluation its file and pictures are gone, and nothing else.
    before = set(files(card))
    publish.run(parse_args([str(work / "run0"), "--output_dir", str(card)]))
    assert before - set(files(card)) == {"evaluation.json", "samples.png", "neighbours.png"}
    assert (card / "LICENSE").read_text() == "Mine." and (card / "teaser.png").read_bytes() == teaser


def test_flows_and_autoencoders_are_published_as_they_are(hub, work, environment, tmp_path):
    flow, autoencoder = tmp_path / "flow", tmp_path / "autoencoder"
    ECFlowPipeline(flow=FlowEC(sample_size=8, in_channels=1, num_levels=1, steps_per_level=1)).save_pretrained(flow)
    write_autoencoder(autoencoder)
    (autoencoder / "README.md").write_text(f'{CARD_MARKER}\nAutoencoderKL.from_pretrained("path/or/hub-id")\n')
    (autoencoder / "metrics.jsonl").write_text("")
    succeed("publish.py", flow, "--hub_model_id", "user/a-flow", environment=environment)
    succeed(
        "publish.py", autoencoder, "--hub_model_id", "decoder", "--output_dir", tmp_path / "kept", environment=environment
    )  # fmt: skip
    for name, folder in (("user/a-flow", flow), ("user/decoder", autoencoder)):
        expected = {path: content for path, content in files(folder).items() if path != "metrics.jsonl"}
        expected["README.md"] = expected["README.md"].replace(b"path/or/hub-id", name.encode())
        assert b"path/or" not in expected["README.md"] and hub.files(name) == expected
    assert set(files(tmp_path / "kept")) == set(hub.files("user/decoder"))


def test_a_folder_from_elsewhere_does_not_lead_out_of_what_is_written(tmp_path):
    model, target = tmp_path / "a" / "b" / "flow", tmp_path / "a" / "x"
    ECFlowPipeline(flow=FlowEC(sample_size=8, in_channels=1, num_levels=1, steps_per_level=1)).save_pretrained(model)
    target.mkdir()
    (target / "scheduler_config.json").write_text("{}")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "../../x": ["diffusers", "DDPMScheduler"]}))
    with pytest.raises(ValueError, match=re.escape("../../x")):
        publish.run(parse_args([str(model), "--output_dir", str(tmp_path / "card")]))
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    "listed, argument", [(["--dtype", "float16"], "dtype"), (["--evaluation", "e", "--details", "d"], "evaluation")]
)
def test_a_restoration_pipeline_stays_one(listed, argument, make_pipeline, tmp_path):
    """Its components would load as an ECVAEPipeline too."""
    model, card = tmp_path / "model", tmp_path / "card"
    ECVAERestorationPipeline(vae=make_pipeline().vae).save_pretrained(model)
    with pytest.raises(ValueError, match=f"--{argument} .*ECVAERestorationPipeline"):
        publish.run(parse_args([str(model), *listed, "--output_dir", str(card)]))
    assert not card.exists()
    publish.run(parse_args([str(model), "--output_dir", str(card)]))
    assert json.loads((card / "model_index.json").read_text())["_class_name"][1] == "ECVAERestorationPipeline"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"--evaluation": "evaluation1"}, "--evaluation .*run0"),
        ({"--evaluation": "images"}, "--evaluation .*images"),
        ({"--evaluation": "list"}, "--evaluation .*list"),
        ({"--baseline": "other=part"}, "--baseline .*generation"),
        ({"--details": "untrained.yaml"}, "--details .*`training`"),
        ({"--details": "untitled.yaml"}, "--details .*`title`"),
        ({"--details": "broken.yaml"}, "--details .*broken.yaml"),
        ({"--training_seeds": "1=evaluation1"}, "--training_seeds .*0 times"),
        ({"--baseline": "other=fewer"}, "--baseline .*num_samples"),
        ({"--training_seeds": "1=fewer"}, "--training_seeds .*num_samples"),
    ],
)  # fmt: skip
def test_refused_in_one_line_with_nothing_written(change, named, work, tmp_path, capsys):
    (work / "untitled.yaml").write_text(yaml.safe_dump({k: v for k, v in DETAILS.items() if k != "title"}))
    (work / "broken.yaml").write_text("title: [")
    (work / "untrained.yaml").write_text(yaml.safe_dump({**DETAILS, "training": None}))
    fewer = json.loads((work / "evaluation1" / "evaluation.json").read_text())
    fewer["generation"]["protocol"]["num_samples"] = 5
    for name, content in (("list", []), ("part", {"weights": None, "protocol": {}}), ("fewer", fewer)):
        (work / name).mkdir(exist_ok=True)
        (work / name / "evaluation.json").write_text(json.dumps(content))
    given = {
        "--evaluation": "evaluation0", "--details": "details.yaml", "--training_seeds": "0=evaluation0",
        "--baseline": "other=evaluation1", **change,
    }  # fmt: skip
    listed = [work / "run0", "--output_dir", tmp_path / "card"]
    for name, value in given.items():
        seed, equals, folder = value.rpartition("=")
        listed += [name, f"{seed}{equals}{work / folder}"]
    assert re.search(named, refused(listed))
    assert not (tmp_path / "card").exists()


def refused(listed: list) -> str:
    """Return the line with which publishing ends."""
    with pytest.raises(SystemExit) as ended:
        publish.main(list(map(str, listed)))
    assert isinstance(ended.value.code, str) and len(ended.value.code.splitlines()) == 1
    return ended.value.code


@pytest.mark.parametrize(
    "listed, named",
    [
        ([], "--output_dir"),
        (["--output_dir", "x", "--details", "d"], "--evaluation"),
        (["--output_dir", "x", "--dtype", "bfloat16"], "--dtype"),
        (["--output_dir", "x", "--baseline", "a=b"], "--baseline"),
        (["--output_dir", "x", "--baseline", "b"], "--baseline.*NAME=FOLDER.*'b'"),
        (["--output_dir", "x", "--training_seeds", "=b"], "--training_seeds.*NAME=FOLDER.*'=b'"),
    ],
)
def test_refused_before_anything_is_done(listed, named, capsys):
    with pytest.raises(SystemExit):
        parse_args(["model", *listed])
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize("token, status", [("hf_wrong", "(401)"), ("hf_token", "(403)")])
def test_a_run_that_could_not_be_pushed_does_not_begin(token, status, work, environment, tmp_path):
    result = run(
        "train_ecvae.py", "--train_data_dir", work / "images", "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 2,
        "--push_to_hub", "--hub_model_id", "stranger/model", environment={**environment, "HF_TOKEN": token},
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "train_ecvae.py: error: --push_to_hub: " in result.stderr and status in result.stderr
    assert token not in result.stderr and not (tmp_path / "out").exists()


def test_a_model_that_could_not_be_uploaded_is_saved(hub, work, environment, tmp_path):
    hub.failures["commit", "user/unlucky"] = [403]
    result = run(
        "train_ecvae.py", "--train_data_dir", work / "images", "--output_dir", tmp_path / "unlucky", *TINY,
        "--max_train_steps", 2, "--push_to_hub", environment=environment,
    )  # fmt: skip
    assert result.returncode == 1
    assert "the token may not write to 'user/unlucky' (403)" in result.stderr
    advice = re.search(r"The model is saved: ecvae publish (.*) uploads it\.", result.stderr)[1]
    assert advice == f"{tmp_path / 'unlucky'} --hub_model_id unlucky"
    ECVAEPipeline.from_pretrained(tmp_path / "unlucky")
    succeed("publish.py", *advice.split(), environment=environment)
    assert "model_index.json" in hub.files("user/unlucky")


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda folder: (folder / "samples.png").write_text("-----BEGIN KEY-----"), "samples.png"),
        (lambda folder: link(folder / "samples.png"), "samples.png"),
        (lambda folder: change(folder, lambda e: e["generation"]["measures"]["precision"].update(mean=math.inf)), "--evaluation"),
        (lambda folder: change(folder, lambda e: e["generation"]["measures"]["precision"].update(mean=math.nan)), "--evaluation"),
        (lambda folder: change(folder, lambda e: e.update(generation=None)), "--evaluation"),
        (lambda folder: change(folder, lambda e: e["generation"].update(measures=[])), "--evaluation"),
    ],
)  # fmt: skip
def test_an_evaluation_that_can_not_be_published(harm, named, work, tmp_path):
    shutil.copytree(work / "evaluation0", tmp_path / "evaluation")
    harm(tmp_path / "evaluation")
    listed = [
        "--evaluation",
        tmp_path / "evaluation",
        "--details",
        work / "details.yaml",
        "--output_dir",
        tmp_path / "card",
    ]
    assert named in refused([work / "run0", *listed])
    assert not (tmp_path / "card").exists()


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.png"))
    path.symlink_to(path.with_name("elsewhere.png"))


def change(folder: Path, update) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    update(evaluation)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
