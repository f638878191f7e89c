"""
What holds for `train_ecvae.py` with several processes and accumulation holds for the other training scripts, and with posteriors
calibrated too. Slow: `make test-slow`.
"""

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


STEPS = 20
# A dual variable that is free to move.
MOVING = ("--max_posterior_dual", 10)
HEADLINES = {
    "train_flow": ("bits_per_dimension",),
    "calibrate_decoder": ("reconstruction",),
    # With posteriors calibrated too.
    "train_ecvae": ("reconstruction", "kl", "posterior_constraint", "posterior_dual", "refined_reconstruction"),
}


def run_ranks(num_processes: int, file: Path, *arguments) -> None:
    succeed(*arguments, ranks=num_processes, script=file)


@pytest.fixture(scope="module", params=list(HEADLINES))
def script(request, tmp_path_factory) -> tuple[str, list]:
    """A script's name, and its arguments but for the batch."""
    folder = tmp_path_factory.mktemp("data")
    arguments = ["--train_data_dir", write_images(folder / "images", count=64), "--log_steps", 1, "--random_flip"]
    if request.param == "train_flow":
        return request.param, [*arguments, *TINY_FLOW]
    if request.param == "train_ecvae":
        return request.param, [*arguments, *TINY, "--calibration", "both", *MOVING]
    model = write_autoencoder(folder / "autoencoder")
    own = ["--pretrained_model_name_or_path", model, "--gradient_checkpointing"]
    return request.param, [*arguments, *TINY_DECODER, *own]


def check_two_ranks_equal_one_process(one: Path, two: Path, measures: tuple[str, ...]) -> None:
    for a, b in list(zip(metrics(one), metrics(two), strict=True))[:10]:
        for measure in measures:
            assert a[measure] == pytest.approx(b[measure], rel=1e-3), (a["step"], measure)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    difference = torch.cat([(first[key] - second[key]).float().flatten() for key in first]).norm()
    assert difference <= 0.01 * torch.cat([value.float().flatten() for value in first.values()]).norm()


@pytest.fixture(scope="module")
def two_ranks(script, tmp_path_factory):
    name, arguments = script
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    run_ranks(2, SCRIPTS / f"{name}.py", *arguments, "--output_dir", output_dir, "--max_train_steps", STEPS)
    return output_dir


def test_two_ranks_equal_one_process_with_the_same_global_batch(script, two_ranks, tmp_path):
    name, arguments = script
    run_ranks(
        1,
        SCRIPTS / f"{name}.py",
        *arguments,
        "--output_dir",
        tmp_path,
        "--max_train_steps",
        STEPS,
        "--train_batch_size",
        16,
    )
    measures = (*HEADLINES[name], "constraint", "dual", "gradient_norm", "energy_gradient_norm")
    check_two_ranks_equal_one_process(tmp_path, two_ranks, measures)


CALIBRATED = ("reconstruction", "constraint", "dual", "gradient_norm", "energy_gradient_norm")


@pytest.mark.parametrize("kind", ["noise on latents", "latents of a file", "the encoder alone"])
def test_two_ranks_equal_one_process_with_other_latents(kind, tmp_path):
    """What is drawn of latents is shared out by rank, and a decoder that is held still is the same on each."""
    images = write_images(tmp_path / "images", count=64)
    file, measures = SCRIPTS / "calibrate_decoder.py", CALIBRATED
    if kind == "the encoder alone":
        succeed(*TINY, "--train_data_dir", images, "--output_dir", tmp_path / "model", "--max_train_steps", 2)
        file, measures = (
            SCRIPTS / "train_ecvae.py",
            ("reconstruction", "kl", "posterior_constraint", "posterior_dual", "gradient_norm"),
        )
        own = [*TINY, "--calibration", "posterior", "--freeze_decoder", *MOVING]
    else:
        write_autoencoder(tmp_path / "model")
        save_file(
            {"latents": torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0))},
            tmp_path / "latents.safetensors",
        )
        changed = ["--latents_file", tmp_path / "latents.safetensors"]
        own = [*TINY_DECODER, *(changed if kind == "latents of a file" else ["--latent_noise", 0.5])]
    own += ["--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", images, "--log_steps", 1]
    own += ["--max_train_steps", 10]
    run_ranks(1, file, *own, "--output_dir", tmp_path / "one", "--train_batch_size", 16)
    run_ranks(2, file, *own, "--output_dir", tmp_path / "two")
    check_two_ranks_equal_one_process(tmp_path / "one", tmp_path / "two", measures)


