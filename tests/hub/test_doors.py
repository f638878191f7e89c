# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""diffusers' other ways to a published model, without the package: modular pipelines, `AutoModel` and `diffusers-cli run`."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hub_server import HubServer
from without_package import run_without_package

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.hub.upload import upload_folder


HUB_ID = "user/tiny-ecvae"
RESTORE = {"num_inference_steps": 3, "num_restorations": 2, "reconstruction_variance": 0.1}
WITHOUT_PACKAGE = """
import contextlib
from diffusers import AutoModel, ModularPipeline, ModularPipelineBlocks
from diffusers.commands.diffusers_cli import main

folder, hub_id, pictures, output = sys.argv[1:5]
picture, mask = torch.load(pictures)
seen, seeded = {}, lambda: {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
untrusted = {
    "modular": lambda: ModularPipeline.from_pretrained(folder),
    "blocks": lambda: ModularPipelineBlocks.from_pretrained(folder),
    "model": lambda: AutoModel.from_pretrained(folder, subfolder="vae"),
}
for name, load in untrusted.items():
    try:
        load()
    except ValueError as error:
        seen[f"untrusted {name}"] = str(error)
assert not [name for name in sys.modules if name.startswith("diffusers_modules.")], "code was run untrusted"

seen["blocks"] = type(ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)).__name__
for place, where in (("folder", folder), ("hub", hub_id)):
    pipe = ModularPipeline.from_pretrained(where, trust_remote_code=True)
    pipe.load_components(trust_remote_code=True)
    restored = pipe(image=picture, mask_image=mask, **RESTORE, **seeded())
    seen[place] = {
        "images": pipe(batch_size=3, **seeded(), output="images").tolist(),
        "restored": restored.images.tolist(),
        "std": restored.std.tolist(),
        "module": type(pipe.vae).__module__,
    }
    vae = AutoModel.from_pretrained(where, subfolder="vae", trust_remote_code=True)
    seen[place]["decoded"] = vae.eval().decode(torch.ones(1, 8, 1, 1)).sample.tolist()
    parts = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
    pipe.update_components(energy_model=parts.energy_model, scheduler=parts.scheduler)
    seen[place]["refined"] = pipe(num_refinement_steps=2, **seeded(), output="images").tolist()
try:
    pipe(temperature=-1)
except ValueError as error:
    seen["wrong"] = str(error)

kwargs = json.dumps({"batch_size": 3})
sys.argv = ["diffusers-cli", "run", "-m", folder, "--trust-remote-code", "--seed", "0", "--pipeline-kwargs", kwargs, "-o", output]
with contextlib.redirect_stdout(sys.stderr):
    main()
print(json.dumps(seen))
""".replace("**RESTORE", f"**{RESTORE}")


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.ones(1, 1, 16, 16).tril()


@pytest.fixture(scope="module")
def without_package(saved, pictures, tmp_path_factory) -> tuple[dict, Path]:
    work = tmp_path_factory.mktemp("doors")
    torch.save(pictures, work / "pictures.pt")
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.use(monkeypatch, work / "cache")
        upload_folder(saved, HUB_ID)
        arguments = map(str, (saved, HUB_ID, work / "pictures.pt", work / "samples" / "new.png"))
        seen, errors = run_without_package(WITHOUT_PACKAGE, *arguments, environment=server.environment(work / "home"))
    # The command line asks which coding agents there are, to find out whether one of them calls it.
    assert set(server.unknown_requests) <= {"GET /api/agent-harnesses"} and "not expected" not in errors
    return seen, work / "samples"


def test_no_code_runs_untrusted(without_package):
    for name in ("modular", "blocks", "model"):
        assert "trust_remote_code=True" in without_package[0][f"untrusted {name}"]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_modular_form_samples_and_restores(place, without_package, make_pipeline, pictures):
    found, pipe = without_package[0][place], make_pipeline()

    def seeded() -> dict:
        return {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}

    assert without_package[0]["blocks"] == "ECVAEAutoBlocks" and found["module"].startswith("diffusers_modules.")
    assert found["images"] == pipe(batch_size=3, **seeded()).images.tolist()
    assert found["refined"] == pipe(num_refinement_steps=2, **seeded()).images.tolist()
    image, mask = pictures
    restored = ECVAERestorationPipeline.from_pipe(pipe)(image, mask_image=mask, **RESTORE, **seeded())
    assert found["restored"] == restored.images.tolist() and found["std"] == restored.std.tolist()
    with pytest.raises(ValueError) as expected:
        pipe(temperature=-1)
    assert without_package[0]["wrong"] == str(expected.value)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_auto_model_loads_the_autoencoder(place, without_package, make_pipeline):
    with torch.no_grad():
        expected = make_pipeline().vae.decode(torch.ones(1, 8, 1, 1)).sample
    assert without_package[0][place]["decoded"] == expected.tolist()


def test_diffusers_cli_draws_pictures(without_package, make_pipeline):
    """Several pictures are numbered."""
    written = sorted(without_package[1].iterdir())
    assert [path.name for path in written] == ["new-0000.png", "new-0001.png", "new-0002.png"]
    expected = make_pipeline()(batch_size=3, generator=torch.Generator().manual_seed(0)).images
    for path, image in zip(written, expected):
        assert np.array_equal(np.asarray(PIL.Image.open(path)), np.asarray(image))


def test_the_index_on_the_hub_names_the_repository(saved, monkeypatch, tmp_path):
    """A folder names none. In a subfolder of a repository, where diffusers does not look for one, neither."""

    def source(index: bytes) -> str | None:
        return json.loads(index)["vae"][-1]["pretrained_model_name_or_path"]

    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        upload_folder(saved, "short")
        upload_folder(saved, "user/shelf", subfolder="one")
        name = "modular_model_index.json"
        assert source(server.files("user/short")[name]) == "user/short"
        assert source(server.files("user/shelf")[f"one/{name}"]) is None
    assert source((saved / name).read_bytes()) is None
