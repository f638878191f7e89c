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
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import SCRIPT, TINY, write_autoencoder, write_images

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline, FlowEC
from ecvae_diffusers.hub import publish
from ecvae_diffusers.hub.card import CARD_MARKER, baseline_rows, check_details, figure, write_card
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


def published(hub: HubServer, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(name).items() if path != ".gitattributes"}


def local(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_pushed_at_its_end(hub, work):
    files = published(hub, "user/trained")
    assert (
        files["vae/diffusion_pytorch_model.safetensors"]
        == local(work / "run0")["vae/diffusion_pytorch_model.safetensors"]
    )
    assert {path.split("/")[0] for path in files} == {
        "README.md", "energy_model", "model_index.json", "pipeline.py", "restoration.py", "scheduler", "vae",
    }  # fmt: skip
    assert hub.private["user/trained"] is True
    log = (work / "train0.log").read_text()
    assert "Published: " in log and "hf_token" not in log
    assert "hf_token" not in (work / "run0" / "training_args.json").read_text()
    assert b'from_pretrained("user/trained")' in files["README.md"]


def test_what_is_uploaded_is_what_is_kept(hub, work):
    assert published(hub, "user/published") == local(work / "card")
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
    before = local(work / "card")
    (work / "card" / "README.md").write_text(before["README.md"].decode().replace(CARD_MARKER, "") + "By hand.\n")
    result = succeed("publish.py", *arguments(work)[:-2], environment=environment)
    assert "was edited and stays as it is" in result.stdout
    assert local(work / "card")["README.md"].decode().endswith("By hand.\n")
    (work / "card" / "README.md").write_bytes(before["README.md"])

    (work / "card" / "mine.txt").write_text("mine")
    result = run("publish.py", *arguments(work)[:-2], environment=environment)
    assert result.returncode == 1 and "holds other files, such as 'mine.txt'" in result.stderr
    (work / "card" / "mine.txt").unlink()
    assert local(work / "card") == before


def test_what_lies_beside_an_earlier_one_stays(work, tmp_path):
    """An absolute folder is not named in the card: it is of this machine."""
    card = tmp_path / "card"
    listed = [
        work / "run0",
        "--evaluation",
        work / "evaluation0",
        "--details",
        work / "details.yaml",
        "--output_dir",
        card,
    ]
    publish.run(parse_args(list(map(str, listed))))
    assert 'from_pretrained("card")' in (card / "README.md").read_text()
    (card / "LICENSE").write_text("Mine.")
    PIL.Image.new("L", (8, 8), 7).save(card / "teaser.png")
    teaser = (card / "teaser.png").read_bytes()
    # Without an evaluation its file and pictures are gone, and nothing else.
    before = set(local(card))
    publish.run(parse_args([str(work / "run0"), "--output_dir", str(card)]))
    assert before - set(local(card)) == {"evaluation.json", "samples.png", "neighbours.png"}
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
        expected = {path: content for path, content in local(folder).items() if path != "metrics.jsonl"}
        expected["README.md"] = expected["README.md"].replace(b"path/or/hub-id", name.encode())
        assert b"path/or" not in expected["README.md"] and published(hub, name) == expected
    assert set(local(tmp_path / "kept")) == set(published(hub, "user/decoder"))


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
    with pytest.raises(ValueError, match=f"--{argument} must be left out of a ECVAERestorationPipeline"):
        publish.run(parse_args([str(model), *listed, "--output_dir", str(card)]))
    assert not card.exists()
    publish.run(parse_args([str(model), "--output_dir", str(card)]))
    assert json.loads((card / "model_index.json").read_text())["_class_name"][1] == "ECVAERestorationPipeline"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--evaluation": "evaluation1"}, "is not of the weights of"),
        ({"--evaluation": "images"}, "holds no evaluation.json that can be read"),
        ({"--evaluation": "list"}, "must hold an evaluation.json of evaluate.py, but it has no 'weights'"),
        ({"--baseline": "other=part"}, "must hold an evaluation.json of evaluate.py, but it has no 'generation'"),
        ({"--details": "untrained.yaml"}, "field `training` must be names with what they were, but is None"),
        ({"--details": "untitled.yaml"}, "untitled.yaml': the card's field `title` is missing"),
        ({"--details": "broken.yaml"}, "can't be read"),
        ({"--training_seeds": "1=evaluation1"}, "--training_seeds must hold this model once, but holds it 0 times"),
        ({"--baseline": "other=fewer"}, "--baseline was evaluated in another way, so that it can't be compared: num_samples"),
    ],
)  # fmt: skip
def test_refused_in_one_line_with_nothing_written(change, message, work, environment, tmp_path):
    (work / "untitled.yaml").write_text(yaml.safe_dump({k: v for k, v in DETAILS.items() if k != "title"}))
    (work / "broken.yaml").write_text("title: [")
    (work / "untrained.yaml").write_text(yaml.safe_dump({**DETAILS, "training": None}))
    for name, content in (("list", []), ("part", {"weights": None, "protocol": {}})):
        (work / name).mkdir(exist_ok=True)
        (work / name / "evaluation.json").write_text(json.dumps(content))
    fewer = json.loads((work / "evaluation1" / "evaluation.json").read_text())
    fewer["generation"]["protocol"]["num_samples"] = 5
    (work / "fewer").mkdir(exist_ok=True)
    (work / "fewer" / "evaluation.json").write_text(json.dumps(fewer))
    given = {
        "--evaluation": "evaluation0", "--details": "details.yaml", "--training_seeds": "0=evaluation0",
        "--baseline": "other=evaluation1", **change,
    }  # fmt: skip
    listed = []
    for name, value in given.items():
        seed, equals, folder = value.rpartition("=")
        listed += [name, f"{seed}{equals}{work / folder}"]
    result = run("publish.py", work / "run0", *listed, "--output_dir", tmp_path / "card", environment=environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    "listed, message",
    [
        ([], "--output_dir or --hub_model_id must say where the model goes"),
        (["--output_dir", "x", "--details", "d"], "--evaluation and --details must be given together"),
        (["--output_dir", "x", "--dtype", "bfloat16"], "invalid choice: 'bfloat16' (choose from"),
        (["--output_dir", "x", "--baseline", "a=b"], "--baseline and --training_seeds need --evaluation"),
        (
            ["--output_dir", "x", "--evaluation", "e", "--details", "d", "--baseline", "b"],
            "--baseline must be NAME=FOLDER, but is 'b'",
        ),
    ],
)
def test_refused_before_anything_is_done(listed, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["model", *listed])
    assert message in capsys.readouterr().err


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
    advice = re.search(r"The model is saved: training/(publish.py .*) uploads it\.", result.stderr)[1]
    assert advice == f"publish.py {tmp_path / 'unlucky'} --hub_model_id unlucky"
    ECVAEPipeline.from_pretrained(tmp_path / "unlucky")
    succeed(*advice.split(), environment=environment)
    assert "model_index.json" in published(hub, "user/unlucky")


