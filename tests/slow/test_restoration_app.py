"""The app of `spaces/restoration` in a real browser, driven as a person does. Slow: `make test-slow`.

It runs in an environment with the packages of its `requirements.txt`, on top of those of the tests.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from chromium import Chromium
from environments import make_environment

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.commands.restore import TASKS


ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "spaces" / "restoration"
MESSAGES = "[...document.querySelectorAll('.toast-body')].map(e => e.textContent).join()"
SHOWN = "[...document.querySelectorAll('#summary img')].map(e => e.src).join()"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """Starts the app with arguments, as in a clone after what its README says. Its standard error goes to a file."""
    install = make_environment(tmp_path_factory.mktemp("environment"), inherits=True)
    programs = install("--no-build-isolation", ROOT, "-r", APP / "requirements.txt")
    # Bytecode is kept, so that only the first start compiles.
    others = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MODEL", "GRADIO_SERVER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in others}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

    def start(errors: Path, *arguments: Path, **variables: str) -> subprocess.Popen:
        command = [programs / "python", APP / "app.py", *arguments]
        with errors.open("w") as file:
            # A shell's background jobs ignore SIGINT, and so would what they start.
            return subprocess.Popen(
                command, env=environment | variables, stdout=subprocess.PIPE, stderr=file, text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    return start


@contextlib.contextmanager
def opened(
    start: Callable[..., subprocess.Popen], folder: Path, *arguments: Path, **variables: str
) -> Iterator[Chromium]:
    """
    A browser that shows an app. It may ask for nothing else. The app writes `errors` into the folder, but no traceback, and
    leaves no pictures.
    """
    errors, kept = folder / "errors", folder / "pictures"
    app = start(errors, *arguments, **variables, GRADIO_TEMP_DIR=str(kept))
    try:
        line = next((line for line in app.stdout if "http://" in line), None)
        assert line, errors.read_text()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        with Chromium(folder / "profile") as browser:
            browser.open(address)
            browser.wait("!!document.querySelector('#editor canvas')")
            browser.rest(2)
            yield browser
            assert all(one.startswith((address, f"blob:{address}", "data:")) for one in browser.requests)
        assert any(path.is_file() for path in kept.rglob("*"))
    finally:
        app.send_signal(signal.SIGINT)
        app.communicate(timeout=300)
    assert str(APP) not in errors.read_text() and app.returncode == 0
    assert not any(path.is_file() for path in kept.rglob("*"))


def upload(browser: Chromium, picture: np.ndarray, path: Path) -> None:
    PIL.Image.fromarray(picture).save(path)
    if browser.evaluate("!document.querySelector('#editor input[type=file]')"):
        browser.click("#editor button[title='Clear canvas']")
        browser.wait("!!document.querySelector('#editor input[type=file]')")
    browser.drop("#editor", path)
    browser.wait("!!document.querySelector('#editor button[title=\"Brush Size\"]')")
    browser.rest(1)


def choose(browser: Chromium, dropdown: str, choice: str) -> None:
    browser.click(f"{dropdown} input")
    browser.wait(f"!!document.querySelector('{dropdown} [role=option]')")
    browser.click(f"{dropdown} [role=option][aria-label='{choice}']")
    browser.wait(f"document.querySelector('{dropdown} input').value === '{choice}'")


def restore(
    browser: Chromium, progress: str = ".", stop: bool = False, count: int = 4
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Press the button, watch the progress, stop if asked to, and return the answers, and mean and uncertainty, (H, W, 3)."""
    before = browser.evaluate(SHOWN)
    browser.click("#restore")
    browser.wait(f"/{progress}/.test(document.querySelector('#answers').innerText)")
    if stop:
        browser.click("#stop")
    browser.wait(f"{SHOWN} !== {json.dumps(before)} && document.querySelectorAll('#answers img').length === {count}")
    browser.wait("[...document.querySelectorAll('#output img')].every(image => image.complete)")
    captions = browser.evaluate("document.querySelector('#output').innerText")
    assert len(re.findall(r"residual \d", captions)) == count + 1 and "uncertainty" in captions

    def pixels(gallery: str, i: int) -> np.ndarray:
        return browser.pixels(
            "(() => { const canvas = document.createElement('canvas');"
            f"const image = document.querySelectorAll('{gallery} img')[{i}];"
            "canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;"
            "canvas.getContext('2d').drawImage(image, 0, 0); return canvas; })()"
        )

    return [pixels("#answers", i) for i in range(count)], [pixels("#summary", i) for i in range(2)]


