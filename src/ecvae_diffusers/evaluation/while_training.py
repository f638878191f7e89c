"""`--evaluation_steps`: samples measured against training images while training, sharded over processes."""

import math

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ecvae_diffusers.figures import why_no_frechet_distance
from ecvae_diffusers.training.data.transforms import to_range, to_uint8
from ecvae_diffusers.training.run.folder import image_grid, save_atomically, step_file
from ecvae_diffusers.training.run.places import why_missing
from ecvae_diffusers.training.run.progress import progress


logger = get_logger(__name__)

FALLING = ("frechet_distance", "kernel_distance")
NUM_NEIGHBOUR_ROWS = 8
NUM_NEIGHBOURS = 5


def load_features(name: str, device: torch.device, argument: str = "evaluation_features") -> torch.nn.Module:
    """
    The feature extractor that `name` stands for: the value of `--evaluation_features`, or of another `argument`.

    Raises:
        ValueError: if it can't be loaded.
        ImportError: if a package that it needs is missing.
    """
    from ecvae_diffusers.metrics import FeatureExtractor, InceptionFeatures, lite0_features, transformers_features
    from ecvae_diffusers.training.data.digits import SIZE, train_digit_features

    if name == "lite0":
        return lite0_features().to(device)
    if name == "digits":
        network, _ = train_digit_features()
        title = f"{network.num_features} features of a digit classifier at {SIZE} px"
        # The classifier brings bytes to its range itself.
        return FeatureExtractor(network, title, SIZE, mean=0.0, std=1 / 255, num_channels=1).to(device)
    if name == "inception":
        return InceptionFeatures().to(device)
    refused = f"--{argument} must be 'lite0', 'digits', 'inception' or a vision model of transformers, but {name!r}"
    if (reason := why_missing(name, "model")) is not None:
        raise ValueError(f"{refused} can't be loaded: {reason}.")
    try:
        return transformers_features(name).to(device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{refused} can't be loaded: {error}") from error


class Evaluation:
    """
    Args:
        args: The command line.
        accelerator ([`Accelerator`]): Each process makes and measures its share.
        feed: The data, of which `--evaluation_samples` images drawn at random are the reference.
        task: The run's [`Task`].

    Attributes:
        metric (`str`): What tells which evaluation is the best: `--early_stopping_metric`, or, where that is a Frechet distance which
            may not be stated, the kernel distance.
    """

    def __init__(self, args, accelerator: Accelerator, feed, task):
        from ecvae_diffusers.metrics import GenerationMetrics
        from ecvae_diffusers.metrics.generation import MAX_KEPT_FEATURES

        self.args, self.accelerator, self.task = args, accelerator, task
        self.reference = feed.reference(args.evaluation_samples)
        if len(self.reference) < NUM_NEIGHBOURS + 2:
            raise ValueError(
                f"--evaluation_steps needs at least {NUM_NEIGHBOURS + 2} images, but there are {len(self.reference)}."
            )
        features = load_features(args.evaluation_features, accelerator.device)
        try:
            num_features = features(self.reference[:1]).shape[1]
        except ValueError as error:  # now, not at the first evaluation
            raise ValueError(
                f"--evaluation_features {args.evaluation_features!r} doesn't fit the data: {error}"
            ) from error
        self.metrics = GenerationMetrics(features, num_neighbours=NUM_NEIGHBOURS)
        limit = MAX_KEPT_FEATURES // accelerator.num_processes
        # Of which images the metrics keep features, in their order.
        self.kept_reference = torch.cat([p[:limit] for p in self.reference.tensor_split(accelerator.num_processes)])
        latents = task.latents(args.evaluation_samples, args.seed + 1)
        if len(latents) < NUM_NEIGHBOURS + 2:
            raise ValueError(
                f"--evaluation_steps needs at least {NUM_NEIGHBOURS + 2} latents, but there are {len(latents)}: see "
                "--evaluation_samples and --latents_file."
            )
        self.latents = self.share(latents)
        self.metric, why = (
            args.early_stopping_metric,
            why_no_frechet_distance(len(self.reference), len(latents), num_features),
        )
        if why is not None and self.metric == "frechet_distance":
            self.metric = "kernel_distance"
            logger.warning(
                f"No Frechet distance: {why} The kernel distance tells which evaluation is the best. See --evaluation_samples."
            )

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

    @torch.no_grad()
    def measure(self, exported, output_dir, step: int) -> dict[str, float | None]:
        """The measures of `GenerationMetrics`, the same in every process; the main one writes `neighbours/`."""
        device, batch_size = self.accelerator.device, self.args.train_batch_size
        if not self.metrics.counts[True]:
            for images in self.share(self.reference).split(batch_size):
                self.metrics.update(images.to(device), real=True)
        first = None
        main_process = self.accelerator.is_main_process
        for latents in progress("Evaluation", self.latents.split(batch_size), shown=main_process):
            samples = to_uint8(self.task.sample(exported, latents.to(device)))
            self.metrics.update(samples, real=False)
            first = samples if first is None else first
        measures = self.metrics.compute()
        real, generated = self.metrics.kept.compute()
        if main_process:
            self.save_neighbours(first, generated, real, output_dir, step)
        self.metrics.reset(keep_real=True)
        return measures

    def save_neighbours(self, samples, generated, real, output_dir, step: int) -> None:
        """One row a sample: itself, and the reference images nearest to it in features."""
        from ecvae_diffusers.metrics import nearest_neighbours

        rows = min(NUM_NEIGHBOUR_ROWS, len(samples))
        _, nearest = nearest_neighbours(generated[:rows].float(), real.float(), NUM_NEIGHBOURS)
        images = torch.cat([samples[:rows, None].cpu(), self.kept_reference[nearest.cpu()]], dim=1)
        grid = image_grid(to_range(images.flatten(0, 1)), num_columns=1 + NUM_NEIGHBOURS)
        save_atomically(grid, step_file(output_dir, "neighbours", step))


class Patience:
    """
    Which evaluation was the best one, and which have come since.

    Args:
        metric (`str`): What decides, a name of `GenerationMetrics.compute`; distances are to fall, the others to rise.
        patience (`int`, *optional*): Evaluations without a better one after which to stop.
    """

    def __init__(self, metric: str, patience: int | None):
        self.metric, self.patience = metric, patience
        self.best = math.inf
        self.best_step = 0
        self.since: list[int] = []

    def is_best(self, measures: dict[str, float], step: int) -> bool:
        """Take note of an evaluation; whether there was never a better one. One that is not a number is the worst."""
        value = measures[self.metric] if self.metric in FALLING else -measures[self.metric]
        if not value < self.best:
            self.since.append(step)
            return False
        self.best, self.best_step, self.since = value, step, []
        return True

    def cut(self, last_step: int) -> None:
        """Forget what came after a step that the run goes back to; the best one stays, it was saved."""
        self.since = [step for step in self.since if step <= last_step]

    @property
    def has_best(self) -> bool:
        """Whether any evaluation gave a number."""
        return self.best < math.inf

    @property
    def is_over(self) -> bool:
        return self.patience is not None and len(self.since) >= self.patience

    @property
    def outcome(self) -> str:
        """What is saved when the run is stopped early, in words."""
        count = len(self.since)
        if not self.has_best:
            return f"{self.metric} was no number in any of {count} evaluations: the last model is saved"
        return (
            f"{self.metric} has not been better for {count} evaluations: the model of step {self.best_step} is saved"
        )

    def state_dict(self) -> dict:
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "since": list(self.since)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state. One of another metric is ignored: its values can't be compared."""
        if state_dict.get("metric", self.metric) != self.metric:
            return
        self.best, self.best_step, self.since = (state_dict[name] for name in ("best", "best_step", "since"))
