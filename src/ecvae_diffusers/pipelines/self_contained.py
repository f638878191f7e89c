# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saving and publishing for all pipelines of this package: the saved folder holds the pipeline's code and its model card too."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

from ..atomic import writing
from ..hub import saving
from ..hub.card import write_card
from ..hub.modular import write_modular_form
from ..hub.single_file import single_file
from ..hub.upload import upload_folder


class SelfContained(saving.SelfContained):
    """A mixin for pipelines whose folders also load without this package. It must precede `DiffusionPipeline` in the bases."""

    def pipeline_code(self) -> str:
        return single_file(Path(inspect.getfile(self.saved_class)).stem)

    def save_code(self, save_directory: str | Path) -> None:
        """
        Write the code of the pipeline and its components. For an [`ECVAEPipeline`], also write its modular form, and
        `restoration.py`, which loads by
        `DiffusionPipeline.from_pretrained(..., custom_pipeline="restoration", trust_remote_code=True)`.
        """
        super().save_code(save_directory)
        if self.saved_class.__name__ == "ECVAEPipeline":
            (Path(save_directory) / "restoration.py").write_text(
                single_file("pipeline_ecvae_restoration"), encoding="utf-8"
            )
            write_modular_form(save_directory)

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Save the card, the code and `model_index.json`."""
        write_card(self, save_directory)
        super().save_config(save_directory, **kwargs)

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
        Save the pipeline: components, code and card. See [`DiffusionPipeline.save_pretrained`] for the arguments.

        `push_to_hub=True` also uploads the folder to `repo_id`, by default the folder's name, and passes further arguments to
        [`~hub.upload.upload_folder`].
        """
        parent: Any = super()
        saved = (safe_serialization, variant, max_shard_size)
        parent.save_pretrained(save_directory, *saved, **({} if push_to_hub else kwargs))
        if push_to_hub:
            upload_folder(save_directory, kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        **kwargs,
    ) -> str:
        """
        Save the pipeline and publish it on the Hub: components, code and card. `repo_id` is `"user/name"`, or only a name for a
        repository of the token's user. See [`~hub.upload.upload_folder`] for further arguments, errors, and which files stay there.

        Push full weights before a `variant` such as `"fp16"`, because pushing full weights removes existing variants.

        Returns:
            `str`: URL of the commit, or of the pull request.
        """
        with tempfile.TemporaryDirectory() as folder:
            with writing(folder):
                self.save_pretrained(folder, safe_serialization, variant)
            return upload_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=subfolder,
                **kwargs,
            )
