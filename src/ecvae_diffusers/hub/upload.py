# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publishing a saved pipeline, or an autoencoder of diffusers with a calibrated decoder, on the Hub: what may be published, and an upload that harms nothing that is there.

The token comes from `hf auth login`, or from the environment variable `HF_TOKEN`, unless one is given.
"""

import errno
import hashlib
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
from diffusers.models import autoencoders
from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .card import CARD_MARKER, with_location
from .saving import fingerprint


logger = logging.get_logger(__name__)

INDEX = "model_index.json"
CONFIG = "config.json"  # of a model alone, which is an autoencoder
CARD = "README.md"
EVALUATION = "evaluation.json"
# Of the folder itself, and of a pipeline's; a training run's other files stay at home.
TOP_LEVEL = {CARD, EVALUATION, "LICENSE"}
PIPELINE_FILES = {INDEX, "pipeline.py", "restoration.py"}
PICTURES = {".png"}
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# The pipelines that are published, with their components.
OUR_PIPELINES = {
    "ECFlowPipeline": {"flow", "energy_model", "scheduler"},
    "ECVAEPipeline": {"vae", "energy_model", "scheduler"},
    "ECVAERestorationPipeline": {"vae", "energy_model", "scheduler"},
}
# Files that the Hub makes itself.
HUB_FILES = {".gitattributes", CARD}
WAITS = (1.0, 4.0)  # seconds before the second and the third try
# Errors of the way to the Hub that are no errors of this machine's files. What the client could not fetch it calls a missing file.
NETWORK_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, LocalEntryNotFoundError)
NETWORK_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
LINK = re.compile(r"https?://[^\s\"'`<>(){}\[\],;]+")


class UploadError(RuntimeError):
    """A folder was not published; the message says why and what to do. Nothing of the folder was changed."""


def files_to_publish(folder: str | os.PathLike) -> list[str]:
    """
    List the files of a saved pipeline that belong on the Hub, relative to its folder: index, code, card, evaluation, pictures, and
    the config, code and weights of each component. Of an autoencoder of diffusers: config, weights, card and pictures.

    Raises:
        ValueError: if the folder holds no pipeline of ours and no autoencoder, no card, a component that the pipeline does not have or
            that has no config or no weights, a pickle among the weights, weights that can't be read or are not finite, an evaluation of
            other weights, a link, a picture that is none, or a text that names a path of this machine.
    """
    folder = Path(folder).resolve()
    components = component_folders(folder)
    top_level = TOP_LEVEL if "." in components else TOP_LEVEL | PIPELINE_FILES
    found = [path for path in folder.iterdir() if path.name in top_level or path.suffix in PICTURES]
    if not (folder / CARD).is_file():
        raise ValueError(f"{str(folder)!r} has no {CARD}: save the pipeline again, which writes one.")
    for name, library in components.items():
        pickles = sorted(path.name for path in (folder / name).glob("*") if path.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{str(folder / name)!r} holds {pickles[0]}, a pickle, which runs code when it is read: only safetensors are "
                "published. Load it, save it anew, and remove it."
            )
        files = component_files(folder / name, library)
        weights = [path for path in files if path.suffix == ".safetensors"]
        configs = [path.name for path in files if path.is_file()]
        if "config.json" not in configs and "scheduler_config.json" not in configs:
            raise ValueError(f"{str(folder / name)!r} holds no config: the component {name!r} can't be loaded.")
        if not weights and "scheduler_config.json" not in configs:
            raise ValueError(f"{str(folder / name)!r} holds no safetensors: the component {name!r} has no weights.")
        for path in weights:
            check_safetensors(path)
        found += files
    found = {path for path in found if path.is_file()}
    for path in found:
        check_no_link(path, folder)
        if path.suffix in PICTURES:
            check_picture(path)
    for path in found:
        if path.suffix not in (".safetensors", *PICTURES):
            check_text(path, folder)
    evaluation = folder / EVALUATION
    if evaluation.is_file() and evaluated_weights(evaluation.read_bytes()) != folder_fingerprint(folder):
        raise ValueError(
            f"{str(evaluation)!r} must be an evaluation of the weights that lie beside it, but is not: evaluate this model, or "
            "take the file out."
        )
    return sorted(path.relative_to(folder).as_posix() for path in found)


def check_no_link(path: Path, folder: Path) -> None:
    """Raise `ValueError` if there is a link between a folder and a file in it: what it leads to was not meant to be published."""
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        raise ValueError(f"{str(path)!r} leads to {str(path.resolve())!r}: put a copy in its place.")


def check_picture(path: Path) -> None:
    """Raise `ValueError` if a file is no PNG picture."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no PNG picture: take it out.") from error


