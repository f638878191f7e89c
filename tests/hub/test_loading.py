# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saved pipelines load with and without the package, from folders and from a Hub.

What the Hub's client or the absence of the package has a part in runs in a subprocess, one for many tests: each writes
what it saw as JSON, and the tests read it.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_server import HubServer, files

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler


ROOT = Path(__file__).resolve().parents[2]
HUB_ID = "user/tiny-ecvae"
COMPONENTS = {"vae": AutoencoderEC, "energy_model": EnergyModel, "scheduler": LangevinScheduler}

# The head of both: where to load from, a place for what is saved, and `report`, which takes down what a pipeline is.
PRELUDE = """
import json, sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

folder, hub_id, work, single_file = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
seen = {}


def report(name, load):
    try:
        pipe = load()
    except Exception as error:
        seen[name] = {"error": f"{type(error).__name__}: {error}"}
        return None
    images = pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    classes = {"pipeline": type(pipe), **{key: type(value) for key, value in pipe.components.items()}}
    seen[name] = {
        "images": images.tolist(),
        "modules": {key: value.__module__ for key, value in classes.items()},
        "names": {key: value.__name__ for key, value in classes.items()},
    }
    return pipe
"""

WITH_PACKAGE = (
    PRELUDE
    + """
unet = UNet2DModel(
    sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
ddpm = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=5))
ddpm.save_pretrained(work / "ddpm_before")

from ecvae_diffusers import ECVAEPipeline

ddpm.save_pretrained(work / "ddpm_after")

for place, where in (("folder", folder), ("hub", hub_id)):
    report(f"concrete {place}", lambda: ECVAEPipeline.from_pretrained(where))
    report(f"generic {place}", lambda: DiffusionPipeline.from_pretrained(where))
    report(f"trusted {place}", lambda: DiffusionPipeline.from_pretrained(where, trust_remote_code=True))
    report(f"concrete {place} sampling only", lambda: ECVAEPipeline.from_pretrained(where, energy_model=None))
    report(f"generic {place} sampling only", lambda: DiffusionPipeline.from_pretrained(where, energy_model=None))

from diffusers import AutoModel

for trust in (False, True):
    model = AutoModel.from_pretrained(hub_id, subfolder="energy_model", trust_remote_code=trust)
    seen[f"AutoModel, trust {trust}"] = f"{type(model).__module__}.{type(model).__name__}"
ECVAEPipeline.from_pretrained(folder).push_to_hub("user/pushed")
report("pushed", lambda: DiffusionPipeline.from_pretrained("user/pushed"))
(work / "seen.json").write_text(json.dumps(seen))
"""
)

WITHOUT_PACKAGE = (
    """
import importlib.util, sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ecvae_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())
try:
    import ecvae_diffusers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package must be out of reach")
"""
    + PRELUDE
    + """
for place, where in (("folder", folder), ("hub", hub_id)):
    report(f"untrusted {place}", lambda: DiffusionPipeline.from_pretrained(where))
seen["code run untrusted"] = [name for name in sys.modules if name.startswith("diffusers_modules.")]
for place, where in (("folder", folder), ("hub", hub_id)):
    pipe = report(f"trusted {place}", lambda: DiffusionPipeline.from_pretrained(where, trust_remote_code=True))
    pipe.save_pretrained(work / f"saved_from_{place}")
    again = lambda: DiffusionPipeline.from_pretrained(work / f"saved_from_{place}", trust_remote_code=True)
    report(f"again {place}", again)
for place, custom_pipeline in (("folder", single_file.parent), ("file", single_file)):
    kwargs = {"custom_pipeline": str(custom_pipeline), "trust_remote_code": True}
    report(f"custom pipeline {place}", lambda: DiffusionPipeline.from_pretrained(folder, **kwargs))
image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
seen["score"] = pipe.score(image).tolist()
seen["refined"] = pipe(
    generator=torch.Generator().manual_seed(0), num_refinement_steps=2, output_type="np"
).images.tolist()
(work / "seen.json").write_text(json.dumps(seen))
"""
)


def sample(pipe: DiffusionPipeline):
    return pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np").images


def assert_is_of_the_package(pipe: DiffusionPipeline) -> None:
    assert type(pipe) is ECVAEPipeline
    for name, component_class in COMPONENTS.items():
        assert type(pipe.components[name]) is component_class


@pytest.fixture(scope="module")
def reference(make_pipeline) -> ECVAEPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-ecvae"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(saved) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_folder(HUB_ID, saved)
        yield server


