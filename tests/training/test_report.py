"""The report of a run: `python training/report.py RUN`, on run folders written here."""

import base64
import io
import json
import math
import re
import subprocess
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import fork_server
import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from ecvae_diffusers.report.curves import plot_curves
from ecvae_diffusers.report.page import FEW_POINTS, Chart, Curve, use_log_scale, value_limits
from ecvae_diffusers.report.report import Run, report_html
from ecvae_diffusers.report.verdict import judge_posterior_dual


SCRIPT = Path(__file__).parents[2] / "training" / "report.py"
ARGUMENTS = {
    "calibration": "energy", "max_dual": 100.0, "drift_tolerance": 0.0074, "calibration_tolerance": "auto",
    "langevin_drift_step": 0.2, "latent_channels": 32, "resolution": 16, "max_train_steps": 2000, "seed": 0,
}  # fmt: skip


def report(*arguments) -> subprocess.CompletedProcess:
    return fork_server.run(SCRIPT, *arguments)


def record(step: int, rng: np.random.Generator) -> dict:
    """A logged step of a healthy run, as the training script writes it."""
    decay, noise = math.exp(-step / 300), rng.normal(1, 0.05)
    energies = {"energy_real": -0.4, "energy_samples": -0.39 + decay, "energy_targets": -0.395 + decay}
    return {
        "step": step, "epoch": step // 25,
        "reconstruction": (10 + 90 * decay) * noise, "kl": 11 * noise, "kl_weight": 1.0, "active_units": 30.0,
        "gradient_norm": 60 * noise, "gradient_norm_max": 80 * noise, "learning_rate": 5e-4,
        "images_per_second": 250 * noise, "peak_memory_gib": 0.7, "data_spread": 0.4, "sample_spread": 0.4 * noise,
        "constraint": (0.015 + 0.3 * decay) * noise, "noise_floor": 0.0013, "tolerance": 0.0153,
        "drift": (0.0074 + 0.03 * decay) * noise, "dual": 20 + 40 * decay,
        **energies, **{f"{name}_std": 0.05 for name in energies},
        "energy_gradient_norm": noise, "energy_learning_rate": 5e-4, "langevin_drift_step": 0.2,
    }  # fmt: skip


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def write_run(folder: Path, num_steps: int = 2000, arguments: dict = ARGUMENTS, change=lambda one: one) -> Path:
    """A run's arguments and metrics; `change` gets each logged step."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "training_args.json").write_text(json.dumps(arguments))
    write_lines(folder / "metrics.jsonl", [change(record(step, rng)) for step in range(10, num_steps + 1, 10)])
    return folder


def write_pictures(folder: Path, kinds: tuple[str, ...], steps: range, size: tuple[int, int] = (135, 135)) -> None:
    for kind in kinds:
        (folder / kind).mkdir()
        for step in steps:
            pixels = np.random.default_rng(step).integers(0, 256, size[::-1], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / kind / f"step-{step:06d}.png")


class Page(HTMLParser):
    """What a page is made of: its sections with their text, its images, its verdict, and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.sections, self.images, self.findings, self.references, self.tags = {}, [], [], [], []
        self.section = self.heading = None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.references += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]
        if tag == "section":
            self.section = attributes["id"]
            self.sections[self.section] = ""
        if tag == "img":
            self.images.append({**attributes, "section": self.section})
        if tag == "li" and self.section == "verdict":
            self.findings.append("")

    def handle_data(self, data):
        if self.section is not None:
            self.sections[self.section] += data
        if self.findings and self.section == "verdict":
            self.findings[-1] += data

    @property
    def to_look_at(self) -> list[str]:
        """What the verdict does not find healthy, by the first word of it."""
        return [re.match(r"! look at this(\w+)", one)[1] for one in self.findings if one.startswith("!")]

    def charts(self) -> list[str]:
        return [
            re.match(r"Chart of (.*) over the steps", one["alt"])[1] for one in self.images if "Chart" in one["alt"]
        ]