def component_folders(folder: Path) -> dict[str, str]:
    """
    The sub-folders of a pipeline's components, each with the library that the index names for it: the stem of its code file, if
    its code travels. An autoencoder's weights lie in the folder itself.
    """
    index = read_index(folder)
    if not (folder / INDEX).is_file():
        return {".": ""}
    listed = {name: value for name, value in index.items() if isinstance(value, list) and name != "_class_name"}
    return {name: value[0] for name, value in listed.items() if value[0]}


def component_files(folder: Path, library: str = "") -> list[Path]:
    """List the files of a component that diffusers reads: config, weights and, where its code travels, `<library>.py`."""
    code = f"{library}.py" if library else None
    return sorted(path for path in folder.glob("*") if path.name == code or COMPONENT_FILES.fullmatch(path.name))


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """`hub.weights_fingerprint` of a saved pipeline's files: of the full weights, where a variant lies beside them."""
    weights = {}
    for name in component_folders(Path(folder)):
        files = [path for path in component_files(Path(folder) / name) if path.suffix == ".safetensors"]
        chosen = [path for path in files if not is_variant(path.name)] or files
        if chosen:  # a scheduler has none
            weights[name] = {key: tensor for path in chosen for key, tensor in load_file(path).items()}
    return fingerprint(weights)


# What diffusers calls a model's weights, whole or in shards, and those of a variant of them.
SHARD = r"(-\d{5}-of-\d{5})?"
FULL_WEIGHTS = re.compile(rf"diffusion_pytorch_model{SHARD}\.safetensors")
VARIANT_WEIGHTS = re.compile(
    rf"diffusion_pytorch_model\.\w+{SHARD}\.safetensors|diffusion_pytorch_model\.safetensors\.index\.\w+\.json"
)
COMPONENT_FILES = re.compile(
    r"config\.json|scheduler_config\.json|diffusion_pytorch_model\.safetensors\.index\.json|"
    rf"{FULL_WEIGHTS.pattern}|{VARIANT_WEIGHTS.pattern}"
)


def is_variant(name: str) -> bool:
    """Whether a file of weights is one of a variant, such as `diffusion_pytorch_model.fp16.safetensors`."""
    return "." in Path(name).name.removesuffix(".safetensors")


def evaluated_weights(content: bytes) -> str | None:
    """The fingerprint of the weights that an `evaluation.json` is of; `None` where it is of none."""
    try:
        evaluation = json.loads(content)
    except ValueError:
        return None
    return evaluation.get("weights") if isinstance(evaluation, dict) else None


def read_index(folder: Path) -> dict:
    """Of a pipeline its index, of a model alone its config. Raises `ValueError` if it is not one that is published."""
    name = CONFIG if (folder / CONFIG).is_file() and not (folder / INDEX).is_file() else INDEX
    try:
        index = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(folder)!r} holds no pipeline: its {name} can't be read ({error}).") from error
    if not is_publishable(name, index):
        raise ValueError(
            f"{str(folder)!r} holds {held_class(name, index)}, but only {', '.join(sorted(OUR_PIPELINES))} and autoencoders of "
            "diffusers are published."
        )
    if name == INDEX:
        check_components(str(folder), index)
    return index


def check_components(where: str, index: dict) -> None:
    """Raises `ValueError` if an index names a component that its class does not have, or by anything but a library and a class."""
    known = OUR_PIPELINES[class_name(index)]
    for name in sorted(known & {"vae", "flow"}):
        if not isinstance(index.get(name), list) or None in index[name]:
            raise ValueError(f"{where!r}: its {INDEX} must name a component {name!r}, but has {index.get(name)!r}.")
    for name, value in index.items():
        if name == "_class_name" or not (isinstance(value, list) or name in known):
            continue
        if name not in known:
            raise ValueError(
                f"{where!r}: its {INDEX} names a component {name!r}, but a {class_name(index)} has only {', '.join(sorted(known))}."
            )
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(part is None or is_dotted_name(part) for part in value)
        ):
            raise ValueError(f"{where!r}: `{name}` of its {INDEX} must be a library and a class, but is {value!r}.")


def is_dotted_name(value) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def is_publishable(name: str, index: dict) -> bool:
    """Whether an index, or a config, is of a class that is published."""
    if name == INDEX:
        return class_name(index) in OUR_PIPELINES
    return hasattr(getattr(autoencoders, str(class_name(index)), None), "decode")


