"""Autoencoders of diffusers: loaded with a frozen encoder, decoded in one wrapped forward, saved as plain diffusers saves them."""

import json
import os
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models import autoencoders
from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open

from ecvae_diffusers import EnergyModel, LangevinScheduler
from ecvae_diffusers.atomic import write_json, write_text
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.saving import fingerprint
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


logger = get_logger(__name__)

# What is trained of an autoencoder; all else makes latents, and must go on making those that others are used to.
TRAINED_PARTS = ("decoder", "post_quant_conv")
PROBED_LATENTS = 8  # rows and columns
LATENTS = "latents"  # the tensor's name in --latents_file

CARD = """---
{metadata}
---

{marker}

# {name} with a {what} decoder

The decoder was trained on from `{origin}` {how}, by `training/calibrate_decoder.py` of
ecvae-diffusers; the encoder, and so the latents, are as they were. It loads without that package:

```python
from diffusers import {name}

autoencoder = {name}.from_pretrained("path/or/hub-id")
```
"""
CALIBRATED = "with energy calibration (Luo et al., ECCV 2024)"
NOT_CALIBRATED = "on its squared error, without calibration"
# What a config of a foreign autoencoder holds at most: numbers, numbers of layers, and resolutions.
MAX_SIZE, MAX_LAYERS, MAX_BLOCKS = 65_536, 128, 16
CALIBRATING_ON = "\nIn the run's folder, `energy_model/` and `scheduler/` are for resuming calibration. They are not used at test time.\n"


class CalibratedDecoder(torch.nn.Module):
    """
    An autoencoder of which decoding is trained. Its forward decodes, so that a process group sees one forward an iteration.

    Args:
        autoencoder ([`ModelMixin`]): Any with `encode`, `decode` and a `decoder`.
        origin (`str`): Where it comes from, for its card.
    """

    def __init__(self, autoencoder: ModelMixin, origin: str):
        super().__init__()
        self.autoencoder, self.origin = autoencoder, origin
        for name, part in autoencoder.named_children():
            part.requires_grad_(name in TRAINED_PARTS)

    @property
    def config(self):
        return self.autoencoder.config

    def encoder_fingerprint(self) -> str:
        """Of what is not trained, and so of what latents mean."""
        weights = self.autoencoder.state_dict().items()
        return fingerprint({"encoder": {k: v for k, v in weights if k.split(".")[0] not in TRAINED_PARTS}})

    def enable_gradient_checkpointing(self) -> None:
        self.autoencoder.enable_gradient_checkpointing()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images (B, C, H, W) near [-1, 1]."""
        return self.autoencoder.decode(latents).sample

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, C, h, w): of a posterior its mode."""
        encoded = self.autoencoder.encode(images)
        if "latent_dist" in encoded:
            return encoded.latent_dist.mode()
        return encoded.latents if "latents" in encoded else encoded.latent


class SavedDecoder:
    """
    What a run saves: the autoencoder's own folder, as plain diffusers writes and reads it, with the energy model and the
    chain in folders of their own. It has the methods of a pipeline that the training loop calls.

    Args:
        decoder ([`CalibratedDecoder`]), energy_model, scheduler: What it is made of.
        card (`str`, *optional*): The text of its card, where there is one already.
    """

    def __init__(
        self,
        decoder: CalibratedDecoder,
        energy_model: EnergyModel | None,
        scheduler: LangevinScheduler | None,
        card: str | None = None,
    ):
        self.decoder, self.energy_model, self.scheduler, self.card = decoder, energy_model, scheduler, card

    def set_progress_bar_config(self, **kwargs) -> None:
        """Nothing: it samples nothing itself."""

    def to(self, device: torch.device) -> "SavedDecoder":
        self.decoder.to(device)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        folder, autoencoder = Path(folder), self.decoder.autoencoder
        autoencoder.save_pretrained(folder)
        without_path(folder / "config.json")
        if self.energy_model is not None:
            self.energy_model.save_pretrained(folder / "energy_model")
            self.scheduler.save_pretrained(folder / "scheduler")
        card = folder / "README.md"
        if not card.exists() or CARD_MARKER.encode() in card.read_bytes():
            write_text(card, self.card or self.new_card())

    def new_card(self) -> str:
        name, origin = type(self.decoder.autoencoder).__name__, self.decoder.origin
        is_folder = Path(origin).exists()
        data = ModelCardData(
            library_name="diffusers",
            tags=["diffusers", "autoencoder"] + (["energy-based-model"] if self.energy_model is not None else []),
            base_model=None if is_folder else origin,
        )
        # No path of this machine.
        origin = Path(origin).name if is_folder else origin
        is_calibrated = self.energy_model is not None
        card = CARD.format(
            metadata=data.to_yaml(),
            marker=CARD_MARKER,
            name=name,
            origin=origin,
            what="calibrated" if is_calibrated else "further trained",
            how=CALIBRATED if is_calibrated else NOT_CALIBRATED,
        )
        return card + (CALIBRATING_ON if is_calibrated else "")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs) -> "SavedDecoder":
        """What `save_pretrained` wrote; other arguments are those of the autoencoder's `from_pretrained`."""
        decoder = CalibratedDecoder(load_autoencoder(folder, **kwargs), str(folder))
        energy_model = scheduler = None
        if (Path(folder) / "energy_model").is_dir():
            energy_model = EnergyModel.from_pretrained(Path(folder) / "energy_model")
            scheduler = LangevinScheduler.from_pretrained(Path(folder) / "scheduler", local_files_only=True)
        return cls(decoder, energy_model, scheduler, (Path(folder) / "README.md").read_text(encoding="utf-8"))


