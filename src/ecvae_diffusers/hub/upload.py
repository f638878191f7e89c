# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishes a saved pipeline, or an autoencoder of diffusers with a calibrated decoder, on the Hub. Nothing of value there is lost.

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


logger = logging.get_logger(__name__)

SHARDS = "diffusion_pytorch_model.safetensors.index.json"  # which names the files of weights in several
HUB_FILES = {".gitattributes", CARD}  # which the Hub makes itself
WAITS = (1.0, 4.0)  # seconds before the second and the third try
# The error of the client's transport, httpx or by newer releases httpx2.
HTTPError = cast(type[Exception], HfHubHTTPError.__bases__[0])


class UploadError(RuntimeError):
    """A folder was not published; the message says why and what to do. Nothing in the folder was changed."""


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
    Publish a saved pipeline, or an autoencoder, as one commit, and create the repository if there is none.

    Files of the same name are replaced (earlier commits keep them), except a card that somebody has edited. A card with figures stays
    too, if the `evaluation.json` next to it is of the weights that come, or only a variant comes. Otherwise that evaluation, and
    variants of the weights before, are removed; a warning names them. A card that names no place loads from the repository.

    Args:
        folder (`str`): A folder that `save_pretrained` wrote.
        repo_id (`str`): `"user/name"`, or a name alone for one's own.
        token (`str`, *optional*): A token of the Hub. That of `hf auth login` or `HF_TOKEN` if not given.
        private (`bool`, *optional*): Whether a new repository is private. The account's default if not given.
        revision (`str`, *optional*): Branch, created if there is none. `main` if not given.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        subfolder (`str`, *optional*): Folder of the repository to publish to, without a card. What lies outside of it stays.

    Returns:
        `str`: URL of the commit, or of the pull request.

    Raises:
        ValueError: if the folder may not be published (see `files_to_publish`), or the repository's name is wrong.
        UploadError: if the Hub can't be reached after three tries, refuses, or the repository holds something else.
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
        # Full weights in one file where now there are several, or the other way round, would be loaded instead of those.
        folders = {PurePosixPath(file).parent for file in full}
        others = [path for path in map(PurePosixPath, there) if path.parent in folders and str(path) not in files]
        replaced = [str(path) for path in others if FULL_WEIGHTS.fullmatch(path.name) or path.name == SHARDS]
        # A model's parts belong together: where the full weights of one are others, all variants go.
        changed = [file for file in full if there.get(file) not in (None, additions[file].upload_info.sha256.hex())]
        if (changed or replaced) and not is_evaluated:
            removed += [str(path) for path in others if VARIANT_WEIGHTS.fullmatch(path.name)]
        removed += replaced
        del additions[CARD]
        if not (card_stays or prefix):
            card = with_location((folder / CARD).read_text(encoding="utf-8"), repo_id)
            additions[CARD] = CommitOperationAdd(CARD, card.encode())
        # Not `HfApi.upload_folder`, which makes several commits: between two of them a reader loads half of each.
        made = api.create_commit(
            repo_id,
            [*additions.values(), *(CommitOperationDelete(prefix + file) for file in removed)],
            commit_message=commit_message or "Upload a model of ecvae-diffusers",
            revision=revision,
            create_pr=create_pr,
        )
        if removed:
            logger.warning(f"Removed from {repo_id!r}, as of other weights (earlier commits keep them): {removed}.")
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
    Make sure that a pipeline can be published under a name, and create the repository and the branch if there are none.
    A training run asks at its start, so that hours later nothing is refused.

    Args:
        repo_id, token, private, revision: As for `upload_folder`.
        name (`str`, *optional*): `"config.json"` for an autoencoder, instead of a pipeline's `"model_index.json"`.
        prefix (`str`, *optional*): Only files of the repository whose paths begin so count: `"folder/"`.

    Returns:
        The client, the repository's full name, and the files that lie there, large ones with their SHA-256.

    Raises:
        ValueError: if the name is no repository's.
        UploadError: as `upload_folder`, also if the client can't write its cache.
    """
    # One that was read from a file ends in a line break, which the client would refuse in an error that quotes it.
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
    # Also an autoencoder in a pipeline's place, or the other way round, which would be half of each.
    if name not in there and (others := there.keys() - HUB_FILES):
        raise UploadError(f"{repo_id!r} holds other files, such as {min(others)!r}: choose another name.")
    return api, repo_id, there


def attempt(repo_id: str, call: Callable[[], Any]) -> Any:
    """Call up to three times, as long as another try may help. Raise errors of the Hub and of files as `UploadError`."""
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
                    ": `hf auth login`, or set HF_TOKEN to a token that may write there"
                    if status in (401, 403)
                    else ""
                )
                # A token with characters that no header may hold is quoted in the client's error.
                message = re.sub(r"Bearer [^'\"]*", "Bearer (hidden)", str(error))
                cause = None if "Bearer" in message else error
                raise UploadError(f"{repo_id!r} can't be published{login}: {message}") from cause
            time.sleep(wait)