def make_page(run: Path, output: Path | None = None) -> Page:
    result = report(run, *([] if output is None else ["--output", output]))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Warning" not in result.stderr, result.stderr
    return Page(output or run / "report.html")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A run with everything that there can be."""
    run = write_run(tmp_path_factory.mktemp("runs") / "healthy")
    write_pictures(run, ("samples", "reconstructions", "chain", "neighbours"), range(200, 2001, 200))
    rng = np.random.default_rng(0)
    write_lines(
        run / "energies.jsonl",
        [
            {"step": s, **{kind: rng.normal(size=256).tolist() for kind in ("data", "samples", "targets")}}
            for s in range(200, 2001, 200)
        ],
    )
    measures = {"kernel_distance": 0.01, "kernel_distance_std": 0.001, "precision": 0.5, "recall": 0.4, "density": 0.9}
    write_lines(
        run / "evaluations.jsonl",
        [
            {
                "step": s,
                "frechet_distance": 30 - s / 100,
                **measures,
                "coverage": 0.5,
                "num_real": 512,
                "features": "lite0",
            }
            for s in (1000, 2000)
        ],
    )
    write_lines(
        run / "events.jsonl",
        [{"step": 300, "kind": "rollback", "message": "<script>alert(1)</script> & so on", "to_step": 200}],
    )
    return run


@pytest.fixture(scope="module")
def page(healthy) -> Page:
    return make_page(healthy)


def test_page_needs_nothing_beside_itself(page):
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(one.startswith(("data:", "#")) for one in page.references)
    assert "url(" not in page.text and "@import" not in page.text
    anchors = {one[1:] for one in page.references if one.startswith("#")}
    assert anchors == set(page.sections)


def test_every_image_can_be_decoded_and_is_described(page):
    assert len(page.images) > 30
    for image in page.images:
        kind, content = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.*)", image["src"]).groups()
        content = base64.b64decode(content, validate=True)
        if kind == "png":
            PIL.Image.open(io.BytesIO(content)).load()
        else:
            assert xml.etree.ElementTree.fromstring(content).tag.endswith("svg")
        assert image["alt"]


def test_page_shows_all_that_a_run_left(page):
    assert list(page.sections) == [
        "verdict", "run", "samples", "calibration", "energies", "chain", "training", "reconstructions", "evaluation",
        "nearest-neighbours", "guard-events",
    ]  # fmt: skip
    assert page.charts() == [
        "dual variable λ", "constraint", "drift a pixel", "energy gap", "energies", "spread of samples",
        "reconstruction", "KL divergence", "active units", "gradient norms", "learning rates", "images a second",
        "peak memory", "Frechet distance", "kernel distance", "precision, recall, density, coverage",
    ]  # fmt: skip
    pictures = [image for image in page.images if image["src"].startswith("data:image/png")]
    counts = {name: sum(one["section"] == name for one in pictures) for name in page.sections}
    assert [counts[name] for name in ("samples", "reconstructions", "chain", "nearest-neighbours")] == [6, 6, 3, 1]
    # The last one is shown first and large, magnified by a whole number.
    assert pictures[0]["alt"].endswith("step 2000") and pictures[0]["width"] == str(4 * 135)
    assert "2000 of 2000" in page.sections["run"] and "10 (step 2000)" in page.sections["run"]


def test_healthy_run_is_said_to_be_healthy(page):
    assert page.to_look_at == []
    assert "Healthy: all 9 checks" in page.sections["verdict"]
    assert "rollbacks: 1, none in the last part" in page.sections["verdict"]


def test_text_of_events_is_escaped(page):
    assert "<script>alert(1)</script> & so on" in page.sections["guard-events"]
    assert "<script>" not in page.text


def test_sick_run_is_seen(tmp_path):
    def change(one: dict) -> dict:
        if one["step"] <= 1000:
            return one
        sick = {"dual": 100.0, "constraint": 0.2, "drift": 0.03, "sample_spread": 0.004, "energy_targets": 0.6}
        return {**one, **sick, "active_units": 1.0, "energy_gradient_norm": 1e-4, "kl": math.nan}

    run = write_run(tmp_path / "sick", change=change)
    write_lines(run / "events.jsonl", [{"step": 1900, "kind": "warning", "message": "lambda at its bound"}])
    page = make_page(run)
    assert set(page.to_look_at) == {
        "Numbers", "Dual", "Constraint", "Drift", "Energy", "Variety", "Active", "Guard"
    }  # fmt: skip
    assert "Look at this: 9 of 9 checks" in page.sections["verdict"]
    for seen in (
        "not finite: kl",
        "at its upper bound (100) in 100%",
        "13.07 times its tolerance",
        "0.01 times the data's",
    ):
        assert seen in page.sections["verdict"]
    # What was wrong is told first, with what to try.
    assert all("Try:" in one for one in page.findings)


def test_one_fault_alone_is_told(tmp_path):
    run = write_run(
        tmp_path / "dead", change=lambda one: {"step": one["step"], "sample_spread": 0.01, "data_spread": 0.4}
    )
    page = make_page(run)
    assert page.to_look_at == ["Variety"]
    assert page.findings[0].startswith("! look at thisVariety of samples")


def test_plain_vae_has_no_calibration_to_show(tmp_path):
    own = ("step", "reconstruction", "kl", "active_units", "data_spread", "learning_rate", "gradient_norm")
    arguments = {**ARGUMENTS, "calibration": "none"}
    run = write_run(tmp_path / "vae", 300, arguments, change=lambda one: {name: one[name] for name in own})
    page = make_page(run)
    assert list(page.sections) == ["verdict", "run", "training"]
    assert page.charts() == ["reconstruction", "KL divergence", "active units", "gradient norms", "learning rates"]
    assert page.to_look_at == []


@pytest.mark.parametrize(
    "component, calibration, kind, samples",
    [
        (None, "none", "Plain VAE, no calibration", "One pass through the decoder"),
        ("flow", "none", "Plain flow, no calibration", "One pass through the flow's inverse"),
        ("flow", "energy", "Energy-calibrated flow", "One pass through the flow's inverse"),
        ("decoder", "energy", "Energy-calibrated decoder", "Decodings of the same latents"),
        ("vae", "posterior", "VAE with a calibrated posterior", "One pass through the decoder"),
    ],
)
def test_the_page_says_what_was_trained(tmp_path, component, calibration, kind, samples):
    arguments = {"calibration": calibration} | ({} if component is None else {"component": component})
    run = write_run(tmp_path / "run", 100, arguments)
    write_pictures(run, ("samples",), range(100, 101))
    make_page(run)
    page = (run / "report.html").read_text()
    assert re.search(r"<p>([^<]*)\. Green: the healthy range", page)[1] == kind
    assert samples in page


def test_a_flow_has_bits_and_a_calibrated_posterior_its_own_curves(tmp_path):
    """Both in one page, since a run logs what it has."""
    own = {
        "posterior_dual": 10.0,
        "posterior_constraint": 2.0,
        "refined_reconstruction": 9.0,
        "bits_per_dimension": 2.0,
    }
    names = ("step", "reconstruction", "gradient_norm", "learning_rate")
    arguments = {"max_posterior_dual": 10.0, "dual_learning_rate": 0.1}
    run = write_run(tmp_path / "run", 100, arguments, change=lambda one: {name: one[name] for name in names} | own)
    page = make_page(run)
    assert page.charts() == [
        "bits per dimension", "reconstruction", "posterior's constraint", "posterior's dual variable", "gradient norms",
        "learning rates",
    ]  # fmt: skip
    assert any("squared error, of the posterior's chains' ends" in image["alt"] for image in page.images)
    assert page.to_look_at == ["Posterior"]


@pytest.mark.parametrize(
    "dual, rate, seen",
    [
        (10.0, 0.1, "at its upper bound (10) in 100%"),
        (0.0, 0.1, "at 0 in 100%"),
        (3.0, 0.1, None),
        (10.0, 0.0, None),  # a weight that the user chose
    ],
)
def test_a_posterior_pinned_at_a_bound_is_told(tmp_path, dual, rate, seen):
    arguments = {**ARGUMENTS, "max_posterior_dual": 10.0, "dual_learning_rate": rate}
    run = write_run(tmp_path / "run", 300, arguments, change=lambda one: one | {"posterior_dual": dual})
    finding = judge_posterior_dual(Run.read(run))
    if rate == 0:
        assert finding is None
    else:
        assert finding.healthy == (seen is None) and (seen or "3, inside its bounds 0 and 10") in finding.seen


def test_a_posterior_s_weight_that_begins_at_its_bound_is_meant_so(tmp_path):
    arguments = {**ARGUMENTS, "initial_posterior_dual": 10.0, "max_posterior_dual": 10.0, "dual_learning_rate": 0.1}
    run = write_run(tmp_path / "run", 300, arguments, change=lambda one: one | {"posterior_dual": 10.0})
    assert judge_posterior_dual(Run.read(run)) is None
    run = write_run(tmp_path / "left", 300, arguments, change=lambda one: one | {"posterior_dual": 0.0})
    assert "--posterior_tolerance" in judge_posterior_dual(Run.read(run)).remedy


@pytest.mark.parametrize(
    "names, width",
    [
        (("reconstruction", "kl"), 1000),
        (("bits_per_dimension",), 500),
        (("reconstruction",), 500),
        (("reconstruction", "kl", "posterior_constraint", "posterior_dual"), 2000),
    ],
)
def test_curves_of_runs_without_an_energy_model(tmp_path, names, width):
    """Of an autoencoder, a flow, a foreign decoder, a posterior calibrated alone: a panel each of what they log."""
    plot_curves([{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)], tmp_path / "curves.png")
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (width, 300)


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
    assert "Numbers" in page.to_look_at and "reconstruction" in page.charts()
    assert "step-000010.png can't be read" in page.sections["chain"]
    source = next(image["src"] for image in page.images if image["section"] == "samples")
    assert PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (1600, 800)


def test_reports_are_replaced_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", 50, change=lambda one: {"step": one["step"], "kl": one["kl"]})
    (run / "report.html").write_text("of an older version")
    assert "Training report: run" in make_page(run).text
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html", "training_args.json"]

    output = tmp_path / "page.html"
    output.write_bytes((run / "report.html").read_bytes())
    make_page(run, output)  # a report of ours may be replaced
    output.write_text("my own page")
    result = report(run, "--output", output)
    assert result.returncode == 1 and "is not a report" in result.stderr
    assert output.read_text() == "my own page"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "holds no logged step"),
        ({"metrics.jsonl": '{"st'}, "holds no logged step"),
        ({"metrics.jsonl": '{"step": 1}\n', "training_args.json": "{"}, "training_args.json' can't be read"),
        ({"metrics.jsonl": '{"step": 1}\n', "training_args.json": "[]"}, "training_args.json' must hold"),
    ],
)
def test_folder_that_is_no_run_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Run.read(tmp_path)


def test_wrong_input_is_told_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", 10)
    for arguments, message in (
        ([tmp_path / "nothing"], "nothing' is no folder"),
        ([run, "--output", tmp_path / "nowhere" / "report.html"], "there is no folder"),
    ):
        result = report(*arguments)
        assert result.returncode == 1
        assert result.stderr.startswith("report.py: error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("num_points, all_shown", [(2, True), (FEW_POINTS, True), (10 * FEW_POINTS, False)])
def test_every_point_of_a_short_run_is_on_its_axis(num_points, all_shown):
    values = 1000.0 / (1 + np.arange(num_points))
    limits = value_limits(Chart("KL", np.arange(num_points), [Curve("KL", values)], ""))
    assert limits[0] <= values.min() and (limits[1] >= values.max()) == all_shown


@pytest.mark.parametrize("low, high", [(2.1, 4.9), (0.011, 0.012), (3.0, 3.2), (1.5, 40.0), (0.1, 1000.0)])
def test_a_logarithmic_axis_has_ticks(low, high):
    axis = Figure().subplots()
    axis.plot([1, 2], [low, high])
    use_log_scale(axis)
    bottom, top = axis.get_ylim()
    assert sum(bottom <= tick <= top for tick in axis.get_yticks()) >= 2


@pytest.mark.parametrize("averaged", [True, False])
def test_the_chain_says_of_which_weights_it_is(tmp_path, averaged):
    run = write_run(tmp_path / "run", num_steps=40, arguments={**ARGUMENTS, "use_ema": averaged})
    (run / "chain").mkdir()
    PIL.Image.new("L", (33, 33)).save(run / "chain" / "step-000040.png")
    write_lines(run / "energies.jsonl", [{"step": 40, "data": [0, 1], "samples": [0, 1], "targets": [0, 1]}])
    page = report_html(Run.read(run))
    assert ("average of its weights" in page) == averaged
    assert "first tenth" not in page and 'class="card own-size"' in page  # a short run, and one panel of its own size