def run_script(script: str, folder: Path, hub: HubServer, work: Path) -> tuple[dict, Path]:
    arguments = (folder, HUB_ID, work, ROOT / "pipelines" / "ecvae" / "pipeline.py")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=hub.environment(work / "hf_home"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((work / "seen.json").read_text(encoding="utf-8")), work


@pytest.fixture(scope="module")
def with_package(saved, hub, tmp_path_factory) -> tuple[dict, Path]:
    return run_script(WITH_PACKAGE, saved, hub, tmp_path_factory.mktemp("with_package"))


@pytest.fixture(scope="module")
def without_package(saved, hub, tmp_path_factory) -> tuple[dict, Path]:
    return run_script(WITHOUT_PACKAGE, saved, hub, tmp_path_factory.mktemp("without_package"))


def assert_same_images(case: dict, reference: ECVAEPipeline) -> None:
    assert "error" not in case, case["error"]
    assert case["images"] == sample(reference).tolist()


# With the package: no trust is asked, and its own classes come


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_loads_with_the_package(with_package, reference, place):
    for how in ("concrete", "generic", "trusted"):
        case = with_package[0][f"{how} {place}"]
        assert_same_images(case, reference)
        assert {module.split(".")[0] for module in case["modules"].values()} == {"ecvae_diffusers"}
    for how in ("concrete", "generic"):
        case = with_package[0][f"{how} {place} sampling only"]
        assert_same_images(case, reference)
        assert case["names"]["energy_model"] == "NoneType" and case["names"]["scheduler"] == "LangevinScheduler"


def test_automodel_loads_a_component_from_the_hub(with_package):
    for trust in (False, True):
        assert with_package[0][f"AutoModel, trust {trust}"] == f"{EnergyModel.__module__}.EnergyModel"


def test_a_pushed_pipeline_is_self_contained(with_package, hub, saved, reference):
    case = with_package[0]["pushed"]
    assert_same_images(case, reference)
    pushed, expected = hub.files("user/pushed"), files(saved)
    # The card alone says where it is.
    card = expected.pop("README.md").replace(b'"path/or/hub-id"', b'"user/pushed"')
    assert {path: pushed[path] for path in expected} == expected
    assert pushed["README.md"] == card and b'from_pretrained("user/pushed")' in card


def test_the_client_used_only_what_the_server_knows(with_package, without_package, hub):
    assert hub.unknown_requests == []


@pytest.mark.parametrize("pipeline_class", [ECVAEPipeline, DiffusionPipeline])
def test_components_are_found_wherever_their_files_have_moved(saved, reference, pipeline_class, tmp_path):
    """A folder saved by an older version names files that a newer version may not have."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    for name in COMPONENTS:
        index[name][0] = f"old_{name}_module"
        (tmp_path / name / f"{index[name][0]}.py").write_text("raise RuntimeError('this must not run')\n")
    index["_class_name"][0] = "old_pipeline_module"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = pipeline_class.from_pretrained(tmp_path)
    assert_is_of_the_package(pipe)
    assert sample(pipe).tolist() == sample(reference).tolist()


# Without the package


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_loads_without_the_package(without_package, reference, place):
    for how in ("trusted", "again"):
        case = without_package[0][f"{how} {place}"]
        assert_same_images(case, reference)
        assert {module.split(".")[0] for module in case["modules"].values()} == {"diffusers_modules"}
        assert case["names"] == {"pipeline": "ECVAEPipeline", **{k: v.__name__ for k, v in COMPONENTS.items()}}


@pytest.mark.parametrize("place", ["folder", "file"])
def test_the_generated_file_is_a_custom_pipeline(without_package, reference, place):
    assert_same_images(without_package[0][f"custom pipeline {place}"], reference)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_code_is_not_run_without_trust(without_package, place):
    seen = without_package[0]
    assert "trust_remote_code=True" in seen[f"untrusted {place}"]["error"]
    assert seen["code run untrusted"] == []


def test_energy_works_without_the_package(without_package, reference):
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.tensor(without_package[0]["score"]), reference.score(image), atol=1e-6, rtol=0)
    refined = reference(generator=torch.Generator().manual_seed(0), num_refinement_steps=2, output_type="np").images
    torch.testing.assert_close(torch.tensor(without_package[0]["refined"]), torch.from_numpy(refined))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_what_was_saved_without_the_package_loads_with_it(without_package, reference, saved, place):
    folder = without_package[1] / f"saved_from_{place}"
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(folder)
        assert_is_of_the_package(pipe)
        assert sample(pipe).tolist() == sample(reference).tolist()
    # The package alone writes the card and the restoration's code. All else is the same bytes, code included.
    packages = ("README.md", "restoration.py")
    assert files(folder) == {path: content for path, content in files(saved).items() if path not in packages}


def test_other_pipelines_are_unharmed(with_package, tmp_path):
    work = with_package[1]
    assert files(work / "ddpm_before") == files(work / "ddpm_after")
    for pipeline_class in (DDPMPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(work / "ddpm_before")
        assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel and type(pipe.scheduler) is DDPMScheduler
        assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]},
        {"_class_name": ["pipeline", "SomebodysPipeline"], "vae": ["autoencoder_ec", "AutoencoderEC"]},
        {"sample_size": 16},
        {"_class_name": []},
        {"_class_name": [["ECVAEPipeline"]]},
        [],
    ],
)
def test_the_index_of_another_pipeline_is_left_as_it_is(config, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    assert DiffusionPipeline._dict_from_json_file(tmp_path / "model_index.json") == config


@pytest.mark.parametrize("value", [[], [["autoencoder_ec", "AutoencoderEC"]], [None, None]])
def test_what_names_no_component_is_left_as_it_is(value, tmp_path):
    index = {"_class_name": ["pipeline", "ECVAEPipeline"], "vae": ["old", "AutoencoderEC"], "energy_model": value}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert DiffusionPipeline._dict_from_json_file(tmp_path / "model_index.json") == {
        "_class_name": "ECVAEPipeline",
        "vae": ["ecvae_diffusers", "AutoencoderEC"],
        "energy_model": value,
    }