def without_path(config_file: Path) -> None:
    """Take the path that a model was loaded from out of its config."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        write_json(config_file, config, sort_keys=True)


def check_size(refused: str, config: dict) -> None:
    """Raises `ValueError` if the config of a foreign autoencoder would fill any memory."""
    for name, value in config.items():
        numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]
        largest = MAX_LAYERS if "layers" in name else MAX_SIZE
        if len(numbers) > MAX_BLOCKS and "channels" in name or any(one > largest for one in numbers):
            raise ValueError(f"{refused} is larger than any: `{name}` of its config is {str(value)[:80]}.")


def load_autoencoder(name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    """
    The autoencoder of a folder or a Hub id, of whichever class of diffusers its config names; from safetensors only.

    Args:
        name_or_path (`str`): The folder or Hub id.
        subfolder, revision, variant (`str`, *optional*): As for `from_pretrained`.

    Raises:
        ValueError: if there is no such subfolder, it can't be loaded, its weights are not whole or not finite, or it is none of images
            with a decoder of one pass.
    """
    found = {name: kwargs[name] for name in ("subfolder", "revision", "variant") if kwargs.get(name) is not None}
    refused = f"--pretrained_model_name_or_path {str(name_or_path)!r}"
    if Path(name_or_path).is_dir() and "subfolder" in found:
        # diffusers would take the weights of the folder itself where there are some.
        if not (place := Path(name_or_path, found["subfolder"])).is_dir():
            raise ValueError(f"{refused} has no folder --subfolder {found['subfolder']!r}.")
        name_or_path = place
        del found["subfolder"]
    try:
        config_place = {name: value for name, value in found.items() if name != "variant"}
        config = AutoencoderKL.load_config(name_or_path, **config_place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{refused} can't be loaded: its config holds no arguments by name.")
    check_size(refused, config)
    class_name = config.get("_class_name")
    model_class = getattr(autoencoders, str(class_name), None)
    if model_class is None or not all(hasattr(model_class, name) for name in ("encode", "decode")):
        raise ValueError(f"{refused} must be an autoencoder of diffusers, but is a {class_name}.")
    try:
        model, info = model_class.from_pretrained(
            name_or_path, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **found
        )
    except LOADING_ERRORS as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"{refused} is not whole: {sorted(info['missing_keys'])[:3]} are missing from its weights.")
    if broken := [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]:
        raise ValueError(f"{refused} holds weights that are not finite: {', '.join(broken[:3])}.")
    # Those of audio have no channels of images, and one that decodes by diffusion no decoder of one pass.
    if "in_channels" not in model.config or not isinstance(getattr(model, "decoder", None), torch.nn.Module):
        raise ValueError(
            f"{refused} must be an autoencoder of images that decodes in one pass (AutoencoderKL, AutoencoderTiny, VQModel), "
            f"but is a {class_name}."
        )
    if model.config.in_channels not in (1, 3, 4):
        raise ValueError(f"{refused} must be of 1, 3 or 4 channels, but has {model.config.in_channels}.")
    return model


def load_energy_model(
    name_or_path: str | os.PathLike,
    resolution: int,
    in_channels: int,
    subfolder: str | None = None,
    revision: str | None = None,
) -> EnergyModel | None:
    """
    The energy model that an earlier run has saved beside its decoder, ready to train; `None`, and a line in the log, where there
    is none, or one for other images.

    Args:
        name_or_path (`str`): The decoder's folder or Hub id.
        resolution, in_channels (`int`): Of the images that it is to be for.
        subfolder, revision (`str`, *optional*): Where the decoder lies.

    Raises:
        ValueError: if it fits and can't be loaded.
    """
    inside = "/".join(filter(None, (subfolder, "energy_model")))
    place, where = name_or_path, {"subfolder": inside, "revision": revision}
    if Path(name_or_path).is_dir():
        # With a subfolder diffusers would take the weights of the folder itself, the decoder's, where there are some.
        place, where = Path(name_or_path, inside), {}
        # Of a folder that is not there diffusers would ask the Hub.
        if not (place / "config.json").is_file():
            logger.info(f"{str(name_or_path)!r} has no energy model next to it: it is a new one.")
            return None
    try:
        config = EnergyModel.load_config(place, **where)
    except OSError as error:
        if not where:
            raise ValueError(f"--pretrained_model_name_or_path: {str(place)!r} can't be loaded: {error}") from error
        # It may be the network that failed.
        logger.info(
            f"{str(name_or_path)!r} has no energy model next to it ({str(error).splitlines()[0]}): it is a new one."
        )
        return None
    if not isinstance(config, dict):
        raise ValueError(
            f"--pretrained_model_name_or_path: {str(place)!r} can't be loaded: its config holds no arguments by name."
        )
    try:
        found = tuple(config.get(name) for name in ("_class_name", "sample_size", "in_channels"))
        if found != (EnergyModel.__name__, resolution, in_channels):
            logger.info(
                f"The energy model of {str(name_or_path)!r} is a {found[0]} of {found[2]} channel(s) and {found[1]} px, "
                "which does not fit: it is a new one."
            )
            return None
        # `from_pretrained` gives networks in evaluation mode.
        return EnergyModel.from_pretrained(place, low_cpu_mem_usage=False, **where).train()
    except LOADING_ERRORS as error:
        raise ValueError(
            f"--pretrained_model_name_or_path: the energy model of {str(name_or_path)!r} can't be loaded: {error}"
        ) from error


@torch.no_grad()
def latent_shape(decoder: CalibratedDecoder, resolution: int) -> tuple[int, ...]:
    """
    The shape of one image's latents.

    Raises:
        ValueError: if the autoencoder does not take images of `resolution`, or gives others back.
    """
    image = torch.zeros(1, decoder.config.in_channels, resolution, resolution)
    name = type(decoder.autoencoder).__name__
    decoder.eval()
    try:
        latents = decoder.encode(image)
        shape = tuple(decoder(latents).shape)
        freeze_unused(decoder, latents)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--resolution {resolution} does not fit {name}: {error}") from error
    if shape != tuple(image.shape):
        raise ValueError(
            f"--resolution {resolution} does not fit {name}, which gives images of {shape[1:]} for {tuple(image.shape[1:])}."
        )
    return tuple(latents.shape[1:])


@torch.enable_grad()
def freeze_unused(decoder: CalibratedDecoder, latents: torch.Tensor) -> None:
    """
    Freeze what decoding does not come by, such as the part of `AutoencoderAsymmetricKL` that reads a mask: data parallel training
    waits for a gradient of each parameter.
    """
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    # A corner will do: it is the same way through the network.
    decoded = decoder(latents[..., :PROBED_LATENTS, :PROBED_LATENTS])
    for parameter, gradient in zip(trained, torch.autograd.grad(decoded.sum(), trained, allow_unused=True)):
        parameter.requires_grad_(gradient is not None)


def load_latents(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """
    Latents (N, C, h, w) of a safetensors file.

    Raises:
        ValueError: if it can't be read, or holds none of `shape`.
    """
    if Path(path).is_dir():
        raise ValueError(f"--latents_file {path!r} must be a safetensors file, but is a folder.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            latents = file.get_tensor(LATENTS).float() if LATENTS in names else None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--latents_file {path!r} can't be read: {error}") from error
    if latents is None:
        raise ValueError(f"--latents_file {path!r} must hold a tensor {LATENTS!r}, but holds {names}.")
    if latents.ndim != 4 or len(latents) == 0 or tuple(latents.shape[1:]) != shape:
        raise ValueError(
            f"--latents_file {path!r} must hold latents of shape (N, {', '.join(map(str, shape))}), but they are of "
            f"{tuple(latents.shape)}."
        )
    if not latents.isfinite().all():
        raise ValueError(f"--latents_file {path!r} holds values that are not finite.")
    return latents
