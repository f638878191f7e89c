# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One-step image generation with a model that `ecvae export` wrote: onnxruntime and numpy, no torch."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import LARGEST_TEMPERATURE, check_choice, check_number, height_and_width, prepare_labels


try:
    import onnxruntime
except ImportError as error:
    raise ImportError(f"{error}: pip install 'ecvae-diffusers[onnx]'") from error


ClassLabels = str | int | Sequence[str | int | None] | np.ndarray | None
MODEL_FILE = "model.json"
NETWORKS = ("decoder", "encoder", "energy")
# Precisions of the weights, and what a file of each is called behind the network's name.
SUFFIXES = {"fp32": "", "fp16": "_fp16"}


def network_path(folder: str | os.PathLike, network: str, precision: str) -> Path:
    """Return the path of a network's file, such as `decoder_fp16.onnx`."""
    return Path(folder) / f"{network}{SUFFIXES[precision]}.onnx"


class OnnxECVAEPipeline:
    """
    Pipeline for image generation with a model that `ecvae export` wrote. It needs neither torch nor diffusers.

    Images are arrays of shape `(batch_size, height, width, channels)`, uint8, in and out. `PIL.Image.fromarray` and `np.asarray`
    convert one to and from a picture. Latents are draws of numpy: a seed gives other images here than with [`ECVAEPipeline`].
    `class_labels` are names or numbers of classes, one for all images or one per image, as in [`ECVAEPipeline`].

    Args:
        folder (`str`): Folder that `ecvae export` wrote.
        precision (`str`, *optional*, defaults to `"fp32"`):
            Precision in which weights are stored: `"fp32"` or `"fp16"`, whose files are half as large. Both are computed in
            float32.
        providers (`Sequence[str]`, *optional*, defaults to the CPU):
            Execution providers of onnxruntime, such as `"CUDAExecutionProvider"`, in order of preference.

    Attributes:
        config (`dict`): The content of `model.json`: sizes, networks, licence and figures of the model's card.

    Raises:
        ValueError: if `folder` holds no such model, a file of it is missing or damaged, or another argument is not allowed.

    Examples:
        ```py
        >>> import numpy as np
        >>> from ecvae_diffusers.onnx import OnnxECVAEPipeline

        >>> pipe = OnnxECVAEPipeline("my_onnx_model")  # doctest: +SKIP
        >>> images = pipe.sample(16, np.random.default_rng(0))  # doctest: +SKIP
        >>> energies = pipe.score(images)  # doctest: +SKIP
        ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        precision: str = "fp32",
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        check_choice("precision", precision, tuple(SUFFIXES))
        for provider in providers:
            check_choice("providers", provider, tuple(onnxruntime.get_available_providers()))
        try:
            self.config: dict[str, Any] = json.loads((Path(folder) / MODEL_FILE).read_text(encoding="utf-8"))
            self.latent_shape = (self.config["latent_channels"], 1, 1)
            self.image_shape = (*height_and_width(self.config["sample_size"]), self.config["channels"])
            networks = self.config["networks"]
            names = [name for name in NETWORKS if name in networks or name != "energy"]
            shapes = {
                name: [
                    {key: one["shape"] for key, one in networks[name][kind].items()} for kind in ("inputs", "outputs")
                ]
                for name in names
            }
        except FileNotFoundError as error:
            raise ValueError(
                f"`folder` must be one that `ecvae export` wrote, but {str(folder)!r} holds no {MODEL_FILE}."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"`folder`: {MODEL_FILE} of {str(folder)!r} can't be read ({reason}).") from error
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        for name, expected in shapes.items():
            path = network_path(folder, name, precision)
            try:
                session = onnxruntime.InferenceSession(path, providers=list(providers))
            except Exception as error:  # of many kinds, which have no common base class
                raise ValueError(f"`folder`: {str(path)!r} can't be loaded: {error}") from error
            found = [{one.name: one.shape for one in kind} for kind in (session.get_inputs(), session.get_outputs())]
            if found != expected:
                raise ValueError(
                    f"`folder`: {str(path)!r} must have {expected}, as {MODEL_FILE} says, but has {found}."
                )
            self.sessions[name] = session

    def run(self, network: str, outputs: Sequence[str], *inputs: np.ndarray) -> list[np.ndarray]:
        """Run a network on its inputs, and return the outputs of these names."""
        session = self.sessions[network]
        return session.run(list(outputs), {one.name: value for one, value in zip(session.get_inputs(), inputs)})

    def labels(self, class_labels: ClassLabels, count: int) -> list[np.ndarray]:
        """
        Return the class numbers (B,), int64, as a list of one array, with the unknown class for `None`. Return an empty list for a
        model without classes.
        """
        numbers = prepare_labels(class_labels, count, self.config)
        if numbers is None:
            return []
        unknown = self.config["num_class_embeds"]
        return [np.array([unknown if one is None else one for one in numbers], np.int64)]

    def draw_labels(self, class_labels: ClassLabels, count: int, generator: np.random.Generator) -> list[int] | None:
        """Return class numbers, drawn by the training data's frequencies where one is `None`. `None` for a model without classes."""
        numbers = prepare_labels(class_labels, count, self.config)
        if numbers is None:
            return None
        known = [one for one in numbers if one is not None]
        if len(known) == count:
            return known
        weights = np.array(self.config["class_frequencies"] or [1.0] * self.config["num_class_embeds"])
        drawn = generator.choice(len(weights), size=count, p=weights / weights.sum()).tolist()
        return [other if one is None else one for one, other in zip(numbers, drawn)]

    def check_image(self, name: str, image: np.ndarray) -> None:
        """Raise `ValueError` if an argument is not a batch of images of the model's size and channels, uint8."""
        is_array = isinstance(image, np.ndarray)
        if not is_array or image.dtype != np.uint8 or image.shape[1:] != self.image_shape or len(image) == 0:
            found = f"{image.dtype} of shape {image.shape}" if is_array else type(image).__name__
            raise ValueError(
                f"`{name}` must be an array (batch_size, {', '.join(map(str, self.image_shape))}), uint8, but is {found}."
            )

    def sample(
        self,
        batch_size: int = 1,
        generator: np.random.Generator | None = None,
        temperature: float = 1.0,
        class_labels: ClassLabels = None,
        oversample: int = 1,
    ) -> np.ndarray:
        """
        Generate images: one decoder pass, and by default no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            generator (`np.random.Generator`, *optional*):
                Makes generation deterministic. Images do not depend on how many are drawn at a time, if their classes are given.
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the latents, from 0 to 100. Below 1, images are more typical and less varied.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes to draw. `None` draws a class by its frequency in the training data.
            oversample (`int`, *optional*, defaults to 1):
                Number of images to draw for each one that is returned, which is the one of lowest energy.

        Returns:
            `np.ndarray` of shape `(batch_size, height, width, channels)`, uint8.

        Raises:
            ValueError: if an argument is outside its range.
        """
        if isinstance(class_labels, (list, tuple, np.ndarray)) and batch_size == 1:
            batch_size = len(class_labels)
        check_number("batch_size", batch_size, 1, whole=True)
        check_number("temperature", temperature, 0, LARGEST_TEMPERATURE)
        if not isinstance(generator, np.random.Generator | None):
            raise ValueError(f"`generator` must be a numpy.random.Generator, but is a {type(generator).__name__}.")
        generator = generator or np.random.default_rng()
        check_number("oversample", oversample, 1, whole=True)
        if oversample > 1 and "energy" not in self.sessions:
            raise ValueError(f"`oversample` must be 1 for a model without an energy model, but is {oversample}.")
        latents = temperature * generator.standard_normal((batch_size * oversample, *self.latent_shape), np.float32)
        labels = self.draw_labels(class_labels, batch_size, generator)
        labels = None if labels is None else [label for label in labels for _ in range(oversample)]
        images = self.decode(latents, labels)
        if oversample == 1:
            return images
        energies = self.score(images, labels).reshape(batch_size, oversample)
        return images.reshape(batch_size, oversample, *self.image_shape)[np.arange(batch_size), energies.argmin(1)]

    def decode(self, latents: np.ndarray, class_labels: ClassLabels = None) -> np.ndarray:
        """
        Decode latents into images, in one pass.

        Args:
            latents (`np.ndarray` of shape `(batch_size, latent_channels, 1, 1)`, floating-point):
                Draws from N(0, I) give new images.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes of the images. `None` is the unknown class.

        Returns:
            `np.ndarray` of shape `(batch_size, height, width, channels)`, uint8.

        Raises:
            ValueError: if `latents` have another shape or dtype, or the images are not finite.
        """
        is_array = isinstance(latents, np.ndarray) and np.issubdtype(latents.dtype, np.floating)
        if not is_array or latents.shape[1:] != self.latent_shape or len(latents) == 0:
            shape = f"(batch_size, {', '.join(map(str, self.latent_shape))})"
            found = (
                f"{latents.dtype} of shape {latents.shape}"
                if isinstance(latents, np.ndarray)
                else type(latents).__name__
            )
            raise ValueError(f"`latents` must be a floating-point array {shape}, but is {found}.")
        with np.errstate(over="ignore"):
            labels = self.labels(class_labels, len(latents))
            image, sample = self.run("decoder", ("image", "sample"), latents.astype(np.float32), *labels)
        if not np.isfinite(sample).all():  # they would be shown as black
            raise ValueError("Images are not finite. Check `temperature` and `latents`.")
        return image

    def encode(self, image: np.ndarray, class_labels: ClassLabels = None) -> np.ndarray:
        """
        Encode images into their latents, the mean of the posterior.

        Args:
            image (`np.ndarray` of shape `(batch_size, height, width, channels)`, uint8): Images of the model's size.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes of the images. `None` is the unknown class.

        Returns:
            `np.ndarray` of shape `(batch_size, latent_channels, 1, 1)`, float32.

        Raises:
            ValueError: if `image` does not fit the model.
        """
        self.check_image("image", image)
        return self.run("encoder", ["mean"], image, *self.labels(class_labels, len(image)))[0]

    def reconstruct(self, image: np.ndarray, class_labels: ClassLabels = None) -> np.ndarray:
        """
        Encode images and decode them again.

        Args:
            image (`np.ndarray` of shape `(batch_size, height, width, channels)`, uint8): Images of the model's size.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes of the images. `None` is the unknown class.

        Returns:
            `np.ndarray` of the shape of `image`, uint8.

        Raises:
            ValueError: if `image` does not fit the model.
        """
        return self.decode(self.encode(image, class_labels), class_labels)

    def interpolate(
        self, image_a: np.ndarray, image_b: np.ndarray, num_steps: int = 8, class_labels: ClassLabels = None
    ) -> np.ndarray:
        """
        Decode the straight line between the encodings of two images.

        Args:
            image_a, image_b (`np.ndarray` of shape `(batch_size, height, width, channels)`, uint8):
                B images each, or one.
            num_steps (`int`, *optional*, defaults to 8):
                Number of images from a to b, including the reconstructions of both; at least 2.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes of both images of each pair. `None` is the unknown class.

        Returns:
            `np.ndarray` of B * `num_steps` images, pair by pair, uint8.

        Raises:
            ValueError: if there are fewer than 2 steps, or the images do not fit the model or each other.
        """
        check_number("num_steps", num_steps, 2, whole=True)
        for name, image in (("image_a", image_a), ("image_b", image_b)):
            self.check_image(name, image)
        if len(image_b) not in (1, len(image_a)) and len(image_a) != 1:
            raise ValueError(
                f"`image_b` must hold one image or {len(image_a)}, as `image_a`, but holds {len(image_b)}."
            )
        a, b = (self.encode(image, class_labels)[:, None] for image in (image_a, image_b))
        weights = np.linspace(0, 1, num_steps, dtype=np.float32).reshape(1, -1, 1, 1, 1)
        latents = a * (1 - weights) + b * weights
        labels = [np.repeat(one, num_steps) for one in self.labels(class_labels, len(latents))]
        return self.decode(latents.reshape(-1, *self.latent_shape), labels[0] if labels else None)

    def score(self, image: np.ndarray, class_labels: ClassLabels = None) -> np.ndarray:
        """
        Return the energies of images: low means like the training data. Only differences between energies are meaningful.

        Args:
            image (`np.ndarray` of shape `(batch_size, height, width, channels)`, uint8): Images of the model's size.
            class_labels (`str`, `int`, `None`, a list of these or a `np.ndarray`, *optional*):
                Classes of the images. `None` is the unknown class.

        Returns:
            `np.ndarray` of shape `(batch_size,)`, float32.

        Raises:
            ValueError: if the model has no energy model, or `image` does not fit it.
        """
        if "energy" not in self.sessions:
            raise ValueError("`score` requires an energy model, and the exported model had none.")
        self.check_image("image", image)
        return self.run("energy", ["energy"], image, *self.labels(class_labels, len(image)))[0]
