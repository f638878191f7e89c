# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saved pipelines load with and without the package, from folders and from a Hub, and what that rests on stays true.

What the Hub's client or the absence of the package has a part in runs in a subprocess, one for many tests: each writes
what it saw as JSON, and the tests read it.
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines import pipeline_loading_utils
from hub_server import HubServer

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler
from ecvae_diffusers.hub.registration import get_signature_keys, resolve_trust_remote_code


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

INSTALLED = """
import sys
from pathlib import Path

import torch

import ecvae_diffusers
from ecvae_diffusers import AutoencoderEC, ECVAEPipeline

site, folder = Path(sys.argv[1]), Path(sys.argv[2])
assert Path(ecvae_diffusers.__file__).is_relative_to(site), ecvae_diffusers.__file__
vae = AutoencoderEC(sample_size=16, in_channels=1, latent_channels=8, block_out_channels=(16, 16, 16)).eval()
pipe = ECVAEPipeline(vae=vae)
pipe.save_pretrained(folder)
latents = torch.ones(2, 8, 1, 1)
images = [p(latents=latents, output_type="pt").images for p in (pipe, ECVAEPipeline.from_pretrained(folder))]
assert torch.equal(*images)
"""


def run(*command: str | Path, env: dict[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def sample(pipe: DiffusionPipeline):
    return pipe(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np").images


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


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


def run_script(script: str, folder: Path, hub: HubServer, work: Path) -> dict:
    arguments = (folder, HUB_ID, work, ROOT / "pipelines" / "ecvae" / "pipeline.py")
    run(sys.executable, "-c", script, *arguments, env=hub.environment(work / "hf_home"))
    return json.loads((work / "seen.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def with_package(saved, hub, tmp_path_factory) -> tuple[dict, Path]:
    work = tmp_path_factory.mktemp("with_package")
    return run_script(WITH_PACKAGE, saved, hub, work), work


@pytest.fixture(scope="module")
def without_package(saved, hub, tmp_path_factory) -> tuple[dict, Path]:
    work = tmp_path_factory.mktemp("without_package")
    return run_script(WITHOUT_PACKAGE, saved, hub, work), work


# With the package: no trust is asked, and its own classes come


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("how", ["concrete", "generic", "trusted"])
def test_loads_with_the_package(with_package, reference, how, place):
    case = with_package[0][f"{how} {place}"]
    assert "error" not in case, case["error"]
    assert case["images"] == sample(reference).tolist()
    assert {module.split(".")[0] for module in case["modules"].values()} == {"ecvae_diffusers"}


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("how", ["concrete", "generic"])
def test_the_energy_model_can_be_left_out(with_package, reference, how, place):
    case = with_package[0][f"{how} {place} sampling only"]
    assert "error" not in case, case["error"]
    assert case["names"]["energy_model"] == "NoneType"
    assert case["names"]["scheduler"] == "LangevinScheduler"
    assert case["images"] == sample(reference).tolist()


@pytest.mark.parametrize("trust", [False, True])
def test_automodel_loads_a_component_from_the_hub(with_package, trust):
    assert with_package[0][f"AutoModel, trust {trust}"] == f"{EnergyModel.__module__}.EnergyModel"


def test_a_pushed_pipeline_is_self_contained(with_package, hub, saved, reference):
    case = with_package[0]["pushed"]
    assert "error" not in case, case["error"]
    assert case["images"] == sample(reference).tolist()
    pushed, expected = hub.files("user/pushed"), files(saved)
    # The card alone says where it is.
    card = expected.pop("README.md").replace(b'"path/or/hub-id"', b'"user/pushed"')
    assert {path: pushed[path] for path in expected} == expected
    assert pushed["README.md"] == card and b'from_pretrained("user/pushed")' in card


def test_the_client_used_only_what_the_server_knows(with_package, without_package, hub):
    assert hub.unknown_requests == []


@pytest.mark.parametrize("pipeline_class", [ECVAEPipeline, DiffusionPipeline])
def test_loads_in_the_process_that_saved(saved, reference, pipeline_class):
    pipe = pipeline_class.from_pretrained(saved)
    assert_is_of_the_package(pipe)
    assert sample(pipe).tolist() == sample(reference).tolist()


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
        assert "error" not in case, case["error"]
        assert case["images"] == sample(reference).tolist()
        assert {module.split(".")[0] for module in case["modules"].values()} == {"diffusers_modules"}
        assert case["names"] == {"pipeline": "ECVAEPipeline", **{k: v.__name__ for k, v in COMPONENTS.items()}}


@pytest.mark.parametrize("place", ["folder", "file"])
def test_the_generated_file_is_a_custom_pipeline(without_package, reference, place):
    case = without_package[0][f"custom pipeline {place}"]
    assert "error" not in case, case["error"]
    assert case["images"] == sample(reference).tolist()


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
    # The package alone has the card's template and the restoration's code; all else is the same bytes, code included.
    packages = ("README.md", "restoration.py")
    assert files(folder) == {path: content for path, content in files(saved).items() if path not in packages}


# What a saved folder holds


def test_a_saved_folder_is_complete_and_safe(saved):
    written = set(files(saved))
    assert {"README.md", "model_index.json", "pipeline.py", "restoration.py"} <= written
    assert {"vae/autoencoder_ec.py", "energy_model/energy_model.py", "scheduler/scheduling_langevin.py"} <= written
    assert {Path(path).suffix for path in written} == {".json", ".md", ".py", ".safetensors"}
    assert {path for path in written if path.endswith(".safetensors")} == {
        f"{name}/diffusion_pytorch_model.safetensors" for name in ("vae", "energy_model")
    }


def test_saving_again_gives_the_same_bytes_and_no_path_of_this_machine(saved, tmp_path):
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        folder = tmp_path / pipeline_class.__name__
        pipeline_class.from_pretrained(saved).save_pretrained(folder)
        assert files(folder) == files(saved)
        for path, content in files(folder).items():
            for place in (saved, tmp_path, ROOT, Path.home()):
                assert str(place).encode() + b"/" not in content, path
            assert b"_name_or_path" not in content or path.endswith(".py"), path


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants(reference, tmp_path, variant, dtype, make_pipeline):
    make_pipeline().to(dtype).save_pretrained(tmp_path, variant=variant)
    weights = {path for path in files(tmp_path) if Path(path).suffix not in (".json", ".md", ".py")}
    assert weights == {f"{name}/diffusion_pytorch_model.{variant}.safetensors" for name in ("vae", "energy_model")}
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(tmp_path, variant=variant, dtype=dtype)
        assert_is_of_the_package(pipe)
        assert pipe.vae.dtype == pipe.energy_model.dtype == dtype
        for name in ("vae", "energy_model"):
            for key, value in reference.components[name].state_dict().items():
                assert torch.equal(pipe.components[name].state_dict()[key], value.to(dtype)), key


def test_a_card_that_is_there_is_kept(reference, tmp_path):
    (tmp_path / "README.md").write_text("mine\n", encoding="utf-8")
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine\n"


# What it rests on


def test_the_parts_of_diffusers_that_are_not_public_are_there():
    methods = ["save_pretrained", "from_pretrained"]
    for table in (pipeline_loading_utils.LOADABLE_CLASSES["diffusers"], pipeline_loading_utils.ALL_IMPORTABLE_CLASSES):
        assert table["ModelMixin"] == table["SchedulerMixin"] == methods
    for component_class in COMPONENTS.values():
        name = component_class.__name__
        assert pipeline_loading_utils.LOADABLE_CLASSES["ecvae_diffusers"][name] == methods
        assert pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[name] == methods
    assert diffusers.ECVAEPipeline is ECVAEPipeline

    assert list(inspect.signature(resolve_trust_remote_code).parameters) == [
        "trust_remote_code", "model_name", "has_remote_code",
    ]  # fmt: skip
    for method in (AutoModel.from_pretrained, AutoModel.from_config):
        assert "= resolve_trust_remote_code(" in inspect.getsource(inspect.unwrap(method))
        assert "load_config(" in inspect.getsource(inspect.unwrap(method))

    # Both stand in for a method of diffusers: it must still be there, with the same parameters, and be called.
    assert list(inspect.signature(ConfigMixin._dict_from_json_file).parameters) == ["json_file"]
    assert "_dict_from_json_file(" in inspect.getsource(ConfigMixin.load_config)
    assert "_dict_from_json_file(" in inspect.getsource(DiffusionPipeline.download)
    assert list(inspect.signature(get_signature_keys.__func__).parameters) == ["cls", "obj"]
    assert get_signature_keys.__func__.__module__ == "diffusers.pipelines.pipeline_utils"
    assert "_get_signature_keys(" in inspect.getsource(DiffusionPipeline.from_pretrained)


def test_other_pipelines_are_unharmed(with_package, tmp_path):
    work = with_package[1]
    assert files(work / "ddpm_before") == files(work / "ddpm_after")
    for pipeline_class in (DDPMPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(work / "ddpm_before")
        assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel and type(pipe.scheduler) is DDPMScheduler
        assert sample_ddpm(pipe).shape == (1, 8, 8, 3)
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    expected = get_signature_keys.__func__(DiffusionPipeline, DDPMPipeline)
    assert DiffusionPipeline._get_signature_keys(DDPMPipeline) == expected


def sample_ddpm(pipe: DDPMPipeline):
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=2, output_type="np").images


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


# The generated file and the wheel


def test_the_single_file_pipeline_is_up_to_date_and_a_change_is_noticed(tmp_path):
    run(sys.executable, ROOT / "pipelines" / "generate.py", "--check")

    for name in ("pipelines", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    generate = tmp_path / "pipelines" / "generate.py"
    run(sys.executable, generate, "--check")
    source = tmp_path / "src" / "ecvae_diffusers" / "energy.py"
    text = source.read_text(encoding="utf-8")
    assert "torch.enable_grad()" in text
    source.write_text(text.replace("torch.enable_grad()", "torch.set_grad_enabled(True)"), encoding="utf-8")
    done = run(sys.executable, generate, "--check", check=False)
    assert done.returncode == 1
    assert "pipelines/ecvae/pipeline.py is out of date: run `make pipelines`." in done.stderr
    run(sys.executable, generate)
    assert "torch.set_grad_enabled(True)" in (tmp_path / "pipelines" / "ecvae" / "pipeline.py").read_text()
    run(sys.executable, generate, "--check")


def test_the_wheel_holds_all_that_saving_needs(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("pipelines/ecvae/pipeline.py", "model_cards/template.md"):
        assert f"ecvae_diffusers/files/{name}" in names

    site, folder = tmp_path / "site", tmp_path / "saved"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel)
    run(sys.executable, "-c", INSTALLED, site, folder, env={**os.environ, "PYTHONPATH": str(site)})
    assert "# VAE, 16 px" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "pipeline.py").read_bytes() == (ROOT / "pipelines" / "ecvae" / "pipeline.py").read_bytes()
