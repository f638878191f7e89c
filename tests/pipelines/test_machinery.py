# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What diffusers, Accelerate and torch do with any pipeline, done with each of ours."""

import inspect
import pickle
import tempfile

import accelerate
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from hub_server import files
from without_package import run_without_package

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline, FlowEC
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.operators import Inpainting


CPU = torch.device("cpu")
PICTURES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = torch.ones(1, 1, 16, 16)
HALF[..., 8:] = 0


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make(make_pipeline):
    def make(name: str, **scheduler_config) -> DiffusionPipeline:
        parts = make_pipeline(**scheduler_config).components
        if name == "flow":
            torch.manual_seed(0)
            flow = FlowEC(sample_size=8, in_channels=1, num_levels=2, steps_per_level=1, hidden_channels=8).eval()
            # A new flow's couplings are the identity, whatever their weights are.
            torch.nn.init.normal_(flow.levels[0].blocks[0].coupling.net[-1].weight, std=0.1)
            pipe = ECFlowPipeline(flow, parts["energy_model"], parts["scheduler"])
        else:
            parts["vae"].register_to_config(reconstruction_variance=0.1)
            pipe = ECVAEPipeline(**parts)
            pipe = ECVAERestorationPipeline.from_pipe(pipe) if name == "restoration" else pipe
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(params=["generation", "restoration", "flow"])
def name(request) -> str:
    return request.param


def run(pipe: DiffusionPipeline, output_type: str | None = "pt", generator=None, **kwargs):
    arguments = {"generator": seeded() if generator is None else generator, "output_type": output_type, **kwargs}
    if isinstance(pipe, ECVAERestorationPipeline):
        measured = {"image": (2 * PICTURES - 1) * HALF, "operator": Inpainting(HALF)}
        settings = {"num_inference_steps": 5, "noise_std": 0.1, "energy_weight": 0.5}
        return pipe(**{**measured, **settings, **arguments}).images
    return pipe(batch_size=2, **arguments).images


def run_all(pipe: DiffusionPipeline) -> list[torch.Tensor]:
    """Run every method, with and without gradients through the networks."""
    if not isinstance(pipe, ECVAEPipeline):
        return [run(pipe)]
    kwargs = {"output_type": "pt", "num_refinement_steps": 2}
    reconstructed = [pipe.reconstruct(PICTURES, output_type="pt"), pipe.reconstruct(PICTURES, **kwargs)]
    return [run(pipe), run(pipe, **kwargs), pipe.score(PICTURES), *(output.images for output in reconstructed)]


def offload_sequentially(model: torch.nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def offload_leaves(model: torch.nn.Module) -> None:
    """To a disk: what is left in memory is not the weights."""
    apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=tempfile.mkdtemp())


def cast_layers(model: torch.nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("hook, tolerance", [(offload_sequentially, 0), (offload_leaves, 0), (cast_layers, 0.02)])
def test_offloaded_and_cast_models_give_the_same(make, name, hook, tolerance):
    expected, pipe = run_all(make(name, drift_step_size=10.0)), make(name, drift_step_size=10.0)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            hook(component)
    torch.testing.assert_close(run_all(pipe), expected, rtol=0, atol=tolerance)


def test_pickle_and_arguments(make, name):
    pipe = make(name)
    expected = run(pipe)
    loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is type(pipe) and dict(loaded.config) == dict(pipe.config)
    assert torch.equal(run(loaded), expected)
    assert (run(pipe, output_type=None) == run(pipe, output_type="np")).all()
    with pytest.raises(ValueError, match="output_type"):
        run(pipe, output_type="")
    for generator in ([seeded(), None], [seeded()] * 3, 0):
        with pytest.raises(ValueError, match="generator"):
            run(pipe, generator=generator)


def test_saving_takes_the_arguments_of_diffusers_in_their_order(make, name, tmp_path):
    pipe = make(name)
    for method in ("save_pretrained", "push_to_hub"):
        theirs, ours = (
            [
                parameter.name
                for parameter in inspect.signature(getattr(kind, method)).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "use_flashpack"
            ]
            for kind in (DiffusionPipeline, type(pipe))
        )
        assert ours[: len(theirs)] == theirs
    pipe.save_pretrained(tmp_path, True, "fp16")
    assert len(list(tmp_path.glob("*/diffusion_pytorch_model.fp16.safetensors"))) == 2


# Saving and loading


def test_compiled_components_and_subclasses_are_saved_as_what_they_extend(make, name, tmp_path):
    pipe = make(name)
    pipe.save_pretrained(tmp_path / "plain")
    subclass, fingerprint = type("Mine", (type(pipe),), {}), weights_fingerprint(pipe)
    with pytest.warns(UserWarning, match="Mine"):
        subclass(**pipe.components).save_pretrained(tmp_path / "mine")
    assert type(subclass.from_pretrained(tmp_path / "mine")) is subclass
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "mine")) is type(pipe)
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            setattr(pipe, component, torch.compile(model, backend="eager"))
    assert weights_fingerprint(pipe) == fingerprint
    pipe.save_pretrained(tmp_path / "compiled")
    assert files(tmp_path / "plain") == files(tmp_path / "compiled") == files(tmp_path / "mine")


