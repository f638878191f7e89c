"""Read the folders, files and Hub ids of a command line: expand `~`, and refuse at once what does not exist."""

import argparse
import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


# Arguments of all scripts that must be folders of pictures.
PICTURE_FOLDERS = ("train_data_dir", "test_data_dir", "generated_image_dir", "image_dir")
# Arguments of all scripts that are folders or Hub ids, with the kind of repository.
SOURCES = {"pretrained_model_name_or_path": "model", "baseline": "model", "dataset_name": "dataset"}
HUB_TIMEOUT = 10.0  # seconds


def place(text: str) -> str:
    """
    Read a folder, a file or a Hub id of the command line: the `type` of such an argument.

    Returns:
        `str`: The text, with the home folder for a leading `~`.

    Raises:
        argparse.ArgumentTypeError: if it is empty, or begins with the `~name` of no user.
    """
    expanded = os.path.expanduser(text)
    if not text.strip() or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"must be a place, but is {text!r}")
    return expanded


def local_path(text: str) -> Path:
    """Read a folder or file of the command line, as [`place`] does."""
    return Path(place(text))


def named_place(text: str) -> str:
    """Read `NAME=PLACE` of the command line, the place as [`place`] does. Text without `=` is returned as it is."""
    name, equals, source = text.partition("=")
    return f"{name}={place(source)}" if equals else text


def name_as_text(source: str) -> str:
    """
    Return what to call a folder or Hub id in reports: of a folder only the name, since its path is this machine's, with bytes that
    are not UTF-8 as escapes.
    """
    if not os.path.exists(source):
        return source
    return os.fsencode(Path(source).resolve().name).decode("utf-8", "backslashreplace")


def check_places(args: argparse.Namespace) -> None:
    """
    Check that the folders and Hub ids of a command line exist, before anything is loaded.

    Raises:
        ValueError: naming the argument, if a folder of pictures does not exist, or a source is neither a local path nor on the Hub.
    """
    for argument in PICTURE_FOLDERS:
        if (folder := getattr(args, argument, None)) is not None:
            check_picture_folder(argument, folder)
    for argument, kind in SOURCES.items():
        if (source := getattr(args, argument, None)) is not None:
            check_source(argument, source, kind)
    for named in getattr(args, "out_of_distribution", ()):
        check_source("out_of_distribution", named.partition("=")[2], "dataset")


def check_picture_folder(argument: str, folder: str | os.PathLike) -> None:
    """Raise `ValueError` if there is no such folder. Empty text would be the working directory, and is refused."""
    if not str(folder) or not os.path.isdir(folder):
        raise ValueError(f"--{argument} must be a folder of images, but {str(folder)!r} is not a folder.")


def check_source(argument: str, source: str, kind: str) -> None:
    """Raise `ValueError`, naming the command line's `argument`, if a folder or Hub id does not exist."""
    if (reason := why_missing(source, kind)) is not None:
        raise ValueError(f"--{argument} {source!r} can't be loaded: {reason}.")


def why_missing(source: str, kind: str) -> str | None:
    """
    Say why nothing can be loaded from a source that is neither a local path nor, by a single request, a repository on the Hub. The
    libraries that load it ask the Hub many times, with pauses, and never say that there is no such folder.

    Args:
        source (`str`): The path or Hub id.
        kind (`str`): `"model"` or `"dataset"`.

    Returns:
        `str`: The reason, or `None` if there is something to load.
    """
    is_cached = (
        Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.replace('/', '--')}"
    ).is_dir()  # loads without the Hub
    if os.path.exists(source) or "://" in source or is_cached:
        return None
    try:
        validate_repo_id(source)
        HfApi().repo_info(source, repo_type=kind, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return None  # it exists: loading it says how to get access
    except HFValidationError:
        return f"there is no such folder, and it can't be the id of a {kind} on the Hub (user/name)"
    except RepositoryNotFoundError:
        return f"there is no such folder, and no such {kind} on the Hub (a private one needs `hf auth login`, or HF_TOKEN)"
    except Exception as error:  # of the client's transport, which changes between releases
        return f"there is no such folder, and the Hub can't be asked for a {kind} of that name ({error})"
    return None
