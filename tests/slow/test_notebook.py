# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The notebook of the quickstart, run from top to bottom as on a fresh machine. Slow: `make test-slow`."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import PIL.Image
import pytest
from nbclient import NotebookClient

import notebooks


ROOT = Path(__file__).resolve().parents[2]


def run(*command, **kwargs) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **kwargs).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository with one commit: the files of this one, as they are now."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    folder = tmp_path_factory.mktemp("checkout")
    for name in run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "All"]):
        run("git", *command, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def machine(checkout, tmp_path_factory) -> Path:
    """
    The folder that the notebook has run in, with what it became in `executed.ipynb`. No cell is changed: git takes `checkout` for
    the address of the repository, and pip finds all that the package requires in an environment in which the package is not.
    """
    folder = tmp_path_factory.mktemp("machine")
    run(sys.executable, "-m", "venv", folder / "environment")
    python = folder / "environment" / "bin" / "python"
    run(
        python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"
    )  # some versions of Python come with one too old for torch
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    environment = {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{checkout.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": notebooks.repository(),
        "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false", "HF_HUB_OFFLINE": "1", "JUPYTER_PATH": str(folder / "jupyter"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.setenv("PATH", str(python.parent), prepend=":")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        notebook = nbformat.read(notebooks.NOTEBOOK, as_version=4)
        try:
            NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(folder)}}).execute()
        finally:
            nbformat.write(notebook, folder / "executed.ipynb")
    assert (site / "ecvae_diffusers" / "public.py").is_file(), "pip installed nothing"
    return folder


@pytest.fixture(scope="module")
def outputs(machine) -> list:
    notebook = nbformat.read(machine / "executed.ipynb", as_version=4)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_no_cell_fails(outputs):
    """`!command` raises nothing."""
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert outputs and "error" not in {output.output_type for output in outputs}
    for words in ("Traceback", "ERROR", "error:", "fatal:", "command not found"):
        assert words not in said, said[-3000:]


def test_it_leaves_a_model_and_pictures(machine):
    clone = machine / "ecvae-diffusers"
    assert len(list((clone / "my_images").rglob("*.png"))) == 1797
    written = json.loads((clone / "my_model" / "model_index.json").read_text())
    assert written["_class_name"] == ["pipeline", "ECVAEPipeline"]
    steps = [json.loads(line)["step"] for line in (clone / "my_model" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 600
    for name, size in (("samples.png", None), ("my_samples.png", None), ("sample.png", (16, 16))):
        with PIL.Image.open(clone / name) as picture:
            assert picture.getextrema()[1] > picture.getextrema()[0] and size in (None, picture.size)


def test_it_shows_pictures_and_the_report(outputs):
    shown = [output.data for output in outputs if output.output_type in ("execute_result", "display_data")]
    pictures = [
        PIL.Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in shown if "image/png" in data
    ]
    clothes, digits, one = [picture.size for picture in pictures]
    # 8 by 8 clothes of 32 px and digits of 16 px, magnified to 64, with lines between them.
    assert clothes[0] == 2 * (8 * 33 - 1) and digits[0] == 4 * (8 * 17 - 1) and one[0] == 128
    assert all(len(set(picture.convert("L").tobytes())) > 10 for picture in pictures)
    (report,) = [data["text/html"] for data in shown if "text/html" in data]
    assert "<iframe srcdoc=" in report and "Training report: my_model" in report
