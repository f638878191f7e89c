"""
What holds for `train_ecvae.py` with several processes holds for the other training scripts, and with posteriors calibrated too.
Slow: `make test-slow`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from training_runs import (
    SCRIPTS,
    TINY,
    TINY_DECODER,
    TINY_FLOW,
    metrics,
    succeed,
    weights,
    write_autoencoder,
    write_images,
)

from ecvae_diffusers.training.run.log import read_metrics


# A dual variable that is free to move.
POSTERIOR = ("--max_posterior_dual", 10, "--calibration")
POSTERIOR_MEASURES = ("reconstruction", "kl", "posterior_constraint", "posterior_dual", "gradient_norm")
CALIBRATED = ("constraint", "dual", "gradient_norm", "energy_gradient_norm")
MEASURES = {
    "train_flow": ("bits_per_dimension", *CALIBRATED),
    "calibrate_decoder": ("reconstruction", *CALIBRATED),
    "train_ecvae": (*POSTERIOR_MEASURES, *CALIBRATED, "refined_reconstruction"),
}
# At the end of training each rank compares its tensors with those of rank 0, bit for bit.
COMPARING = """
import importlib, pathlib, sys, torch
script = importlib.import_module(f"ecvae_diffusers.training.{sys.argv[1]}")
from accelerate import Accelerator

kept, prepare, end = [], Accelerator.prepare, Accelerator.end_training

def remember(self, *parts):
    prepared = prepare(self, *parts)
    kept.extend(part for part in prepared if isinstance(part, torch.nn.Module))
    return prepared

def compare(self):
    for module in kept:
        for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
            first = tensor.detach().clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(first, tensor), f"rank {self.process_index}: {name}"
    # A file each: what two ranks print may come out in one line.
    pathlib.Path(__file__).with_name(f"agreed-{self.process_index}").write_text(str(len(kept)))
    end(self)

Accelerator.prepare, Accelerator.end_training = remember, compare
script.run(script.parse_args(sys.argv[2:]))
"""


@pytest.fixture(scope="module", params=MEASURES)
def two_ranks(request, tmp_path_factory) -> tuple[str, list, Path]:
    """
    A script's name, its arguments, and a run of two ranks. 64 images make 4 batches an epoch, of which a step takes three: steps
    lie across the end of an epoch.
    """
    name, folder = request.param, tmp_path_factory.mktemp("two")
    arguments = [
        "--train_data_dir", write_images(folder / "images", count=64), "--log_steps", 1, "--random_flip",
        "--gradient_accumulation_steps", 3, "--max_grad_norm", 50, "--max_train_steps", 6, "--checkpointing_steps", 3,
        "--evaluation_steps", 6, "--evaluation_samples", 21,
    ]  # fmt: skip
    if name == "train_flow":
        arguments += TINY_FLOW
    elif name == "train_ecvae":
        arguments += [*TINY, *POSTERIOR, "both"]
    else:
        model = write_autoencoder(folder / "autoencoder")
        arguments += [*TINY_DECODER, "--pretrained_model_name_or_path", model, "--gradient_checkpointing"]
    (folder / "comparing.py").write_text(COMPARING)
    succeed(name, *arguments, "--output_dir", folder / "run", ranks=2, script=folder / "comparing.py")
    assert [(folder / f"agreed-{rank}").read_text() for rank in range(2)] == ["2", "2"]
    return name, arguments, folder / "run"


def check_same_training(one: Path, two: Path, measures: tuple[str, ...]) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for measure in measures:
            assert a[measure] == pytest.approx(b[measure], rel=1e-3), (a["step"], measure)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    difference = torch.cat([(first[key] - second[key]).float().flatten() for key in first]).norm()
    assert difference <= 0.01 * torch.cat([value.float().flatten() for value in first.values()]).norm()


def test_two_ranks_train_and_measure_what_one_process_does(two_ranks, tmp_path):
    """With the same global batch. What is sampled is shared out; bounds on the likelihood are the main process's."""
    name, arguments, folder = two_ranks
    succeed(*arguments, "--output_dir", tmp_path, "--train_batch_size", 16, script=SCRIPTS / f"{name}.py")
    check_same_training(tmp_path, folder, MEASURES[name])
    (one,), (two,) = (read_metrics(run / "evaluations.jsonl") for run in (tmp_path, folder))
    assert one.pop("kernel_distance_std") < 1e-6 and two.pop("kernel_distance_std") < 1e-6  # one subset of 21
    assert one.pop("features") == two.pop("features")
    assert ("amortisation_gap" in one) == (name == "train_ecvae")
    # Of a hundred steps of Adam, which make more of a rounding.
    assert one.pop("amortisation_gap", 0) == pytest.approx(two.pop("amortisation_gap", 0), abs=0.1)
    # Of 21 images none is stated.
    assert one.pop("frechet_distance") is None and two.pop("frechet_distance") is None
    assert one == pytest.approx(two, rel=1e-2, abs=1e-3)


