"""Bad input gets one clear error that names the argument, before any work; nothing of the user's is overwritten."""

import builtins
import json

import pytest
from training_runs import TINY, run, write_images

from ecvae_diffusers.training.data.images import ImageDataset, load_images
from ecvae_diffusers.training.run.checkpoints import (
    STATE_FILES,
    check_resumed_arguments,
    find_checkpoint,
    write_manifest,
)
from ecvae_diffusers.training.run.folder import check_output_dir, check_pretrained_stays, clear_run
from ecvae_diffusers.training.run.log import RunLog, read_metrics
from ecvae_diffusers.training.train_ecvae import parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]


@pytest.mark.parametrize(
    "prepare, extra, message",
    [
        (lambda p: (p / "data").mkdir(), [], "--train_data_dir must hold images, but"),
        (
            lambda p: [
                f.write_bytes(f.read_bytes()[:40])
                for f in sorted(write_images(p / "data").iterdir())
                if f.stem > "011"
            ],
            [],
            "12 of 24 images can't be read, among them: ",
        ),
        (lambda p: write_images(p / "data", count=4), [], "--train_batch_size must be at most"),
        (
            lambda p: write_images(p / "data"),
            ["--mixed_precision", "fp16"],
            "--mixed_precision fp16 needs an accelerator",
        ),
    ],
    ids=["empty", "half corrupt", "too few", "fp16"],
)
def test_script_refuses_before_it_writes(prepare, extra, message, tmp_path):
    prepare(tmp_path)
    result = run("--train_data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", *TINY, *extra)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_broken_file_is_named(tmp_path):
    folder = write_images(tmp_path / "data", count=4)
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    images = load_images(None, None, str(folder), None, None, None)
    with pytest.raises(ValueError, match=r"1 of 4 images can't be read.*002\.png"):
        ImageDataset(images, 16, progress=False)
    rest = ImageDataset(images, 16, skip_broken=True, progress=False)
    assert len(rest) == 3 and "1 of 4 images can't be read" in rest.skipped and "002.png" in rest.skipped
    (folder / "002.png").unlink()
    whole = ImageDataset(load_images(None, None, str(folder), None, None, None), 16, progress=False)
    assert whole.skipped is None and all((whole[i] == rest[i]).all() for i in range(3))
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 3 images can't be read"):
        ImageDataset(load_images(None, None, str(folder), None, None, None), 16, skip_broken=True, progress=False)


def test_foreign_output_folder_is_refused_and_stays(tmp_path):
    data, out = write_images(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        result = run("--train_data_dir", data, "--output_dir", out, *TINY, "--max_train_steps", 1, *extra)
        assert result.returncode != 0
        assert "holds files that are not of a training run" in result.stderr
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [("thesis.txt", "years of work")]


def test_what_a_run_starts_from_must_not_lie_where_it_writes(tmp_path):
    """It would be removed before the first step."""
    run, link = tmp_path / "run", tmp_path / "link"
    (run / "checkpoint-2" / "pipeline").mkdir(parents=True)
    link.symlink_to(run)
    for path in (run, run / "checkpoint-2" / "pipeline", link / "checkpoint-2"):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path .* must not lie in --output_dir"):
            check_pretrained_stays(run, str(path))
    check_pretrained_stays(run, str(tmp_path))
    check_pretrained_stays(tmp_path / "other", str(run))
    check_pretrained_stays(run, "me/run")


def test_the_run_of_another_script_is_neither_replaced_nor_gone_on_with(tmp_path):
    (tmp_path / "training_args.json").write_text('{"component": "vae"}')
    for resume in (False, True):
        check_output_dir(tmp_path, overwrite=True, resume=resume, component="vae")
        with pytest.raises(ValueError, match=r"of another script \(of a vae, not of a flow\): choose another folder"):
            check_output_dir(tmp_path, overwrite=True, resume=resume, component="flow")


def test_a_finished_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "training_args.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a training run: replace it with --overwrite_output_dir"):
        check_output_dir(tmp_path, overwrite=False, resume=False, component="vae")
    check_output_dir(tmp_path, overwrite=True, resume=False, component="vae")
    check_output_dir(
        tmp_path, overwrite=False, resume=True, component="vae"
    )  # cut off before its first checkpoint: starts at 0
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="finds no checkpoint in .* but a finished or best model"):
        check_output_dir(tmp_path, overwrite=False, resume=True, component="vae")
    (tmp_path / "checkpoint-10").mkdir()
    check_output_dir(tmp_path, overwrite=False, resume=True, component="vae")
    with pytest.raises(ValueError, match="holds a training run: go on with --resume_from_checkpoint latest"):
        check_output_dir(tmp_path, overwrite=False, resume=False, component="vae")