def class_name(index) -> str | None:
    """The class that an index, or a config, names; `None` if it names none."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) else None


def held_class(name: str, index) -> str:
    """In words, for an error, what an index, or a config, is of."""
    found = class_name(index)
    return f"a {found}" if found is not None else f"a {name} that names no class"


def check_safetensors(path: Path) -> None:
    """Raises `ValueError` if a file is cut off or is no safetensors, which its header tells, or holds NaN or infinity."""
    try:
        with safe_open(path, framework="pt") as file:
            broken = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
    if broken:
        raise ValueError(f"{str(path)!r} must hold finite weights only, but {broken[0]!r} has some that are not.")


def check_text(path: Path, folder: Path) -> None:
    """Raises `ValueError` if a text names the folder that it lies in, or the user's own one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be text in UTF-8, but is not: {error}.") from error
    text = LINK.sub("", text)
    # `~` where the user has no home.
    for private in {str(folder), os.path.expanduser("~")} - {"/", "~"}:
        # Not as a part of a longer name, nor of a relative path.
        if re.search(r"(?<![\w.~-])" + re.escape(private) + r"(?![\w.-])", text):
            raise ValueError(
                f"{str(path)!r} names {private!r}, a path of this machine: take it out before publishing."
            )


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
    Publish a saved pipeline, or an autoencoder, as one commit. A repository that is not there is created; in one that is, files of the same name
    are replaced (earlier commits keep them), but a card that somebody has edited stays. So does one with figures, where the
    `evaluation.json` that is there is of the weights that come, or they are a variant beside those it is of; it is removed
    where other weights come, and so are variants of those before (a warning names them). The card that is published loads from the repository, where that of the folder names no place.

    Args:
        folder (`str`): Of `save_pretrained`.
        repo_id (`str`): `"user/name"`, or a name alone for one's own.
        token (`str`, *optional*): That of `hf auth login` or `HF_TOKEN` if not given.
        private (`bool`, *optional*): Whether a new repository is private. The account's default if not given.
        revision (`str`, *optional*): Branch, created if it is not there. `main` if not given.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        subfolder (`str`, *optional*):
            Folder of the repository to publish to, without a card, instead of the repository itself. Whatever lies outside of it
            stays as it is.

    Returns:
        `str`: URL of the commit, or of the pull request.

    Raises:
        ValueError: if the folder may not be published (see `files_to_publish`), or the repository's name is wrong.
        UploadError: if the Hub can't be reached after three tries, refuses, or the repository holds something else, or if a file of this
            machine can't be read or written.
    """
    folder, files = Path(folder), files_to_publish(folder)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    api, repo_id, there = open_repository(
        repo_id,
        token=token,
        private=private,
        revision=revision,
        name=INDEX if INDEX in files else CONFIG,
        prefix=prefix,
    )
    card_stays = CARD in there and CARD_MARKER.encode() not in there[CARD]
    removed = []
    are_those_evaluated = EVALUATION in there and evaluated_weights(there[EVALUATION]) == folder_fingerprint(folder)
    if EVALUATION in there and EVALUATION not in files:
        only_variant = all(is_variant(name) for name in files if name.endswith(".safetensors"))
        if only_variant or are_those_evaluated:
            card_stays = CARD in there
        else:
            removed = [EVALUATION]
    if not are_those_evaluated:
        stale = attempt("read", repo_id, api, lambda: stale_variants(api, repo_id, revision, folder, prefix))
        removed += [name for name in stale if name not in files]
        if removed:
            logger.warning(
                f"Removed from {repo_id!r}, since they are of the weights before (earlier commits keep them): {', '.join(removed)}."
            )
    contents: dict[str, Path | bytes] = {name: folder / name for name in files}
    contents[CARD] = with_location((folder / CARD).read_text(encoding="utf-8"), repo_id).encode()
    if card_stays or prefix:
        del contents[CARD]

    def commit():
        return api.create_commit(
            repo_id,
            # Made anew at each try: the client takes none twice.
            [
                *(CommitOperationAdd(prefix + name, content) for name, content in contents.items()),
                *(CommitOperationDelete(prefix + name) for name in removed),
            ],
            revision=revision,
            commit_message=commit_message or "Upload a model of ecvae-diffusers",
            create_pr=create_pr,
        )

    made = attempt("write to", repo_id, api, commit)
    return made.pr_url or made.commit_url


def stale_variants(api: HfApi, repo_id: str, revision: str | None, folder: Path, prefix: str) -> list[str]:
    """
    The variants in a repository (such as `vae/diffusion_pytorch_model.fp16.safetensors`) where full weights come that are
    others than those beside them. All of them: a model's parts belong together.
    """
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {entry.path.removeprefix(prefix): entry for entry in entries if entry.path.startswith(prefix)}

    def changes(file: Path, entry) -> bool:
        if file.stat().st_size != entry.size:
            return True
        with open(file, "rb") as opened:
            if entry.lfs is not None:
                return hashlib.file_digest(opened, "sha256").hexdigest() != entry.lfs.sha256
            content = opened.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != entry.blob_id

    changed, variants = False, []
    for name in component_folders(folder):
        place = "" if name == "." else f"{name}/"
        held = {path.removeprefix(place): entry for path, entry in there.items() if path.startswith(place)}
        before = {file for file in held if FULL_WEIGHTS.fullmatch(file)}
        coming = {path.name for path in (folder / name).glob("*") if FULL_WEIGHTS.fullmatch(path.name)}
        if before and coming:
            changed |= before != coming or any(changes(folder / name / file, held[file]) for file in coming)
        variants += [place + file for file in held if VARIANT_WEIGHTS.fullmatch(file)]
    return variants if changed else []


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
    Make sure that a pipeline can be published under a name, and create the repository and the branch if they are not there.
    A training run asks at its start, so that hours later nothing is refused.

    Args:
        repo_id, token, private, revision: As for `upload_folder`.
        name (`str`, *optional*): `"config.json"` for an autoencoder, instead of a pipeline's `"model_index.json"`.
        prefix (`str`, *optional*): Only the repository's files whose paths begin so are looked at: `"folder/"`.

    Returns:
        The client, the repository's full name, and the card and the evaluation in it, as far as they are there.

    Raises:
        ValueError: if the name is no repository's.
        UploadError: if the Hub can't be reached, refuses, or the repository holds something else, or if the client can't write its cache.
    """
    # One that was read from a file ends in a line break, which the client would refuse in an error that quotes it.
    api = HfApi(token=token.strip() if isinstance(token, str) else token)

    def ask(what: str, call: Callable):
        return attempt(what, repo_id, api, call)

    repo_id = ask("create", lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision not in (None, "main"):
        ask("create a branch in", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))

    def read(file: str) -> bytes:
        return Path(ask("read", lambda: api.hf_hub_download(repo_id, prefix + file, revision=revision))).read_bytes()

    paths = ask("read", lambda: api.list_repo_files(repo_id, revision=revision))
    there = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
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
    elif set(there) - HUB_FILES:
        found = sorted(set(there) - HUB_FILES)[0]
        raise UploadError(f"{repo_id!r} holds other files, such as {found!r}: choose another name.")
    return api, repo_id, {file: read(file) for file in (CARD, EVALUATION) if file in there}


