"""Eyes on a run: the scalars of a logged step, and the pictures and energies that `report.py` lays out."""

import re
import resource
import sys
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator

from ecvae_diffusers import EnergyCalibrator
from ecvae_diffusers.energy import compute_energy, frozen
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.folder import ENERGIES_FILE, RunLog, image_grid, save_atomically, step_file
from ecvae_diffusers.training.run.progress import progress


NUM_GRID_IMAGES = 64
NUM_CHAIN_IMAGES = 8
NUM_ENERGIES = 256
# Above this many pixels a side, fewer of them: chains through 256 images of 256 px took 15 GiB and minutes.
FULL_SIZE = 32


def num_energies(resolution: int) -> int:
    """Images to take energies of: as many pixels at each resolution, but at least 32 images."""
    return max(32, min(NUM_ENERGIES, NUM_ENERGIES * FULL_SIZE**2 // resolution**2))


def moments(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the mean and the spread over all processes are made of: averaged over them, see `reduce_scalars`."""
    return {name: values.mean(), f"{name}_square": values.square().mean()}


def reduce_scalars(accelerator: Accelerator, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    Scalars averaged over processes, in one exchange and one wait for the device. Where there is `name_square` beside
    `name`, it becomes `name_std`.
    """
    names = list(scalars)
    # MPS has no float64.
    dtype = torch.float32 if scalars[names[0]].device.type == "mps" else torch.float64
    values = torch.stack([scalars[name].detach().to(dtype) for name in names])
    logged = dict(zip(names, accelerator.reduce(values, reduction="mean").tolist()))
    for name in [name for name in names if f"{name}_square" in logged]:
        logged[f"{name}_std"] = max(logged.pop(f"{name}_square") - logged[name] ** 2, 0.0) ** 0.5
    return logged


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held: of the device, or of the process on a CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # Where there is one: what `getrusage` tells begins with the peak of the process that started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) / 2**20
    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Observer:
    """
    Writes, on the main process, what a run looks like at a step: `samples/`, `reconstructions/`, `chain/` and a line of
    `energies.jsonl`.

    Args:
        output_dir (`Path`): The run's folder.
        task: The run's [`Task`].
        images (`torch.Tensor` of shape `(N, C, H, W)`, uint8): Data to reconstruct and to take energies of.
        seed (`int`): Draws latents and the chain's noise, the same ones at each step.
        batch_size (`int`): Images at a time: that of training, whose memory is there.
    """

    def __init__(self, output_dir, task, images: torch.Tensor, seed: int, device: torch.device, batch_size: int):
        self.output_dir, self.task, self.seed, self.device = output_dir, task, seed, device
        self.batch_size = batch_size
        self.images = images
        self.num_energies = num_energies(images.shape[-1])
        self.latents = task.latents(max(NUM_GRID_IMAGES, self.num_energies), seed).to(device)

    @torch.no_grad()
    def observe(
        self, step: int, exported, generator, calibrator: EnergyCalibrator | None, energies: bool = True
    ) -> None:
        """
        Args:
            step (`int`): The step that the files are named by.
            exported: The generator that would be saved now.
            generator: The generator that is being trained, which is what the energy model sees.
            calibrator: `None` where nothing is calibrated.
            energies (`bool`, *optional*, defaults to `True`):
                Whether to take energies, whose chains cost many times what the pictures do.
        """
        samples = self.in_batches("Samples", lambda z: self.task.sample(exported, z), self.latents[:NUM_GRID_IMAGES])
        self.save("samples", step, image_grid(samples, num_columns=8))
        images = to_range(self.images[: NUM_GRID_IMAGES // 2].to(self.device))
        reconstructions = self.in_batches("Reconstructions", lambda x: self.task.reconstruct(exported, x), images)
        self.save("reconstructions", step, pairs_grid(images, reconstructions))
        if calibrator is None:
            return
        noise = torch.Generator(device=self.device).manual_seed(self.seed)

        def run_chain(latents: torch.Tensor) -> torch.Tensor:
            samples = self.task.sample(generator, latents)
            return calibrator.run_chain(samples, noise, return_trajectory=True).transpose(0, 1)

        # Without energies as many whole batches as are shown: the noise of a picture depends on the size of its batch.
        count = self.num_energies if energies else -(-NUM_CHAIN_IMAGES // self.batch_size) * self.batch_size
        states = self.in_batches("Chains", run_chain, self.latents[: min(count, self.num_energies)]).transpose(0, 1)
        self.save("chain", step, chain_strip(states[:, :NUM_CHAIN_IMAGES]))
        if not energies:
            return
        with frozen(calibrator.energy_model):
            taken = {}
            for name, images in (
                ("data", to_range(self.images[: self.num_energies].to(self.device))),
                ("samples", states[0]),
                ("targets", states[-1]),
            ):
                values = self.in_batches("Energies", lambda x: compute_energy(calibrator.energy_model, x), images)
                taken[name] = [round(e, 5) for e in values.tolist()]
        RunLog(self.output_dir / ENERGIES_FILE).write(step=step, **taken)

    def in_batches(self, what: str, function, whole: torch.Tensor) -> torch.Tensor:
        return torch.cat([function(part) for part in progress(what, whole.split(self.batch_size))])

    def save(self, kind: str, step: int, picture: PIL.Image.Image) -> None:
        save_atomically(picture, step_file(self.output_dir, kind, step))


def pairs_grid(images: torch.Tensor, reconstructions: torch.Tensor, num_columns: int = 8) -> PIL.Image.Image:
    """Rows of images, each above its reconstruction."""
    rows = zip(images.split(num_columns), reconstructions.split(num_columns))
    whole = [row for row in rows if len(row[0]) == num_columns] or [(images, reconstructions)]
    return image_grid(torch.cat([part for row in whole for part in row]), num_columns=len(whole[0][0]))


def chain_strip(states: torch.Tensor) -> PIL.Image.Image:
    """
    One row an image: G(z), each step of the chain, and where it moved: end minus start, grey where nothing did, scaled
    so that the largest move of all is black or white.

    Args:
        states (`torch.Tensor` of shape `(K + 1, B, C, H, W)`): In [-1, 1].
    """
    difference = states[-1] - states[0]
    difference = difference / difference.abs().max().clamp(min=1e-8)
    if difference.shape[1] == 4:
        difference[:, 3] = 1.0  # opaque, or nothing of it would be seen
    columns = torch.cat([states, difference[None]])
    return image_grid(columns.transpose(0, 1).flatten(0, 1), num_columns=len(columns))
