# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishes a saved pipeline, or an autoencoder of diffusers with a calibrated decoder, on the Hub. Nothing of value there is lost.

The token is that of `hf auth login` or of the environment variable `HF_TOKEN`, unless one is given.
"""

import errno
import hashlib
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from .card import CARD_MARKER, with_location
from .contents import (
    CARD,
    CONFIG,
    EVALUATION,
    FULL_WEIGHTS,
    INDEX,
    VARIANT_WEIGHTS,
    component_folders,
    evaluated_weights,
    files_to_publish,
    folder_fingerprint,
    held_class,
    is_publishable,
)


logger = logging.get_logger(__name__)

HUB_FILES = {".gitattributes", CARD}  # which the Hub makes itself
WAITS = (1.0, 4.0)  # seconds before the second and the third try
# What the client could not fetch it calls a missing file.
NETWORK_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, LocalEntryNotFoundError)
NETWORK_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class UploadError(RuntimeError):
    """A folder was not published; the message says why and what to do. Nothing in the folder was changed."""


@contextmanager
def local_errors() -> Iterator[None]:
    """Turn errors of this machine's files, such as a full disk, into `UploadError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UploadError(f"a file of this machine can't be read or written: {error}") from error


@local_errors()
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
        UploadError: if the Hub can't be reached after three tries, refuses, or the repository holds something else, or if a file of
            this machine can't be read or written.
    """
    folder, files = Path(folder), files_to_publish(folder)
    if INDEX in files and "pipeline.py" not in files:
        raise ValueError(f"{str(folder)!r} has no pipeline.py: save the pipeline again, which writes its code.")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    name = INDEX if INDEX in files else CONFIG
    asked = {"token": token, "private": private, "revision": revision}
    api, repo_id, there = open_repository(repo_id, **asked, name=name, prefix=prefix)

    removed = []
    card_stays = CARD in there and CARD_MARKER.encode() not in there[CARD]
    are_those_evaluated = EVALUATION in there and evaluated_weights(there[EVALUATION]) == folder_fingerprint(folder)
    if EVALUATION in there and EVALUATION not in files:
        if are_those_evaluated or not any(FULL_WEIGHTS.fullmatch(PurePosixPath(file).name) for file in files):
            card_stays = CARD in there
        else:
            removed = [EVALUATION]
    if not are_those_evaluated:
        stale = attempt("read", repo_id, api, lambda: stale_variants(api, repo_id, revision, folder, files, prefix))
        removed += [file for file in stale if file not in files]
    if removed:
        logger.warning(
            f"Removed from {repo_id!r}, since they are of the weights before (earlier commits keep them): {', '.join(removed)}."
        )
    contents: dict[str, Path | bytes] = {file: folder / file for file in files}
    contents[CARD] = with_location((folder / CARD).read_text(encoding="utf-8"), repo_id).encode()
    if card_stays or prefix:
        del contents[CARD]

    def commit():
        # Not `HfApi.upload_folder`, which looks for files itself. Made anew at each try: the client takes no operation twice.
        operations = [CommitOperationAdd(prefix + file, content) for file, content in contents.items()]
        operations += [CommitOperationDelete(prefix + file) for file in removed]
        message = commit_message or "Upload a model of ecvae-diffusers"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)

    made = attempt("write to", repo_id, api, commit)
    return made.pr_url or made.commit_url


def stale_variants(
    api: HfApi, repo_id: str, revision: str | None, folder: Path, files: list[str], prefix: str
) -> list[str]:
    """
    List the variants in a repository (such as `vae/diffusion_pytorch_model.fp16.safetensors`) if full weights come that differ from
    those next to them. All variants: a model's parts belong together.
    """
    components = component_folders(folder)

    def weights(names: Iterable[str], pattern: re.Pattern) -> list[PurePosixPath]:
        paths = map(PurePosixPath, names)
        return [path for path in paths if str(path.parent) in components and pattern.fullmatch(path.name)]

    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {entry.path.removeprefix(prefix): entry for entry in entries if entry.path.startswith(prefix)}
    before, coming = {}, {}
    for path in weights(there, FULL_WEIGHTS):
        large = there[str(path)].lfs
        before.setdefault(path.parent, {})[path.name] = large.sha256 if large else None
    for path in weights(files, FULL_WEIGHTS):
        with open(folder / path, "rb") as file:
            coming.setdefault(path.parent, {})[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    changed = any(before[name] != coming[name] for name in before.keys() & coming.keys())
    return [str(path) for path in weights(there, VARIANT_WEIGHTS)] if changed else []


@local_errors()
def open_repository(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    name: str = INDEX,
    prefix: str = "",
) -> tuple[HfApi, str, dict[str, bytes]]:
    """
    Make sure that a pipeline can be published under a name, and create the repository and the branch if there are none.
    A training run asks at its start, so that hours later nothing is refused.

    Args:
        repo_id, token, private, revision: As for `upload_folder`.
        name (`str`, *optional*): `"config.json"` for an autoencoder, instead of a pipeline's `"model_index.json"`.
        prefix (`str`, *optional*): Only files of the repository whose paths begin so count: `"folder/"`.

    Returns:
        The client, the repository's full name, and the card and the evaluation that lie there.

    Raises:
        ValueError: if the name is no repository's.
        UploadError: as `upload_folder`, also if the client can't write its cache.
    """
    # One that was read from a file ends in a line break, which the client would refuse in an error that quotes it.
    api = HfApi(token=token.strip() if isinstance(token, str) else token)

    def ask(what: str, call: Callable):
        return attempt(what, repo_id, api, call)

    def read(file: str) -> bytes:
        return Path(ask("read", lambda: api.hf_hub_download(repo_id, prefix + file, revision=revision))).read_bytes()

    repo_id = ask("create", lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision not in (None, "main"):
        ask("create a branch in", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    paths = ask("read", lambda: api.list_repo_files(repo_id, revision=revision))
    there = {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}
    held = next((file for file in (INDEX, CONFIG) if file in there), None)
    if held is not None:
        try:
            index = json.loads(read(held))
        except ValueError as error:
            raise UploadError(f"{repo_id!r} holds a {held} that is no JSON ({error}): choose another name.") from error
        # An autoencoder in a pipeline's folder, or the other way round, would be half of each.
        if held != name or not is_publishable(held, index):
            raise UploadError(
                f"{repo_id!r} holds {held_class(held, index)}, which would be lost: choose another name."
            )
    elif there - HUB_FILES:
        raise UploadError(f"{repo_id!r} holds other files, such as {min(there - HUB_FILES)!r}: choose another name.")
    return api, repo_id, {file: read(file) for file in (CARD, EVALUATION) if file in there}


def attempt(what: str, repo_id: str, api: HfApi, call: Callable):
    """Try up to three times, as long as another try may help. Raise errors of the Hub and of the way to it as `UploadError`."""
    for wait in (*WAITS, None):
        try:
            return call()
        except HFValidationError as error:
            raise ValueError(f"`repo_id` must be 'user/name', but is {repo_id!r}: {error}") from error
        except Exception as error:
            answer = error.response if isinstance(error, HfHubHTTPError) else None
            status = answer.status_code if answer is not None else None
            if not isinstance(error, HfHubHTTPError) and not is_transport_error(error):
                raise
            may_pass = is_transport_error(error) if status is None else status >= 500 or status == 429
            if wait is None or not may_pass:
                # A cause that quotes the token would stand in the traceback.
                cause = None if "Bearer" in str(error) else error
                raise UploadError(explanation(error, status, what, repo_id, api.endpoint)) from cause
            time.sleep(wait)


def is_transport_error(error: Exception) -> bool:
    """Tell an error of the way to the Hub from one of this machine's files, which is an `OSError` too."""
    # The client's transport is httpx, or by newer releases httpx2, and lets its errors through.
    if isinstance(error, NETWORK_ERRORS) or type(error).__module__.split(".")[0].startswith("httpx"):
        return True
    return isinstance(error, OSError) and error.errno in NETWORK_ERRNOS


def explanation(error: Exception, status: int | None, what: str, repo_id: str, endpoint: str) -> str:
    if status == 401:
        return f"the Hub does not know the token (401): `hf auth login`, or set HF_TOKEN to a token that may write {repo_id!r}."
    if status == 403:
        return f"the token may not {what} {repo_id!r} (403): use one with write access, or choose a name of your own."
    message = re.sub(r"Bearer [^'\"]*", "Bearer (hidden)", str(error))
    if status is not None:
        return f"the Hub could not {what} {repo_id!r}: {message}"
    return f"the Hub at {endpoint} can't be reached, {len(WAITS) + 1} times: {message}"
