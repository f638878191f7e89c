# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""From training to the Hub, as a user does it: `ecvae train --push_to_hub`, `ecvae evaluate`, `ecvae publish`."""

import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from evaluation_runs import measure
from hub_server import HubServer, files
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import TINY, write_autoencoder, write_images

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline, FlowEC
from ecvae_diffusers.cli import main
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.modular import MODULAR_INDEX, modular_index


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
DETAILS = {
    "title": "Disks, 16 px",
    "license": "apache-2.0",
    "data": {"name": "disks", "license": "CC0", "description": "Drawn by a test."},
    "known_failures": "Two steps of training: noise.",
    "training": {"command": "`ecvae train disks`", "epochs": 1},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch, HubServer() as server:
        yield server.use(monkeypatch, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def work(tmp_path_factory, hub) -> Path:
    """A run that was pushed, its evaluation and one that stands for another seed's, details, and what is published."""
    folder = tmp_path_factory.mktemp("publish")
    images = write_images(folder / "images")
    push = ["--push_to_hub", "--hub_model_id", "user/trained", "--hub_private_repo"]
    main(["train", images, "--output_dir", folder / "run", *TINY, "--max_train_steps", 2, "--log_steps", 1, *push])
    found = measure(
        folder / "evaluation", "--pretrained_model_name_or_path", folder / "run", "--train_data_dir", images,
        "--num_samples", 20, "--seeds", 0, 1,
    )  # fmt: skip
    write_evaluation(folder / "other", found | {"weights": "of others"})
    (folder / "details.yaml").write_text(yaml.safe_dump(DETAILS))
    main(["publish", *arguments(folder), "--output_dir", folder / "card", "--hub_model_id", "user/published"])
    return folder


def write_evaluation(folder: Path, content) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))


def arguments(work: Path, **changed: str) -> list:
    given = {
        "evaluation": "evaluation", "details": "details.yaml", "baseline": "another=other",
        "training_seeds": "0=evaluation", **changed,
    }  # fmt: skip
    listed = [work / "run", "--dtype", "float16"]
    for name, value in given.items():
        label, equals, place = value.rpartition("=")
        listed += [f"--{name}", f"{label}{equals}{work / place}"]
    return listed


def refused(*listed) -> str:
    """Return the line with which publishing ends."""
    with pytest.raises(SystemExit) as ended:
        main(["publish", *listed])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def test_what_a_run_pushes_at_its_end_and_what_is_published_in_half_precision(hub, work):
    pushed = hub.files("user/trained")
    assert pushed[WEIGHTS] == (work / "run" / WEIGHTS).read_bytes() and "metrics.jsonl" not in pushed
    assert hub.private["user/trained"] is True
    assert "hf_token" not in (work / "run" / "training_args.json").read_text()
    assert b'from_pretrained("user/trained")' in pushed["README.md"]
    assert hub.files("user/published") == files(work / "card") | {
        MODULAR_INDEX: modular_index("user/published").encode()
    }
    weights, before = (load_file(work / folder / WEIGHTS) for folder in ("card", "run"))
    assert all(torch.equal(weights[name], value.half()) for name, value in before.items())
    pipe = ECVAEPipeline.from_pretrained(work / "card")
    assert pipe.vae.dtype == torch.float32 and pipe.vae.config.reconstruction_variance > 0


