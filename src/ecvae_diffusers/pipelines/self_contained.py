# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What every pipeline of this package does when it is saved: take its code and its card along."""

from pathlib import Path

from ..hub.card import write_card
from ..hub.saving import self_contained_index, single_file_source, write_code_files
from ..hub.upload import push_to_hub, upload_arguments, upload_folder


class SelfContained:
    """Saves a pipeline so that its folder loads without this package too. To stand before `DiffusionPipeline`."""

    push_to_hub = push_to_hub

    @property
    def saved_class(self) -> type:
        """The class whose code is saved: for a subclass from elsewhere, the pipeline of this package that it extends."""
        return next(kind for kind in type(self).__mro__ if SelfContained in kind.__bases__)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Save the pipeline: components, code and card; with `push_to_hub=True` publish the folder too. See
        [`DiffusionPipeline.save_pretrained`] for the arguments.

        Raises:
            ValueError: if `safe_serialization` is False: weights are safetensors only.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are saved as safetensors only.")
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size, "push_to_hub": push_to_hub}
        upload = upload_arguments(save_directory, kwargs)
        super().save_pretrained(save_directory, **kwargs)
        if upload is not None:
            upload_folder(save_directory, **upload)

    def to_json_string(self) -> str:
        return self_contained_index(self, super().to_json_string())

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Save `model_index.json` with the code and the card beside it, so that the folder loads without this package."""
        write_code_files(self, save_directory, single_file_source(self.saved_class))
        write_card(self, save_directory)
        super().save_config(save_directory, **kwargs)