@pytest.mark.parametrize("name", ["title", "license", "data", "known_failures"])
def test_a_card_lacks_nothing(name):
    check_details(DETAILS)
    with pytest.raises(ValueError, match=f"field `{name}` is missing"):
        check_details({**DETAILS, name: None})


@pytest.mark.parametrize(
    "details, message",
    [
        ({**DETAILS, "author": "me"}, "field `author` is unknown"),
        ({**DETAILS, "data": {"name": "x"}}, "field `data.license` is missing"),
        ({**DETAILS, "data": "digits"}, "field `data` must be `name` and `license`"),
        ({**DETAILS, "data": {**DETAILS["data"], "id": None}}, "field `data.id` must be text, but is None"),
        ({**DETAILS, "training": "a week"}, "field `training` must be names with what they were, but is 'a week'"),
        ({**DETAILS, "training": None}, "field `training` must be names with what they were, but is None"),
        ({**DETAILS, "tags": "faces"}, "field `tags` must be a list of texts, but is 'faces'"),
        ({**DETAILS, "tags": None}, "field `tags` must be a list of texts, but is None"),
        ({**DETAILS, "tags": [1]}, r"field `tags` must be a list of texts, but is \[1\]"),
        ({**DETAILS, "license": ["mit"]}, "field `license` must be text"),
        ([], "must be fields with values"),
    ],
)
def test_details_that_are_none(details, message):
    with pytest.raises(ValueError, match=message):
        check_details(details)