def test_unknown_checkpoint_is_named_with_those_there_are(tmp_path):
    for checkpoint in (tmp_path / "checkpoint-40", tmp_path / "checkpoint-100"):
        checkpoint.mkdir()
        for name in STATE_FILES:
            (checkpoint / name).write_text("state")
        write_manifest(checkpoint)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-100")).name == "checkpoint-100"
    for other in ("checkpoint-7", "/elsewhere/checkpoint-100", "checkpoint-40"):  # of the last two runs would mix
        with pytest.raises(ValueError, match="--resume_from_checkpoint.*'checkpoint-40', 'checkpoint-100'"):
            find_checkpoint(tmp_path, other)


def test_a_run_is_gone_on_with_under_its_own_arguments(tmp_path):
    arguments = parse_args([*GIVEN, "--max_train_steps", "5"]).flat()
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    check_resumed_arguments(tmp_path, arguments | {"max_train_steps": 9, "log_steps": 1, "train_data_dir": "moved"})
    with pytest.raises(
        ValueError, match=r"--latent_channels \(was 128, is 6\), --learning_rate \(was 0.0005, is 1.0\)"
    ):
        check_resumed_arguments(tmp_path, arguments | {"latent_channels": 6, "learning_rate": 1.0})


@pytest.mark.parametrize("held", ["", "[1]", "{", "\udcff"])
def test_arguments_that_can_not_be_read_are_named(held, tmp_path):
    (tmp_path / "training_args.json").write_bytes(held.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="training_args.json"):
        check_resumed_arguments(tmp_path, {})


def test_metrics_of_a_run_that_was_cut_off(tmp_path):
    """Killed while it wrote a line, after its last checkpoint at step 2."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "re')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log = RunLog(path)
    log.cut(2)
    log.write(step=3, loss=0.5)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_overwriting_leaves_nothing_of_the_old_run_and_all_of_the_users(tmp_path):
    for name in ("vae", "energy_model", "scheduler", "samples", "checkpoint-5", ".checkpoint-9", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for name in ("metrics.jsonl", "model_index.json", "pipeline.py", "thesis.txt"):
        (tmp_path / name).write_text("x")
    clear_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "thesis.txt"}


def test_missing_extra_is_named(monkeypatch):
    """As on a machine where only the base package is installed: the import of `datasets` fails."""
    real_import = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ImportError, match=r"pip install 'ecvae-diffusers\[training\]'"):
        load_images("images", None, None, None, None, None)


def test_wrong_size_of_a_pretrained_model_is_refused(tmp_path):
    data = write_images(tmp_path / "data", count=8)
    arguments = ["--train_data_dir", data, "--max_train_steps", 1]
    assert run(*arguments, "--output_dir", tmp_path / "a", *TINY).returncode == 0
    result = run(
        *arguments, "--output_dir", tmp_path / "b", "--resolution", 32, "--train_batch_size", 8,
        "--pretrained_model_name_or_path", tmp_path / "a",
    )  # fmt: skip
    assert result.returncode != 0 and not (tmp_path / "b").exists()
    assert "is for images of 16 px, but --resolution is 32" in result.stderr
