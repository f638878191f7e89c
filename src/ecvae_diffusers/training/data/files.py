"""Find the pictures of a folder, in the same way for every script, report what was left out, and hash pictures.

Links are followed, and each file counts once. Files that training runs, evaluations and restorations wrote are left out, so that a run
inside its data folder is not trained on its own sample sheets or compared with them.
"""

import hashlib
import mimetypes
import os
import re
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from huggingface_hub import DatasetCard

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.command import check_picture_folder
from ecvae_diffusers.training.data.bands import ARRAY, BAND_FILES, has_bands, num_bands
from ecvae_diffusers.training.run.folder import ARGUMENTS_FILE, CHECKPOINT, HASHES_FILE, RUN_FILES, RUN_FOLDERS


# Formats that Pillow recognizes but can't read without a plugin. MPEG is video.
STUB_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
MODEL_FILE = "model_index.json"
RESTORED_FILE = "restored.json"
# Files that scripts write into any folder, by the file that is always among them. `datasets` would read JSON files as data.
SHEETS = re.compile(r"(model_index|evaluation)\.json|(samples|neighbours|curves)\.png")
WRITTEN = {
    MODEL_FILE: SHEETS,
    "evaluation.json": SHEETS,
    "restoration.json": re.compile(r"restoration\.(json|md)|restoration_noise-.*\.png"),
    ARGUMENTS_FILE: re.compile("|".join(re.escape(name) for name in sorted({ARGUMENTS_FILE, *RUN_FILES}))),
}
MAX_NAMED = 5
HASH_BYTES = 16


