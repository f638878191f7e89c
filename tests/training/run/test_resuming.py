"""What may be overwritten, resumed and started from: nothing of the user's is lost."""

import json
from contextlib import nullcontext

import pytest

from ecvae_diffusers.training.command_line import RETIRED
from ecvae_diffusers.training.run.checkpoints import (
    STATE_FILES,
    check_resumed_arguments,
    find_checkpoint,
    write_manifest,
)
from ecvae_diffusers.training.run.folder import check_output_dir, check_pretrained_stays, clear_run
from ecvae_diffusers.training.train_ecvae import parse_args


def test_what_a_run_starts_from_must_not_lie_where_it_writes(tmp_path):
    """It would be removed before the first step."""
    run, link = tmp_path / "run", tmp_path / "link"
    (run / "checkpoint-2" / "pipeline").mkdir(parents=True)
    link.symlink_to(run)
    for path in (run, run / "checkpoint-2" / "pipeline", link / "checkpoint-2"):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path"):
            check_pretrained_stays(run, str(path))
    check_pretrained_stays(run, str(tmp_path))
    check_pretrained_stays(tmp_path / "other", str(run))
    check_pretrained_stays(run, "me/run")


def test_the_run_of_another_script_is_neither_replaced_nor_gone_on_with(tmp_path):
    (tmp_path / "training_args.json").write_text('{"component": "vae"}')
    for resume in (False, True):
        check_output_dir(tmp_path, overwrite=True, resume=resume, component="vae")
        with pytest.raises(ValueError, match="vae.*flow"):
            check_output_dir(tmp_path, overwrite=True, resume=resume, component="flow")


def test_a_finished_run_is_not_overwritten_unasked(tmp_path):
    def check(overwrite: bool = False, resume: bool = False) -> None:
        check_output_dir(tmp_path, overwrite=overwrite, resume=resume, component="vae")

    (tmp_path / "training_args.json").write_text("{}")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        check()
    check(overwrite=True)
    check(resume=True)  # cut off before its first checkpoint: starts at 0
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="--resume_from_checkpoint finds no checkpoint"):
        check(resume=True)
    (tmp_path / "checkpoint-10").mkdir()
    check(resume=True)
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        check()


def test_another_checkpoint_is_named_with_those_there_are(tmp_path):
    for checkpoint in (tmp_path / "checkpoint-40", tmp_path / "checkpoint-100"):
        checkpoint.mkdir()
        for name in STATE_FILES:
            (checkpoint / name).write_text("state")
        write_manifest(checkpoint)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-100")).name == "checkpoint-100"
    for other in ("checkpoint-7", "/elsewhere/checkpoint-100", "checkpoint-40"):  # of the last two runs would mix
        with pytest.raises(ValueError, match="--resume_from_checkpoint.*checkpoint-100"):
            find_checkpoint(tmp_path, other)


def test_a_run_is_gone_on_with_under_its_own_arguments(tmp_path):
    arguments = parse_args(["--train_data_dir", "images", "--output_dir", "out", "--max_train_steps", "5"]).flat()
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    check_resumed_arguments(
        tmp_path, arguments | {"max_train_steps": 9, "log_steps": 1, "train_data_dir": "moved"}, {}
    )
    with pytest.raises(ValueError, match="latent_channels.*learning_rate"):
        check_resumed_arguments(tmp_path, arguments | {"latent_channels": 6, "learning_rate": 1.0}, {})


@pytest.mark.parametrize(
    "own, named",
    [
        ({"num_chains": 2}, "--num_chains 2"),
        ({"posterior_langevin_steps": 2}, None),  # which does nothing without a calibrated posterior
        ({"posterior_langevin_steps": 2, "calibration": "both"}, "--posterior_langevin_steps 2"),
        ({"shuffle_buffer_size": 20_000}, None),
        ({"shuffle_buffer_size": 20_000, "streaming": True}, "--shuffle_buffer_size 20000"),
        ({"initial_posterior_dual": 5.0, "healthy_states": 5, "tracker_project_name": "mine"}, None),
    ],
)
def test_a_run_with_what_a_retired_argument_did_is_not_resumed(own, named, tmp_path):
    arguments = parse_args(["--train_data_dir", "images", "--output_dir", "out"]).flat()
    (tmp_path / "training_args.json").write_text(json.dumps(arguments | own))
    arguments |= {name: value for name, value in own.items() if name in arguments}
    with pytest.raises(ValueError, match=named) if named else nullcontext():
        check_resumed_arguments(tmp_path, arguments, RETIRED)


@pytest.mark.parametrize("held", ["", "[1]", "{", "\udcff"])
def test_arguments_that_can_not_be_read_are_named(held, tmp_path):
    (tmp_path / "training_args.json").write_bytes(held.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="training_args.json"):
        check_resumed_arguments(tmp_path, {}, {})


def test_overwriting_leaves_nothing_of_the_old_run_and_all_of_the_users(tmp_path):
    for name in ("vae", "energy_model", "scheduler", "samples", "checkpoint-5", ".checkpoint-9", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for name in ("metrics.jsonl", "model_index.json", "pipeline.py", "thesis.txt"):
        (tmp_path / name).write_text("x")
    clear_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "thesis.txt"}