def test_figures_of_the_card_are_those_of_its_evaluation(work):
    evaluation = json.loads((work / "card" / "evaluation.json").read_text())
    card = ModelCard.load(work / "card" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    measures = evaluation["generation"]["measures"]
    assert found == {name: measures[name]["mean"] for name in found} and "kernel_distance" in found
    assert "frechet_distance" not in found  # fewer images than features
    assert evaluation["baseline"]["name"] == "another" and "Against another" in card.text
    assert [run["seed"] for run in evaluation["training_seeds"]["runs"]] == [evaluation["training_seeds"]["published"]]
    for words in ("Two steps of training: noise.", "licence CC0", "epochs: 1", "max train steps: 2", "(EMA): yes"):
        assert words in card.text
    for name in ("samples.png", "neighbours.png", "curves.png"):
        assert f"]({name})" in card.text and (work / "card" / name).is_file()


def test_published_again_in_the_same_place(work, tmp_path, capsys):
    """What somebody has laid there or edited stays, and what is of neither is not lost."""
    card = shutil.copytree(work / "card", tmp_path / "card")
    (card / "README.md").write_text((card / "README.md").read_text().replace(CARD_MARKER, "") + "By hand.\n")
    (card / "LICENSE").write_text("Mine.")
    PIL.Image.new("L", (8, 8), 7).save(card / "teaser.png")
    before = files(card)
    # Without an evaluation its file and pictures are gone, and nothing else.
    main(["publish", work / "run", "--dtype", "float16", "--output_dir", card])
    assert str(card / "README.md") in capsys.readouterr().out
    kept = {"README.md", "LICENSE", "teaser.png"}
    assert {name: content for name, content in files(card).items() if name in kept} == {n: before[n] for n in kept}
    assert before.keys() - files(card).keys() == {"evaluation.json", "samples.png", "neighbours.png"}
    # An absolute folder is not named in the card: it is of this machine.
    (card / "README.md").unlink()
    main(["publish", work / "run", "--details", work / "details.yaml", "--output_dir", tmp_path / "new"])
    text = (tmp_path / "new" / "README.md").read_text()
    assert 'from_pretrained("new")' in text and "Two steps of training: noise." in text
    (tmp_path / "new" / "mine.txt").write_text("mine")
    before = files(tmp_path / "new")
    assert "mine.txt" in refused(work / "run", "--output_dir", tmp_path / "new")
    assert files(tmp_path / "new") == before


def test_flows_and_autoencoders_are_published_as_they_are(hub, tmp_path):
    flow, autoencoder = tmp_path / "flow", tmp_path / "autoencoder"
    ECFlowPipeline(flow=FlowEC(sample_size=8, in_channels=1, num_levels=1, steps_per_level=1)).save_pretrained(flow)
    write_autoencoder(autoencoder)
    (autoencoder / "README.md").write_text(f'{CARD_MARKER}\nAutoencoderKL.from_pretrained("path/or/hub-id")\n')
    (autoencoder / "metrics.jsonl").write_text("")
    main(["publish", flow, "--hub_model_id", "user/a-flow"])
    main(["publish", autoencoder, "--hub_model_id", "decoder", "--output_dir", tmp_path / "kept"])
    for name, folder in (("user/a-flow", flow), ("user/decoder", autoencoder)):
        expected = {path: content for path, content in files(folder).items() if path != "metrics.jsonl"}
        expected["README.md"] = expected["README.md"].replace(b"path/or/hub-id", name.encode())
        assert hub.files(name) == expected
    assert set(files(tmp_path / "kept")) == set(hub.files("user/decoder"))
    for folder, name in ((autoencoder, "user/a-flow"), (flow, "user/decoder")):
        assert name in refused(folder, "--hub_model_id", name)


def test_a_restoration_pipeline_stays_one(make_pipeline, tmp_path):
    """Its components would load as an ECVAEPipeline too."""
    model, card = tmp_path / "model", tmp_path / "card"
    ECVAERestorationPipeline(vae=make_pipeline().vae).save_pretrained(model)
    for wrong in (["--dtype", "float16"], ["--evaluation", "e", "--details", "d"]):
        assert f"{wrong[0]} " in refused(model, *wrong, "--output_dir", card) and not card.exists()
    main(["publish", model, "--output_dir", card])
    assert json.loads((card / "model_index.json").read_text())["_class_name"][1] == "ECVAERestorationPipeline"


def test_a_folder_from_elsewhere_does_not_lead_out_of_what_is_written(make_pipeline, tmp_path):
    model, target = tmp_path / "a" / "b" / "model", tmp_path / "a" / "x"
    make_pipeline().save_pretrained(model)
    target.mkdir()
    (target / "scheduler_config.json").write_text("{}")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "../../x": ["diffusers", "DDPMScheduler"]}))
    assert "../../x" in refused(model, "--output_dir", tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_refused_in_one_line_with_nothing_written(work, tmp_path):
    found = json.loads((work / "evaluation" / "evaluation.json").read_text())
    generation = found["generation"]
    write_evaluation(work / "list", [])
    write_evaluation(work / "measures", found | {"generation": {"protocol": generation["protocol"]}})
    fewer = {"protocol": generation["protocol"] | {"num_samples": 5}}
    write_evaluation(work / "fewer", found | {"generation": generation | fewer})
    (work / "untitled.yaml").write_text(yaml.safe_dump(DETAILS | {"title": None}))
    (work / "broken.yaml").write_text("title: [")
    shutil.copytree(work / "evaluation", work / "link")
    (work / "link" / "samples.png").unlink()
    (work / "link" / "samples.png").symlink_to(work / "details.yaml")
    for argument, value, named in (
        ("evaluation", "other", "run"),  # of other weights
        ("evaluation", "images", "images"),
        ("evaluation", "list", "list"),
        ("evaluation", "link", "samples.png"),
        ("baseline", "other=measures", "`generation.measures`"),
        ("baseline", "other=fewer", "num_samples"),
        ("details", "untitled.yaml", "`title`"),
        ("details", "broken.yaml", "broken.yaml"),
        ("training_seeds", "1=other", "0 times"),
        ("training_seeds", "1=fewer", "num_samples"),
    ):
        line = refused(*arguments(work, **{argument: value}), "--output_dir", tmp_path / "card")
        assert named in line and (f"--{argument}" in line or value == "link"), line
        assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    "listed, named",
    [
        ([], "--output_dir"),
        (["--output_dir", "x", "--evaluation", "e"], "--details"),
        (["--output_dir", "x", "--dtype", "bfloat16"], "--dtype"),
        (["--output_dir", "x", "--baseline", "a=b"], "--baseline"),
        (["--output_dir", "x", "--training_seeds", "=b"], "--training_seeds.*NAME=FOLDER.*'=b'"),
    ],
)
def test_refused_before_anything_is_done(listed, named, capsys):
    with pytest.raises(SystemExit):
        main(["publish", "model", *listed])
    assert re.search(named, capsys.readouterr().err)


def test_a_run_that_could_not_be_pushed_does_not_begin(hub, work, tmp_path):
    train = ["train", work / "images", *TINY, "--max_train_steps", 2, "--push_to_hub"]
    with pytest.raises(SystemExit, match="--push_to_hub: .*stranger/model.*HF_TOKEN"):
        main([*train, "--output_dir", tmp_path / "out", "--hub_model_id", "stranger/model"])
    assert not (tmp_path / "out").exists()
    # One that could not be uploaded is saved.
    hub.failures["commit", "user/unlucky"] = [403]
    with pytest.raises(SystemExit) as ended:
        main([*train, "--output_dir", tmp_path / "unlucky"])
    assert "403" in ended.value.code
    advice = re.search(r"ecvae (publish .*--hub_model_id \S+)", ended.value.code)[1]
    assert advice == f"publish {tmp_path / 'unlucky'} --hub_model_id unlucky"
    main(advice.split())
    assert "model_index.json" in hub.files("user/unlucky")
