"""Load autoencoders of diffusers with a frozen encoder, decode in one wrapped forward pass, and save them for plain diffusers."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models import autoencoders
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file

from ecvae_diffusers import EnergyModel, LangevinScheduler
from ecvae_diffusers.atomic import write_json, write_text
from ecvae_diffusers.checks import MODES, height_and_width
from ecvae_diffusers.hub.card import CARD_MARKER
from ecvae_diffusers.hub.saving import fingerprint
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


logger = get_logger(__name__)

# The trained parts of an autoencoder. All others compute latents, which must not change.
TRAINED_PARTS = ("decoder", "post_quant_conv")
CARD = """---
{metadata}
---

{marker}

# {title}

{about} It was trained {how}, with `ecvae calibrate-decoder` of ecvae-diffusers, and loads without that package:

```python
from diffusers import {name}

autoencoder = {name}.from_pretrained("path/or/hub-id")
```
"""
CALIBRATING_ON = "\nIn the run's folder, `energy_model/` and `scheduler/` serve to continue calibration. They are not used at test time.\n"


def encoder_weights(autoencoder: ModelMixin) -> dict[str, torch.Tensor]:
    """Return the weights of an autoencoder that compute latents, by their names."""
    return {k: v for k, v in autoencoder.state_dict().items() if k.split(".")[0] not in TRAINED_PARTS}


class CalibratedDecoder(torch.nn.Module):
    """
    An autoencoder whose decoder is trained, through `forward`.

    Args:
        autoencoder (`ModelMixin`): An autoencoder of diffusers. All parameters except those of the decoder are frozen.
        origin (`str`): The folder or Hub id of the autoencoder, for the card.
    """

    def __init__(self, autoencoder: ModelMixin, origin: str):
        super().__init__()
        self.autoencoder, self.origin, self.config = autoencoder, origin, autoencoder.config
        for name, part in autoencoder.named_children():
            part.requires_grad_(name in TRAINED_PARTS)

    def describe(self, origin: str, what: str) -> tuple[str, str]:
        """Return title and first sentences of the card. `what` is done with the decoder, and `origin` names the autoencoder."""
        about = f"The decoder of `{origin}` was trained further. The encoder, and so the latents, are unchanged."
        return f"{type(self.autoencoder).__name__} with a {what} decoder", about

    def encoder_fingerprint(self) -> str:
        """Return a fingerprint of the frozen weights, which determine the latents."""
        return fingerprint({"encoder": encoder_weights(self.autoencoder)})

    def enable_gradient_checkpointing(self) -> None:
        self.autoencoder.enable_gradient_checkpointing()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, h, w) to images (B, C, H, W), nominally in [-1, 1] but not clipped."""
        return self.autoencoder.decode(latents).sample

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to latents (B, C, h, w): the mode, if the encoder returns a distribution."""
        encoded = self.autoencoder.encode(images)
        if "latent_dist" in encoded:
            return encoded.latent_dist.mode()
        return encoded.latents if "latents" in encoded else encoded.latent


class SavedDecoder:
    """
    The result of a run that trains a decoder, saved instead of a pipeline: the autoencoder's folder with a card, and sub-folders for the
    energy model and the scheduler of the chain.

    Args:
        decoder ([`CalibratedDecoder`]): The autoencoder.
        energy_model ([`EnergyModel`], *optional*), scheduler ([`LangevinScheduler`], *optional*): Saved if both are given.
        card (`str`, *optional*): The text of the card. Default: a new card.
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
        """Do nothing, since there is no sampling. Pipelines have this method."""

    def to(self, device: torch.device) -> None:
        self.decoder.to(device)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        folder = Path(folder)
        self.decoder.autoencoder.save_pretrained(folder)
        # Remove the path from which it was loaded on this machine.
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(folder / "config.json", config, sort_keys=True)
        if self.energy_model is not None and self.scheduler is not None:
            self.energy_model.save_pretrained(folder / "energy_model")
            self.scheduler.save_pretrained(folder / "scheduler")
        card = folder / "README.md"
        if not card.exists() or CARD_MARKER.encode() in card.read_bytes():
            write_text(card, self.card or self.new_card())

    def new_card(self) -> str:
        origin, is_calibrated = self.decoder.origin, self.energy_model is not None
        is_folder = Path(origin).exists()
        tags = ["diffusers", "autoencoder", *(["energy-based-model"] if is_calibrated else [])]
        data = ModelCardData(library_name="diffusers", tags=tags, base_model=None if is_folder else origin)
        name = Path(origin).name if is_folder else origin
        title, about = self.decoder.describe(name, "calibrated" if is_calibrated else "further trained")
        card = CARD.format(
            metadata=data.to_yaml(),
            marker=CARD_MARKER,
            name=type(self.decoder.autoencoder).__name__,
            title=title,
            about=about,
            how="with energy calibration (Luo et al., ECCV 2024)"
            if is_calibrated
            else "on the squared error, without calibration",
        )
        return card + (CALIBRATING_ON if is_calibrated else "")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **kwargs) -> "SavedDecoder":
        """Load a folder that `save_pretrained` wrote."""
        folder, energy_model, scheduler = Path(folder), None, None
        if (folder / "energy_model").is_dir():
            energy_model = EnergyModel.from_pretrained(folder / "energy_model")
            scheduler = LangevinScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        decoder = CalibratedDecoder(load_autoencoder(folder), str(folder))
        return cls(decoder, energy_model, scheduler, (folder / "README.md").read_text(encoding="utf-8"))


