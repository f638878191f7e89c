# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Blocks of diffusers' modular pipelines: they do what the pipelines do. Without the package: tests/hub/test_doors.py."""

from dataclasses import fields
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import ImagePipelineOutput, ModularPipeline, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines import InputParam, OutputParam

from ecvae_diffusers import (
    AutoencoderEC,
    ECVAEAutoBlocks,
    ECVAEBlocks,
    ECVAEPipeline,
    ECVAERestorationBlocks,
    ECVAERestorationOutput,
    ECVAERestorationPipeline,
    EnergyModel,
    LangevinScheduler,
)
from ecvae_diffusers.hub.modular import MODULAR_FILES


OLD = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1" / "energy"
MASK = torch.ones(1, 1, 16, 16).tril()
PICTURE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
RESTORE = {
    "image": PICTURE, "mask_image": MASK, "num_inference_steps": 3, "num_restorations": 2, "reconstruction_variance": 0.1
}  # fmt: skip
OUTPUTS = {ECVAEBlocks: ImagePipelineOutput, ECVAERestorationBlocks: ECVAERestorationOutput}


def seeded(**inputs) -> dict:
    return {"output_type": "pt", "generator": torch.Generator().manual_seed(0), **inputs}


def modular(pipe: ECVAEPipeline, blocks_class: type[ModularPipelineBlocks]) -> ModularPipeline:
    made = blocks_class().init_pipeline()
    made.update_components(**{name: pipe.components[name] for name in made.component_names})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("blocks_class", [ECVAEBlocks, ECVAEAutoBlocks])
@pytest.mark.parametrize(
    "inputs",
    [
        {"batch_size": 3},
        {"latents": torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(1))},
        {"batch_size": 2, "temperature": 0.5, "num_refinement_steps": 2},
    ],
)
def test_blocks_sample_as_the_pipeline_does(blocks_class, inputs, pipe):
    expected = pipe(**seeded(**inputs)).images
    assert torch.equal(modular(pipe, blocks_class)(**seeded(**inputs), output="images"), expected)


@pytest.mark.parametrize("blocks_class", [ECVAERestorationBlocks, ECVAEAutoBlocks])
def test_blocks_restore_as_the_pipeline_does(blocks_class, pipe):
    expected = ECVAERestorationPipeline.from_pipe(pipe)(**seeded(**RESTORE))
    state = modular(pipe, blocks_class)(**seeded(**RESTORE))
    for field in fields(ECVAERestorationOutput):
        torch.testing.assert_close(state.get(field.name), expected[field.name], rtol=0, atol=0)


def test_images_are_pil_by_default(pipe):
    images = modular(pipe, ECVAEAutoBlocks)(batch_size=2, output="images")
    assert len(images) == 2 and all(isinstance(image, PIL.Image.Image) for image in images)


@pytest.mark.parametrize(
    "inputs, named",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"latents": torch.zeros(1, 3, 1, 1)}, "latents"),
        ({"class_labels": "cat"}, "class_labels"),
        ({**RESTORE, "method": "guess"}, "method"),
        ({**RESTORE, "mask_image": None}, "mask_image"),
        ({**RESTORE, "noise_std": -1.0}, "noise_std"),
    ],
)
def test_wrong_inputs_raise_what_the_pipeline_raises(inputs, named, pipe):
    restoration = ECVAERestorationPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=named) as expected:
        (restoration if "image" in inputs else pipe)(**inputs)
    with pytest.raises(ValueError, match=named) as found:
        modular(pipe, ECVAEAutoBlocks)(**inputs)
    assert str(found.value) == str(expected.value)


def test_a_missing_autoencoder_is_named():
    with pytest.raises(ValueError, match="vae"):
        ECVAEBlocks().init_pipeline()()


def test_blocks_declare_and_explain_what_they_take_and_give():
    for blocks_class, output_class in OUTPUTS.items():
        blocks = blocks_class()
        assert blocks.description and all(one.description for one in [*blocks.inputs, *blocks.outputs])
        assert set(blocks.output_names) == {field.name for field in fields(output_class)}
        assert all(component.description for component in blocks.expected_components)
    sample, restore = ECVAEBlocks(), ECVAERestorationBlocks()
    assert {"batch_size", "generator", "latents", "class_labels"} < set(
        sample.input_names
    ) and not sample.required_inputs
    assert "return_dict" not in sample.input_names and restore.required_inputs == ["image"]
    assert {one.name: one.type_hint for one in sample.expected_components} == {
        "vae": AutoencoderEC, "energy_model": EnergyModel, "scheduler": LangevinScheduler
    }  # fmt: skip
    both = ECVAEAutoBlocks()
    assert set(both.input_names) == {*sample.input_names, *restore.input_names} and not both.required_inputs
    assert both.get_execution_blocks(image=PICTURE).__class__ is ECVAERestorationBlocks
    assert both.get_execution_blocks().__class__ is ECVAEBlocks


def test_the_progress_bar_is_silenced(pipe, capfd):
    restored = modular(pipe, ECVAEAutoBlocks)
    restored(**RESTORE)
    assert capfd.readouterr().err == ""
    restored.set_progress_bar_config(desc="Restoring")
    restored(**RESTORE)
    assert "Restoring" in capfd.readouterr().err


def test_blocks_load_the_components_of_a_folder(saved, pipe):
    """With the package, blocks need no trust. A folder of version 0.1, which has no modular form, loads with all components."""
    made = ECVAEBlocks().init_pipeline(str(saved))
    made.load_components()
    assert type(made.vae) is AutoencoderEC
    assert torch.equal(made(**seeded(batch_size=2), output="images"), pipe(**seeded(batch_size=2)).images)
    assert not any((OLD / name).exists() for name in MODULAR_FILES)
    old = ECVAEBlocks().init_pipeline(str(OLD))
    old.load_components()
    expected = ECVAEPipeline.from_pretrained(OLD)(**seeded(num_refinement_steps=2)).images
    assert torch.equal(old(**seeded(num_refinement_steps=2), output="images"), expected)


class Negative(ModularPipelineBlocks):
    """A block of a user, after ours."""

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("images", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("negatives")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.negatives = 1 - block_state.images
        self.set_block_state(state, block_state)
        return components, state


def test_blocks_work_next_to_those_of_a_user(pipe):
    blocks = SequentialPipelineBlocks.from_blocks_dict({"sample": ECVAEBlocks(), "negative": Negative()})
    made = blocks.init_pipeline()
    made.update_components(**pipe.components)
    found = made(**seeded(batch_size=2), output="negatives")
    assert torch.equal(found, 1 - pipe(**seeded(batch_size=2)).images)
