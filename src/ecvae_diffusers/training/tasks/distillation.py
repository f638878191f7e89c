"""A new decoder, of any class and size, for the latents of an autoencoder that exists already.

The existing autoencoder is the teacher: its encoder makes the latents, and the new decoder, the student, learns to decode them as the
teacher does (Hinton et al. 2015). What is saved is a whole autoencoder of diffusers that takes the teacher's place. Its encoder is the
teacher's where it has the same weights, as in `AsymmetricAutoencoderKL`. Otherwise it learns the teacher's latents next to the decoder,
as `AutoencoderTiny` does for Stable Diffusion.
"""

import json
from typing import Any

import torch
from diffusers import ModelMixin

from ecvae_diffusers.checks import height_and_width
from ecvae_diffusers.training.tasks.autoencoders import CalibratedDecoder, autoencoder_class, encoder_weights
from ecvae_diffusers.training.tasks.networks import LOADING_ERRORS


class StudentDecoder(CalibratedDecoder):
    """
    A new autoencoder whose decoder is trained on the latents of another one.

    A pipeline hands a decoder `latents / scaling_factor + shift_factor`. The two autoencoders may have other factors, so the student
    gets the latents `z` of the teacher as `(z - shift) * scaling / own scaling + own shift`.

    Args:
        teacher ([`CalibratedDecoder`]): The autoencoder that makes the latents. It is frozen.
        autoencoder (`ModelMixin`): The new autoencoder of diffusers.
    """

    def __init__(self, teacher: CalibratedDecoder, autoencoder: ModelMixin):
        super().__init__(autoencoder, teacher.origin)
        self.teacher = teacher.requires_grad_(False).eval()
        encoder, own = encoder_weights(teacher.autoencoder), encoder_weights(autoencoder)
        copies = own.keys() == encoder.keys() and all(own[key].shape == encoder[key].shape for key in own)
        self.learns_encoder = not copies
        if copies:
            autoencoder.load_state_dict(autoencoder.state_dict() | encoder)
        else:
            autoencoder.encoder.requires_grad_(True)

    def train(self, mode: bool = True) -> "StudentDecoder":
        super().train(mode)
        self.teacher.eval()
        return self

    def own_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the teacher's latents (B, C, h, w) as the student takes them."""
        (scaling, shift), (own_scaling, own_shift) = factors(self.teacher.autoencoder), factors(self.autoencoder)
        return (latents - shift) * (scaling / own_scaling) + own_shift

    def forward(self, latents: torch.Tensor, images: torch.Tensor | None = None) -> Any:
        """
        Decode latents (B, C, h, w) of the teacher to images (B, C, H, W). With `images` (N, C, H, W), return a tuple: the decoded
        images, and the squared error of the student's latents of `images` to the first N `latents`, in the student's units.
        """
        latents = self.own_latents(latents)
        decoded = self.autoencoder.decode(latents).sample
        if images is None:
            return decoded
        errors = self.autoencoder.encode(images).latents - latents[: len(images)]
        return decoded, errors.square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to latents (B, C, h, w) of the teacher."""
        return self.teacher.encode(images)

    def describe(self, origin: str, what: str) -> tuple[str, str]:
        encoder = "Its encoder learned these latents" if self.learns_encoder else "Its encoder is the same"
        about = (
            f"A new decoder for the latents of `{origin}`, which it learned to decode as the old one does. {encoder}."
        )
        return f"{type(self.autoencoder).__name__} for the latents of {origin}", about

    def encoder_fingerprint(self) -> str:
        return self.teacher.encoder_fingerprint()


def factors(autoencoder: ModelMixin) -> tuple[float, float]:
    """Return `scaling_factor` and `shift_factor` of an autoencoder, 1 and 0 if it has none."""
    config = autoencoder.config
    return float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)


def build_student(path: str, teacher: CalibratedDecoder, resolution: int | list[int]) -> StudentDecoder:
    """
    Return a new decoder by a config of diffusers, for the latents of `teacher`.

    Raises:
        ValueError: if the file is no config of an autoencoder, or its decoder does not turn the latents of a `teacher` into images of
            `resolution`.
    """
    refused = f"--decoder_config {path!r}"
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("it must hold a config, a JSON object")
        student = StudentDecoder(teacher, autoencoder_class(config).from_config(config))
        shape = (teacher.config.in_channels, *height_and_width(resolution))
        image = torch.zeros(1, *shape)
        with torch.no_grad():
            if student.eval().learns_encoder and "latents" not in student.autoencoder.encode(image):
                raise ValueError(
                    f"its encoder must have the weights of {teacher.origin!r}, or return latents without a distribution as "
                    "AutoencoderTiny does. For a small decoder next to the same encoder, take AsymmetricAutoencoderKL"
                )
            if not student.learns_encoder and factors(student.autoencoder) != factors(teacher.autoencoder):
                raise ValueError(
                    f"its `scaling_factor` and `shift_factor` must be {factors(teacher.autoencoder)}, as its encoder's"
                )
            decoded = student(teacher.encode(image))
    except (*LOADING_ERRORS, ArithmeticError, LookupError) as error:
        raise ValueError(f"{refused} can't be used: {error}.") from error
    if decoded.shape[1:] != shape:
        made, wanted = ("x".join(map(str, each)) for each in (decoded.shape[1:], shape))
        raise ValueError(
            f"{refused} must decode the latents of {teacher.origin!r} to {wanted} images, but makes {made}."
        )
    return student
