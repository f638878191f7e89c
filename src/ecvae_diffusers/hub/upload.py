# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Uploads a saved pipeline, or an autoencoder of diffusers with a calibrated decoder, to the Hub.

The token is that of `hf auth login` or of the environment variable `HF_TOKEN`, unless one is given.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, cast

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .card import CARD_MARKER, with_location
from .contents import (
    CARD,
    CONFIG,
    EVALUATION,
    FULL_WEIGHTS,
    INDEX,
    VARIANT_WEIGHTS,
    evaluated_weights,
    files_to_publish,
    folder_fingerprint,
    held_class,
    is_publishable,
)
from .modular import MODULAR_INDEX, modular_index


logger = logging.get_logger(__name__)

SHARDS = "diffusion_pytorch_model.safetensors.index.json"  # names the shards of split weights
HUB_FILES = {".gitattributes", CARD}  # made by the Hub itself
WAITS = (1.0, 4.0)  # seconds before the second and the third try
# The transport error of the Hub's client, from httpx or, in newer releases, from httpx2.
HTTPError = cast(type[Exception], HfHubHTTPError.__bases__[0])


class UploadError(RuntimeError):
    """Raised if a folder can't be published. The message says why and what to do. The folder is unchanged."""


def upload_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """
    Publish a saved pipeline, or an autoencoder, in one commit. The repository is created if it does not exist.

    Files of the same name are replaced; earlier commits keep them. A card that somebody has edited stays. A card with figures
    also stays if its `evaluation.json` was made with the new weights, or if only a variant is uploaded. Otherwise that
    evaluation and the variants of the old weights are removed, and a warning names them. Snippets of a card that name no
    location get that of the repository.

    Args:
        folder (`str`): A folder that `save_pretrained` wrote.
        repo_id (`str`): `"user/name"`, or `"name"` for a repository of the token's user.
        token (`str`, *optional*): A token of the Hub. That of `hf auth login` or `HF_TOKEN` if not given.
        private (`bool`, *optional*): Whether a new repository is private. The account's default if not given.
        revision (`str`, *optional*): Branch, created if it does not exist. `main` if not given.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        subfolder (`str`, *optional*): Folder of the repository to publish to, without a card. Files outside of it stay.

    Returns:
        `str`: URL of the commit, or of the pull request.

    Raises:
        ValueError: if the folder may not be published (see `files_to_publish`), or `repo_id` is not a valid name.
        UploadError: if the Hub can't be reached in three tries, if it refuses, or if the repository holds something else.
    """
    folder, files = Path(folder), files_to_publish(folder)
    if INDEX in files and "pipeline.py" not in files:
        raise ValueError(f"{str(folder)!r} has no pipeline.py: save the pipeline again, which writes its code.")
    full = [file for file in files if FULL_WEIGHTS.fullmatch(PurePosixPath(file).name)]
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    name = INDEX if INDEX in files else CONFIG
    api, repo_id, there = open_repository(
        repo_id, token=token, private=private, revision=revision, name=name, prefix=prefix
    )

    def publish() -> str:
        additions = {file: CommitOperationAdd(prefix + file, folder / file) for file in files}
        held = {
            file: Path(api.hf_hub_download(repo_id, prefix + file, revision=revision)).read_bytes()
            for file in (CARD, EVALUATION)
            if file in there
        }
        removed = []
        card_stays = CARD in held and CARD_MARKER.encode() not in held[CARD]
        is_evaluated = EVALUATION in held and evaluated_weights(held[EVALUATION]) == folder_fingerprint(folder)
        if EVALUATION in held and EVALUATION not in files:
            if is_evaluated or not full:
                card_stays = CARD in held
            else:
                removed = [EVALUATION]
        # Old full weights in one file would be loaded instead of new ones in several, and the other way round.
        folders = {PurePosixPath(file).parent for file in full}
        others = [path for path in map(PurePosixPath, there) if path.parent in folders and str(path) not in files]
        replaced = [str(path) for path in others if FULL_WEIGHTS.fullmatch(path.name) or path.name == SHARDS]
        # A model's components belong together: if the full weights of one change, all variants are removed.
        changed = [file for file in full if there.get(file) not in (None, additions[file].upload_info.sha256.hex())]
        if (changed or replaced) and not is_evaluated:
            removed += [str(path) for path in others if VARIANT_WEIGHTS.fullmatch(path.name)]
        removed += replaced
        if MODULAR_INDEX in files and not prefix:
            additions[MODULAR_INDEX] = CommitOperationAdd(MODULAR_INDEX, modular_index(repo_id).encode())
        del additions[CARD]
        if not (card_stays or prefix):
            card = with_location((folder / CARD).read_text(encoding="utf-8"), repo_id)
            additions[CARD] = CommitOperationAdd(CARD, card.encode())
        # `HfApi.upload_folder` would make several commits, and between two of them a reader would load a mixture.
        made = api.create_commit(
            repo_id,
            [*additions.values(), *(CommitOperationDelete(prefix + file) for file in removed)],
            commit_message=commit_message or "Upload a model of ecvae-diffusers",
            revision=revision,
            create_pr=create_pr,
        )
        if removed:
            logger.warning(
                f"Removed from {repo_id!r}, since they belong to other weights (earlier commits keep them): {removed}."
            )
        return made.pr_url or made.commit_url

    return attempt(repo_id, publish)


