"""`calibrate_decoder.py`. What it shares with `train_ecvae.py` is tested there, except for resuming."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from training_runs import (
    TINY_DECODER,
    assert_same_start,
    assert_same_weights,
    metrics,
    train_tiny,
    weights,
    without_end,
    write_autoencoder,
)

from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.training.calibrate_decoder import parse_args
from ecvae_diffusers.training.data import digits
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder, load_autoencoder
from ecvae_diffusers.training.tasks.decoder import DecoderTask
from ecvae_diffusers.training.tasks.distillation import StudentDecoder


FROZEN = {"AutoencoderKL": ("encoder.", "quant_conv."), "AutoencoderTiny": ("encoder.",)}
FROZEN["VQModel"] = ("encoder.", "quant_conv.", "quantize.")
STILL = ("--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--no-use_ema")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    write_autoencoder(folder / "AutoencoderKL")
    torch.manual_seed(0)
    for model in (
        AutoencoderTiny(
            encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        VQModel(
            block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3, num_vq_embeddings=32,
        ),
        UNet2DModel(
            block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ),
    ):  # fmt: skip
        model.save_pretrained(folder / type(model).__name__)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def calibrate(images):
    def calibrate(start: Path, output_dir: Path, num_steps: int, *arguments) -> list[dict]:
        given = ("--pretrained_model_name_or_path", start, *arguments)
        return train_tiny(images, output_dir, num_steps, *given, script="calibrate_decoder")

    return calibrate


@pytest.fixture(scope="module")
def finished(models, calibrate, tmp_path_factory) -> dict[str, Path]:
    """Runs of gray images, which become RGB for models of three channels."""
    folder = tmp_path_factory.mktemp("runs")
    for name in FROZEN:
        calibrate(models[name], folder / name, 4, "--learning_rate", "1e-3")
    return {name: folder / name for name in FROZEN}


@pytest.mark.parametrize("name", list(FROZEN))
def test_the_encoder_stays_the_decoder_learns_and_plain_diffusers_loads_it(finished, models, name, monkeypatch):
    """Bit for bit: latents that others have made, or a diffusion model makes, must mean what they did."""
    folder = finished[name]
    before, after = (load_file(at / "diffusion_pytorch_model.safetensors") for at in (models[name], folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(FROZEN[name]))
    decoder = [key for key in before if key.startswith("decoder.")]
    assert sum(not torch.equal(before[key], after[key]) for key in decoder) > len(decoder) / 2
    lines = metrics(folder)
    assert min(line["reconstruction"] for line in lines[1:]) < lines[0]["reconstruction"]
    assert all(line["constraint"] > 0 for line in lines)
    assert {"energy_model", "scheduler", "samples", "chain", "reconstructions"} <= {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert f"{name}.from_pretrained" in card and str(models[name].parent) not in card
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    monkeypatch.setitem(sys.modules, "ecvae_diffusers", None)
    model = getattr(diffusers, name).from_pretrained(folder)
    encoded = model.encode(torch.zeros(2, 3, 16, 16))
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
    assert model.decode(latents).sample.shape == (2, 3, 16, 16)


def test_a_run_cut_in_two_equals_a_run_in_one(models, calibrate, tmp_path):
    """With latents and chains that are drawn anew at each step; and not from another encoder."""
    arguments = ("--checkpointing_steps", 1, "--latent_noise", 0.2, "--random_flip")
    resumed = (*arguments, "--resume_from_checkpoint", "latest")
    calibrate(models["AutoencoderKL"], tmp_path / "whole", 2, *arguments)
    cut = without_end(tmp_path / "whole", tmp_path / "cut", 2)
    calibrate(models["AutoencoderKL"], cut, 2, *resumed)
    assert_same_weights(tmp_path / "whole", cut)
    other = load_autoencoder(models["AutoencoderKL"])
    other.encoder.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="encoder"):
        calibrate(tmp_path / "other", cut, 3, *resumed)


def test_bf16_of_crops(models, calibrate, tmp_path):
    """16 px of the images at 32 px; the model itself takes any size."""
    arguments = ("--mixed_precision", "bf16", "--latent_noise", 0.1, "--image_size", 32)
    (line,) = calibrate(models["VQModel"], tmp_path / "run", 1, *arguments)
    assert line["constraint"] > 0 and line["reconstruction"] > 0
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())
    assert load_autoencoder(tmp_path / "run")(torch.zeros(1, 3, 48, 32)).sample.shape == (1, 3, 48, 32)


def test_continues_from_the_energy_model_that_it_saved(finished, calibrate, tmp_path):
    """Whatever the command line would make anew."""
    calibrate(finished["VQModel"], tmp_path / "run", 1, *STILL, "--energy_block_out_channels", 8, 8)
    assert (tmp_path / "run" / "energy_model").is_dir()
    assert_same_start(finished["VQModel"], tmp_path / "run")


def test_the_encoder_runs_once_a_step_and_its_spread_is_measured(models, images):
    given = [
        "--pretrained_model_name_or_path",
        models["AutoencoderTiny"],
        "--train_data_dir",
        images,
        "--output_dir",
        "run",
    ]
    config = parse_args([*TINY_DECODER, *given, "--in_channels", 3, "--latent_noise", 0.5])
    accelerator = Accelerator(cpu=True)
    feed = build_feed(config.data, accelerator, train_batch_size=8, seed=0)
    decoder = CalibratedDecoder(load_autoencoder(models["AutoencoderTiny"]), "here")
    task = DecoderTask(config, decoder, None, feed, None)
    task.prepare(accelerator)
    assert task.noise_scale == pytest.approx(0.5 * task.encodings(24).std().item()) and task.noise_scale > 0
    calls = []
    task.generator.autoencoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        real, noise = torch.rand(4, 3, 16, 16) * 2 - 1, StepNoise(0, step, 0, 1, accelerator.device)
        calls.clear()
        task.loss(task.generator, real, noise, step, with_samples=True)
        assert not torch.equal(task.draw(real, noise), task.encode_batch(real)) and len(calls) == 1
        torch.testing.assert_close(task.encode_batch(real), task.generator.encode(real))


def write_config(model, path: Path) -> Path:
    path.write_text(model.to_json_string())
    return path


def tiny(**config) -> AutoencoderTiny:
    shape = {
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 1),
    }
    return AutoencoderTiny(**(shape | {"num_decoder_blocks": (1, 1)} | config))


def asymmetric(**config) -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(16, 16), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), layers_per_up_block=1,
        norm_num_groups=4, latent_channels=4, sample_size=16, **config,
    )  # fmt: skip


def test_a_new_decoder_learns_the_latents_that_exist(models, calibrate, tmp_path, monkeypatch):
    """Of another class, whose encoder learns them too. Plain diffusers loads it, and the run resumes."""
    config = write_config(tiny(), tmp_path / "tiny.json")
    arguments = ("--decoder_config", config, "--checkpointing_steps", 1, "--no-use_ema", "--latent_noise", 0.1)
    calibrate(models["AutoencoderKL"], tmp_path / "whole", 12, *arguments)
    lines = metrics(tmp_path / "whole")
    for name in ("reconstruction", "distillation", "latent_error"):
        assert lines[-1][name] < lines[0][name]
    assert all(line["constraint"] > 0 for line in lines)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "AutoencoderTiny for the latents of AutoencoderKL" in card
    cut = without_end(tmp_path / "whole", tmp_path / "cut", 12)
    calibrate(models["AutoencoderKL"], cut, 12, *arguments, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", cut)
    other = write_config(tiny(num_decoder_blocks=(2, 1)), tmp_path / "other.json")
    with pytest.raises(SystemExit, match="decoder_config"):
        calibrate(models["AutoencoderKL"], cut, 13, "--decoder_config", other, "--resume_from_checkpoint", "latest")
    monkeypatch.setitem(sys.modules, "ecvae_diffusers", None)
    model = AutoencoderTiny.from_pretrained(tmp_path / "whole")
    assert model.decode(torch.zeros(2, 4, 8, 8)).sample.shape == (2, 3, 16, 16)


def test_a_new_decoder_next_to_the_same_encoder(models, calibrate, tmp_path):
    config = write_config(asymmetric(), tmp_path / "config.json")
    lines = calibrate(models["AutoencoderKL"], tmp_path / "run", 2, "--decoder_config", config)
    assert "latent_error" not in lines[0] and lines[0]["distillation"] > 0
    teacher = AutoencoderKL.from_pretrained(models["AutoencoderKL"])
    student = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "run")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(student.encode(images).latent_dist.mode(), teacher.encode(images).latent_dist.mode())
    size = {model: sum(weight.numel() for weight in model.decoder.parameters()) for model in (student, teacher)}
    assert size[student] < size[teacher]


def test_a_new_decoder_takes_the_latents_of_a_pipeline(models):
    """Which gives each autoencoder `latents / scaling_factor + shift_factor`."""
    teacher = CalibratedDecoder(load_autoencoder(models["AutoencoderKL"]), "here")
    student = StudentDecoder(teacher, tiny(scaling_factor=0.5, shift_factor=0.25))
    of_diffusion = torch.randn(2, 4, 8, 8)
    latents = of_diffusion / teacher.config.scaling_factor
    torch.testing.assert_close(student.own_latents(latents), of_diffusion / 0.5 + 0.25)
    expected = student.autoencoder.decode(of_diffusion / 0.5 + 0.25).sample
    torch.testing.assert_close(student(latents), expected)


def test_latents_of_a_file(models, calibrate, tmp_path):
    save_file({"latents": torch.randn(3, 4, 8, 8)}, tmp_path / "latents.safetensors")
    given = ("--latents_file", tmp_path / "latents.safetensors")
    assert calibrate(models["AutoencoderKL"], tmp_path / "run", 1, *given)[-1]["constraint"] > 0


def test_evaluations_have_psnr_the_card_of_no_calibration_claims_none_and_the_start_stays(
    models, images, calibrate, tmp_path
):
    arguments = ("--calibration", "none", "--evaluation_steps", 1, "--evaluation_samples", 12, "--no-use_ema")
    calibrate(models["AutoencoderTiny"], tmp_path, 1, *arguments)
    [found] = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    model = AutoencoderTiny.from_pretrained(tmp_path)
    arrays = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in sorted(images.glob("*.png"))]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latents).sample.clamp(-1, 1)
    psnr = reconstruction_metrics(decoded / 2 + 0.5, pixels / 2 + 0.5)["psnr"]
    assert psnr.min() < found["psnr"] < psnr.max()  # of some of these images
    assert not (tmp_path / "energy_model").exists()
    card = (tmp_path / "README.md").read_text()
    assert "with a further trained decoder" in card and "with energy" not in card and "energy-based" not in card
    before = weights(tmp_path)
    with pytest.raises(SystemExit, match="--output_dir"):
        calibrate(tmp_path, tmp_path, 1, "--overwrite_output_dir")
    after = weights(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


EVALUATED = ["--evaluation_steps", 1, "--evaluation_samples", 12]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["{gone}"], "--pretrained_model_name_or_path"),
        (["{UNet2DModel}"], "UNet2DModel"),
        (["{AutoencoderKL}", "--in_channels", 1], "--in_channels"),
        (["{VQModel}", "--gradient_checkpointing"], "--gradient_checkpointing"),
        (["{AutoencoderKL}", "--latents_file", "{bad}"], "--latents_file"),
        (["{AutoencoderKL}", "--latents_file", "none"], "--latents_file"),
        # The folder itself holds an autoencoder, which it is not.
        (["{AutoencoderKL}", "--subfolder", "vae"], "--subfolder"),
        (["{AutoencoderKL}", "--latents_file", "{bad}", "--latent_noise", 0.1], "--latent_noise"),
        (["{AutoencoderKL}", "--latents_file", "{few}", *EVALUATED], "--evaluation_steps"),
        # The digit classifier takes gray images.
        (["{AutoencoderTiny}", *EVALUATED, "--evaluation_features", "digits"], "--evaluation_features"),
        (["{AutoencoderKL}", "--calibration", "none", "--reconstruction_weight", 0], "--reconstruction_weight"),
        (["{AutoencoderKL}", "--resolution", 15], "--resolution"),
        (["{AutoencoderKL}", "--distillation_weight", 2], "--distillation_weight"),
        (["{AutoencoderKL}", "--decoder_config", "{gone}"], "--decoder_config"),
        (["{AutoencoderKL}", "--decoder_config", "{unet}"], "--decoder_config"),
        # Its encoder would learn no distribution, three levels make images too large, and three channels are not those of the latents.
        (["{AutoencoderKL}", "--decoder_config", "{smaller}"], "--decoder_config"),
        (["{AutoencoderKL}", "--decoder_config", "{larger}"], "--decoder_config"),
        (["{AutoencoderKL}", "--decoder_config", "{narrow}"], "--decoder_config"),
    ],
)
def test_wrong_arguments(models, calibrate, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.setattr(digits, "train_digit_features", lambda: (digits.DigitFeatures().eval(), 0.0))
    places = {name: tmp_path / f"{name}.safetensors" for name in ("gone", "bad", "few")} | models
    levels = {"encoder_block_out_channels": (16,) * 3, "decoder_block_out_channels": (16,) * 3}
    levels |= {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    smaller = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    unet = UNet2DModel.from_pretrained(models["UNet2DModel"])
    configs = {"smaller": smaller, "larger": tiny(**levels), "narrow": tiny(latent_channels=3), "unet": unet}
    places |= {name: write_config(model, tmp_path / f"{name}.json") for name, model in configs.items()}
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, places["bad"])
    save_file({"latents": torch.zeros(3, 4, 8, 8)}, places["few"])
    start, *others = [places.get(str(one).strip("{}"), one) for one in arguments]
    with pytest.raises(SystemExit) as refusal:
        calibrate(start, tmp_path / "run", 1, *others)
    assert named in capsys.readouterr().err + str(refusal.value)
    assert not (tmp_path / "run").exists()
