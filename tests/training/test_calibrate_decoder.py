"""`calibrate_decoder.py`. What it shares with `train_ecvae.py` is tested there, except for resuming."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from training_runs import TINY_DECODER, metrics, weights, write_autoencoder, write_images
from training_runs import train as run

from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.training.calibrate_decoder import parse_args
from ecvae_diffusers.training.data import digits
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder, load_autoencoder
from ecvae_diffusers.training.tasks.decoder import DecoderTask


FROZEN = {"AutoencoderKL": ("encoder.", "quant_conv."), "AutoencoderTiny": ("encoder.",)}
FROZEN["VQModel"] = ("encoder.", "quant_conv.", "quantize.")
RESUMED = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Gray ones, which become RGB for a model of three channels."""
    return write_images(tmp_path_factory.mktemp("data") / "gray")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_autoencoder(folder / "AutoencoderKL")
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "AutoencoderTiny")  # fmt: skip
    VQModel(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3, num_vq_embeddings=32,
    ).save_pretrained(folder / "VQModel")  # fmt: skip
    UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(folder / "UNet2DModel")  # fmt: skip
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def calibrate(images):
    def calibrate(start: Path, output_dir: Path, num_steps: int, *arguments) -> list[dict]:
        run(
            *TINY_DECODER, "--train_data_dir", images, "--pretrained_model_name_or_path", start, "--output_dir", output_dir,
            "--max_train_steps", num_steps, "--log_steps", 1, *arguments, script="calibrate_decoder",
        )  # fmt: skip
        return metrics(output_dir)

    return calibrate


@pytest.fixture(scope="module")
def finished(models, calibrate, tmp_path_factory) -> dict[str, Path]:
    """A run of 6 steps of each, with a checkpoint at every third."""
    folder = tmp_path_factory.mktemp("runs")
    for name in FROZEN:
        calibrate(models[name], folder / name, 6, "--checkpointing_steps", 3, "--learning_rate", "1e-3")
    return {name: folder / name for name in FROZEN}


def test_plain_diffusers_loads_it_without_the_package_and_nothing_names_this_machine(finished, models, monkeypatch):
    folder = finished["AutoencoderKL"]
    assert {"energy_model", "scheduler", "samples", "chain", "reconstructions"} <= {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "AutoencoderKL.from_pretrained" in card and str(models["AutoencoderKL"].parent) not in card
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    monkeypatch.setitem(sys.modules, "ecvae_diffusers", None)
    for name, folder in finished.items():
        model = getattr(diffusers, name).from_pretrained(folder)
        encoded = model.encode(torch.zeros(2, 3, 16, 16))
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
        assert model.decode(latents).sample.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", list(FROZEN))
def test_the_encoder_stays_and_the_decoder_learns(finished, models, name):
    """Bit for bit: latents that others have made, or a diffusion model makes, must mean what they did."""
    before = load_file(models[name] / "diffusion_pytorch_model.safetensors")
    after = load_file(finished[name] / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(FROZEN[name]))
    decoder = [key for key in before if key.startswith("decoder.")]
    assert sum(not torch.equal(before[key], after[key]) for key in decoder) > len(decoder) / 2
    lines = metrics(finished[name])
    assert min(line["reconstruction"] for line in lines[1:]) < lines[0]["reconstruction"]
    assert all(line["constraint"] > 0 for line in lines)


def test_a_run_cut_in_two_equals_a_run_in_one(models, calibrate, tmp_path):
    """With latents and chains that are drawn anew at each step; and not from another encoder."""
    arguments = ("--checkpointing_steps", 2, "--latent_noise", 0.2, "--random_flip")
    first = calibrate(models["AutoencoderKL"], tmp_path / "whole", 4, *arguments)[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").unlink()
    calibrate(models["AutoencoderKL"], tmp_path / "cut", 4, *arguments, *RESUMED)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and any(key.startswith("./decoder") for key in whole)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)

    def other(tensors, config):
        tensors["encoder.conv_in.bias"] += 1

    for start in (broken_copy(models["AutoencoderKL"], tmp_path / "other", other), models["VQModel"]):
        with pytest.raises(SystemExit, match="encoder"):
            calibrate(start, tmp_path / "cut", 6, *arguments, *RESUMED)
    # Without noise, reconstructions are those of the same encodings, the samples others.
    (plain,) = calibrate(models["AutoencoderKL"], tmp_path / "plain", 1, "--random_flip")
    assert plain["reconstruction"] == pytest.approx(first["reconstruction"], rel=1e-4)
    assert plain["sample_spread"] != pytest.approx(first["sample_spread"], rel=1e-3)


@pytest.mark.parametrize("name", list(FROZEN))
def test_bf16_of_crops(models, calibrate, tmp_path, name):
    """16 px of the images at 32 px; the model itself takes any size."""
    arguments = ("--mixed_precision", "bf16", "--latent_noise", 0.1, "--image_size", 32)
    lines = calibrate(models[name], tmp_path / "run", 2, *arguments)
    assert all(line["constraint"] > 0 and line["reconstruction"] > 0 for line in lines)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())
    assert load_autoencoder(tmp_path / "run")(torch.zeros(1, 3, 48, 32)).sample.shape == (1, 3, 48, 32)


