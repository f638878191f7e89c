"""Images are what they are taken for: no run resumes on others, held-out ones were not trained on, and gray is not colour."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from accelerate.state import AcceleratorState, GradientState
from training_runs import TINY, TINY_DECODER, TINY_FLOW, write_autoencoder, write_images

from ecvae_diffusers.evaluation import evaluate, evaluate_restoration
from ecvae_diffusers.hub.card import evaluation_table
from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.arguments import decoder as decoder_arguments
from ecvae_diffusers.training.arguments import flow as flow_arguments
from ecvae_diffusers.training.arguments import vae as ecvae_arguments
from ecvae_diffusers.training.data.files import trained_hashes, write_hashes
from ecvae_diffusers.training.run.folder import HASHES_FILE
from ecvae_diffusers.training.run.session import run_script


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
        "train_ecvae": (train_ecvae, ecvae_arguments.parse_args, *TINY),
        "train_flow": (train_flow, flow_arguments.parse_args, *TINY_FLOW, "--calibration", "none"),
        "calibrate_decoder": (
            calibrate_decoder, decoder_arguments.parse_args, *TINY_DECODER, "--pretrained_model_name_or_path", autoencoder,
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
        *tiny[script],
        "--dataset_name",
        data,
        "--cache_dir",
        tmp_path / "cache",
        "--save_images_steps",
        1,
        "--log_steps",
        1,
    ]
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
            "--output_dir",
            tmp_path / "further",
            "--max_train_steps",
            1,
            "--pretrained_model_name_or_path",
            out,
        ]
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


def measure(*arguments) -> dict:
    arguments = list(map(str, arguments))
    call(evaluate, evaluate.parse_args, *arguments)
    return json.loads(
        (Path(arguments[arguments.index("--output_dir") + 1]) / "evaluation.json").read_text(encoding="utf-8")
    )


def write_colour(folder: Path, first: int, count: int, mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        PIL.Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return folder


def test_gray_samples_are_measured_against_colour(tmp_path):
    """Where one set has colour all are compared in colour; where none has, in gray; and the protocol says what became of which."""
    colour, gray = write_colour(tmp_path / "colour", 0, 12), write_colour(tmp_path / "gray", 0, 12, "L")
    shutil.copytree(gray, tmp_path / "as_rgb")
    for path in (tmp_path / "as_rgb").iterdir():
        PIL.Image.open(path).convert("RGB").save(path)
    found = {
        name: measure("--generated_image_dir", tmp_path / name, "--train_data_dir", colour, "--output_dir", tmp_path / f"e_{name}")
        for name in ("gray", "as_rgb")
    }  # fmt: skip
    assert found["gray"]["generation"] == found["as_rgb"]["generation"]
    assert found["gray"]["generation"]["measures"]["kernel_distance"]["mean"] > 0
    assert set(found["gray"]) == {"model", "weights", "protocol", "generation"} and found["gray"]["model"] == "gray"
    assert found["gray"]["generation"]["protocol"]["num_samples"] == 12
    protocol = found["gray"]["protocol"]
    assert "3 channel" in protocol["images"] and "12 of 12" in protocol["files"]["generated"]
    assert protocol["files"]["train"] == "12 of 16x16"
    of_gray = measure("--generated_image_dir", gray, "--train_data_dir", gray, "--output_dir", tmp_path / "e")
    assert "1 channel" in of_gray["protocol"]["images"] and of_gray["protocol"]["files"]["train"] == "12 of 16x16"
    of_three = measure(
        "--generated_image_dir",
        gray,
        "--train_data_dir",
        gray,
        "--test_data_dir",
        colour,
        "--output_dir",
        tmp_path / "e3",
    )
    assert "3 channel" in of_three["protocol"]["images"]


def test_generated_images_of_several_sizes_are_refused_or_named(tmp_path):
    data, made = write_colour(tmp_path / "data", 0, 10), write_colour(tmp_path / "made", 10, 10)
    PIL.Image.new("RGB", (24, 32)).save(made / "z.png")
    given = ["--generated_image_dir", made, "--train_data_dir", data, "--output_dir", tmp_path / "e"]
    with pytest.raises(SystemExit, match="generated_image_dir.*resolution"):
        measure(*given)
    files = measure(*given, "--resolution", 16)["protocol"]["files"]
    assert "10 of 16x16" in files["generated"] and "1 of 24x32" in files["generated"]


def test_held_out_images_that_were_trained_on_are_counted(tmp_path, caplog):
    """Also those outside the reference that is drawn, saved in another format, and of a run's record."""
    data, test = write_colour(tmp_path / "all" / "train", 0, 24), write_colour(tmp_path / "all" / "test", 24, 8)
    made = write_colour(tmp_path / "made", 30, 10)
    other = write_colour(tmp_path / "other", 40, 4)
    for i in range(4):
        PIL.Image.open(data / f"{i}.png").save(other / f"{i}.bmp")
    given = ["--generated_image_dir", made, "--num_reference", 10, "--output_dir"]
    counts = {}
    for name, train_dir, test_dir in (("none", data, test), ("all", tmp_path / "all", test), ("some", data, other)):
        caplog.clear()
        evaluation = measure(*given, tmp_path / name, "--train_data_dir", train_dir, "--test_data_dir", test_dir)
        held_out = evaluation["held_out"]
        counts[name] = (held_out["measures"]["num_trained_on"], held_out["protocol"]["num_images"])
        rows = [row for row in evaluation_table(evaluation).splitlines() if "trained on" in row]
        assert len(rows) == 1 and f"| {counts[name][0]} |" in rows[0]
        assert ("WARNING" in caplog.text) == (counts[name][0] > 0)
    assert counts == {"none": (0, 8), "all": (8, 8), "some": (4, 8)}


