"""`calibrate_decoder.py`, run as a user runs it. What it shares with `train_ecvae.py` is tested there, but for going on."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file
from training_runs import SCRIPTS, TINY_DECODER, metrics, run, succeed, weights, write_autoencoder, write_images

from ecvae_diffusers import EnergyModel
from ecvae_diffusers.metrics import reconstruction_metrics
from ecvae_diffusers.training import calibrate_decoder
from ecvae_diffusers.training.calibrate_decoder import parse_args
from ecvae_diffusers.training.data.loaders import build_feed
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.autoencoders import (
    CalibratedDecoder,
    latent_shape,
    load_autoencoder,
    load_energy_model,
)
from ecvae_diffusers.training.tasks.decoder import DecoderTask


SCRIPT = SCRIPTS / "calibrate_decoder.py"
FROZEN = {"AutoencoderKL": ("encoder.", "quant_conv."), "AutoencoderTiny": ("encoder.",)}
FROZEN["VQModel"] = ("encoder.", "quant_conv.", "quantize.")


def calibrate(*arguments, **kwargs):
    return succeed(*TINY_DECODER, *arguments, script=SCRIPT, **kwargs)


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
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(models, images, tmp_path_factory) -> dict[str, Path]:
    """A run of 8 steps of each, that of the first through `accelerate launch`, with a checkpoint at every fourth."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, path in models.items():
        launcher = None
        if name == "AutoencoderKL":
            launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
        calibrate(
            "--pretrained_model_name_or_path", path, "--train_data_dir", images, "--output_dir", folder / name,
            "--max_train_steps", 8, "--log_steps", 1, "--checkpointing_steps", 4, "--learning_rate", "1e-3",
            launcher=launcher,
        )  # fmt: skip
        found[name] = folder / name
    return found


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ecvae_diffusers":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import diffusers, torch
model = getattr(diffusers, sys.argv[1]).from_pretrained(sys.argv[2])
image = torch.zeros(2, 3, 16, 16)
encoded = model.encode(image)
latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
print(tuple(model.decode(latents).sample.shape))
"""


@pytest.mark.parametrize("name", list(FROZEN))
def test_plain_diffusers_loads_it_without_the_package(finished, name):
    result = subprocess.run(
        [sys.executable, "-c", ALONE, name, str(finished[name])], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "(2, 3, 16, 16)"


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


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_gradient_checkpointing_changes_nothing_but_memory(finished, models, images, tmp_path, name):
    calibrate(
        "--pretrained_model_name_or_path", models[name], "--train_data_dir", images, "--output_dir", tmp_path / "run",
        "--max_train_steps", 8, "--log_steps", 1, "--learning_rate", "1e-3", "--gradient_checkpointing",
    )  # fmt: skip
    found, expected = weights(tmp_path / "run"), weights(finished[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_the_folder_holds_what_calibrating_on_needs_and_no_path(finished, models):
    folder = finished["AutoencoderKL"]
    assert {"energy_model", "scheduler", "samples", "chain", "reconstructions"} <= {p.name for p in folder.iterdir()}
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert "_name_or_path" not in config
    assert "AutoencoderKL.from_pretrained" in card and str(models["AutoencoderKL"].parent) not in card


def test_a_run_cut_in_two_equals_a_run_in_one(models, images, tmp_path):
    """With latents and chains that are drawn anew at each step. Plain reconstructions: tests/slow."""
    common = [
        "--pretrained_model_name_or_path", models["AutoencoderKL"], "--train_data_dir", images, "--log_steps", 1,
        "--checkpointing_steps", 2, "--latent_noise", 0.2, "--random_flip",
    ]  # fmt: skip
    calibrate(*common, "--output_dir", tmp_path / "whole", "--max_train_steps", 4)
    calibrate(*common, "--output_dir", tmp_path / "cut", "--max_train_steps", 2)
    calibrate(*common, "--output_dir", tmp_path / "cut", "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and any(key.startswith("./decoder") for key in whole)
    for key in whole:
        assert torch.equal(whole[key], cut[key]), key


def test_noise_on_latents_changes_what_is_calibrated(models, images, tmp_path):
    """The same step: reconstructions are those of the encodings, the samples others."""
    first = {}
    for noise in (0.0, 0.5):
        calibrate(
            "--pretrained_model_name_or_path", models["AutoencoderKL"], "--train_data_dir", images, "--output_dir",
            tmp_path / str(noise), "--latent_noise", noise, "--max_train_steps", 1,
        )  # fmt: skip
        first[noise] = metrics(tmp_path / str(noise))[0]
    assert first[0.0]["reconstruction"] == pytest.approx(first[0.5]["reconstruction"], rel=1e-4)
    assert first[0.0]["sample_spread"] != pytest.approx(first[0.5]["sample_spread"], rel=1e-3)


@pytest.mark.parametrize("name", list(FROZEN))
def test_bf16(models, images, tmp_path, name):
    calibrate(
        "--pretrained_model_name_or_path", models[name], "--train_data_dir", images, "--output_dir", tmp_path,
        "--mixed_precision", "bf16", "--latent_noise", 0.1, "--max_train_steps", 2, "--log_steps", 1,
        "--overwrite_output_dir",
    )  # fmt: skip
    assert all(line["constraint"] > 0 and line["reconstruction"] > 0 for line in metrics(tmp_path))
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_latents_of_a_file(models, images, tmp_path):
    latents = torch.randn(12, 4, 8, 8)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    calibrate(
        "--pretrained_model_name_or_path", models["AutoencoderKL"], "--train_data_dir", images, "--output_dir",
        tmp_path / "run", "--latents_file", tmp_path / "latents.safetensors", "--max_train_steps", 2,
    )  # fmt: skip
    assert metrics(tmp_path / "run")[-1]["constraint"] > 0


def test_random_crops_of_larger_images(models, images, tmp_path):
    """16 px of the images at 32 px; the model itself takes any size."""
    calibrate(
        "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir", images, "--output_dir",
        tmp_path / "run", "--image_size", 32, "--max_train_steps", 2,
    )  # fmt: skip
    model = AutoencoderTiny.from_pretrained(tmp_path / "run")
    assert model(torch.zeros(1, 3, 48, 32)).sample.shape == (1, 3, 48, 32)


def test_goes_on_from_what_it_saved(finished, images, tmp_path):
    """The energy model too: one step of rates almost 0 leaves both as they were, whatever the command line would make anew."""
    start = finished["VQModel"]
    calibrate(
        "--pretrained_model_name_or_path", start, "--train_data_dir", images, "--output_dir", tmp_path / "run",
        "--max_train_steps", 1, "--learning_rate", "1e-12", "--energy_learning_rate", "1e-12", "--no-use_ema",
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


def test_an_energy_model_of_other_images_is_not_gone_on_with(finished, images, tmp_path, caplog):
    """Nor is it looked for without calibration."""
    folder = finished["VQModel"]
    Accelerator(cpu=True)
    with caplog.at_level("INFO"):
        for resolution, channels in ((32, 3), (16, 1)):
            assert load_energy_model(folder, resolution, channels) is None
            assert "EnergyModel of 3 channel(s) and 16 px, which does not fit" in caplog.text
            caplog.clear()
        assert load_energy_model(folder / "samples", 16, 3) is None
        assert str(folder / "samples") in caplog.text
        assert load_energy_model(folder.parent, 16, 3, subfolder="VQModel").training
    assert load_energy_model(folder, 16, 3).training
    calibrate(
        "--pretrained_model_name_or_path", finished["VQModel"], "--train_data_dir", images, "--output_dir",
        tmp_path / "run", "--max_train_steps", 1, "--calibration", "none",
    )  # fmt: skip
    assert not (tmp_path / "run" / "energy_model").exists()


def test_the_hub_is_not_asked_for_what_a_local_folder_lacks(tmp_path, monkeypatch):
    """A folder named `my_vae` is no reason to load whatever somebody has published as `my_vae/energy_model`."""

    def download(repo_id, *args, **kwargs):
        raise AssertionError(f"The Hub was asked for {repo_id}.")

    Accelerator(cpu=True)
    monkeypatch.setattr(diffusers.configuration_utils, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_vae" / "vae").mkdir(parents=True)
    for subfolder in (None, "vae", "gone"):
        assert load_energy_model("my_vae", 16, 3, subfolder=subfolder) is None


def test_the_spread_of_latents_is_measured_when_the_decoder_is_on_its_device(models, images, tmp_path):
    config = parse_args(
        list(map(str, [*TINY_DECODER, "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir",
        images, "--output_dir", tmp_path / "run", "--latent_noise", 0.5, "--in_channels", 3]))
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    feed = build_feed(config.data, accelerator, train_batch_size=8, seed=0)
    decoder = CalibratedDecoder(load_autoencoder(models["AutoencoderTiny"]), "here")
    task = DecoderTask(config, decoder, None, feed, None)
    assert task.noise_scale == 0
    task.prepare(accelerator)
    assert task.noise_scale == pytest.approx(0.5 * task.encodings(24).std().item()) and task.noise_scale > 0


def test_features_that_do_not_fit_are_refused_before_training(models, images, tmp_path):
    """The digit classifier takes gray images."""
    result = run(
        *TINY_DECODER, "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir", images,
        "--output_dir", tmp_path / "run", "--evaluation_steps", 1, "--evaluation_samples", 12,
        "--evaluation_features", "digits", script=SCRIPT,
    )  # fmt: skip
    assert result.returncode == 1 and "--evaluation_features 'digits' doesn't fit the data" in result.stderr
    assert not (tmp_path / "run").exists()


def test_autoencoders_of_audio_or_with_a_diffusion_decoder_are_refused(tmp_path):
    blocks = {
        "encoder_block_out_channels": (8, 8), "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "decoder_block_out_channels": (32, 32), "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }  # fmt: skip
    models = (
        AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
            decoder_input_channels=4,
        ),
        ConsistencyDecoderVAE(**blocks, encoder_norm_num_groups=4),
    )  # fmt: skip
    for model in models:
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        with pytest.raises(
            ValueError, match=f"must be an autoencoder of images that decodes in one pass .* is a {name}"
        ):
            load_autoencoder(tmp_path / name)


def broken_copy(folder: Path, to: Path, change) -> Path:
    """The autoencoder of `folder` with other weights or another config, which `change` makes of them."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    to.mkdir()
    change(tensors, config)
    save_file(tensors, to / "diffusion_pytorch_model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


def without_encoder(tensors, config):
    for name in [name for name in tensors if name.startswith("encoder.")]:
        del tensors[name]


def not_a_number(tensors, config):
    tensors["decoder.conv_out.bias"][0] = torch.nan


def of_other_sizes(tensors, config):
    config["block_out_channels"] = [32, 32]


@pytest.mark.parametrize(
    "change, message",
    [
        (without_encoder, r"is not whole: \['encoder\."),
        (not_a_number, "holds weights that are not finite: decoder.conv_out.bias"),
        (of_other_sizes, "can't be loaded: .*size"),
        (lambda tensors, config: config.update(layers_per_block=1_000_000), "layers_per_block"),
        (lambda tensors, config: config.update(block_out_channels=[1_000_000] * 10), "block_out_channels"),
        (lambda tensors, config: config.update(in_channels="3"), ""),
    ],
)
def test_weights_that_are_not_whole_not_finite_or_not_of_the_config_are_refused(models, tmp_path, change, message):
    broken = broken_copy(models["AutoencoderKL"], tmp_path / "broken", change)
    with pytest.raises(ValueError, match=f"(?s)--pretrained_model_name_or_path .*{message}"):
        load_autoencoder(broken)


@pytest.mark.parametrize("content", ["[1]", "3", "{"])
def test_a_config_that_holds_no_arguments_is_refused(models, tmp_path, content):
    folder = broken_copy(models["AutoencoderKL"], tmp_path / "broken", lambda tensors, config: None)
    EnergyModel(sample_size=16, in_channels=3, block_out_channels=(16, 16)).save_pretrained(folder / "energy_model")
    (folder / "energy_model" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path.*energy_model"):
        load_energy_model(folder, 16, 3)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
        load_autoencoder(folder)


def test_two_channels_are_refused(tmp_path):
    AutoencoderKL(in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of 1, 3 or 4 channels, but has 2"):
        load_autoencoder(tmp_path)


def test_a_variant_is_calibrated_in_float32(models, images, tmp_path):
    model = AutoencoderTiny.from_pretrained(models["AutoencoderTiny"], dtype=torch.float16)
    model.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match="can't be loaded"):
        load_autoencoder(tmp_path / "half")
    calibrate(
        "--pretrained_model_name_or_path", tmp_path / "half", "--variant", "fp16", "--train_data_dir", images,
        "--output_dir", tmp_path / "run", "--max_train_steps", 1,
    )  # fmt: skip
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


def test_parts_that_decoding_does_not_use_are_frozen(tmp_path):
    """Several processes wait for a gradient of each parameter that has one: this one reads masks, which no one gives it."""
    model = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), layers_per_up_block=1,
        norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    decoder = CalibratedDecoder(model, "here")
    shape = latent_shape(decoder, 16)
    decoder(torch.randn(2, *shape)).square().sum().backward()
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    assert trained and all(decoder.get_parameter(name).grad is not None for name in trained)
    assert not any("condition_encoder" in name for name in trained)
    assert all(name.split(".")[1] in ("decoder", "post_quant_conv") for name in trained)


def test_the_encoder_runs_once_a_step(models, images, tmp_path):
    arguments = [
        *TINY_DECODER, "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir", images,
        "--output_dir", tmp_path / "run", "--latent_noise", 0.5, "--in_channels", 3,
    ]  # fmt: skip
    config, accelerator = parse_args(list(map(str, arguments))), Accelerator(cpu=True)
    decoder = CalibratedDecoder(load_autoencoder(models["AutoencoderTiny"]), "here")
    feed = build_feed(config.data, accelerator, train_batch_size=8, seed=0)
    task = DecoderTask(config, decoder, None, feed, None)
    task.prepare(accelerator)
    calls = []
    decoder.autoencoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        real = torch.rand(4, 3, 16, 16) * 2 - 1
        noise = StepNoise(0, step, 0, 1, accelerator.device)
        calls.clear()
        task.loss(decoder, real, noise, step, with_samples=True)
        again = task.draw(real, noise)
        assert len(calls) == 1
        assert again.shape == task.encode_batch(real).shape and not torch.equal(again, task.encode_batch(real))
        torch.testing.assert_close(task.encode_batch(real), decoder.encode(real))


def test_nothing_of_the_model_that_a_run_starts_from_is_lost(models, images, tmp_path):
    """Though it may replace the folder."""
    common = ["--train_data_dir", images, "--output_dir", tmp_path / "run", "--max_train_steps", 1]
    calibrate(*common, "--pretrained_model_name_or_path", models["AutoencoderTiny"])
    before = weights(tmp_path / "run")
    result = run(
        *TINY_DECODER, *common, "--pretrained_model_name_or_path", tmp_path / "run", "--overwrite_output_dir",
        script=SCRIPT,
    )  # fmt: skip
    assert result.returncode == 1 and "must not lie in --output_dir" in result.stderr
    after = weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_another_encoder_is_not_gone_on_with(models, images, tmp_path):
    common = ["--train_data_dir", images, "--output_dir", tmp_path / "run", "--checkpointing_steps", 1]
    calibrate(*common, "--pretrained_model_name_or_path", models["AutoencoderKL"], "--max_train_steps", 1)

    def other(tensors, config):
        tensors["encoder.conv_in.bias"] += 1

    for start in (broken_copy(models["AutoencoderKL"], tmp_path / "other", other), models["VQModel"]):
        result = run(
            *TINY_DECODER, *common, "--pretrained_model_name_or_path", start, "--max_train_steps", 2,
            "--resume_from_checkpoint", "latest", script=SCRIPT,
        )  # fmt: skip
        assert result.returncode == 1 and "these differ: " in result.stderr and "encoder (was" in result.stderr


def test_few_latents_can_not_be_evaluated_which_is_said_before_training(models, images, tmp_path):
    save_file({"latents": torch.zeros(3, 4, 8, 8)}, tmp_path / "latents.safetensors")
    result = run(
        *TINY_DECODER, "--pretrained_model_name_or_path", models["AutoencoderKL"], "--train_data_dir", images,
        "--output_dir", tmp_path / "run", "--latents_file", tmp_path / "latents.safetensors", "--evaluation_steps", 1,
        "--evaluation_samples", 12, script=SCRIPT,
    )  # fmt: skip
    assert result.returncode == 1
    assert "--evaluation_steps" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_evaluations_have_the_reconstructions_psnr_and_the_card_of_no_calibration_claims_none(
    models, images, tmp_path
):
    calibrate(
        "--pretrained_model_name_or_path", models["AutoencoderTiny"], "--train_data_dir", images, "--output_dir",
        tmp_path, "--max_train_steps", 1, "--calibration", "none", "--evaluation_steps", 1, "--evaluation_samples", 12,
        "--overwrite_output_dir", "--no-use_ema",
    )  # fmt: skip
    [found] = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    model = AutoencoderTiny.from_pretrained(tmp_path)
    files = sorted(images.glob("*.png"))
    arrays = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in files]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = model.decode(model.encode(pixels).latents).sample.clamp(-1, 1)
    psnr = reconstruction_metrics(decoded / 2 + 0.5, pixels / 2 + 0.5)["psnr"]
    assert psnr.min() < found["psnr"] < psnr.max()  # of some of these images
    card = (tmp_path / "README.md").read_text()
    assert "with a further trained decoder" in card and "with energy" not in card and "energy-based" not in card


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--pretrained_model_name_or_path must be given"),
        (["--pretrained_model_name_or_path", "{gone}"], "gone' can't be loaded"),
        (["--pretrained_model_name_or_path", "{unet}"], "must be an autoencoder of diffusers, but is a UNet2DModel"),
        (["--pretrained_model_name_or_path", "{kl}", "--in_channels", 1], "--in_channels must be 3"),
        (
            ["--pretrained_model_name_or_path", "{vq}", "--gradient_checkpointing"],
            "--gradient_checkpointing must not be given: VQModel does not have it",
        ),
        (
            ["--pretrained_model_name_or_path", "{kl}", "--latents_file", "{bad}"],
            "must hold latents of shape (N, 4, 8, 8), but they are of (2, 3, 8, 8)",
        ),
        (
            ["--pretrained_model_name_or_path", "{kl}", "--latents_file", "{bad}", "--latent_noise", 0.1],
            "--latent_noise must be 0 with --latents_file",
        ),
        (["--pretrained_model_name_or_path", "{kl}", "--latents_file", "none"], "--latents_file 'none' can't be read"),
        (
            ["--pretrained_model_name_or_path", "{kl}", "--latents_file", "{kl}"],
            "must be a safetensors file, but is a folder",
        ),
        # The folder itself holds an autoencoder, which it is not.
        (["--pretrained_model_name_or_path", "{kl}", "--subfolder", "vae"], "has no folder --subfolder 'vae'"),
        (
            ["--pretrained_model_name_or_path", "{kl}", "--calibration", "none", "--reconstruction_weight", 0],
            "--reconstruction_weight must be above 0 with --calibration none",
        ),
        (["--pretrained_model_name_or_path", "{kl}", "--latent_noise", -1], "--latent_noise must be a finite number"),
        (["--pretrained_model_name_or_path", "{kl}", "--image_size", 8], "--image_size must be at least --resolution"),
        (["--pretrained_model_name_or_path", "{kl}", "--resolution", 2048], "a power of two from 8 to 1024"),
    ],
)
def test_wrong_arguments(models, images, tmp_path, capsys, arguments, message):
    UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    save_file({"latents": torch.zeros(2, 3, 8, 8)}, tmp_path / "bad.safetensors")
    places = {
        "{unet}": tmp_path / "unet", "{kl}": models["AutoencoderKL"], "{vq}": models["VQModel"],
        "{bad}": tmp_path / "bad.safetensors", "{gone}": tmp_path / "gone",
    }  # fmt: skip
    arguments = [
        *TINY_DECODER, "--train_data_dir", images, "--output_dir", tmp_path / "run",
        *[places.get(argument, argument) for argument in arguments],
    ]  # fmt: skip
    with pytest.raises((SystemExit, ValueError)) as raised:
        calibrate_decoder.run(parse_args(list(map(str, arguments))))
    assert message in capsys.readouterr().err + str(raised.value)
    assert not (tmp_path / "run").exists()
