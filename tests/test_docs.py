# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""README and docs: their Python runs, their commands parse, their links lead somewhere, and their figures were measured."""

import functools
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from training_runs import write_images

import check_prose
import command_line
import notebooks
from common import results
from ecvae_diffusers import (
    AutoencoderEC,
    ECFlowPipeline,
    ECVAEPipeline,
    ECVAERestorationPipeline,
    EnergyModel,
    FlowEC,
    LangevinScheduler,
)
from ecvae_diffusers.cli import COMMANDS
from ecvae_diffusers.evaluation.schema import Evaluation
from ecvae_diffusers.hub.card import figure
from ecvae_diffusers.onnx.export import export_onnx


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if "_build" not in path.parts and (ROOT / "docs" / "results") not in path.parents
    ),
]
WITH_RESULTS = [*PAGES, *sorted((ROOT / "docs" / "results").rglob("*.md"))]
OTHERS = [
    ROOT / name
    for name in (
        "CONTRIBUTING.md",
        "benchmarks/RESULTS.md",
        "training/configs/README.md",
        "spaces/restoration/README.md",
        "CHANGELOG.md",
    )
]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
# The programs of shell blocks that are not ours.
FOREIGN = {"pip", "hf", "make", "diffusers-cli", "curl"}
FOREIGN_FLAGS = {"--help", "--no-deps", "--num_processes", "--nproc_per_node", "--machine_rank", "--pipeline-kwargs"}
SCRIPTS = {
    "train_ecvae.py": "train",
    "train_flow.py": "train-flow",
    "calibrate_decoder.py": "calibrate-decoder",
    "evaluate.py": "evaluate",
    "evaluate_restoration.py": "evaluate-restoration",
    "report.py": "report",
    "publish.py": "publish",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> list[str]:
    """The Python blocks of a page, but those below `<!-- not run: why -->`."""
    found = re.findall(r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [code for skipped, code in found if not skipped]


def commands(text: str) -> list[list[str]]:
    """The commands of a page's shell blocks, each as its arguments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [arguments for line in lines if (arguments := shlex.split(line, comments=True))]


@functools.cache
def script_parser(script: str):
    if Path(script).parent.name == "training":
        return command_line.command_parser(SCRIPTS[Path(script).name])
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return command_line.parser_of(module.main)


@functools.cache
def command_parser(name: str):
    return command_line.command_parser(name)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with what the pages speak of: the models of the repository, and small ones for those of a reader."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "model_cards", folder / "model_cards")
    for card in CARDS:
        model = folder / "model_cards" / card.parent.name
        ECVAEPipeline.from_pretrained(model).save_code(model)
    shutil.copytree(ROOT / "examples", folder / "examples")
    write_images(folder / "my_images")
    torch.manual_seed(0)
    config = {"sample_size": 16, "in_channels": 1, "block_out_channels": (16, 16), "num_class_embeds": 2}
    vae = AutoencoderEC(latent_channels=8, id2label={"0": "cat", "1": "dog"}, **config)
    model = ECVAEPipeline(vae=vae.eval(), energy_model=EnergyModel(**config).eval(), scheduler=LangevinScheduler())
    model.save_pretrained(folder / "my_model")
    export_onnx(model, folder / "my_onnx_model")
    flow = FlowEC(sample_size=16, in_channels=1, num_levels=2, steps_per_level=1, hidden_channels=8)
    ECFlowPipeline(flow=flow.eval()).save_pretrained(folder / "my_flow")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "my_calibrated_vae")
    return folder


@pytest.mark.parametrize("page", [path for path in PAGES if python_blocks(path.read_text())], ids=name_of)
def test_python_runs(page, clone, monkeypatch):
    monkeypatch.chdir(clone)
    restore = ECVAERestorationPipeline.__call__
    few = {"num_inference_steps": 2}
    monkeypatch.setattr(ECVAERestorationPipeline, "__call__", lambda *args, **kwargs: restore(*args, **few | kwargs))
    monkeypatch.setattr(PIL.Image.Image, "show", lambda image: None)
    names: dict = {}
    for code in python_blocks(page.read_text()):
        exec(compile(code, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", [path for path in (*PAGES, *OTHERS) if commands(path.read_text())], ids=name_of)
def test_commands_parse(page):
    for arguments in commands(page.read_text()):
        program, *rest = [argument for argument in arguments if not re.fullmatch(r"[A-Z_]+=\S*", argument)]
        scripts = [i for i, argument in enumerate(rest) if argument.endswith(".py")]
        if program == "ecvae":
            command_parser(rest[0]).parse_args(rest[1:])
        elif scripts and program in ("python", "accelerate", "torchrun"):
            script_parser(rest[scripts[0]]).parse_args(rest[scripts[0] + 1 :])
        else:
            assert Path(program).name in {*FOREIGN, "ecvae", "python", "git"}, arguments


def test_flags_in_the_text_exist():
    known = {flag for name in COMMANDS for flag in command_line.flags(command_parser(name))} | FOREIGN_FLAGS
    for page in PAGES:
        if page.name != "changelog.md":
            for code in re.findall(r"`([^`\n]+)`", page.read_text()):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known - {"--no-NAME"}
                assert not unknown, (name_of(page), code)


def test_the_notebook_is_that_of_its_page_and_badges_lead_to_it():
    assert notebooks.NOTEBOOK.read_text() == notebooks.notebook()
    for page in (ROOT / "README.md", notebooks.PAGE):
        assert f"]({notebooks.colab_address()})" in page.read_text()


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*WITH_RESULTS, *OTHERS, *CARDS], ids=name_of)
def test_links_lead_somewhere_and_pictures_have_a_text(page):
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    for alt, target in re.findall(r"!?\[([^\]]*)\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        place = page if not path else page.parent / path
        assert place.exists(), (target, alt)
        assert not anchor or anchor in slugs(place.read_text()), target
    assert not re.search(r"!\[\s*\]", text)


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")


def figures(text: str) -> set[str]:
    """The numbers of a page's text, without those of code, links, versions of Python, years, and the citation."""
    text = re.sub(r"(?s)^## Citation.*?(?=^## |\Z)", "", check_prose.prose(text), flags=re.MULTILINE)
    text = re.sub(r"Python \d\.\d+|\b(?:19|20)\d\d\b|arXiv [\d.]+|CC BY [\d.]+|[Aa]pache-2\.0", "", text)
    return {found.rstrip(",").replace(",", "") for found in NUMBER.findall(text)}


@functools.cache
def measured() -> set[str]:
    """The numbers of benchmarks/results."""
    text = "\n".join(path.read_text() for path in sorted(results.FIGURES.glob("*.json")))
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return {found.rstrip(",") for found in NUMBER.findall(text)}


def test_the_readme_has_only_figures_that_were_measured():
    text = (ROOT / "README.md").read_text()
    assert {"5.2", "314.7", "7.3"} <= figures(text)
    assert not figures(text) - measured()


def numbers_of(value) -> set[str]:
    """The numbers of a JSON value, as cards write them."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_of, value))
    if isinstance(value, str):
        return figures(value)
    if value is None or isinstance(value, bool):
        return set()
    return {figure(abs(value)), f"{abs(value):g}", f"{abs(value):.2g}"}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_cards_have_only_figures_that_were_measured(card):
    evaluation = json.loads((card.parent / "evaluation.json").read_text())
    known = numbers_of(evaluation) | measured()
    loaded = Evaluation.load(card.parent)
    ours, theirs = (one.generation.measures for one in (loaded, loaded.baseline))
    known |= {f"{theirs[name].mean / ours[name].mean:.1f}" for name in ours.keys() & theirs.keys()}
    said = card.read_text().split("\n## Evaluation", 1)[1].split("\n## Citation")[0]
    assert not {one for one in figures(said) if float(one) > 10 or "." in one} - known


def test_the_check_of_the_language_finds_faults():
    page = check_prose.ROOT / "docs" / "page.md"
    faults = {
        "It takes 5 ms an image.": "per",
        "The run is gone on with.": "resume",
        "Weights are held still.": "frozen",
        "A model in the place of another.": "instead of",
        "All but for one.": "except",
        "The one beside it.": "next to",
        "A folder of its own.": "its own",
        "Measured at 0bbd227.": "benchmarks/results",
        "Measured on an H100.": "benchmarks/results",
        "x" * 201: "201",
    }
    for text, expected in faults.items():
        assert [fault for _, fault in check_prose.findings(page, f"# Head\n\n{text}\n") if expected in fault], text
    fine = "An image of its own class, an iteration.\n\n```\nbeside 0bbd227\n```\n`beside` [one](beside.md)\n"
    assert not list(check_prose.findings(page, fine))
    assert list(check_prose.findings(check_prose.ROOT / "README.md", "A " + "word " * 30 + "too many.\n" * 90))
