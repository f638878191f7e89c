"""The start of a script: Accelerate, logging, and what can't be trained with."""

import argparse
import ctypes
import logging
import platform

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
from diffusers.utils import logging as diffusers_logging

from ecvae_diffusers.training.config import TrainingConfig


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST_BYTES = 2**31 - 1


def keep_freed_memory() -> bool:
    """
    Have malloc keep what it is given back, for the next tensor, instead of handing it to the system and fetching it
    again, page by page and zeroed. A training step frees and asks for the same tensors every time, and on a CPU those of more than
    32 MB would cost more than what is computed in them (`benchmarks/RESULTS.md`).

    Returns:
        `bool`: Whether this is glibc, whose malloc can be told so.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST_BYTES))


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """
    Raises:
        ValueError: if the way of launching trains one model only, or the precision needs what is not there.
    """
    accelerator = Accelerator(
        # Said outright: of several processes without an accelerator, each would otherwise take itself for the only one.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.optimizer.mixed_precision,
        log_with=config.run.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.run.output_dir, logging_dir=f"{config.run.output_dir}/logs"
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.optimizer.seed),
        # Accumulation goes on over the end of an epoch: every step has the same number of batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.optimizer.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} trains one model, and this script two: use data parallel training "
            "(`accelerate launch --multi_gpu`)."
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs an accelerator, and there is none: use bf16 or no.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of a checkpoint
    diffusers_logging.set_verbosity_error()
    return accelerator


def device_name(text: str) -> str:
    """
    Return the name of a device, of a command line, as it is.

    Raises:
        argparse.ArgumentTypeError: if nothing can be computed on it, here and now.
    """
    try:
        torch.zeros(1, device=torch.device(text))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, but is {text}: {reason}") from error
    return text
