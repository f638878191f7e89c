"""Work of an evaluation in numbered parts: shared by processes, and kept, so that one that was killed is gone on with."""

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
    Each part is a file of tensors, made by one process and whole as soon as it has its name. What a part holds depends on
    its number alone, so that any number of processes makes the same ones.

    Args:
        folder (`Path`): Where they are kept until the evaluation is done. All processes must see the same one.
        accelerator ([`Accelerator`]): Tells how many processes there are.
        identity (`dict`): What the parts depend on; kept beside them.

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
                    f"--output_dir holds parts of an evaluation that was begun with other arguments ({', '.join(changed)}): "
                    f"give those again, another folder, or remove {str(folder)!r}."
                )
        # Every process looks before one of them writes.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(path, identity)
        accelerator.wait_for_everyone()

    def path(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:05d}.safetensors"

    def make(self, kind: str, count: int, make: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Make this process's share of `count` parts, without those that are there."""
        mine = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        missing = [index for index in mine if not self.path(kind, index).is_file()]
        shown = bool(missing) and self.accelerator.is_main_process
        for index in tqdm(missing, desc=kind.replace("_", " "), disable=not shown):
            part = {name: value.cpu().contiguous() for name, value in make(index).items()}
            with replacing(self.path(kind, index)) as temporary:
                save_file(part, temporary)

    def collect(self, kind: str, count: int) -> dict[str, torch.Tensor]:
        """
        All parts of a kind, one after the other.

        Raises:
            ValueError: if one is missing: a process has made it in another machine's folder; or if one is damaged.
        """
        missing = [index for index in range(count) if not self.path(kind, index).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {count} parts of {kind!r} are not in {str(self.folder)!r}: --output_dir must be a folder "
                "that all processes share."
            )
        loaded = [load_part(self.path(kind, index)) for index in range(count)]
        return {name: torch.cat([part[name] for part in loaded]) for name in loaded[0]}

    def remove(self) -> None:
        remove(self.folder)


def load_part(path: Path) -> dict[str, torch.Tensor]:
    """Raises `ValueError` if a part is not as it was written."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}): remove it, and start again with the same arguments."
        ) from error
