# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saved pipelines load with and without the package, from folders and from a Hub."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_server import HubServer, files
from without_package import run_without_package

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler
from ecvae_diffusers.hub.modular import MODULAR_FILES


ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "user/tiny-ecvae"
COMPONENTS = {"vae": AutoencoderEC, "energy_model": EnergyModel, "scheduler": LangevinScheduler}
# Notes the images and the modules of pipelines, errors, energies and refined images. In the end the package may be imported:
# after diffusers, and all that it loads by then is of the package.
WITHOUT_PACKAGE = """
from pathlib import Path

folder, hub_id, single_file, work = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
seen = {}


def report(name, where, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(where, **kwargs)
    images = pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    kinds = [type(pipe), *(type(one) for one in pipe.components.values())]
    seen[name] = {"images": images.tolist(), "modules": [f"{kind.__module__}.{kind.__name__}" for kind in kinds]}
    return pipe


for place, where in (("folder", folder), ("hub", hub_id)):
    try:
        report("untrusted", where)
    except Exception as error:
        seen[f"untrusted {place}"] = str(error)
assert not [name for name in sys.modules if name.startswith("diffusers_modules.")], "code was run untrusted"
for place, where in (("folder", folder), ("hub", hub_id)):
    pipe = report(f"trusted {place}", where, trust_remote_code=True)
    pipe.save_pretrained(work / place)
report("again", work / "hub", trust_remote_code=True)
report("custom pipeline", folder, custom_pipeline=str(single_file), trust_remote_code=True)
image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
seen["score"] = pipe.score(image).tolist()
refined = pipe(generator=torch.Generator().manual_seed(0), num_refinement_steps=2, output_type="np")
seen["refined"] = refined.images.tolist()
sys.meta_path[sys.meta_path.index(WithoutPackage)] = PathFinder
import ecvae_diffusers
assert type(DiffusionPipeline.from_pretrained(folder)) is ecvae_diffusers.ECVAEPipeline
print(json.dumps(seen))
"""


def sample(pipe: DiffusionPipeline) -> list:
    return pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np").images.tolist()


def assert_is_of_the_package(pipe: DiffusionPipeline, reference: ECVAEPipeline) -> None:
    assert type(pipe) is ECVAEPipeline and sample(pipe) == sample(reference)
    for name, component_class in COMPONENTS.items():
        assert type(pipe.components[name]) is component_class


@pytest.fixture(scope="module")
def reference(make_pipeline) -> ECVAEPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def hub(saved) -> Iterator[HubServer]:
    with HubServer() as server:
        server.commit(HUB_ID, files(saved))
        yield server
    assert server.unknown_requests == []


@pytest.fixture(scope="module")
def without_package(saved, hub, tmp_path_factory) -> tuple[dict, Path]:
    work = tmp_path_factory.mktemp("without_package")
    arguments = (saved, HUB_ID, ROOT / "pipelines" / "ecvae" / "pipeline.py", work)
    seen, _ = run_without_package(WITHOUT_PACKAGE, *map(str, arguments), environment=hub.environment(work / "home"))
    return seen, work


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_loads_with_the_package(place, saved, reference, hub, monkeypatch, tmp_path):
    hub.use(monkeypatch, tmp_path)
    where = saved if place == "folder" else HUB_ID
    assert_is_of_the_package(DiffusionPipeline.from_pretrained(where, trust_remote_code=True), reference)
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        assert_is_of_the_package(pipeline_class.from_pretrained(where), reference)
        pipe = pipeline_class.from_pretrained(where, energy_model=None)
        assert sample(pipe) == sample(reference) and pipe.energy_model is None and pipe.scheduler is not None
    assert type(AutoModel.from_pretrained(str(where), subfolder="energy_model")) is EnergyModel


def test_components_are_found_wherever_their_files_have_moved(saved, reference, tmp_path):
    """A folder saved by an older version names files that a newer version may not have."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    for name in COMPONENTS:
        index[name][0] = f"old_{name}_module"
        (tmp_path / name / f"{index[name][0]}.py").write_text("raise RuntimeError('this must not run')\n")
    index["_class_name"][0] = "old_pipeline_module"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        assert_is_of_the_package(pipeline_class.from_pretrained(tmp_path), reference)


def test_loads_without_the_package(without_package, reference):
    seen, _ = without_package
    for case in ("trusted folder", "trusted hub", "again", "custom pipeline"):
        assert seen[case]["images"] == sample(reference), case
        assert all(module.startswith("diffusers_modules.") for module in seen[case]["modules"]), case
        names = [module.rpartition(".")[2] for module in seen[case]["modules"]]
        assert names == ["ECVAEPipeline", *(kind.__name__ for kind in COMPONENTS.values())]
    for place in ("folder", "hub"):
        assert "trust_remote_code=True" in seen[f"untrusted {place}"]
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(seen["score"]), reference.score(image), atol=1e-6, rtol=0)
    refined = reference(generator=torch.Generator().manual_seed(0), num_refinement_steps=2, output_type="np").images
    torch.testing.assert_close(torch.tensor(seen["refined"]), torch.from_numpy(refined))


def test_what_was_saved_without_the_package_loads_with_it(without_package, reference, saved):
    """The package alone writes the card, the restoration's code and the modular form. All else is the same bytes, code included."""
    added = {"README.md", "restoration.py", *MODULAR_FILES}
    expected = {path: content for path, content in files(saved).items() if path not in added}
    for place in ("folder", "hub"):
        assert_is_of_the_package(DiffusionPipeline.from_pretrained(without_package[1] / place), reference)
        assert files(without_package[1] / place) == expected


def test_other_pipelines_are_unharmed(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=5)).save_pretrained(tmp_path)
    assert {path.suffix for path in map(Path, files(tmp_path))} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel and type(pipe.scheduler) is DDPMScheduler


OTHERS = {"energy_model": [None, None], "scheduler": [], "size": 16, "more": [["autoencoder_ec", "AutoencoderEC"]]}


@pytest.mark.parametrize(
    "index, change",
    [
        ({"_class_name": ["pipeline", "SomebodysPipeline"], "vae": ["autoencoder_ec", "AutoencoderEC"]}, {}),
        ({"_class_name": [["ECVAEPipeline"]]}, {}),
        ([], {}),
        (
            {"_class_name": ["pipeline", "ECVAEPipeline"], "vae": ["old", "AutoencoderEC"], **OTHERS},
            {"_class_name": "ECVAEPipeline", "vae": ["ecvae_diffusers", "AutoencoderEC"]},
        ),
    ],
)
def test_an_index_changes_by_our_components_alone(index, change, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    expected = index | change if change else index
    assert DiffusionPipeline._dict_from_json_file(tmp_path / "model_index.json") == expected