def test_a_person_fills_a_hole(start, tmp_path):
    with PIL.Image.open(ROOT / "examples" / "damaged.png") as image:
        picture = np.asarray(image)
    with opened(start, tmp_path, ROOT / "model_cards" / "fashion_mnist") as browser:
        upload(browser, picture, tmp_path / "damaged.png")
        # The picture is shown in the middle of the canvas: a stroke around its center.
        browser.drag("#editor canvas", [(0.45, 0.45), (0.5, 0.5), (0.55, 0.55)])
        browser.rest(1)
        answers, (mean, uncertainty) = restore(browser, progress=r"\d+\/75 steps")
        assert [one.shape for one in (*answers, mean, uncertainty)] == [(32, 32, 3)] * 6
        hole = uncertainty[..., 0] > 20
        rows, columns = hole.nonzero()
        assert 30 < hole.sum() < 300 and 8 < rows.min() < rows.max() < 24 and 8 < columns.min() < columns.max() < 24
        for one in (*answers, mean):
            assert np.abs(one[~hole].astype(int) - picture[~hole][:, None]).max() <= 2
        assert all((one[hole] != other[hole]).any() for one, other in zip(answers, answers[1:]))
        assert np.abs(mean[hole].astype(int) - np.mean(answers, 0)[hole]).mean() < 10
        assert browser.evaluate(MESSAGES) == ""

        # A long search that is stopped gives the answers so far.
        for slider, value in (("#num_answers", "16"), ("#steps", "300")):
            browser.click(f"{slider} input[type=number]")
            browser.evaluate(f"document.querySelector('{slider} input[type=number]').select()")
            browser.call("Input.insertText", text=value)
            browser.press("Tab")
        stopped, _ = restore(browser, progress=r"\d+\/300 steps", stop=True, count=16)
        assert all((one != other).any() for one, other in zip(stopped, answers))
        assert int(re.findall(r"(\d+)/300", (tmp_path / "errors").read_text())[-1]) < 300


def test_tasks_classes_and_messages(start, tmp_path):
    """A model of colours and classes, without an energy model, which a variable names."""
    torch.manual_seed(0)
    vae = AutoencoderEC(
        sample_size=16, block_out_channels=(8, 8), latent_channels=4, num_class_embeds=2,
        id2label={"0": "cat", "1": "dog"}, reconstruction_variance=0.05,
    )  # fmt: skip
    ECVAEPipeline(vae=vae.eval()).save_pretrained(tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    with opened(start, tmp_path, MODEL=str(tmp_path / "model")) as browser:
        # No picture, and one that is too small: a message each, and the app goes on.
        browser.click("#restore")
        browser.wait(f"{MESSAGES}.length > 0")
        upload(browser, picture[:8, :8], tmp_path / "small.png")
        browser.drag("#editor canvas", [(0.5, 0.5), (0.51, 0.51)])
        browser.rest(1)
        browser.click("#restore")
        browser.wait(f"{MESSAGES}.includes('image') && {MESSAGES}.includes('16x16')")

        # Nothing painted: the pipeline's warning, and the picture itself, which is larger than the model's.
        upload(browser, picture, tmp_path / "picture.png")
        answers, _ = restore(browser)
        browser.wait(f"{MESSAGES}.includes('mask_image')")
        assert all(np.abs(one.astype(int) - picture).max() <= 2 for one in answers)

        browser.click("#task input")
        browser.wait("!!document.querySelector('#task [role=option]')")
        offered = browser.evaluate("[...document.querySelectorAll('#task [role=option]')].map(e => e.ariaLabel)")
        assert offered[1:] == list(TASKS)
        browser.press("Escape")
        choose(browser, "#label", "dog")
        for task, size in (("super_resolution_x2", (48, 40)), ("deblurring", (24, 20)), ("colorization", (24, 20))):
            choose(browser, "#task", task)
            asked_for = json.dumps(task == "deblurring")
            browser.wait(f"!!document.querySelector('#blur_std')?.offsetParent === {asked_for}")
            answers, (mean, uncertainty) = restore(browser)
            assert {one.shape[:2] for one in (*answers, mean, uncertainty)} == {size}, task


def test_a_folder_that_is_no_model_ends_with_one_line(start, tmp_path):
    (tmp_path / "empty").mkdir()
    app = start(tmp_path / "errors", tmp_path / "empty")
    output, _ = app.communicate(timeout=600)
    assert app.returncode != 0 and not output
    errors = (tmp_path / "errors").read_text()
    assert errors.count("\n") == 1 and str(tmp_path / "empty") in errors
