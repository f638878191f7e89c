"""Start from a model of images of another size: its blocks are kept from the coarse end, and grown or dropped at the fine end."""

import math
import re
from typing import Any

from accelerate.logging import get_logger

from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.training.config import num_halvings


logger = get_logger(__name__)

# Entries of a config that were measured at the other size. They are measured again at the end of training.
MEASURED = ("reconstruction_variance", "reconstruction_spectrum", "posterior_directions")
# Networks whose blocks are numbered from the fine end. Those of a decoder are numbered from the coarse end.
FINE_FIRST = re.compile(r"(encoder|networks\.\d+)\.blocks\.(\d+)\.(.+)")


def resize(model: Any, sample_size: int | list[int]) -> Any:
    """
    Return a model for images of another size, with all weights of `model` that fit, and log which ones are new.

    An image of twice the size has one block more, at the fine end, as wide as the finest one. An image of half the size has one
    less. Blocks, counted from the coarse end, keep their weights.

    Args:
        model ([`AutoencoderEC`] or [`EnergyModel`]): The model of the other size.
        sample_size (`int` or `list[int]`): Size of the images, or height and width.

    Raises:
        ValueError: if `sample_size` can't be halved as often as the smallest model needs.
    """
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    sides = zip(height_and_width(sample_size), height_and_width(config["sample_size"]))
    growth = round(sum(math.log2(new / old) for new, old in sides) / 2)
    channels = list(config["block_out_channels"])
    most = num_halvings(sample_size, config["patch_size"], least=4) + 1
    if most < 1:
        raise ValueError(f"--resolution {sample_size} must be a multiple of the patch size {config['patch_size']}.")
    count = min(max(len(channels) + growth, 1), most)
    added = count - len(channels)
    channels = [channels[0]] * added + channels[max(-added, 0) :]
    config |= {"sample_size": sample_size, "block_out_channels": channels}
    config |= {name: None for name in MEASURED if name in config}
    if "num_scales" in config:
        config["num_scales"] = min(config["num_scales"], count)
    resized = type(model)(**config)
    weights, kept = resized.state_dict(), model.state_dict()
    renamed = {renumber(name, added, config["layers_per_block"]): weight for name, weight in kept.items()}
    fitting = {
        name: weight for name, weight in renamed.items() if name in weights and weight.shape == weights[name].shape
    }
    resized.load_state_dict(weights | fitting)
    new = sorted({part_of(name) for name in weights.keys() - fitting.keys()})
    logger.info(
        f"{type(model).__name__} of {model.config.sample_size} px, resized to {sample_size} px: {len(fitting)} of {len(weights)} "
        f"weights are copied. New: {', '.join(new) or 'none'}."
    )
    return resized.train()


def renumber(name: str, added: int, layers_per_block: int) -> str:
    """Return the name of a weight after `added` blocks were added at the fine end, or `""` if it has no place any more."""
    if (found := FINE_FIRST.fullmatch(name)) is None:
        return name
    network, rest = found[1], found[3]
    # An energy model numbers the residual blocks themselves.
    block = int(found[2]) + added * (1 if network == "encoder" else layers_per_block)
    if network == "encoder":
        # All blocks but the finest begin with a downsampling layer.
        layer, rest = rest.split(".", 1)
        residual = int(layer) - (int(found[2]) > 0)
        layer_now = residual + (block > 0)
        if residual < 0 and block == 0:
            return ""
        rest = f"{layer_now}.{rest}"
    return f"{network}.blocks.{block}.{rest}" if block >= 0 else ""


def part_of(name: str) -> str:
    """Return the part of a model that a weight belongs to, such as `encoder.blocks.0` or `decoder.conv_out`."""
    names = name.split(".")
    start = 1 if names[0] != "networks" else 2
    return ".".join(names[: start + (2 if names[start] == "blocks" else 1)])


def freeze_coarse_blocks(energy_model: Any, count: int) -> None:
    """
    Freeze the residual blocks of the `count` coarsest resolutions of each network of an [`EnergyModel`], which see its images last.
    The layers after them are trained, since they decide.
    """
    for network in energy_model.networks if count > 0 else ():
        for block in network.blocks[-count * energy_model.config.layers_per_block :]:
            block.requires_grad_(False)
