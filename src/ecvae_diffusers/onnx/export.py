# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Writes an [`ECVAEPipeline`] as ONNX files: the work of `ecvae export`.

Inputs and outputs of the networks are latents and 8-bit images. Each network contains the conversion between 8 bits and [-1, 1].
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from .. import __version__
from ..atomic import is_free, replacing, write_json
from ..checks import height_and_width
from ..energy import unfrozen_copy
from ..hub.saving import weights_fingerprint
from ..models import AutoencoderEC, EnergyModel
from ..pipelines import ECVAEPipeline
from .pipeline_onnx_ecvae import MODEL_FILE, SUFFIXES, network_path, onnxruntime


try:
    import onnx
    import onnxscript  # noqa: F401  torch's exporter imports it
except ImportError as error:
    raise ImportError(f"{error}: pip install 'ecvae-diffusers[onnx]'") from error


# Batches that are compared with torch. Neither has the size that is traced.
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2
# Largest difference from torch, as a share of the largest value of an output: rounding of float32, and of weights to float16.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}


def described(dtype: str, *shape: int, **more: Any) -> dict[str, Any]:
    """Return the entry of `model.json` for an input or output. `shape` is the shape for one image."""
    return {"dtype": dtype, "shape": ["batch_size", *shape], **more}


def to_sample(image: torch.Tensor) -> torch.Tensor:
    """Convert images (B, H, W, C), uint8, to (B, C, H, W) in [-1, 1]."""
    return 2 * (image.permute(0, 3, 1, 2).float() / 255) - 1


