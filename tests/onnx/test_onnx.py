# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""ONNX files: they do without torch what the pipeline does with it, and nothing else is taken for one."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from hub_server import HubServer, files
from without_package import run_without

from ecvae_diffusers import AutoencoderEC, ECFlowPipeline, ECVAEPipeline, EnergyModel, FlowEC, LangevinScheduler
from ecvae_diffusers.cli import main
from ecvae_diffusers.commands.export import read_card
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.onnx.export import Decoder, check, export_onnx


BATCHES = (1, 2, 3, 64, 257)
NETWORKS = ("decoder", "encoder", "energy")
# Runs all that the class does, and saves it.
RUN = """
import numpy as np
from ecvae_diffusers.onnx import OnnxECVAEPipeline

given, outputs = np.load(sys.argv[2]), {}
for precision in ("fp32", "fp16"):
    pipe = OnnxECVAEPipeline(sys.argv[1], precision)
    for name, value in given.items():
        kind, _, batch = name.partition("_")
        if kind == "latents":
            outputs[f"decode_{batch}_{precision}"] = pipe.decode(value)
        else:
            outputs[f"reconstruct_{batch}_{precision}"] = pipe.reconstruct(value)
            outputs[f"interpolate_{batch}_{precision}"] = pipe.interpolate(value[:1], value[-2:], 3)
            if "energy" in pipe.config["networks"]:
                outputs[f"score_{batch}_{precision}"] = pipe.score(value)
np.savez(sys.argv[3], **outputs)
assert not {"torch", "diffusers"} & sys.modules.keys()
"""


def to_levels(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] in 8 bits."""
    return (images * 255).round().astype(np.uint8)


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    """Where a value is in the middle of two levels, rounding in float32 decides, with torch too between batch sizes."""
    difference = np.abs(found.astype(int) - expected)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert difference.max() <= 1 and difference.mean() <= 1e-3


def compare_with_torch(pipe: ECVAEPipeline, folder: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """Compare all outputs in a process without torch, and return them."""
    generator = torch.Generator().manual_seed(0)
    latents = {
        batch: torch.randn(batch, pipe.vae.config.latent_channels, 1, 1, generator=generator) for batch in BATCHES
    }
    decoded = {batch: to_levels(pipe(latents=one, output_type="np").images) for batch, one in latents.items()}
    given = {f"latents_{batch}": one.numpy() for batch, one in latents.items()}
    given |= {f"images_{batch}": one for batch, one in decoded.items()}
    np.savez(tmp_path / "given.npz", **given)
    done = run_without("torch", RUN, str(folder), str(tmp_path / "given.npz"), str(tmp_path / "outputs.npz"))
    assert done.returncode == 0, done.stderr
    outputs = dict(np.load(tmp_path / "outputs.npz"))
    for batch, pixels in decoded.items():
        images = pixels / np.float32(255)
        reconstructed = to_levels(pipe.reconstruct(images, output_type="np").images)
        between = to_levels(pipe.interpolate(images[:1], images[-2:], 3, output_type="np").images)
        for precision in ("fp32", "fp16"):
            assert_same_pictures(outputs[f"decode_{batch}_{precision}"], pixels)
            assert_same_pictures(outputs[f"reconstruct_{batch}_{precision}"], reconstructed)
            assert_same_pictures(outputs[f"interpolate_{batch}_{precision}"], between)
        if pipe.energy_model is not None:
            energies = pipe.score(images).numpy()
            np.testing.assert_allclose(outputs[f"score_{batch}_fp32"], energies, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(outputs[f"score_{batch}_fp16"], energies, rtol=1e-2, atol=1e-2)
    return outputs


def make_pipeline(in_channels: int, with_energy: bool) -> ECVAEPipeline:
    """A pipeline of 8 px, which is traced in seconds, with weights that are exact in half precision, as those of published models."""
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": in_channels, "block_out_channels": (8, 16)}
    pipeline = ECVAEPipeline(
        vae=AutoencoderEC(latent_channels=6, **config).eval().half().float(),
        energy_model=EnergyModel(**config).eval() if with_energy else None,
        scheduler=LangevinScheduler() if with_energy else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of a gray pipeline, of one in colour without an energy model, and of both as ONNX."""
    root = tmp_path_factory.mktemp("onnx")
    found = {}
    for name, pipeline in (("gray", make_pipeline(1, True)), ("colour", make_pipeline(3, False))):
        found[name], found[f"{name}_onnx"] = root / name, root / f"{name}_onnx"
        pipeline.save_pretrained(found[name])
    card = found["gray"] / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    for name in ("gray", "colour"):
        main(["export", found[name], "--output_dir", found[f"{name}_onnx"]])
    return found


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return shutil.copytree(folders["gray_onnx"], tmp_path / "copied")