def test_two_ranks_resumed_equal_two_ranks_in_one_run(script, two_ranks, tmp_path):
    name, arguments = script
    arguments = [*arguments, "--output_dir", tmp_path, "--checkpointing_steps", STEPS // 2]
    run_ranks(2, SCRIPTS / f"{name}.py", *arguments, "--max_train_steps", STEPS // 2)
    run_ranks(2, SCRIPTS / f"{name}.py", *arguments, "--max_train_steps", STEPS, "--resume_from_checkpoint", "latest")
    expected, found = weights(two_ranks), weights(tmp_path)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


PARAMETERS = """
import importlib, pathlib, sys, torch
script = importlib.import_module(f"ecvae_diffusers.training.{sys.argv[1]}")
from accelerate import Accelerator

kept = []
prepare = Accelerator.prepare

def remember(self, *parts):
    prepared = prepare(self, *parts)
    kept.extend(part for part in prepared if isinstance(part, torch.nn.Module))
    return prepared

Accelerator.prepare = remember
end = Accelerator.end_training

def compare(self):
    # At the end of training, each rank's tensors against those of rank 0, bit for bit.
    for module in kept:
        for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
            first = tensor.detach().clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(first, tensor), f"rank {self.process_index}: {name}"
    # A file each: what two ranks print may come out in one line.
    pathlib.Path(__file__).with_name(f"agreed-{self.process_index}").write_text(str(len(kept)))
    end(self)

Accelerator.end_training = compare
script.run(script.parse_args(sys.argv[2:]))
"""


def test_ranks_keep_bit_equal_parameters(script, tmp_path):
    name, arguments = script
    (tmp_path / "compare.py").write_text(PARAMETERS)
    arguments = [name, *arguments, "--output_dir", tmp_path / "out", "--max_train_steps", STEPS]
    run_ranks(2, tmp_path / "compare.py", *arguments)
    assert [(tmp_path / f"agreed-{rank}").read_text() for rank in range(2)] == ["2", "2"]


def test_accumulation_cut_in_two_equals_a_run_in_one(script, tmp_path):
    """64 images make 8 batches an epoch; three a step, so that the cut lies within an epoch and the run goes over its end."""
    name, arguments = script
    arguments = [*arguments, "--gradient_accumulation_steps", 3, "--max_grad_norm", 50, "--checkpointing_steps", 2]
    file = SCRIPTS / f"{name}.py"
    succeed(*arguments, "--output_dir", tmp_path / "whole", "--max_train_steps", 4, script=file)
    succeed(*arguments, "--output_dir", tmp_path / "cut", "--max_train_steps", 2, script=file)
    resume = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
    succeed(*arguments, "--output_dir", tmp_path / "cut", *resume, script=file)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    duals = [[line.get("dual"), line.get("posterior_dual")] for line in metrics(tmp_path / "whole")]
    assert duals == [[line.get("dual"), line.get("posterior_dual")] for line in metrics(tmp_path / "cut")]


def test_two_ranks_measure_what_one_process_does(script, tmp_path):
    """What is sampled or reconstructed is shared out; bounds on the likelihood are the main process's."""
    name, arguments = script
    arguments = [*arguments, "--max_train_steps", 2, "--evaluation_steps", 2, "--evaluation_samples", 21]
    run_ranks(1, SCRIPTS / f"{name}.py", *arguments, "--output_dir", tmp_path / "one", "--train_batch_size", 16)
    run_ranks(2, SCRIPTS / f"{name}.py", *arguments, "--output_dir", tmp_path / "two")
    (one,), (two,) = (read_metrics(tmp_path / folder / "evaluations.jsonl") for folder in ("one", "two"))
    assert one.pop("kernel_distance_std") < 1e-6 and two.pop("kernel_distance_std") < 1e-6  # one subset of 21
    assert one.pop("features") == two.pop("features")
    assert ("amortisation_gap" in one) == (name == "train_ecvae")
    # Of a hundred steps of Adam, which make more of a rounding.
    assert one.pop("amortisation_gap", 0) == pytest.approx(two.pop("amortisation_gap", 0), abs=0.1)
    # Of 21 images none is stated.
    assert one.pop("frechet_distance") is None and two.pop("frechet_distance") is None
    assert one == pytest.approx(two, rel=1e-2, abs=1e-3)


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
