# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What diffusers, Accelerate and torch do with any pipeline, done with each of ours."""

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
HALF = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)


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
    generator = torch.manual_seed(0) if generator is None else generator
    arguments = {"batch_size": 2}
    if isinstance(pipe, ECVAERestorationPipeline):
        arguments = {"image": (2 * PICTURES - 1) * HALF, "operator": Inpainting(HALF), "num_inference_steps": 5}
        arguments |= {"noise_std": 0.1, "energy_weight": 0.5}
    return pipe(**arguments | {"generator": generator, "output_type": output_type} | kwargs).images


def run_all(pipe: DiffusionPipeline) -> list[torch.Tensor]:
    """Run every method, with and without gradients through the networks."""
    if not isinstance(pipe, ECVAEPipeline):
        return [run(pipe)]
    kwargs = {"output_type": "pt", "num_refinement_steps": 2}
    reconstructed = [pipe.reconstruct(PICTURES, output_type="pt"), pipe.reconstruct(PICTURES, **kwargs)]
    return [run(pipe), run(pipe, **kwargs), pipe.score(PICTURES), *(output.images for output in reconstructed)]


HOOKS = [
    (lambda model: accelerate.cpu_offload(model, execution_device=CPU), 0),
    # To a disk: what is left in memory is not the weights.
    (lambda model: apply_group_offloading(model, CPU, CPU, "leaf_level", offload_to_disk_path=tempfile.mkdtemp()), 0),
    (lambda model: model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32), 0.02),
]


@pytest.mark.parametrize("hook, tolerance", HOOKS)
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
    for generator in ([torch.manual_seed(0), None], [torch.manual_seed(0)] * 3, 0):
        with pytest.raises(ValueError, match="generator"):
            run(pipe, generator=generator)


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
    other, missing = (ECVAEPipeline, "vae") if name == "flow" else (ECFlowPipeline, "flow")
    with pytest.raises(ValueError, match=f"{other.__name__}.*{missing}"):
        other.from_pretrained(tmp_path / "plain")


def test_automodel_loads_components(make, name, tmp_path):
    pipe = make(name)
    pipe.save_pretrained(tmp_path)
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for folder, place in ((tmp_path / component, {}), (tmp_path, {"subfolder": component})):
                loaded = AutoModel.from_pretrained(str(folder), trust_remote_code=bool(place), **place)
                assert type(loaded) is type(model)
                assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


WITHOUT_PACKAGE = """
x, half = torch.load(sys.argv[2])
found = {}
for name, kwargs in ("restoration", {}), ("generation", {"custom_pipeline": "restoration"}), ("flow", {}):
    pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True, **kwargs)
    kwargs = {"batch_size": 2} if name == "flow" else {"image": x, "mask_image": 1 - half, "num_inference_steps": 5}
    images = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images
    found[name] = [type(pipe).__name__, images.tolist()]
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
        masked = {"image": PICTURES, "mask_image": 1 - HALF, "num_inference_steps": 5}
        expected = pipe(**masked, generator=torch.manual_seed(0), output_type="pt").images
        assert found[name][0] == "ECVAERestorationPipeline"
        torch.testing.assert_close(torch.tensor(found[name][1]), expected, rtol=0, atol=1e-4)


def test_a_card_of_ours_follows_the_model(make, tmp_path):
    pipe = make("generation")
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "What was true before.")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


@pytest.mark.parametrize("last", [0, 5, 11])  # in the descent, the probes of the curvature, the chain
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
