# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The content of `evaluation.json`, which `ecvae evaluate` writes, and model cards and `ecvae publish` read.

Each section has measures and a protocol, which says how they were measured. A figure that may not be stated is `None`.
"""

import json
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Generic, NoReturn, Self, TypeVar, get_args, get_origin, get_type_hints


EVALUATION_FILE = "evaluation.json"


P = TypeVar("P")
M = TypeVar("M")
Figures = dict[str, float | None]  # by their names


@dataclass(kw_only=True)
class Section(Generic[P, M]):
    """Measures and their protocol."""

    protocol: P
    measures: M


@dataclass(kw_only=True)
class OverSeeds:
    """A measure for each seed, with mean and standard deviation. `std` is `None` for a single seed."""

    mean: float | None
    std: float | None
    values: list[float | None]


@dataclass(kw_only=True)
class Protocol:
    """Settings that all sections share."""

    images: str
    features: str
    files: dict[str, str] | None = None
    libraries: dict[str, str] | None = None
    machine: str | None = None
    device: str | None = None
    computed_in: str | None = None


@dataclass(kw_only=True)
class ImageSet:
    """A number of images from one split of a data set."""

    data: str
    split: str
    num_images: int


@dataclass(kw_only=True)
class Pairs:
    """How many images of each set were compared in pairs: the first ones, for all measures except the Frechet distance."""

    most_images_in_pairs: int | None = None
    kernel_distance_std: str | None = None


@dataclass(kw_only=True)
class GenerationProtocol(Pairs):
    """Samples compared with training images."""

    reference: ImageSet
    num_samples: int
    num_features: int | None = None
    seeds: list[int | None] | None = None
    latents: str | None = None
    num_neighbours: int | None = None


@dataclass(kw_only=True)
class Generation:
    protocol: GenerationProtocol
    measures: dict[str, OverSeeds]
    why_no_frechet_distance: str | None = None


@dataclass(kw_only=True)
class HeldOutProtocol(ImageSet):
    """Held-out images. The measure `num_trained_on` counts those that are training images."""

    compared_with: str
    same: str | None = None


@dataclass(kw_only=True)
class FloorProtocol(Pairs):
    """Held-out images compared with training images: about the lowest distances that samples can reach."""

    reference: ImageSet
    compared: ImageSet
    meaning: str | None = None


@dataclass(kw_only=True)
class ReconstructionProtocol(ImageSet, Pairs):
    latents: str | None = None


@dataclass(kw_only=True)
class LikelihoodProtocol(ImageSet):
    """Bounds on the likelihood of a VAE, for a `variance` of its decoder, or the exact likelihood of a flow."""

    unit: str
    variance: float | None = None
    importance_samples: int | None = None
    amortisation_steps: int | None = None


@dataclass(kw_only=True)
class OutOfDistributionProtocol:
    """
    How well scores tell other images from held-out images. The measures are AUROCs, by the name of the other data and of
    the score. `outside` has the numbers of other images; `error` and `bits_per_dimension` describe these scores.
    """

    inside: ImageSet
    outside: dict[str, int]
    measure: str | None = None
    error: str | None = None
    bits_per_dimension: str | None = None


@dataclass(kw_only=True)
class MemorisationProtocol:
    """Median distances to the nearest training image, in features, of the first `num_samples` samples and of held-out images."""

    reference: ImageSet
    compared: ImageSet
    num_samples: int


@dataclass(kw_only=True)
class ClassesProtocol:
    """
    A classifier of the training data's classes, and its `accuracy` on held-out images. The measures are those of the
    samples, by class and for all classes.
    """

    num_classes: int
    accuracy: float | None = None


@dataclass(kw_only=True)
class SeedRun:
    """The figures that `ecvae publish` takes from an evaluation of the same training with another seed."""

    seed: str
    weights: str | None
    frechet_distance: float | None
    kernel_distance: float | None


@dataclass(kw_only=True)
class TrainingSeeds:
    published: str
    runs: list[SeedRun]


@dataclass(kw_only=True)
class Measured:
    """The evaluation of any model. `weights` is the fingerprint of its weights, or `None` for a folder of images."""

    model: str | None = None
    weights: str | None
    protocol: Protocol
    generation: Generation
    held_out: Section[HeldOutProtocol, dict[str, int]] | None = None
    floor: Section[FloorProtocol, Figures] | None = None
    reconstruction: Section[ReconstructionProtocol, Figures] | None = None
    likelihood: Section[LikelihoodProtocol, Figures] | None = None
    out_of_distribution: Section[OutOfDistributionProtocol, dict[str, Figures]] | None = None
    classes: Section[ClassesProtocol, dict[str, Figures]] | None = None
    memorisation: Section[MemorisationProtocol, Figures] | None = None


@dataclass(kw_only=True)
class Baseline(Measured):
    """The evaluation of another model, with a name for it."""

    name: str


@dataclass(kw_only=True)
class Evaluation(Measured):
    """An evaluation, with what `ecvae publish` adds to it."""

    baseline: Baseline | None = None
    training_seeds: TrainingSeeds | None = None

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read the content of a JSON file. Raises `ValueError`, naming the field that is wrong."""
        return read(cls, value, "")

    def to_json(self) -> dict[str, Any]:
        """Return the content of a JSON file, without the fields that were not measured."""
        return to_plain(self)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """
        Read `evaluation.json` of a folder.

        Raises:
            ValueError: if the file can't be read or does not hold an evaluation.
        """
        path = Path(folder) / EVALUATION_FILE
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant))
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not an {EVALUATION_FILE} of `ecvae evaluate`: {error}") from error


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def read(kind: Any, value: Any, name: str) -> Any:
    """Convert a `value` from JSON to the type `kind`. Errors name the field `name`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        return None if value is None else read(arguments[0], value, name)
    kind = origin or kind
    allowed: Any = {float: (int, float)}.get(kind, dict if is_dataclass(kind) else kind)
    if not isinstance(value, allowed) or isinstance(value, bool):
        wanted = "dict" if is_dataclass(kind) else kind.__name__
        raise ValueError(f"`{name or 'the file'}` must be a {wanted}, but is {str(value)[:50]!r}")
    if kind is list:
        return [read(arguments[0], one, f"{name}[{i}]") for i, one in enumerate(value)]
    if kind is dict:
        return {key: read(arguments[1], one, f"{name}.{key}") for key, one in value.items()}
    if not is_dataclass(kind):
        return value
    within = f"{name}." if name else ""
    known = {field.name: field.default for field in fields(kind)}
    if missing := [key for key, default in known.items() if default is MISSING and key not in value]:
        raise ValueError(f"`{within}{missing[0]}` is missing")
    # An unknown field would be lost when the file is written again.
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"`{within}{unknown[0]}` is unknown")
    types = get_type_hints(kind)
    if kind is Section:
        types = dict(zip(known, arguments))
    return kind(**{key: read(types[key], one, f"{within}{key}") for key, one in value.items()})


def to_plain(value: Any) -> Any:
    """Convert dataclasses to dictionaries, without the optional fields that are `None`."""
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [to_plain(one) for one in value]
    if not is_dataclass(value):
        return value
    found = ((field, getattr(value, field.name)) for field in fields(value))
    return {field.name: to_plain(one) for field, one in found if one is not None or field.default is MISSING}