def autoencoder_class(config: dict[str, Any]) -> Any:
    """Return the class of diffusers that a config names as `_class_name`. Raises `ValueError` if it is no autoencoder of diffusers."""
    class_name = config.get("_class_name")
    found = getattr(autoencoders, str(class_name), None)
    if not hasattr(found, "encode"):
        raise ValueError(
            f"its `_class_name` must be an autoencoder of diffusers, such as AutoencoderKL, but is {class_name}"
        )
    return found


def load_autoencoder(
    name_or_path: str | os.PathLike,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> ModelMixin:
    """
    Load an autoencoder from a folder or a Hub id, as the diffusers class that its config names. Only safetensors are loaded.

    Raises:
        ValueError: if the subfolder does not exist, the model can't be loaded, weights are missing or not finite, or it is not an image
            autoencoder that decodes in one pass.
    """
    refused = f"--pretrained_model_name_or_path {str(name_or_path)!r}"
    if subfolder is not None and Path(name_or_path).is_dir():
        # diffusers would load the weights of the folder itself, if it holds some.
        name_or_path = Path(name_or_path, subfolder)
        if not name_or_path.is_dir():
            raise ValueError(f"--subfolder {subfolder!r} does not exist in {refused}.")
        subfolder = None
    where: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    try:
        model_class = autoencoder_class(AutoencoderKL.load_config(name_or_path, **where))
        model, info = model_class.from_pretrained(
            name_or_path,
            variant=variant,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            **where,
        )
        if info["missing_keys"]:
            raise ValueError(
                f"its weights are incomplete, with missing keys such as {sorted(info['missing_keys'])[:3]}"
            )
    except LOADING_ERRORS as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error
    if broken := [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]:
        raise ValueError(f"{refused} holds weights that are not finite: {', '.join(broken[:3])}.")
    # Audio autoencoders have no image channels. Those that decode by diffusion have no `decoder` module.
    decodes_at_once = isinstance(getattr(model, "decoder", None), torch.nn.Module)
    if not decodes_at_once or model.config.get("in_channels") not in MODES:
        allowed = "an autoencoder of images with 1, 3 or 4 channels that decodes in one pass, such as AutoencoderKL"
        raise ValueError(f"{refused} must be {allowed}, but is a {model_class.__name__}.")
    return model


def load_energy_model(
    name_or_path: str | os.PathLike,
    resolution: int | list[int],
    in_channels: int,
    subfolder: str | None = None,
    revision: str | None = None,
) -> EnergyModel | None:
    """
    Load the energy model that an earlier run saved with its autoencoder, in training mode. Returns `None`, and logs it, if there is none
    for images of `resolution` and `in_channels`.

    Raises:
        ValueError: if there is an energy model but it can't be loaded.
    """
    inside = "/".join(filter(None, (subfolder, "energy_model")))
    place, where = name_or_path, {"subfolder": inside, "revision": revision}
    if is_local := Path(name_or_path).is_dir():
        # With `subfolder`, diffusers would load the weights of the folder itself, which are the autoencoder's.
        place, where = Path(name_or_path, inside), {}
    config: Any = {}
    try:
        # If the local folder does not exist, diffusers would ask the Hub.
        if not is_local or Path(place, "config.json").is_file():
            config = EnergyModel.load_config(place, **where)
        found = tuple(config.get(name) for name in ("_class_name", "sample_size", "in_channels"))
        if found == (EnergyModel.__name__, resolution, in_channels):
            # `from_pretrained` returns networks in evaluation mode.
            return EnergyModel.from_pretrained(place, low_cpu_mem_usage=False, **where).train()
    except LOADING_ERRORS as error:
        if is_local or config:
            named = f"--pretrained_model_name_or_path: energy_model in {str(place)!r}"
            raise ValueError(f"{named} can't be loaded: {error}") from error
        found = (
            " ".join(str(error).split()) or type(error).__name__,
        )  # it is not on the Hub, or the connection failed
    there = "none" if is_local and not config else ", ".join(map(str, found))
    logger.info(
        f"Training a new energy model for {resolution} px and {in_channels} channel(s). Found with {str(name_or_path)!r}: {there}."
    )
    return None


def latent_shape(decoder: CalibratedDecoder, resolution: int | list[int]) -> tuple[int, ...]:
    """
    Return the shape of the latents of one image, and freeze parameters that decoding does not use.

    Data parallel training waits for a gradient of each trained parameter, and some parameters, such as the mask encoder of `AsymmetricAutoencoderKL`,
    get none.

    Raises:
        ValueError: if the autoencoder does not accept images of `resolution`, or decodes them to another shape.
    """
    image = torch.zeros(1, decoder.config.in_channels, *height_and_width(resolution))
    refused = f"--resolution {resolution} does not fit {type(decoder.autoencoder).__name__}"
    decoder.eval()
    parts = (part for name, part in decoder.autoencoder.named_children() if name in TRAINED_PARTS)
    trained = [parameter for part in parts for parameter in part.parameters()]
    try:
        latents = decoder.encode(image)
        with torch.no_grad():
            decoded = decoder(latents)
        # A corner of the latents is enough to find the parameters in use.
        gradients = torch.autograd.grad(decoder(latents[..., :8, :8]).sum(), trained, allow_unused=True)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{refused}: {error}") from error
    if decoded.shape != image.shape:
        raise ValueError(f"{refused}, which decodes {tuple(image.shape[1:])} images to {tuple(decoded.shape[1:])}.")
    for parameter, gradient in zip(trained, gradients):
        parameter.requires_grad_(gradient is not None)
    return tuple(latents.shape[1:])


def load_latents(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Load finite latents (N, *shape) from a safetensors file. Raises `ValueError` if it holds no such latents."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--latents_file {path!r} can't be read as safetensors: {error}") from error
    latents = tensors.get("latents", torch.empty(0)).float()
    if len(latents) == 0 or tuple(latents.shape[1:]) != shape or not latents.isfinite().all():
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        allowed = f"a tensor `latents` of shape (N, {', '.join(map(str, shape))}), all finite"
        raise ValueError(f"--latents_file {path!r} must hold {allowed}, but holds {found}.")
    return latents
