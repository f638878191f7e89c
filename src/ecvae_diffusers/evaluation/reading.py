"""What a person needs next to the figures of an evaluation: which direction is good, how far the best can be, where the pictures are."""

from collections.abc import Iterable
from pathlib import Path


PICTURES = {
    "samples.png": "samples",
    "neighbours.png": "samples, each next to the training images nearest to it: an equal one is memorised",
}
RESTORATION = (
    "Good: PSNR and SSIM high; feature distance and residuals low; within 2 std near 95%, less is an uncertainty that claims too "
    "much. `ours` should be better than every other method of the same task and noise."
)


def directions(evaluation: dict) -> str:
    """Return one sentence on what is good, of those measures alone that an `evaluation.json` has."""
    good = [
        "distances low, those of the floor are what unseen images get instead of samples"
        if "floor" in evaluation
        else "distances low; give test images, whose own distances say how low they can be",
        "precision, recall, density and coverage near 1",
    ]
    if "reconstruction" in evaluation:
        good.append("of reconstructions PSNR and SSIM high, mean squared error low")
    measures = evaluation.get("likelihood", {}).get("measures", {})
    if "elbo" in measures:
        good.append("ELBO and importance-weighted bound high, amortisation gap low")
    if "bits_per_dimension" in measures:
        good.append("bits per dimension low")
    if "out_of_distribution" in evaluation:
        good.append("AUROC near 1, at 0.5 the score tells nothing apart")
    return f"Good: {'; '.join(good)}."


def to_the_floor(evaluation: dict) -> str:
    """Return one sentence with the Frechet distance and its floor, empty where one of them is not stated."""
    ours = evaluation["generation"]["measures"]["frechet_distance"]["mean"]
    floor = evaluation.get("floor", {}).get("measures", {}).get("frechet_distance")
    if ours is None or floor is None:
        return ""
    times = f", {ours / floor:.3g} times the floor" if floor > 0 else ""
    return f"The Frechet distance is {ours:.3g}, and {floor:.3g} for unseen images{times}."


def how_to_read(evaluation: dict, folder: Path, pictures: Iterable[str]) -> str:
    """
    Return the lines that follow the table of an evaluation.

    Args:
        evaluation (`dict`): What `evaluation.json` holds.
        folder (`Path`): The folder that it was written to.
        pictures (`Iterable[str]`): Names of the pictures in it.
    """
    lines = [directions(evaluation), to_the_floor(evaluation)]
    lines += [f"{folder / name}: {PICTURES[name]}." for name in pictures]
    lines.append(f"{folder / 'evaluation.json'}: every figure with its protocol.")
    return "\n".join(line for line in lines if line)