class FolderFiles:
    """
    The files of a folder and its sub-folders, each once, sorted by name.

    Attributes:
        files (`list[Path]`): The files that are data.
        written (`list[Path]`): The folders and files that runs, evaluations and restorations wrote.
        num_hidden, num_links (`int`): The number of hidden files and folders, and of links to files and folders that are counted already.

    Raises:
        ValueError: if a folder can't be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.num_hidden, self.num_links, self.written = folder, 0, 0, []
        root = os.path.realpath(folder)
        found, seen, linked_files, waiting = {}, set(), [], deque([folder])
        while waiting:
            current = waiting.popleft()
            real = Path(os.path.realpath(current))
            if real in seen:
                self.num_links += 1
                continue
            seen.add(real)
            if str(real) != root and is_written(real):
                self.written.append(current)
                continue
            for entry in self.entries(current):
                path = current / entry.name
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    self.num_hidden += 1
                elif entry.is_dir(follow_symlinks=False):
                    waiting.appendleft(path)
                elif not entry.is_symlink():
                    if entry.is_file():  # reading a pipe would block
                        found[real / entry.name] = path
                elif not os.path.isdir(path):
                    linked_files.append(path)  # broken links too: reading the file reports them
                elif real.is_relative_to(os.path.realpath(path)):
                    self.num_links += 1
                else:
                    waiting.append(path)  # after all real folders, so that a file keeps its real name
        for path in sorted(linked_files):
            real = Path(os.path.realpath(path))
            self.num_links += real in found
            found.setdefault(real, path)
        self.files, self.written = sorted(found.values()), sorted(self.written)

    def entries(self, folder: Path) -> list[os.DirEntry]:
        """List a folder without the files that scripts wrote into it."""
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{str(folder)!r} can't be read: {error.strerror}.") from error
        names = {entry.name for entry in entries}
        written = {name for mark in WRITTEN.keys() & names for name in names if WRITTEN[mark].fullmatch(name)}
        self.written += [folder / name for name in written]
        return [entry for entry in entries if entry.name not in written]

    def left_out(self) -> list[str]:
        """Describe what is not among the files, and why."""
        parts = []
        if self.written:
            named = ", ".join(repr(os.path.relpath(path, self.folder)) for path in self.written[:MAX_NAMED])
            more = ", ..." if len(self.written) > MAX_NAMED else ""
            parts.append(f"files of runs, evaluations and restorations ({named}{more})")
        if self.num_links:
            parts.append(f"{self.num_links} link(s) to files or folders that are included already")
        if self.num_hidden:
            parts.append(f"{self.num_hidden} hidden file(s) or folder(s)")
        return parts


def is_written(folder: Path) -> bool:
    """Return whether a folder (a real path) is a run, a part of one, a saved pipeline, or an output of `ecvae restore`."""
    if any((folder / name).is_file() for name in (ARGUMENTS_FILE, MODEL_FILE, RESTORED_FILE)):
        return True
    is_part = folder.name in RUN_FOLDERS or CHECKPOINT.fullmatch(folder.name) is not None
    return is_part and (folder.parent / ARGUMENTS_FILE).is_file()


def readable_extensions() -> set[str]:
    """Return the file name extensions, in lower case, that Pillow can read."""
    PIL.Image.init()
    readable = PIL.Image.OPEN.keys() - STUB_FORMATS
    return {extension for extension, name in PIL.Image.EXTENSION.items() if name in readable}


def unreadable(files: Iterable[Path], what: str = "that Pillow can't read") -> list[str]:
    """Describe files that are not read, by number and extension. Empty if there are none."""
    counts = Counter(path.suffix.lower() or "without an extension" for path in files)
    if not counts:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(MAX_NAMED))
    more = ", ..." if len(counts) > MAX_NAMED else ""
    return [f"{counts.total()} file(s) {what} ({kinds}{more})"]


class Pictures:
    """
    The undecoded pictures of a folder or of a data set, as `{"path": ..., "bytes": ...}`.

    Args:
        source (`list[Path]` or `datasets.Dataset`): Files, or a data set whose only column is `image`, undecoded.
        left_out (`list[str]`): Descriptions of what was left out.
        labels (`list[int]`, *optional*), class_names (`list[str]`, *optional*): The class of each picture, and the names of all classes.
        bands (`int`, *optional*): The number of channels, if files are arrays or pages (see `bands.py`) instead of pictures.
    """

    def __init__(
        self,
        source: Any,
        left_out: list[str],
        labels: list[int] | None = None,
        class_names: list[str] | None = None,
        bands: int | None = None,
    ):
        self.source, self.left_out, self.labels, self.class_names = source, left_out, labels, class_names
        self.bands = bands

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict | None:
        row = self.source[i]
        return {"path": str(row), "bytes": None} if isinstance(row, Path) else row["image"]

    def select(self, indices: list[int]) -> "Pictures":
        """Return the pictures at the given indices, in that order."""
        chosen = [self.source[i] for i in indices] if isinstance(self.source, list) else self.source.select(indices)
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Pictures(chosen, self.left_out, labels, self.class_names, self.bands)


def find_images(folder: str | os.PathLike, argument: str | None = None, in_channels: int | None = None) -> Pictures:
    """
    Find the images of a folder by their extensions: pictures or, if there are none, `.npy` arrays, whose first one tells the number of
    channels. With another number of `in_channels` than pictures have, arrays and TIFF files.

    Raises:
        ValueError: if the folder, or the first array, can't be read. The message names `argument`.
    """
    check_picture_folder(argument or "folder", folder)
    found = FolderFiles(Path(folder))
    of_bands, readable = has_bands(None, in_channels), readable_extensions()
    wanted, what = (BAND_FILES, "neither arrays nor TIFF") if of_bands else (readable, "that Pillow can't read")
    if not of_bands and not any(path.suffix.lower() in readable for path in found.files):
        wanted, what = {ARRAY}, "neither pictures nor arrays"
    files = [path for path in found.files if path.suffix.lower() in wanted]
    left_out = unreadable((path for path in found.files if path.suffix.lower() not in wanted), what)
    bands = in_channels if of_bands else num_bands(files[0]) if files and wanted == {ARRAY} else None
    return Pictures(files, left_out + found.left_out(), bands=bands)


def local_data_files(name_or_path: str) -> tuple[Any, list[str]]:
    """
    Return the argument `data_files` for `datasets.load_dataset`, and descriptions of what is left out of a local data set.

    `data_files` is `None` if `datasets` finds the files by itself. If there is a run in the folder, `datasets` alone would also read the
    run's pictures and logs.
    """
    if not os.path.isdir(name_or_path):
        return None, []
    found = FolderFiles(Path(os.path.realpath(name_or_path)))
    for path in found.files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!r} can't be read by `datasets`: its name is not UTF-8.") from None
    readable = readable_extensions()
    images = (path for path in found.files if str(mimetypes.guess_type(path.name)[0]).startswith("image/"))
    left_out = unreadable(path for path in images if path.suffix.lower() not in readable)
    if not found.written and not found.num_links:
        return None, left_out
    return split_files(found, os.path.realpath(name_or_path)), left_out + found.left_out()


def split_files(found: FolderFiles, folder: str) -> Any:
    """Sort files into splits by the rules of `datasets`. Return `None` if the data set's card defines the splits."""
    from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, DataFilesList, _get_data_files_patterns
    from fsspec.utils import glob_translate

    card = Path(folder, "README.md")
    if card.is_file() and DatasetCard.load(card).data.get("configs"):
        return None
    files = {path.relative_to(folder).as_posix(): path for path in found.files if path.name not in FILES_TO_IGNORE}
    # In the order of `datasets`, so that a resumed run keeps the order of its images.
    names = sorted(name for name in files if not any(part.startswith("__") for part in name.split("/")[:-1]))

    def matching(pattern: str) -> list[str]:
        return [name for name in names if re.match(glob_translate(pattern), name)]

    splits = {}
    for split, patterns in _get_data_files_patterns(matching).items():
        chosen = [str(files[name]) for pattern in patterns for name in matching(pattern)]
        splits[str(split)] = DataFilesList(chosen, [(str(os.path.getmtime(file)),) for file in chosen])
    return DataFilesDict(splits)


def content_hash(image: PIL.Image.Image | np.ndarray) -> bytes:
    """
    Return a hash (16 bytes) of the size and pixels of an upright RGB image, or of an array (H, W, C). The file's format and name do not
    matter.
    """
    size = image.size if isinstance(image, PIL.Image.Image) else image.shape
    digest = hashlib.blake2b(repr(size).encode(), digest_size=HASH_BYTES)
    digest.update(image.tobytes())
    return digest.digest()


def write_hashes(hashes: set[bytes], path: Path) -> None:
    """Write hashes in hexadecimal, one per line, sorted."""
    write_text(path, "".join(f"{one.hex()}\n" for one in sorted(hashes)))


def trained_hashes(name_or_path: str | os.PathLike | None) -> set[bytes] | None:
    """
    Read the hashes of the images that a local model was trained on. The model is a run's folder, its `best/`, or the pipeline of one of
    its checkpoints. Returns `None` if its run recorded no hashes. Raises `ValueError` if the file is damaged.
    """
    if name_or_path is None or not os.path.isdir(name_or_path):
        return None
    folder = Path(name_or_path).resolve()
    for path in (place / HASHES_FILE for place in (folder, *folder.parents[:2])):
        if path.is_file():
            try:
                return {bytes.fromhex(line) for line in path.read_text(encoding="utf-8").split()}
            except ValueError as error:  # damaged text too
                what_to_do = "Restore it, or remove it to continue without the record of training images."
                raise ValueError(f"{str(path)!r} is damaged ({error}). {what_to_do}") from error
    return None
