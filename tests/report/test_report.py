# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The page of a report, as a browser would read it."""

import base64
import io
import json
import math
import re
import warnings
import xml.etree.ElementTree
from collections import Counter
from html import unescape
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from report_runs import record, write_lines, write_pictures, write_run

from ecvae_diffusers.report.report import main


class Page:
    """A page's sections with their text, its images, and what it refers to."""

    def __init__(self, path: Path):
        self.text = path.read_text(encoding="utf-8")
        bodies = dict(re.findall(r'<section id="(.*?)">(.*?)</section>', self.text, re.DOTALL))
        self.sections = {name: unescape(re.sub("<.*?>", "", body)) for name, body in bodies.items()}
        images = [(name, tag) for name, body in bodies.items() for tag in re.findall("<img .*?>", body)]
        self.images = [dict(re.findall(r'(\w+)="(.*?)"', unescape(tag)), section=name) for name, tag in images]
        self.references = re.findall(r'(?:src|href|srcset|action)="(.*?)"', self.text)

    def charts(self) -> list[str]:
        return [re.match("Chart of (.*) over", one["alt"])[1] for one in self.images if "Chart" in one["alt"]]


def make_page(run: Path, output: Path | None = None) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([str(run), *([] if output is None else ["--output", str(output)])])
    return Page(output or run / "report.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """Of a run with everything that there can be."""
    run = write_run(tmp_path_factory.mktemp("runs") / "healthy")
    write_pictures(run, ("samples", "reconstructions", "chain", "neighbours"), range(200, 2001, 200))
    rng = np.random.default_rng(0)
    energies = [{kind: rng.normal(size=256).tolist() for kind in ("data", "samples", "targets")} for _ in range(10)]
    write_lines(run / "energies.jsonl", [{"step": 200 + 200 * i, **one} for i, one in enumerate(energies)])
    measures = {
        "kernel_distance": 0.01, "kernel_distance_std": 0.001, "precision": 0.5, "recall": 0.4, "density": 0.9, "coverage": 0.5,
        "num_real": 512, "features": "lite0",
    }  # fmt: skip
    evaluations = [{"step": s, "frechet_distance": 30 - s / 100, **measures} for s in (1000, 2000)]
    write_lines(run / "evaluations.jsonl", evaluations)
    message = "<script>alert(1)</script> & so on"
    write_lines(run / "events.jsonl", [{"step": 300, "kind": "rollback", "message": message, "to_step": 200}])
    return make_page(run)


def test_page_needs_nothing_besides_itself(page):
    assert not re.search("<(script|link|iframe|object)", page.text)
    assert all(one.startswith(("data:", "#")) for one in page.references)
    assert "url(" not in page.text and "@import" not in page.text
    assert {one[1:] for one in page.references if one.startswith("#")} == set(page.sections)
    # Text of events is escaped.
    assert "<script>alert(1)</script> & so on" in page.sections["guard-events"] and "<script>" not in page.text


def test_page_shows_all_that_a_run_left(page):
    assert list(page.sections) == [
        "verdict", "samples", "run", "calibration", "energies", "chain", "training", "reconstructions", "evaluation",
        "nearest-neighbours", "guard-events",
    ]  # fmt: skip
    assert page.charts() == [
        "dual variable lambda", "constraint", "drift per pixel", "energy gap", "energies", "spread of samples",
        "reconstruction", "KL divergence", "active units", "gradient norms", "learning rates", "images per second",
        "peak memory", "Frechet distance", "kernel distance", "precision, recall, density, coverage",
    ]  # fmt: skip
    for image in page.images:
        kind, content = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", image["src"]).groups()
        content = base64.b64decode(content, validate=True)
        if kind == "png":
            PIL.Image.open(io.BytesIO(content)).load()
        else:
            assert xml.etree.ElementTree.fromstring(content).tag.endswith("svg")
        assert image["alt"]
    pictures = [image for image in page.images if image["src"].startswith("data:image/png")]
    counts = Counter(one["section"] for one in pictures)
    assert counts == {"samples": 6, "reconstructions": 6, "chain": 3, "nearest-neighbours": 1}
    # The last one is shown first and large, magnified by a whole number.
    assert pictures[0]["alt"].endswith("step 2000") and pictures[0]["width"] == str(4 * 135)
    assert "2000 of 2000" in page.sections["run"] and "10 (step 2000)" in page.sections["run"]
    assert "Healthy: all 9 checks" in page.sections["verdict"] and "Try:" not in page.sections["verdict"]


@pytest.mark.parametrize(
    "arguments, kind, samples",
    [
        ({"calibration": "none", "use_ema": True}, "Plain VAE, no calibration", "One pass through the decoder"),
        ({"calibration": "energy", "component": "flow"}, "Energy-calibrated flow", "the flow's inverse"),
    ],
)
def test_the_page_says_what_was_trained(tmp_path, arguments, kind, samples):
    names = ("step", "reconstruction")
    own = {"posterior_dual": 10.0, "refined_reconstruction": 9.0, "bits_per_dimension": 2.0}
    run = write_run(tmp_path / "run", 40, arguments, lambda one: {name: one[name] for name in names} | own)
    write_pictures(run, ("samples", "chain"), range(40, 41), size=(33, 33))
    write_lines(run / "energies.jsonl", [{"step": 40, "data": [0, 1], "samples": [0, 1], "targets": [0, 1]}])
    page = make_page(run)
    assert re.search(r"<p>([^<]*)\. Green: the healthy range", page.text)[1] == kind
    assert samples in page.sections["samples"]
    # The chain says of which weights it is.
    assert ("average of its weights" in page.sections["chain"]) == ("use_ema" in arguments)
    assert "first tenth" not in page.text
    assert page.charts() == ["bits per dimension", "reconstruction", "posterior's dual variable"]
    assert any("from samples of q, from ends of the posterior's chains" in image["alt"] for image in page.images)


def test_first_logged_step_of_a_run_that_was_killed(tmp_path):
    """One line, one cut off, values that are no numbers, no arguments, a picture that is none."""
    run = tmp_path / "killed"
    run.mkdir()
    one = record(10, np.random.default_rng(0))
    one |= {"kl": math.inf, "gradient_norm": math.nan, "drift": 0.0, "constraint": None, "energy_real": 1e300}
    (run / "metrics.jsonl").write_text(json.dumps(one) + "\n" + '{"step": 20, "kl')
    write_lines(run / "energies.jsonl", [{"step": 10, "data": [math.nan], "samples": [], "targets": [1.0]}])
    write_pictures(run, ("samples", "chain"), range(10, 11), size=(2000, 1000))
    (run / "chain" / "step-000010.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = make_page(run)
    assert "energies" not in page.sections and "KL divergence" not in page.charts()
    assert "reconstruction" in page.charts()
    # What is wrong is told first, with what to try.
    verdict = page.sections["verdict"]
    assert verdict.index("Numbers: not finite") < verdict.index("Try:") < verdict.index("✓ healthy")
    assert "step-000010.png can't be read" in page.sections["chain"]
    source = next(image["src"] for image in page.images if image["section"] == "samples")
    assert PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (1600, 800)


def test_reports_are_replaced_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", 50, change=lambda one: {"step": one["step"], "kl": one["kl"]})
    (run / "report.html").write_text("of an older version")
    page = make_page(run)
    assert "Training report: run" in page.text
    # What the run lacks is left out.
    assert list(page.sections) == ["verdict", "run", "training"] and page.charts() == ["KL divergence"]
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html", "training_args.json"]
    output = tmp_path / "page.html"
    output.write_bytes((run / "report.html").read_bytes())
    make_page(run, output)  # a report of ours may be replaced
    output.write_text("my own page")
    for wrong in (output, tmp_path, tmp_path / "nowhere" / "report.html"):
        with pytest.raises(SystemExit, match="--output"):
            main([str(run), "--output", str(wrong)])
    assert output.read_text() == "my own page"


@pytest.mark.parametrize(
    "files, named",
    [
        ({}, "RUN"),
        ({"metrics.jsonl": '{"st'}, "metrics.jsonl"),
        ({"metrics.jsonl": '{"step": 1}\n', "training_args.json": "[]"}, "training_args.json"),
    ],
)
def test_folder_that_is_no_run_is_refused(tmp_path, files, named):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=named) as raised:
        main([str(tmp_path)])
    assert "\n" not in raised.value.code