def test_two_ranks_resumed_equal_two_ranks_in_one_run(two_ranks, tmp_path):
    name, arguments, folder = two_ranks
    cut = shutil.copytree(folder, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-6")
    resume = ["--output_dir", cut, "--resume_from_checkpoint", "latest"]
    succeed(*arguments, *resume, ranks=2, script=SCRIPTS / f"{name}.py")
    expected, found = weights(folder), weights(cut)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    for whole, again in zip(metrics(folder), metrics(cut), strict=True):
        assert [whole.get(key) for key in MEASURES[name]] == [again.get(key) for key in MEASURES[name]]


@pytest.mark.parametrize("kind", ["noise on latents", "latents of a file", "the encoder alone"])
def test_two_ranks_equal_one_process_with_other_latents(kind, tmp_path):
    """What is drawn of latents is shared out by rank, and a frozen decoder is the same on each."""
    images, model = write_images(tmp_path / "images", count=64), tmp_path / "model"
    if kind == "the encoder alone":
        succeed(*TINY, "--train_data_dir", images, "--output_dir", model, "--max_train_steps", 2)
        script, measures, own = "train_ecvae", POSTERIOR_MEASURES, [*TINY, *POSTERIOR, "posterior", "--freeze_decoder"]
    else:
        write_autoencoder(model)
        latents = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        save_file({"latents": latents}, tmp_path / "latents.safetensors")
        file = ["--latents_file", tmp_path / "latents.safetensors"]
        own = [*TINY_DECODER, *(file if kind == "latents of a file" else ["--latent_noise", 0.5])]
        script, measures = "calibrate_decoder", MEASURES["calibrate_decoder"]
    own += [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--log_steps",
        1,
        "--max_train_steps",
        5,
    ]
    script = SCRIPTS / f"{script}.py"
    succeed(*own, "--output_dir", tmp_path / "one", "--train_batch_size", 16, script=script)
    succeed(*own, "--output_dir", tmp_path / "two", ranks=2, script=script)
    check_same_training(tmp_path / "one", tmp_path / "two", measures)


def test_a_decoder_is_measured_and_its_best_kept(tmp_path):
    """Reconstructions are measured; what is kept in `best/` is an autoencoder of diffusers too."""
    images, model = write_images(tmp_path / "images"), write_autoencoder(tmp_path / "autoencoder")
    succeed(
        *TINY_DECODER, "--pretrained_model_name_or_path", model, "--train_data_dir", images, "--output_dir",
        tmp_path / "run", "--max_train_steps", 3, "--evaluation_steps", 1, "--evaluation_samples", 12,
        "--early_stopping_patience", 1, "--learning_rate", "1e-9", script=SCRIPTS / "calibrate_decoder.py",
    )  # fmt: skip
    AutoencoderKL.from_pretrained(tmp_path / "run" / "best")
    AutoencoderKL.from_pretrained(tmp_path / "run")
    assert "from `autoencoder`" in (tmp_path / "run" / "README.md").read_text()