def test_automodel_loads_components(make, name, tmp_path):
    pipe = make(name)
    pipe.save_pretrained(tmp_path)
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for place in ({"subfolder": component}, {}):
                folder = str(tmp_path if place else tmp_path / component)
                loaded = AutoModel.from_pretrained(folder, **place)
                assert type(loaded) is type(model)
                assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
            config = dict(model.config) | {"_class_name": type(model).__name__}
            assert type(AutoModel.from_config(config)) is type(model)


@pytest.mark.parametrize(
    "other, saved, missing", [(ECVAEPipeline, "flow", "vae"), (ECFlowPipeline, "generation", "flow")]
)
def test_a_folder_of_another_pipeline_says_what_is_missing(make, saved, other, missing, tmp_path):
    make(saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{other.__name__}.*{missing}"):
        other.from_pretrained(tmp_path)


WITHOUT_PACKAGE = """
x, half = torch.load(sys.argv[2])
found = {}
for name, kwargs in ("restoration", {}), ("generation", {"custom_pipeline": "restoration"}), ("flow", {}):
    pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True, **kwargs)
    kwargs = {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    if name == "flow":
        images = [pipe(batch_size=2, **kwargs).images]
    else:
        kwargs["num_inference_steps"] = 5
        pair = (lambda x: x * half, lambda y: y * half)
        images = [pipe(x, mask_image=1 - half, **kwargs).images, pipe((2 * x - 1) * half, operator=pair, **kwargs).images]
    found[name] = [type(pipe).__name__, *(one.tolist() for one in images)]
print(json.dumps(found))
"""


def test_folders_are_used_without_the_package(make, tmp_path):
    """That of a generation pipeline restores too: it holds the code as `restoration.py`."""
    torch.save((PICTURES, HALF), tmp_path / "pictures.pt")
    for name in ("restoration", "generation", "flow"):
        make(name).save_pretrained(tmp_path / name)
    found, errors = run_without_package(WITHOUT_PACKAGE, str(tmp_path), str(tmp_path / "pictures.pt"))
    assert "scheduler" not in errors and found["flow"][0] == "ECFlowPipeline"
    torch.testing.assert_close(torch.tensor(found["flow"][1]), run(make("flow")), rtol=0, atol=1e-6)
    for name in ("restoration", "generation"):
        pipe = ECVAERestorationPipeline.from_pretrained(tmp_path / name)
        settings = {"num_inference_steps": 5, "output_type": "pt", "generator": seeded()}
        for arguments, images in zip(
            (
                {"image": PICTURES, "mask_image": 1 - HALF},
                {"image": (2 * PICTURES - 1) * HALF, "operator": (lambda x: x * HALF, lambda y: y * HALF)},
            ),
            found[name][1:],
        ):
            expected = pipe(**arguments, **settings).images
            torch.testing.assert_close(torch.tensor(images), expected, rtol=0, atol=1e-4)
        assert found[name][0] == "ECVAERestorationPipeline"


# Interruption


@pytest.mark.parametrize("last", [0, 5, 11])  # in the descent, in the probes of the curvature, in the chain
def test_restoration_can_be_interrupted(make, last):
    """The answers are those of the latents that the search has come to, and the next call runs to its end."""
    search = {"num_inference_steps": 12, "noise_std": 0.0}
    pipe, seen = make("restoration"), []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == last

    def stay(pipe, step, timestep, tensors):
        return {"latents": seen[-1]} if step >= last else {}

    interrupted = run(pipe, callback_on_step_end=stop, **search)
    assert len(seen) == last + 1 and pipe.num_timesteps == 12 and pipe.interrupt
    assert torch.equal(run(pipe, callback_on_step_end=stay, **search), interrupted)
    assert not pipe.interrupt


def test_refinement_can_be_interrupted(make):
    pipe = make("generation")

    def stop(module, inputs, output):
        steps.append(output)
        pipe._interrupt = len(steps) == 3

    pipe.energy_model.register_forward_hook(stop)
    steps = []
    images = run(pipe, num_refinement_steps=7)
    assert len(steps) == 3 and pipe.num_timesteps == 7
    steps = [None] * 3
    assert torch.equal(run(pipe, num_refinement_steps=3), images)
