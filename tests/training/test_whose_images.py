"""No run resumes on other images than it began with. What evaluations know of images: tests/evaluation."""

from pathlib import Path

import PIL.Image
import pytest
from accelerate.state import AcceleratorState, GradientState
from training_runs import TINY, TINY_DECODER, TINY_FLOW, write_autoencoder, write_images

from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.data.files import trained_hashes
from ecvae_diffusers.training.run.folder import HASHES_FILE
from ecvae_diffusers.training.run.launch import run_script


def call(script, parse_args, *arguments) -> None:
    """A script in this process, as if it was the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run_script(script.__name__, parse_args(list(map(str, arguments))), script.run)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    """Each training script with its smallest model."""
    autoencoder = write_autoencoder(tmp_path_factory.mktemp("model") / "autoencoder")
    return {
        "train_ecvae": (train_ecvae, train_ecvae.parse_args, *TINY),
        "train_flow": (train_flow, train_flow.parse_args, *TINY_FLOW, "--calibration", "none"),
        "calibrate_decoder": (
            calibrate_decoder, calibrate_decoder.parse_args, *TINY_DECODER, "--pretrained_model_name_or_path", autoencoder,
        ),
    }  # fmt: skip


def change(path: Path) -> None:
    image = PIL.Image.open(path)
    image.putpixel((0, 0), 255 - image.getpixel((0, 0)))
    image.save(path)


@pytest.mark.parametrize("script", ["train_ecvae", "train_flow", "calibrate_decoder"])
def test_a_run_resumes_on_its_own_images_alone(script, tiny, tmp_path):
    """In the folder of its own data set, where its pictures are no data; moved and renamed, but not on another image."""
    data = write_images(tmp_path / "data", count=8)
    out = data / "train_run"
    given = [
        *tiny[script], "--dataset_name", data, "--cache_dir", tmp_path / "cache", "--save_images_steps", 1, "--log_steps", 1,
    ]  # fmt: skip
    resume = ["--output_dir", out, "--resume_from_checkpoint", "latest", "--checkpointing_steps", 1]
    call(*given, *resume, "--max_train_steps", 1)
    assert (out / "samples" / "step-000001.png").is_file()
    hashes = trained_hashes(out)
    assert len(hashes) == 8
    call(*given, *resume, "--max_train_steps", 2)
    assert (out / "checkpoint-2").is_dir() and trained_hashes(out) == hashes
    change(data / "003.png")
    with pytest.raises(SystemExit, match="hash_of_images"):
        call(*given, *resume, "--max_train_steps", 3)
    assert not (out / "checkpoint-3").exists()
    # Another run, from this one: what that was trained on counts for its model as well.
    if script == "train_ecvae":
        further = [
            "--output_dir", tmp_path / "further", "--max_train_steps", 1, "--pretrained_model_name_or_path", out,
        ]  # fmt: skip
        call(*tiny[script], "--train_data_dir", data, *further)
        assert trained_hashes(tmp_path / "further" / "vae") > hashes


def test_a_stream_resumes_on_its_own_images_alone(tiny, tmp_path):
    data = write_images(tmp_path / "data", count=8)
    given = [
        *tiny["train_ecvae"], "--dataset_name", data, "--streaming", "--in_channels", 1, "--cache_dir", tmp_path / "cache",
        "--output_dir", tmp_path / "out", "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    call(*given, "--max_train_steps", 1)
    assert not (tmp_path / "out" / HASHES_FILE).exists()
    change(data / "003.png")
    with pytest.raises(SystemExit, match="hash_of_images"):
        call(*given, "--max_train_steps", 2)