@pytest.mark.parametrize("with_energy", [True, False])
def test_a_card_says_what_the_model_is(with_energy, make_pipeline, tmp_path):
    """Of a plain VAE not that it is calibrated, and of one without a variance, which restoration needs, no restoration."""
    pipe = make_pipeline(with_energy=with_energy)
    for variance in (None, 0.1):
        pipe.vae.register_to_config(reconstruction_variance=variance)
        write_card(pipe, tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert ("energy-calibrated" in card.text) == ("EC-VAE" in card.text) == with_energy
        assert ("ecvae" in card.data.tags) == ("energy-based-model" in card.data.tags) == with_energy
        assert ("image-restoration" in card.data.tags) == ("restored" in card.text) == (variance is not None)
        write_card(ECVAERestorationPipeline(vae=pipe.vae), tmp_path)
        assert ("mask_image=mask" in ModelCard.load(tmp_path / "README.md").text) == (variance is not None)


def test_beside_the_energy_stands_what_the_plain_model_tells_apart(pipe, work, tmp_path):
    """Its reconstruction error on the same sets: elsewhere than on these it says nothing of them."""
    evaluation = json.loads((work / "evaluation0" / "evaluation.json").read_text())
    protocol = {"inside": {"data": "disks", "num_images": 9}, "outside": {"noise": 5, "stripes": 7}}
    measures = {"noise": {"energy": 0.75, "error": 0.5}, "stripes": {"energy": 0.25, "error": 0.5}}
    evaluation["out_of_distribution"] = {"protocol": protocol, "measures": measures}
    other = {"protocol": {**protocol, "outside": {"noise": 5, "stripes": 8}}, "measures": {}}
    other["measures"] = {"noise": {"error": 0.875}, "stripes": {"error": 1.0}}
    evaluation["baseline"] = {**evaluation, "name": "a VAE", "out_of_distribution": other}
    write_card(pipe, tmp_path, evaluation, DETAILS)
    row = "| AUROC by which noise is told apart: by the energy here, by the reconstruction error there | 0.75 | 0.875 |  |"
    card = (tmp_path / "README.md").read_text()
    assert row in card and "stripes is told apart" not in card
    del evaluation["baseline"]["out_of_distribution"]
    assert len(baseline_rows(evaluation)) == 2


def test_a_card_with_figures_needs_details(pipe, work, tmp_path):
    evaluation = json.loads((work / "evaluation0" / "evaluation.json").read_text())
    with pytest.raises(ValueError, match="a card with an evaluation needs `details`"):
        write_card(pipe, tmp_path, evaluation)
    assert not (tmp_path / "README.md").exists()


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
def test_an_evaluation_that_can_not_be_published(harm, named, work, environment, tmp_path):
    shutil.copytree(work / "evaluation0", tmp_path / "evaluation")
    harm(tmp_path / "evaluation")
    result = run(
        "publish.py", work / "run0", "--evaluation", tmp_path / "evaluation", "--details", work / "details.yaml",
        "--output_dir", tmp_path / "card", environment=environment,
    )  # fmt: skip
    assert result.returncode == 1 and named in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "card").exists()


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere.png"))
    path.symlink_to(path.with_name("elsewhere.png"))


def change(folder: Path, update) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    update(evaluation)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def test_evaluation_of_another_model_is_refused_after_a_change_of_weights(work, environment, tmp_path):
    shutil.copytree(work / "run0", tmp_path / "run")
    pipe = ECVAEPipeline.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(0.1)
    pipe.save_pretrained(tmp_path / "run")
    result = run(
        "publish.py", tmp_path / "run", "--evaluation", work / "evaluation0", "--details", work / "details.yaml",
        "--output_dir", tmp_path / "card", environment=environment,
    )  # fmt: skip
    assert result.returncode == 1 and "is not of the weights of" in result.stderr