def test_goes_on_from_what_it_saved(finished, calibrate, tmp_path):
    """
    The energy model too: one step of rates almost 0 leaves both as they were, whatever the command line would make anew. Not without
    calibration.
    """
    start = finished["VQModel"]
    calibrate(
        start, tmp_path / "run", 1, "--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--no-use_ema",
        "--energy_block_out_channels", 8, 8,
    )  # fmt: skip
    VQModel.from_pretrained(tmp_path / "run")
    before, after = weights(start), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    # All but the vectors of power iterations, which turn at each step.
    learnt = [key for key in before if not key.endswith(("_u", "_v"))]
    assert any(key.startswith("energy_model/") for key in learnt)
    for key in learnt:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-6)
    calibrate(start, tmp_path / "plain", 1, "--calibration", "none")
    assert not (tmp_path / "plain" / "energy_model").exists()


def task_of(models, images, *arguments) -> tuple[DecoderTask, Accelerator]:
    given = [*TINY_DECODER, "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir", images]
    config = parse_args([*given, "--output_dir", "run", "--in_channels", 3, *arguments])
    accelerator = Accelerator(cpu=True)
    feed = build_feed(config.data, accelerator, train_batch_size=8, seed=0)
    decoder = CalibratedDecoder(load_autoencoder(models["AutoencoderTiny"]), "here")
    return DecoderTask(config, decoder, None, feed, None), accelerator


def test_the_encoder_runs_once_a_step_and_its_spread_is_measured_on_its_device(models, images):
    task, accelerator = task_of(models, images, "--latent_noise", 0.5)
    assert task.noise_scale == 0
    task.prepare(accelerator)
    assert task.noise_scale == pytest.approx(0.5 * task.encodings(24).std().item()) and task.noise_scale > 0
    calls = []
    task.generator.autoencoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        real = torch.rand(4, 3, 16, 16) * 2 - 1
        noise = StepNoise(0, step, 0, 1, accelerator.device)
        calls.clear()
        task.loss(task.generator, real, noise, step, with_samples=True)
        again = task.draw(real, noise)
        assert len(calls) == 1
        assert again.shape == task.encode_batch(real).shape and not torch.equal(again, task.encode_batch(real))
        torch.testing.assert_close(task.encode_batch(real), task.generator.encode(real))


def test_latents_of_a_file(models, calibrate, tmp_path):
    """So few can not be evaluated, which is said before training."""
    save_file({"latents": torch.randn(3, 4, 8, 8)}, tmp_path / "latents.safetensors")
    arguments = ("--latents_file", tmp_path / "latents.safetensors")
    lines = calibrate(models["AutoencoderKL"], tmp_path / "run", 1, *arguments)
    assert lines[-1]["constraint"] > 0
    with pytest.raises(SystemExit, match="--evaluation_steps"):
        calibrate(
            models["AutoencoderKL"],
            tmp_path / "no",
            1,
            *arguments,
            "--evaluation_steps",
            1,
            "--evaluation_samples",
            12,
        )
    assert not (tmp_path / "no").exists()


