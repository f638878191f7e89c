# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What diffusers, Accelerate and torch do with any pipeline, done with each of ours."""

import inspect
import json
import pickle
import tempfile

import accelerate
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from hub_server import files

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, ECVAERestorationPipeline, FlowEC, LangevinScheduler
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.operators import Inpainting


NAMES = ["generation", "restoration", "flow"]
CPU = torch.device("cpu")
PICTURES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = torch.ones(16, 16)
HALF[:, 8:] = 0


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


def run(pipe: DiffusionPipeline, output_type: str | None = "pt", generator=None, **kwargs):
    arguments = {"generator": seeded() if generator is None else generator, "output_type": output_type, **kwargs}
    if isinstance(pipe, ECVAERestorationPipeline):
        measured = {"image": (2 * PICTURES - 1) * HALF, "operator": Inpainting(HALF)}
        return pipe(
            **{**measured, "num_inference_steps": 5, "noise_std": 0.1, "energy_weight": 0.5, **arguments}
        ).images
    return pipe(batch_size=2, **arguments).images


# How a method of each pipeline runs its networks; those of `gradients` differentiate through them.
CALLS = {
    "sampling": ("generation", run),
    "refinement": ("generation", lambda pipe: run(pipe, num_refinement_steps=2)),
    "score": ("generation", lambda pipe: pipe.score(PICTURES)),
    "reconstruction": ("generation", lambda pipe: pipe.reconstruct(PICTURES, output_type="pt").images),
    "gradients of reconstruction": (
        "generation",
        lambda pipe: pipe.reconstruct(PICTURES, output_type="pt", num_refinement_steps=2).images,
    ),
    "restoration": ("restoration", run),
    "flow": ("flow", run),
}


def offload_sequentially(model: torch.nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def offload_leaves(model: torch.nn.Module) -> None:
    """To a disk: what is left in memory is not the weights."""
    apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=tempfile.mkdtemp())


def cast_layers(model: torch.nn.Module) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("hook, tolerance", [(offload_sequentially, 0), (offload_leaves, 0), (cast_layers, 0.02)])
@pytest.mark.parametrize("call", CALLS)
def test_offloaded_and_cast_models_give_the_same(make, call, hook, tolerance):
    name, method = CALLS[call]
    expected, pipe = method(make(name, drift_step_size=10.0)), make(name, drift_step_size=10.0)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            hook(component)
    torch.testing.assert_close(method(pipe), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_pickle(make, name):
    pipe = make(name)
    loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is type(pipe) and dict(loaded.config) == dict(pipe.config)
    assert torch.equal(run(loaded), run(pipe))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_methods_take_the_arguments_of_diffusers_in_their_order(make, name, method):
    theirs, ours = (
        [
            parameter.name
            for parameter in inspect.signature(getattr(kind, method)).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "use_flashpack"
        ]
        for kind in (DiffusionPipeline, type(make(name)))
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", NAMES)
def test_saved_by_position(make, name, tmp_path):
    make(name).save_pretrained(tmp_path, True, "fp16")
    assert len(list(tmp_path.glob("*/diffusion_pytorch_model.fp16.safetensors"))) == 2
    for arguments, wrong in (((False,), {}), ((), {"safe_serialization": False})):
        with pytest.raises(ValueError, match="safe_serialization"):
            make(name).save_pretrained(tmp_path, *arguments, **wrong)


@pytest.mark.parametrize("name", NAMES)
def test_output_type_none_is_np(make, name):
    assert (run(make(name), output_type=None) == run(make(name), output_type="np")).all()
    with pytest.raises(ValueError, match="output_type"):
        run(make(name), output_type="")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("generator", [[None, None], [seeded(), None], 0, [0, 1]])
def test_what_is_no_generator_is_refused(make, name, generator):
    with pytest.raises(ValueError, match="generator"):
        run(make(name), generator=generator)


# Saving and loading


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_is_saved_as_the_pipeline_that_it_extends(make, name, tmp_path):
    pipe = make(name)
    subclass = type("Mine", (type(pipe),), {})
    mine = subclass(**pipe.components)
    with pytest.warns(UserWarning, match="Mine"):
        mine.save_pretrained(tmp_path / "mine")
    pipe.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "mine") == files(tmp_path / "ours")
    assert type(subclass.from_pretrained(tmp_path / "mine")) is subclass
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "mine")) is type(pipe)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_components_are_saved_with_their_code(make, name, tmp_path):
    pipe = make(name)
    pipe.save_pretrained(tmp_path / "plain")
    fingerprint = weights_fingerprint(pipe)
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            setattr(pipe, component, torch.compile(model, backend="eager"))
    assert weights_fingerprint(pipe) == fingerprint
    pipe.save_pretrained(tmp_path / "compiled")
    assert files(tmp_path / "plain") == files(tmp_path / "compiled")


@pytest.mark.parametrize("name", NAMES)
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
    "name, other, missing",
    [
        ("flow", ECVAEPipeline, "vae"),
        ("flow", ECVAERestorationPipeline, "vae"),
        ("generation", ECFlowPipeline, "flow"),
    ],
)
def test_a_folder_of_another_pipeline_says_what_is_missing(make, name, other, missing, tmp_path):
    make(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{other.__name__}.*{missing}"):
        other.from_pretrained(tmp_path)


def test_a_subclass_with_more_components_loads_from_a_folder_without_them(make, tmp_path):
    class Extended(ECVAEPipeline):
        def __init__(self, vae, extra, energy_model=None, scheduler=None):
            super().__init__(vae, energy_model, scheduler)
            self.register_modules(extra=extra)

    make("generation").save_pretrained(tmp_path)
    loaded = Extended.from_pretrained(tmp_path, extra=LangevinScheduler(num_steps=3))
    assert loaded.extra.config.num_steps == 3
    with pytest.warns(UserWarning, match="Extended"):
        loaded.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ECVAEPipeline"]


# Interruption


@pytest.mark.parametrize("energy_weight", [0.0, 0.5])
@pytest.mark.parametrize("last", [0, 5, 11])  # in the descent, in the probes of the curvature, in the chain
def test_restoration_can_be_interrupted(make, last, energy_weight):
    """The answers are those of the latents that the search has come to, and the next call runs to its end."""
    search = {"num_inference_steps": 12, "energy_weight": energy_weight, "noise_std": 0.0}
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
