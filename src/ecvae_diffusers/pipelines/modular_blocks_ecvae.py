# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The pipelines of sampling and of restoration as blocks of diffusers' modular pipelines."""

import inspect
import re
from dataclasses import fields
from typing import Any, get_args

from diffusers import AutoPipelineBlocks, DiffusionPipeline, ImagePipelineOutput, ModularPipelineBlocks
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam, PipelineState
from diffusers.utils import BaseOutput

from .pipeline_ecvae import ECVAEPipeline
from .pipeline_ecvae_restoration import ECVAERestorationOutput, ECVAERestorationPipeline


def described(documented: Any) -> dict[str, str]:
    """Return the description of each argument in a docstring, by name."""
    text = f"{inspect.getdoc(documented)}\n"
    # `name (type): text` or, in diffusers, `name (type)`, and then lines of text.
    found = re.findall(r"^ {4}(\w+) \((?:.*?\):(.*)|.*\))\n((?: {8}.*\n)*)", text, flags=re.MULTILINE)
    return {name: " ".join(f"{first} {rest}".split()) for name, first, rest in found}


class PipelineBlock(ModularPipelineBlocks):
    """
    A block that calls a pipeline of this package. Its components are those of the pipeline, its inputs the arguments of the call
    except `return_dict`, and its outputs the fields of the output. Subclasses name the pipeline and its output.
    """

    pipeline_class: type[DiffusionPipeline]
    output_class: type[BaseOutput]

    def __init__(self) -> None:
        super().__init__()
        self.progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **kwargs) -> None:
        """Configure the progress bar of steps, as [`DiffusionPipeline.set_progress_bar_config`] does."""
        self.progress_bar_config = kwargs

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.pipeline_class) or "").split("\n\n")[0]

    @property
    def expected_components(self) -> list[ComponentSpec]:
        descriptions = described(self.pipeline_class)
        names, _ = self.pipeline_class._get_signature_keys(self.pipeline_class)
        arguments = [
            one for one in inspect.signature(self.pipeline_class.__init__).parameters.values() if one.name in names
        ]
        # The annotation of an optional component is a class or `None`.
        kinds = [(one.name, next(iter(get_args(one.annotation)), one.annotation)) for one in arguments]
        return [ComponentSpec(name, kind, descriptions.get(name)) for name, kind in kinds]

    @property
    def inputs(self) -> list[InputParam]:
        descriptions = described(self.pipeline_class.__call__)
        arguments = list(inspect.signature(self.pipeline_class.__call__).parameters.values())[1:]
        return [
            InputParam(
                name=one.name,
                type_hint=one.annotation,
                default=None if one.default is one.empty else one.default,
                required=one.default is one.empty,
                description=descriptions.get(one.name, ""),
            )
            for one in arguments
            if one.name != "return_dict"
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        descriptions = described(self.output_class)
        return [OutputParam(one.name, one.type, descriptions.get(one.name, "")) for one in fields(self.output_class)]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        if components.vae is None:
            raise ValueError(
                "`vae` must be loaded, but is None: call `load_components(trust_remote_code=True)` or `update_components(vae=...)`."
            )
        block_state = self.get_block_state(state)
        pipeline = self.pipeline_class(**{name: getattr(components, name) for name in self.component_names})
        pipeline.set_progress_bar_config(**self.progress_bar_config)
        output = pipeline(**block_state.as_dict())
        for name in self.intermediate_output_names:
            block_state[name] = getattr(output, name)
        self.set_block_state(state, block_state)
        return components, state


class ECVAEBlocks(PipelineBlock):
    """A block that generates images, as [`ECVAEPipeline`] does: with the same components, inputs and errors."""

    pipeline_class = ECVAEPipeline
    output_class = ImagePipelineOutput


class ECVAERestorationBlocks(PipelineBlock):
    """A block that restores images, as [`ECVAERestorationPipeline`] does: with the same components, inputs, outputs and errors."""

    pipeline_class = ECVAERestorationPipeline
    output_class = ECVAERestorationOutput


class ECVAEAutoBlocks(AutoPipelineBlocks):
    """
    Blocks that restore `image` if it is given, and generate images otherwise. A saved folder loads as a pipeline of these blocks:
    `ModularPipeline.from_pretrained(folder, trust_remote_code=True)`.
    """

    block_classes = [ECVAERestorationBlocks, ECVAEBlocks]
    block_names = ["restore", "sample"]
    block_trigger_inputs = ["image", None]

    @property
    def description(self) -> str:
        return "Restores `image` if it is given, and generates images otherwise."