def test_features_that_do_not_fit_are_refused_before_training(models, calibrate, tmp_path, monkeypatch):
    """The digit classifier takes gray images."""
    monkeypatch.setattr(digits, "train_digit_features", lambda: (digits.DigitFeatures().eval(), 0.0))
    arguments = ("--evaluation_steps", 1, "--evaluation_samples", 12, "--evaluation_features", "digits")
    with pytest.raises(SystemExit, match="--evaluation_features"):
        calibrate(models["AutoencoderTiny"], tmp_path / "run", 1, *arguments)
    assert not (tmp_path / "run").exists()


def test_evaluations_have_the_reconstructions_psnr_and_the_card_of_no_calibration_claims_none(
    models, images, calibrate, tmp_path
):
    """Nothing of the model that a run starts from is lost, though it may replace the folder."""
    arguments = ("--calibration", "none", "--evaluation_steps", 1, "--evaluation_samples", 12, "--no-use_ema")
    calibrate(models["AutoencoderTiny"], tmp_path, 1, *arguments, "--overwrite_output_dir")
    [found] = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    model = AutoencoderTiny.from_pretrained(tmp_path)
    arrays = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in sorted(images.glob("*.png"))]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latents).sample.clamp(-1, 1)
    psnr = reconstruction_metrics(decoded / 2 + 0.5, pixels / 2 + 0.5)["psnr"]
    assert psnr.min() < found["psnr"] < psnr.max()  # of some of these images
    card = (tmp_path / "README.md").read_text()
    assert "with a further trained decoder" in card and "with energy" not in card and "energy-based" not in card
    before = weights(tmp_path)
    with pytest.raises(SystemExit, match="--output_dir"):
        calibrate(tmp_path, tmp_path, 1, "--overwrite_output_dir")
    after = weights(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def broken_copy(folder: Path, to: Path, change) -> Path:
    """The autoencoder of `folder` with other weights or another config, which `change` makes of them."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    to.mkdir()
    change(tensors, config)
    save_file(tensors, to / "diffusion_pytorch_model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["{gone}"], "--pretrained_model_name_or_path"),
        (["{UNet2DModel}"], "UNet2DModel"),
        (["{AutoencoderKL}", "--in_channels", 1], "--in_channels"),
        (["{VQModel}", "--gradient_checkpointing"], "--gradient_checkpointing"),
        (["{AutoencoderKL}", "--latents_file", "{bad}"], "--latents_file"),
        (["{AutoencoderKL}", "--latents_file", "none"], "--latents_file"),
        (["{AutoencoderKL}", "--latents_file", "{AutoencoderKL}"], "--latents_file"),
        # The folder itself holds an autoencoder, which it is not.
        (["{AutoencoderKL}", "--subfolder", "vae"], "--subfolder"),
        (["{AutoencoderKL}", "--latents_file", "{bad}", "--latent_noise", 0.1], "--latent_noise"),
        (["{AutoencoderKL}", "--calibration", "none", "--reconstruction_weight", 0], "--reconstruction_weight"),
        (["{AutoencoderKL}", "--resolution", 2048], "--resolution"),
    ],
)
def test_wrong_arguments(models, calibrate, tmp_path, capsys, arguments, named):
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, tmp_path / "bad.safetensors")
    places = {"bad": tmp_path / "bad.safetensors", "gone": tmp_path / "gone", **models}
    start, *others = [places.get(str(one).strip("{}"), one) for one in arguments]
    with pytest.raises(SystemExit) as refusal:
        calibrate(start, tmp_path / "run", 1, *others)
    assert named in capsys.readouterr().err + str(refusal.value)
    assert not (tmp_path / "run").exists()