def to_image(sample: torch.Tensor) -> torch.Tensor:
    """Convert images (B, C, H, W) in [-1, 1] to (B, H, W, C), uint8, as diffusers does."""
    return ((sample * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def labels_of(config: Any) -> dict[str, dict[str, Any]]:
    """Return the entry of `model.json` for the input `class_labels`. Empty for a model without classes."""
    classes = config.num_class_embeds
    return {} if classes is None else {"class_labels": described("int64", range=[0, classes])}


class Network(nn.Module):
    """A network for export. `forward` takes the `inputs` and returns the `outputs`, in the order of these dictionaries."""

    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]

    def random_inputs(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Draw inputs: whole numbers over their range, others from N(0, I)."""
        drawn: list[torch.Tensor] = []
        for one in self.inputs.values():
            shape = (batch_size, *one["shape"][1:])
            if one["dtype"] == "float32":
                drawn.append(torch.randn(shape, generator=generator))
            else:
                low, high = one["range"]
                values = torch.randint(low, high + 1, shape, generator=generator)
                drawn.append(values.to(getattr(torch, one["dtype"])))
        return tuple(drawn)


class Decoder(Network):
    """Latents -> images, in 8 bits and in [-1, 1]."""

    def __init__(self, vae: AutoencoderEC):
        super().__init__()
        self.vae, config = vae, vae.config
        size, channels = height_and_width(config.sample_size), config.in_channels
        latents = described("float32", config.latent_channels, 1, 1, distribution="N(0, I)")
        self.inputs = {"latents": latents, **labels_of(config)}
        self.outputs = {
            "image": described("uint8", *size, channels, range=[0, 255]),
            "sample": described("float32", channels, *size, range=[-1, 1]),
        }

    def forward(self, latents: torch.Tensor, class_labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        sample = self.vae.decode(latents, class_labels=class_labels).sample
        return to_image(sample), sample


class Encoder(Network):
    """Images in 8 bits -> mean and standard deviation of the posterior."""

    def __init__(self, vae: AutoencoderEC):
        super().__init__()
        self.vae, config = vae, vae.config
        image = described("uint8", *height_and_width(config.sample_size), config.in_channels, range=[0, 255])
        self.inputs = {"image": image, **labels_of(config)}
        self.outputs = {name: described("float32", config.latent_channels, 1, 1) for name in ("mean", "std")}

    def forward(self, image: torch.Tensor, class_labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        posterior = self.vae.encode(to_sample(image), class_labels=class_labels).latent_dist
        return posterior.mean, posterior.std


class Energy(Network):
    """Images in 8 bits -> energies. The weights are divided by their spectral norms in advance."""

    def __init__(self, energy_model: EnergyModel):
        super().__init__()
        self.energy_model, config = without_spectral_norm(energy_model), energy_model.config
        image = described("uint8", *height_and_width(config.sample_size), config.in_channels, range=[0, 255])
        self.inputs = {"image": image, **labels_of(config)}
        self.outputs = {"energy": described("float32")}

    def forward(self, image: torch.Tensor, class_labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return (self.energy_model(to_sample(image), class_labels).energy,)


def without_spectral_norm(energy_model: EnergyModel) -> EnergyModel:
    """
    Return the same function as a model whose weights are divided by their norms in advance. `parametrize.remove_parametrizations`
    would take the weights of all copies of the model, which share a class.
    """
    weights = {name: one for name, one in energy_model.state_dict().items() if ".parametrizations." not in name}
    for name, module in energy_model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            weights[f"{name}.weight"] = module.weight.detach()
    # Without private entries of diffusers, such as the list of defaulted arguments.
    config = {name: value for name, value in energy_model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        folded = type(energy_model).from_config(config | {"spectral_norm": False})
    folded.load_state_dict(weights, assign=True)
    return folded


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of torch's exporter about a missing torchvision and about deprecated functions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def to_onnx(network: Network) -> onnx.ModelProto:
    """Trace a network, for any batch size."""
    batch = torch.export.Dim("batch_size")
    try:
        with quiet():
            program: Any = torch.onnx.export(
                network,
                network.random_inputs(TRACED_BATCH, torch.Generator().manual_seed(0)),
                input_names=list(network.inputs),
                output_names=list(network.outputs),
                dynamic_shapes=tuple({0: batch} for _ in network.inputs),
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:  # of an onnxscript that is older than torch
        raise ImportError(f"{error}: pip install --upgrade onnxscript") from error
    model = program.model_proto
    # The metadata holds source lines with paths of this machine.
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]  # intermediate shapes, which a runtime infers
    return model


def with_half_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    Return a copy that stores the weights of convolutions in float16. A runtime converts them to float32 once, when it loads the file,
    and computes in float32. So it runs on devices without float16, and intermediate results are not rounded.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    conversions = []
    for weight in copied.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 4:
            name = weight.name
            with np.errstate(over="ignore"):  # the comparison with torch finds it
                halves = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}.fp16"))
            conversions.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*conversions, *copied.graph.node]
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    return copied


def check(path: Path, network: Network, precision: str) -> None:
    """Check a file by `onnx.checker`, and raise `RuntimeError` if it gives other outputs than torch on random inputs."""
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for batch_size in CHECKED_BATCHES:
        inputs = network.random_inputs(batch_size, generator)
        outputs = session.run(None, {name: one.numpy() for name, one in zip(network.inputs, inputs)})
        with torch.no_grad():
            expected = [one.double().numpy() for one in network(*inputs)]
        for name, found, wanted in zip(network.outputs, outputs, expected):
            # Images in 8 bits may be rounded to the next level.
            allowed = TOLERANCES[precision] * np.abs(wanted).max() + (found.dtype == np.uint8)
            is_close = found.shape == wanted.shape and np.abs(found - wanted).max() <= allowed
            if not is_close:  # NaN too
                raise RuntimeError(f"{path.name} is not kept: its `{name}` differs from that of torch.")


def export_onnx(pipeline: ECVAEPipeline, output_dir: str | os.PathLike, card: ModelCardData | None = None) -> None:
    """
    Write a pipeline's networks as ONNX files, each in float32 and with weights in float16, and `model.json`. [`OnnxECVAEPipeline`]
    loads the folder. Each file is checked by `onnx.checker`, and against torch on random inputs. The folder is complete or absent.

    Args:
        pipeline ([`ECVAEPipeline`]): What to export. Without an energy model there is no `energy.onnx`.
        output_dir (`str`): Where to write: a new or empty folder.
        card (`ModelCardData`, *optional*): The model card's data, whose title, licence and figures go into `model.json`.

    Raises:
        ValueError: if `output_dir` holds something.
        RuntimeError: if a network gives other outputs as ONNX than in torch.
        WriteError: if the folder can't be written.
    """
    if not is_free(output_dir):
        raise ValueError(f"`output_dir` must be a new or empty folder, but {str(output_dir)!r} holds something.")
    # Copies, in float32 on the CPU.
    vae = copy.deepcopy(pipeline.vae).cpu().float().eval()
    networks: dict[str, Network] = {"decoder": Decoder(vae), "encoder": Encoder(vae)}
    if pipeline.energy_model is not None:
        networks["energy"] = Energy(unfrozen_copy(pipeline.energy_model).cpu().float().eval())
    figures = (card.eval_results or []) if card is not None else []
    config = {
        "title": card.model_name if card is not None else None,
        "license": card.license if card is not None else None,
        "sample_size": vae.config.sample_size,
        "channels": vae.config.in_channels,
        "latent_channels": vae.config.latent_channels,
        "num_class_embeds": vae.config.num_class_embeds,
        "id2label": vae.config.id2label,
        "class_frequencies": vae.config.class_frequencies,
        "networks": {name: {"inputs": one.inputs, "outputs": one.outputs} for name, one in networks.items()},
        "figures": [
            {
                "name": one.metric_name,
                "type": one.metric_type,
                "value": one.metric_value,
                "dataset": one.dataset_name,
                "split": one.dataset_split,
            }
            for one in figures
        ],
        "weights": weights_fingerprint(pipeline),
        "ecvae_diffusers": __version__,
    }
    with (
        replacing(output_dir) as unfinished,
        tqdm(total=len(networks) * len(SUFFIXES), desc="Export", unit="file") as progress_bar,
    ):
        unfinished.mkdir()
        for name, network in networks.items():
            network.eval()
            model = to_onnx(network)
            for precision, stored in (("fp32", model), ("fp16", with_half_weights(model))):
                path = network_path(unfinished, name, precision)
                onnx.save(stored, path)
                check(path, network, precision)
                progress_bar.update()
        write_json(unfinished / MODEL_FILE, config)