def test_a_run_knows_what_it_was_trained_on(make_pipeline, tmp_path, capsys):
    """Whatever data an evaluation is given, and from its `best/` and its checkpoints too."""
    train, test = write_images(tmp_path / "train", 12), write_colour(tmp_path / "test", 0, 12, "L")
    run, pipeline = tmp_path / "run", make_pipeline()
    pipeline.vae.register_to_config(reconstruction_variance=0.1)
    for folder in (run, run / "best", run / "checkpoint-7" / "pipeline"):
        pipeline.save_pretrained(folder)
    checked = evaluate_restoration.choose_clean(str(test), 100)
    for folder in (run, run / "best", run / "checkpoint-7" / "pipeline"):
        assert evaluate_restoration.count_trained_on(checked, str(folder)) is None
    write_hashes(set(checked.hashes[:5]), run / HASHES_FILE)
    for folder in (run, run / "best", run / "checkpoint-7" / "pipeline"):
        assert evaluate_restoration.count_trained_on(checked, str(folder)) == 5
    assert trained_hashes("user/name") is None
    hashes = (run / HASHES_FILE).read_bytes()
    for damaged in (b"no hex", b"\xff\xfe"):
        (run / HASHES_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=HASHES_FILE):
            trained_hashes(run / "best")
    (run / HASHES_FILE).write_bytes(hashes)
    small = [
        "--num_samples", 20, "--num_likelihood_images", 0, "--seeds", 0, "--train_data_dir", train, "--test_data_dir", test,
    ]  # fmt: skip
    evaluation = measure("--pretrained_model_name_or_path", run / "best", *small, "--output_dir", tmp_path / "e")
    assert evaluation["held_out"]["measures"] == {"num_trained_on": 5}
    call(
        evaluate_restoration, evaluate_restoration.parse_args, "--pretrained_model_name_or_path", run, "--image_dir", test,
        "--output_dir", tmp_path / "r", "--tasks", "super_resolution_x2", "--noise_std", 0, "--num_restorations", 1,
        "--num_inference_steps", 2,
    )  # fmt: skip
    protocol = json.loads((tmp_path / "r" / "restoration.json").read_text(encoding="utf-8"))["protocol"]
    assert (protocol["num_trained_on"], protocol["files"]) == (5, "12 of 16x16")
    assert "5 of 12" in (tmp_path / "r" / "restoration.md").read_text(encoding="utf-8")
