"""What `ecvae page` writes, in a real browser and driven as a person does. Slow: `make test-slow`.

Takes Chromium or Chrome, and npm, where they are installed, and else installs Debian's packages.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from chromium import ISOLATED, Chromium, find_program, serving

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.cli import main
from ecvae_diffusers.training.data.digits import write_digits


DIGITS = Path(__file__).resolve().parents[2] / "model_cards" / "digits"
STATUS = "document.querySelector('#status')"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def page(data, tmp_path_factory) -> Path:
    find_program(("npm",))
    folder = tmp_path_factory.mktemp("pages") / "digits"
    main(["page", DIGITS, "--output_dir", folder, "--data", data / "train", "--vendor"])
    return folder


@pytest.fixture(scope="module")
def pipe() -> ECVAEPipeline:
    pipe = ECVAEPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def opened(page: Path, profile: Path, headers: dict[str, str] | None = None) -> Iterator[Chromium]:
    """A browser that shows a page, which must stay without errors and ask for nothing but its own address."""
    with serving(page, headers) as address, Chromium(profile) as browser:
        browser.open(address)
        browser.wait(f"{STATUS}.textContent.startsWith('Ready')")
        yield browser
        browser.rest(0.2)
        assert browser.problems == []
        assert all(re.match(f"(blob:)?{address}", one) or one.startswith("data:") for one in browser.requests)


def latents_of(browser: Chromium, expression: str, count: int = 1) -> torch.Tensor:
    return torch.tensor(browser.evaluate(f"Array.from({expression})")).reshape(count, -1, 1, 1)


def levels(pipe: ECVAEPipeline, latents: torch.Tensor, **more) -> np.ndarray:
    """The pipeline's pictures in 8 bits."""
    return (255 * pipe(latents=latents, output_type="np", **more).images).round()


def explored(browser: Chromium) -> tuple[torch.Tensor, np.ndarray]:
    """Latents of the explored picture, and its pixels (H, W, 3), once it rests."""
    browser.rest(0.5)
    latents = latents_of(browser, "ecvae.state.latents")
    return latents, browser.pixels("document.querySelector('#picture')")