def attempt(what: str, repo_id: str, api: HfApi, call: Callable):
    """Up to three tries, as long as another may help; errors of the Hub and of the way to it as `UploadError`."""
    for wait in (*WAITS, None):
        try:
            return call()
        except HFValidationError as error:
            raise ValueError(f"`repo_id` must be 'user/name', but is {repo_id!r}: {error}") from error
        except Exception as error:
            if wait is None or not may_pass(error):
                if isinstance(error, HfHubHTTPError) or is_transport_error(error):
                    # A cause that quotes the token would stand in the traceback.
                    cause = None if "Bearer" in str(error) else error
                    raise UploadError(explanation(error, what, repo_id, api.endpoint)) from cause
                raise
            time.sleep(wait)


def is_transport_error(error: Exception) -> bool:
    """Whether an error is of the way to the Hub, and not of this machine's files, which are `OSError` too."""
    # The client's transport is httpx, or by newer releases httpx2, and lets its errors through.
    if isinstance(error, NETWORK_ERRORS) or type(error).__module__.split(".")[0].startswith("httpx"):
        return True
    return isinstance(error, OSError) and error.errno in NETWORK_ERRNOS


def may_pass(error: Exception) -> bool:
    """Whether another try may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code >= 500 or error.response.status_code == 429)
    return is_transport_error(error)


def explanation(error: Exception, what: str, repo_id: str, endpoint: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return f"the Hub does not know the token (401): `hf auth login`, or set HF_TOKEN to a token that may write {repo_id!r}."
    if status == 403:
        return f"the token may not {what} {repo_id!r} (403): use one with write access, or choose a name of your own."
    message = re.sub(r"Bearer [^'\"]*", "Bearer (hidden)", str(error))
    if status is not None:
        return f"the Hub could not {what} {repo_id!r}: {message}"
    return f"the Hub at {endpoint} can't be reached, {len(WAITS) + 1} times: {message}"