def open_repository(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    name: str = INDEX,
    prefix: str = "",
) -> tuple[HfApi, str, dict[str, str | None]]:
    """
    Check that a model can be published under a name, and create the repository and the branch if they do not exist. A
    training run calls this at its start, so that it does not fail hours later.

    Args:
        repo_id, token, private, revision: As for `upload_folder`.
        name (`str`, *optional*): `"config.json"` for an autoencoder, instead of a pipeline's `"model_index.json"`.
        prefix (`str`, *optional*): Only files whose paths begin with it are looked at, such as `"folder/"`.

    Returns:
        The client, the full name of the repository, and its files by path, with the SHA-256 of large ones.

    Raises:
        ValueError: if `repo_id` is not a valid name.
        UploadError: as in `upload_folder`, and if the client can't write its cache.
    """
    # A token that was read from a file may end in a line break, which the client refuses in an error that quotes it.
    api = HfApi(token=token.strip() if isinstance(token, str) else token)

    def look() -> tuple[str, dict[str, str | None], Any]:
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(full_name, branch=revision, exist_ok=True)
        entries = api.list_repo_tree(full_name, recursive=True, revision=revision)
        files = [entry for entry in entries if entry.path.startswith(prefix) and isinstance(entry, RepoFile)]
        there = {entry.path.removeprefix(prefix): entry.lfs.sha256 if entry.lfs else None for entry in files}
        index = None
        if name in there:
            text = Path(api.hf_hub_download(full_name, prefix + name, revision=revision)).read_bytes()
            with suppress(ValueError):  # an index that can't be read names no class
                index = json.loads(text)
        return full_name, there, index

    repo_id, there, index = attempt(repo_id, look)
    if name in there and not is_publishable(name, index):
        raise UploadError(f"{repo_id!r} holds {held_class(name, index)}, which would be lost: choose another name.")
    # This also refuses an autoencoder where a pipeline is, and the other way round, which would mix both.
    if name not in there and (others := there.keys() - HUB_FILES):
        raise UploadError(f"{repo_id!r} holds other files, such as {min(others)!r}: choose another name.")
    return api, repo_id, there


def attempt(repo_id: str, call: Callable[[], Any]) -> Any:
    """Call a function, up to three times while another try may help. Errors of the Hub and of files become `UploadError`."""
    for wait in (*WAITS, None):
        try:
            return call()
        except HFValidationError as error:
            raise ValueError(f"`repo_id` must be 'user/name', but is {repo_id!r}: {error}") from error
        except (HTTPError, OSError) as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            is_transport = isinstance(
                error, (HTTPError, ConnectionError, TimeoutError, socket.gaierror, LocalEntryNotFoundError)
            )
            may_pass = is_transport and (status is None or status == 429 or status >= 500)
            if wait is None or not may_pass:
                login = (
                    ": run `hf auth login`, or set HF_TOKEN to a token that may write there"
                    if status in (401, 403)
                    else ""
                )
                # The client's error quotes a token with characters that a header may not hold.
                message = re.sub(r"Bearer [^'\"]*", "Bearer (hidden)", str(error))
                cause = None if "Bearer" in message else error
                raise UploadError(f"{repo_id!r} can't be published{login}: {message}") from cause
            time.sleep(wait)