def assert_equal_to_one_level(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_person_uses_all_of_it(page, pipe, data, tmp_path):
    with opened(page, tmp_path / "profile") as browser:
        # The wall, and a key that redraws it.
        walls = []
        for seed in range(2):
            if seed:
                browser.press("n")
                browser.wait("document.querySelector('#seed').textContent === '1'")
            latents = latents_of(browser, "ecvae.state.wall.flatMap(one => Array.from(one.latents))", 24)
            tiles = [browser.pixels(f"document.querySelectorAll('#wall canvas')[{i}]") for i in range(24)]
            assert_equal_to_one_level(np.stack(tiles), levels(pipe, latents))
            walls.append(latents)
        assert abs(walls[0].mean()) < 0.2 and abs(walls[0].std() - 1) < 0.1 and (walls[0] != walls[1]).all()

        # Ranked, the same samples come by their energies.
        browser.wait("document.querySelector('#status').textContent.startsWith('Ready')")
        browser.press("r")
        browser.wait("ecvae.state.wall[0].energy !== undefined")
        ranked = latents_of(browser, "ecvae.state.wall.flatMap(one => Array.from(one.latents))", 24)
        energies = browser.evaluate("ecvae.state.wall.map(one => one.energy)")
        assert energies == sorted(energies)
        assert sorted(ranked[:, 0].flatten().tolist()) == sorted(walls[1][:, 0].flatten().tolist())
        assert energies == pytest.approx(pipe.score(levels(pipe, ranked) / 255).tolist(), abs=5e-3)
        walls[1] = ranked

        # The map, by mouse and keys: directions 1 and 2 go where the pointer is, the others stay.
        browser.click("#wall button:nth-child(5)")
        start, _ = explored(browser)
        assert torch.equal(start, walls[1][4:5])
        browser.drag("#map", [(0.5, 0.5), (0.6, 0.4), (0.75, 0.25)])
        latents, pixels = explored(browser)
        assert_equal_to_one_level(pixels, levels(pipe, latents)[0])
        values = [
            float(text)
            for text in browser.evaluate(
                "[...document.querySelectorAll('#directions output')].map(e => e.textContent)"
            )
        ]
        assert values[:2] == pytest.approx([1.5, 1.5], abs=0.11)
        browser.press("Tab")
        browser.evaluate("document.querySelector('#map').focus()")
        browser.press("ArrowLeft")
        explored(browser)
        assert browser.evaluate("document.querySelector('#directions output').textContent") == f"{values[0] - 0.2:.1f}"

        # A slider, by keys.
        browser.evaluate("document.querySelectorAll('#directions input')[2].focus()")
        for _ in range(5):
            browser.press("ArrowRight")
        moved, pixels = explored(browser)
        assert (moved - latents).norm() > 0.1
        assert_equal_to_one_level(pixels, levels(pipe, moved)[0])

        # The walk plays, counts its frames and stops.
        browser.press("w")
        browser.rest(1.5)
        frames = browser.evaluate("document.querySelector('#frames').textContent")
        assert int(frames.split()[0]) >= 5
        browser.press("w")
        stopped, pixels = explored(browser)
        assert (stopped - moved).norm() > 0.1
        assert torch.equal(explored(browser)[0], stopped)
        assert_equal_to_one_level(pixels, levels(pipe, stopped)[0])

        # A dropped picture: itself, its reconstruction, its energy.
        file = next((data / "test" / "3").iterdir())
        picture = np.asarray(PIL.Image.open(file))
        browser.drop("#drop", file)
        browser.wait("ecvae.state.yours && ecvae.state.yours.energy !== undefined")
        assert (browser.pixels("document.querySelector('#original')") == picture[..., None]).all()
        given = (picture / np.float32(255))[None, ..., None]
        expected = (255 * pipe.reconstruct(given, output_type="np").images).round()
        assert_equal_to_one_level(browser.pixels("document.querySelector('#reconstruction')"), expected[0])
        assert browser.evaluate("ecvae.state.yours.energy") == pytest.approx(pipe.score(given).item(), abs=2e-3)
        assert browser.evaluate("document.querySelectorAll('#histogram line').length") == 1
        browser.click("#from-yours")
        _, pixels = explored(browser)
        assert_equal_to_one_level(pixels, expected[0])

        # A painted hole: known pixels stay exactly, the others are filled.
        browser.drag("#hole", [(0.4, 0.4), (0.5, 0.5), (0.6, 0.6)])
        mask = np.array(browser.evaluate("Array.from(ecvae.state.hole.mask)")).reshape(16, 16) == 1
        assert mask[6, 6] and mask[9, 9] and 10 < mask.sum() < 100
        painted = browser.pixels("document.querySelector('#hole')")
        assert (painted[mask] != painted[mask][:, :1]).any()  # in a colour
        browser.press("f")
        browser.wait("ecvae.state.hole.filled && !ecvae.state.hole.isFilling")
        filled = browser.pixels("document.querySelector('#hole')")
        assert (filled[~mask] == picture[~mask][:, None]).all() and (filled == filled[..., :1]).all()

        # A saved picture is the shown one.
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.click("#save-hole")
        browser.rest(2)
        with PIL.Image.open(tmp_path / "filled.png") as saved:
            assert (np.asarray(saved.convert("RGB")) == filled).all()


def test_it_works_offline_after_the_first_load(page, tmp_path):
    with Chromium(tmp_path / "profile") as browser:
        with serving(page) as address:
            browser.open(address)
            browser.wait(f"{STATUS}.textContent.startsWith('Ready')")
            assert "offline" in browser.evaluate(f"{STATUS}.textContent")
        browser.open(address)  # nobody serves it any more
        browser.wait(f"{STATUS}.textContent.startsWith('Ready')")
        assert browser.evaluate("ecvae.state.wall.length") == 24
        assert browser.problems == []


def test_threads_where_the_server_sends_the_headers_of_the_space(page, pipe, tmp_path):
    with opened(page, tmp_path / "profile", ISOLATED) as browser:
        assert browser.evaluate("crossOriginIsolated")
        expected = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        assert f"{expected} thread" in browser.evaluate("document.querySelector('#frames').textContent")
        latents, pixels = explored(browser)
        assert_equal_to_one_level(pixels, levels(pipe, latents)[0])


def test_a_phone_in_the_dark(page, tmp_path):
    with serving(page) as address, Chromium(tmp_path / "profile") as browser:
        browser.emulate(390, 844, dark=True, mobile=True)
        browser.open(address)
        browser.wait(f"{STATUS}.textContent.startsWith('Ready')")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 64
        before, _ = explored(browser)
        browser.touch("#map", [(0.5, 0.5), (0.3, 0.6), (0.1, 0.9)])
        after, _ = explored(browser)
        assert (before - after).norm() > 0.1
        assert browser.problems == []
        # All that can be pressed has a name for screen readers.
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = [
            (node["role"]["value"], node["name"]["value"])
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in ("button", "slider", "image", "img")
        ]
        assert len(named) > 40 and all(name.strip() for _, name in named)


def test_one_message_for_an_old_browser_and_a_picture_that_is_too_large(page, tmp_path):
    with serving(page) as address, Chromium(tmp_path / "profile") as browser:
        PIL.Image.new("L", (8000, 8000)).save(tmp_path / "large.png")
        (tmp_path / "text.png").write_text("no picture")
        browser.open(address)
        browser.wait(f"{STATUS}.textContent.startsWith('Ready')")
        messages = []
        for name in ("large.png", "text.png"):
            browser.drop("#drop", tmp_path / name)
            browser.wait(f"document.querySelector('#message').textContent.includes('{name}')")
            messages.append(browser.evaluate("document.querySelector('#message').textContent"))
        assert "8000" in messages[0] and browser.evaluate("ecvae.state.yours") is None
        # What a browser without SIMD says of every module that needs it.
        script = "WebAssembly.validate = () => false"
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        browser.open(address)
        browser.wait(f"{STATUS}.className === 'wrong'")
        assert "SIMD" in browser.evaluate(f"{STATUS}.textContent")
        assert browser.evaluate("document.querySelector('#main').hidden")
        assert browser.problems == []


def test_classes_and_colours(page, data, tmp_path):
    torch.manual_seed(0)
    names = {"0": "cat", "1": "dog"}
    vae = AutoencoderEC(
        sample_size=8, in_channels=3, block_out_channels=(8, 16), latent_channels=6, num_class_embeds=2, id2label=names
    )
    with torch.no_grad():  # new networks do not see their class
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipe = ECVAEPipeline(vae=vae.half().float().eval())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    main(["page", tmp_path / "model", "--output_dir", tmp_path / "page", "--data", data / "test"])
    # Without another download.
    (tmp_path / "page" / "vendor").symlink_to(page / "vendor")
    described = tmp_path / "page" / "page.json"
    described.write_text(re.sub(r'"runtime": *"[^"]*"', '"runtime": "vendor/"', described.read_text()))
    with opened(tmp_path / "page", tmp_path / "profile") as browser:
        assert browser.evaluate("[...document.querySelectorAll('#classes button')].map(e => e.textContent)") == [
            "any",
            "cat",
            "dog",
        ]
        pictures = []
        for number in (1, 2):
            browser.click(f"#classes button:nth-of-type({number + 1})")
            browser.rest(1)
            latents = latents_of(browser, "ecvae.state.wall.flatMap(one => Array.from(one.latents))", 24)
            pictures.append(browser.pixels("document.querySelectorAll('#wall canvas')[3]"))
            assert_equal_to_one_level(pictures[-1], levels(pipe, latents[3:4], class_labels=[number - 1])[0])
        assert (pictures[0] != pictures[1]).any()
        assert browser.evaluate("document.querySelector('#energy-part').hidden")