def refusal(capsys, *argv) -> str:
    """The last line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code
    return capsys.readouterr().err if isinstance(ended.value.code, int) else ended.value.code


def test_files_of_an_export(folders):
    folder = folders["gray_onnx"]
    files = {f"{network}{suffix}.onnx" for network in NETWORKS for suffix in ("", "_fp16")}
    assert {path.name for path in folder.iterdir()} == files | {"model.json"}
    for network in NETWORKS:
        full, half = folder / f"{network}.onnx", folder / f"{network}_fp16.onnx"
        assert half.stat().st_size < full.stat().st_size
        onnx.checker.check_model(full, full_check=True)
    for path in folder.iterdir():
        assert b"autoencoder_ec.py" not in path.read_bytes() and str(folder.parent).encode() not in path.read_bytes()
    config = json.loads((folder / "model.json").read_text())
    assert (config["sample_size"], config["channels"], config["latent_channels"]) == (8, 1, 6)
    assert (config["license"], config["title"], config["figures"]) == ("mit", None, [])
    for network, one in config["networks"].items():
        graph = onnx.load(folder / f"{network}.onnx").graph
        for values, described in ((graph.input, one["inputs"]), (graph.output, one["outputs"])):
            shapes = {
                value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                for value in values
            }
            assert shapes == {name: told["shape"] for name, told in described.items()}


def test_it_does_without_torch_what_torch_does(folders, tmp_path):
    outputs = compare_with_torch(ECVAEPipeline.from_pretrained(folders["gray"]), folders["gray_onnx"], tmp_path)
    # Nothing is lost of weights that are exact in half precision.
    for batch in BATCHES:
        assert (outputs[f"decode_{batch}_fp16"] == outputs[f"decode_{batch}_fp32"]).all()


def test_a_model_without_an_energy_model(folders, tmp_path):
    folder = folders["colour_onnx"]
    compare_with_torch(ECVAEPipeline.from_pretrained(folders["colour"]), folder, tmp_path)
    assert not list(folder.glob("energy*"))
    pipe = OnnxECVAEPipeline(folder)
    with pytest.raises(ValueError, match="energy model"):
        pipe.score(pipe.sample())


def test_classes(tmp_path):
    """Every network takes classes, by name or number. Without one, samples have those of the training data."""
    torch.manual_seed(0)
    config = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 8), "num_class_embeds": 3}
    names = {"0": "shirt", "1": "shoe", "2": "bag"}
    vae = AutoencoderEC(latent_channels=4, id2label=names, class_frequencies=[0.5, 0.0, 0.5], **config)
    for name, parameter in vae.named_parameters():
        if "embedding" in name:
            parameter.data.normal_(0, 0.5)
    whole = ECVAEPipeline(vae.eval(), EnergyModel(**config).eval())
    export_onnx(whole, tmp_path / "model")
    pipe, labels = OnnxECVAEPipeline(tmp_path / "model"), ["bag", 0, None, 3]
    latents = np.random.default_rng(0).standard_normal((4, 4, 1, 1), np.float32)
    numbers = torch.tensor([2, 0, 3, 3])
    image = whole(latents=torch.from_numpy(latents), class_labels=numbers, output_type="np").images
    assert_same_pictures(pipe.decode(latents, labels), to_levels(image))
    given = to_levels(image)
    found = whole.score(given / np.float32(255), class_labels=labels)
    np.testing.assert_allclose(pipe.score(given, labels), found, atol=1e-5)
    expected = whole.reconstruct(given / np.float32(255), class_labels=labels, output_type="np").images
    assert_same_pictures(pipe.reconstruct(given, labels), to_levels(expected))
    assert_same_pictures(pipe.interpolate(given, given[::-1].copy(), 3, labels)[::3], to_levels(expected))
    assert not (pipe.decode(latents, "bag") == pipe.decode(latents, "shoe")).all()
    drawn = pipe.draw_labels(None, 400, np.random.default_rng(0))
    assert set(drawn) == {0, 2} and 150 < drawn.count(0) < 250
    assert len(pipe.sample(class_labels=["bag", None])) == 2
    for size in (1, 3):
        asked_for = ["--class_labels", "bag", "0"] if size == 1 else []
        for batch_size in (1, size):
            place = ["-o", str(tmp_path / f"{size}_{batch_size}.png"), "--batch_size", str(batch_size), *asked_for]
            main(["sample", str(tmp_path / "model"), "--backend", "onnx", "-n", "3", *place, "--overwrite"])
    one, three = (np.array(PIL.Image.open(tmp_path / f"3_{batch_size}.png")) for batch_size in (1, 3))
    assert_same_pictures(one[..., None], three[..., None])
    for wrong in ("trousers", 4, ["bag"] * 3):
        with pytest.raises(ValueError, match="`class_labels`"):
            pipe.decode(latents, wrong)


def test_draws(folders):
    pipe = OnnxECVAEPipeline(folders["gray_onnx"])
    images = pipe.sample(5, np.random.default_rng(0))
    generator = np.random.default_rng(0)
    assert (np.concatenate([pipe.sample(2, generator), pipe.sample(3, generator)]) == images).all()
    assert (pipe.sample(5, np.random.default_rng(1)) != images).any()
    assert (pipe.sample(5) != images).any()
    (mean,) = pipe.decode(np.zeros((1, 6, 1, 1)))
    assert (pipe.sample(2, temperature=0) == mean).all()
    # Each image is the one of lowest energy of its own draws.
    draws = pipe.sample(6, np.random.default_rng(0))
    best = pipe.score(draws).reshape(2, 3).argmin(1) + [0, 3]
    assert (pipe.sample(2, np.random.default_rng(0), oversample=3) == draws[best]).all()


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: (folder / "model.json").unlink(),
        lambda folder: (folder / "model.json").write_text("{"),
        lambda folder: (folder / "model.json").write_text("[]"),
        lambda folder: (folder / "model.json").write_text('{"sample_size": 16}'),
        lambda folder: (folder / "model.json").write_text(
            (folder / "model.json").read_text().replace('"decoder"', '"d"')
        ),
        lambda folder: (folder / "decoder.onnx").unlink(),
        lambda folder: shutil.copyfile(folder / "energy.onnx", folder / "encoder.onnx"),
        lambda folder: (folder / "energy.onnx").write_bytes(b"no network"),
        lambda folder: (folder / "encoder.onnx").write_bytes((folder / "encoder.onnx").read_bytes()[:1000]),
    ],
)
def test_a_folder_that_is_no_model(damage, copied, tmp_path, capsys):
    damage(copied)
    with pytest.raises(ValueError, match="folder"):
        OnnxECVAEPipeline(copied)
    error = refusal(capsys, "sample", copied, "--backend", "onnx", "-o", tmp_path / "samples.png")
    assert str(copied) in error and not (tmp_path / "samples.png").exists()


IMAGE, LATENTS = np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 6, 1, 1), np.float32)


@pytest.mark.parametrize(
    "argument, call",
    [
        ("batch_size", lambda pipe: pipe.sample(0)),
        ("batch_size", lambda pipe: pipe.sample(2.0)),
        ("temperature", lambda pipe: pipe.sample(temperature=-1)),
        ("temperature", lambda pipe: pipe.sample(temperature=np.nan)),
        ("oversample", lambda pipe: pipe.sample(oversample=0)),
        ("generator", lambda pipe: pipe.sample(1, 0)),
        ("generator", lambda pipe: pipe.sample(1, torch.Generator())),
        ("latents", lambda pipe: pipe.decode(LATENTS[:0])),
        ("latents", lambda pipe: pipe.decode(LATENTS[..., 0])),
        ("latents", lambda pipe: pipe.decode(LATENTS[:, :5])),
        ("latents", lambda pipe: pipe.decode(LATENTS.astype(int))),
        ("latents", lambda pipe: pipe.decode(np.nan * LATENTS)),
        ("latents", lambda pipe: pipe.decode(LATENTS.astype(float) + 1e300)),
        ("latents", lambda pipe: pipe.decode(torch.zeros(2, 6, 1, 1))),
        ("image", lambda pipe: pipe.encode(IMAGE[0])),
        ("image", lambda pipe: pipe.encode(IMAGE[:0])),
        ("image", lambda pipe: pipe.reconstruct(IMAGE[:, :4])),
        ("image", lambda pipe: pipe.reconstruct(IMAGE / 255)),
        ("image", lambda pipe: pipe.score(IMAGE.repeat(3, -1))),
        ("image", lambda pipe: pipe.score(PIL.Image.new("L", (8, 8)))),
        ("image_a", lambda pipe: pipe.interpolate(IMAGE[0], IMAGE)),
        ("image_b", lambda pipe: pipe.interpolate(IMAGE, IMAGE.astype(float))),
        ("image_b", lambda pipe: pipe.interpolate(IMAGE, IMAGE.repeat(2, 0))),
        ("num_steps", lambda pipe: pipe.interpolate(IMAGE, IMAGE, 1)),
        ("precision", lambda pipe: OnnxECVAEPipeline("unused", "int8")),
        ("providers", lambda pipe: OnnxECVAEPipeline("unused", providers=["NoSuchProvider"])),
    ],
)  # fmt: skip
def test_wrong_arguments(argument, call, folders):
    pipe = OnnxECVAEPipeline(folders["gray_onnx"])
    with pytest.raises(ValueError, match=f"`{argument}`"):
        call(pipe)


def test_export_refuses_what_is_no_model_and_writes_over_nothing(folders, tmp_path, capsys):
    ECFlowPipeline(flow=FlowEC(sample_size=8, num_levels=2, steps_per_level=1, hidden_channels=8)).save_pretrained(
        tmp_path / "flow"
    )
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(folders["gray"], tmp_path / "broken_card")
    (broken / "README.md").write_text("---\nmodel-index: [{}]\n---\n")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for source in ("nowhere", "flow", "empty", "broken_card"):
        assert source in refusal(capsys, "export", tmp_path / source, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    for output in (mine, mine / "notes.txt"):
        assert "--output_dir" in refusal(capsys, "export", folders["gray"], "--output_dir", output)
    with pytest.raises(ValueError, match="output_dir"):
        export_onnx(make_pipeline(1, False), mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_the_card_of_a_model_on_the_hub(folders, tmp_path, monkeypatch):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        server.commit("me/with", files(folders["gray"]))
        server.commit("me/without", {"model_index.json": b"{}"})
        assert read_card("me/with").license == "mit" and read_card("me/without") is None
    assert server.unknown_requests == []


def test_what_differs_from_torch_is_not_kept(folders, tmp_path):
    pipeline = make_pipeline(1, True)
    decoder, names = Decoder(make_pipeline(1, False).vae), pipeline.energy_model.state_dict().keys()
    check(folders["gray_onnx"] / "decoder.onnx", decoder, "fp32")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.fill_(1e5)  # infinite in half precision
    with pytest.raises(RuntimeError, match="decoder_fp16"):
        export_onnx(pipeline, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [] and pipeline.energy_model.state_dict().keys() == names
    decoder.vae.decoder.conv_out.bias.data += 0.1
    with pytest.raises(RuntimeError, match="decoder"):
        check(folders["gray_onnx"] / "decoder.onnx", decoder, "fp32")


def test_sample_with_the_backend_onnx(folders, tmp_path, capsys):
    folder = folders["gray_onnx"]
    sampling = ["sample", str(folder), "--backend", "onnx", "-n", "3", "--seed", "1", "-o"]
    code = f"from ecvae_diffusers.cli import main; main({[*sampling, str(tmp_path / 'grid.png')]})"
    done = run_without("torch", code)
    assert done.returncode == 0, done.stderr
    main([*sampling, tmp_path / "images", "--batch_size", 2])
    grid = np.array(PIL.Image.open(tmp_path / "grid.png"))[::8, ::8]  # images of 8 px are magnified to 64
    (expected,) = OnnxECVAEPipeline(folder).sample(1, np.random.default_rng(1))
    assert grid.shape == (17, 17) and (grid[:8, :8] == expected[..., 0]).all()
    assert (np.array(PIL.Image.open(tmp_path / "images" / "1.png")) == grid[:8, 9:]).all()
    assert "--output" in refusal(capsys, *sampling, tmp_path / "grid.png")
    assert "--device" in refusal(capsys, *sampling, tmp_path / "new.png", "--device", "cpu")
    assert str(folders["gray"]) in refusal(
        capsys, "sample", folders["gray"], "--backend", "onnx", "-o", tmp_path / "n.png"
    )


@pytest.mark.parametrize("command, package", [("export", "onnx"), ("export", "onnxscript"), ("sample", "onnxruntime")])
def test_without_the_extra(command, package, folders, tmp_path):
    argv = [
        command,
        str(folders["gray"]),
        "-o",
        str(tmp_path / "out"),
        *(["--backend", "onnx"] if command == "sample" else []),
    ]
    done = run_without(package, f"from ecvae_diffusers.cli import main; main({argv})")
    assert done.returncode and "ecvae-diffusers[onnx]" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
