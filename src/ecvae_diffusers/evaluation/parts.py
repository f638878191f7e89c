# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Splits an evaluation into numbered parts. Processes share them, and finished parts are cached on disk, so an
interrupted evaluation resumes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ecvae_diffusers.atomic import remove, replacing, to_json, write_json


class Parts:
    """
    Files of tensors, each made by one process. A part's content depends only on its number, so any number of processes
    makes the same parts.

    Args:
        folder (`Path`): Where they are kept until the evaluation is done. All processes must see the same one.
        accelerator ([`Accelerator`]): Tells how many processes there are.
        identity (`dict`): What the parts depend on; kept next to them.

    Raises:
        ValueError: if the folder holds parts of another evaluation.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, identity: dict):
        self.folder, self.accelerator = folder, accelerator
        identity = json.loads(to_json(identity))
        path = folder / "identity.json"
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{str(path)!r} can't be read ({error}): remove {str(folder)!r}.") from error
            if before != identity:
                changed = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
                raise ValueError(
                    f"--output_dir holds parts of an evaluation with other arguments ({', '.join(changed)}): give "
                    f"those again, another folder, or remove {str(folder)!r}."
                )
        # Every process looks before one of them writes.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(path, identity)
        accelerator.wait_for_everyone()

    def path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def make(self, kind: str, count: int, make: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Make this process's share of `count` parts, except those that are there."""
        mine = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        missing = [index for index in mine if not self.path(kind, index).is_file()]
        shown = bool(missing) and self.accelerator.is_main_process
        for index in tqdm(missing, desc=kind.replace("_", " "), disable=not shown):
            part = {name: value.cpu().contiguous() for name, value in make(index).items()}
            with replacing(self.path(kind, index)) as temporary:
                save_file(part, temporary)

    def collect(self, kind: str, count: int) -> dict[str, torch.Tensor]:
        """
        Concatenate all parts of a kind.

        Raises:
            ValueError: if one is damaged, or missing because a process made it in another machine's folder.
        """
        paths = [self.path(kind, index) for index in range(count)]
        if missing := sum(not path.is_file() for path in paths):
            raise ValueError(
                f"{missing} of {count} parts of {kind!r} are not in {str(self.folder)!r}: --output_dir must be a "
                "folder that all processes share."
            )
        loaded = []
        for path in paths:
            try:
                loaded.append(load_file(path))
            except SafetensorError as error:
                raise ValueError(f"{str(path)!r} is damaged ({error}): remove it, and start again.") from error
        return {name: torch.cat([part[name] for part in loaded]) for name in loaded[0]}

    def remove(self) -> None:
        remove(self.folder)
