"""The report of a real run, in a real browser: what it shows, and that nothing is broken. Slow: `make test-slow`.

Takes Chromium or Chrome where there is one, and else installs Debian's `chromium`.
"""

import html
import json
import re
import subprocess
from pathlib import Path

import PIL.Image
import pytest
from chromium import find_browser
from training_runs import TINY, succeed, write_images

from ecvae_diffusers.report.report import main


WIDTH = 1280
# Goes into a copy of the page, whose findings are then read from its DOM.
PROBE = """<script>
const errors = [];
// Captured, so that a resource that does not load counts too.
addEventListener("error", event => errors.push(event.message || "can't load " + event.target.outerHTML.slice(0, 200)), true);
addEventListener("load", () => {
  const root = document.documentElement;
  const found = {
    errors,
    broken: [...document.images].filter(image => !image.complete || image.naturalWidth === 0).map(image => image.alt),
    images: document.images.length,
    unseen: [...document.images].filter(image => image.getBoundingClientRect().width < 50).map(image => image.alt),
    width: [root.scrollWidth, window.innerWidth],
    sections: [...document.querySelectorAll("section")].map(section => section.id),
    tables: document.querySelectorAll("table").length,
    verdict: document.querySelectorAll(".findings li").length,
    dead_links: [...document.querySelectorAll("nav a")].filter(a => !document.querySelector(a.hash)).length,
  };
  const output = document.createElement("pre");
  output.id = "found";
  output.textContent = JSON.stringify(found);
  document.body.append(output);
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A short real run with all that a report can show, but events of the guard."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_images(folder / "data", count=64)
    succeed(
        "--train_data_dir", data, "--output_dir", folder / "run", *TINY, "--max_train_steps", 60, "--log_steps", 2,
        "--save_images_steps", 10, "--evaluation_steps", 30, "--evaluation_samples", 32,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def page(run_folder) -> Path:
    main([str(run_folder)])
    return run_folder / "report.html"


def browse(browser: str, page: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=20000", *arguments,
        page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def probe(browser: str, text: str, folder: Path, width: int = WIDTH) -> dict:
    """What a browser of that width finds in a page."""
    assert text.count("<head>") == 1
    copy = folder / "copy.html"
    copy.write_text(text.replace("<head>", f"<head>{PROBE}"), encoding="utf-8")
    result = browse(browser, copy, folder / "profile", "--dump-dom", f"--window-size={width},900")
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-3000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(found[1])), "console": console}


def test_page_is_whole_in_a_browser(browser, page, tmp_path):
    found = probe(browser, page.read_text(encoding="utf-8"), tmp_path)
    assert found["errors"] == found["console"] == found["broken"] == found["unseen"] == []
    assert found["images"] > 25
    assert found["width"][0] <= found["width"][1] == WIDTH
    assert found["sections"] == [
        "verdict", "samples", "run", "calibration", "energies", "chain", "training", "reconstructions", "evaluation",
        "nearest-neighbours",
    ]  # fmt: skip
    assert found["tables"] > 10 and found["verdict"] == 10 and found["dead_links"] == 0


def test_page_fits_a_narrow_window(browser, page, tmp_path):
    found = probe(browser, page.read_text(encoding="utf-8"), tmp_path, width=600)
    assert found["width"][0] <= found["width"][1] == 600


def test_faults_would_be_found(browser, page, tmp_path):
    """What the tests above rely on: a page with each fault does not pass."""
    text = page.read_text(encoding="utf-8")
    text = text.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    text = text.replace("</main>", '<script>console.error("a"); b()</script><div style="width: 3000px">c</div></main>')
    found = probe(browser, text, tmp_path)
    assert len(found["broken"]) == 1 and found["broken"][0].startswith("Grid of samples")
    assert len(found["errors"]) == 2 and found["console"]
    assert found["width"][0] > WIDTH


def test_screenshot_shows_something(browser, page, tmp_path):
    picture = tmp_path / "page.png"
    browse(browser, page, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={WIDTH},4000")
    with PIL.Image.open(picture) as image:
        assert image.size == (WIDTH, 4000)
        # No part of it is blank: each has headings, curves or pictures, anti-aliased in many colours.
        for top in range(0, 4000, 1000):
            colours = image.convert("RGB").crop((0, top, WIDTH, top + 1000)).getcolors(maxcolors=2**24)
            assert len(colours) > 50, top
