"""Which pictures a folder holds: the one answer for every script, with what was left out, and hashes that tell pictures apart.

Links are followed, but no file counts twice. What training runs, evaluations and restorations write is no data: the run that
lies in a data folder would otherwise be trained on, and measured against, its own sample sheets.
"""

import hashlib
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
from huggingface_hub import DatasetCard

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.training.run.folder import ARGUMENTS_FILE, CHECKPOINT, HASHES_FILE, RUN_FILES, RUN_FOLDERS
from ecvae_diffusers.training.run.places import check_picture_folder


# Formats that Pillow only recognises: reading them needs a program of the user's. MPEG is video.
STUB_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
MODEL_FILE = "model_index.json"
# What scripts write into any folder, by the file that is always among it. `datasets` takes JSON for data too.
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
    The files of a folder and its sub-folders, each once.

    Args:
        folder (`Path`): The folder.

    Attributes:
        files (`list[Path]`): In the order of their names.
        num_hidden (`int`): Files and folders whose names begin with a dot, and `__MACOSX`.
        num_links (`int`): Links to a file that is there already, or to a folder that is, or that holds the link.
        written (`list[Path]`): Folders and files that runs, evaluations and restorations wrote.

    Raises:
        ValueError: if a folder can't be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.num_hidden, self.num_links, self.written = folder, 0, 0, []
        found: dict[str, Path] = {}
        seen: set[str] = set()
        root = os.path.realpath(folder)
        # Links after what is really there, so that a file is known by its own name.
        waiting, links, linked_files = [(folder, root)], [], []
        while waiting or links:
            current, real = waiting.pop() if waiting else links.pop(0)
            if real in seen:
                self.num_links += 1
                continue
            seen.add(real)
            if real != root and is_written(Path(real)):
                self.written.append(current)
                continue
            for entry in self.entries(current):
                path, is_link = Path(current, entry.name), entry.is_symlink()
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    self.num_hidden += 1
                elif not (os.path.isdir(path) if is_link else entry.is_dir()):
                    # A broken link is a file that can't be read, and is told as such; a socket or a pipe is none.
                    if is_link:
                        linked_files.append(path)
                    elif entry.is_file():
                        found[os.path.join(real, entry.name)] = path
                elif not is_link:
                    waiting.append((path, os.path.join(real, entry.name)))
                elif is_inside(real, target := os.path.realpath(path)):
                    self.num_links += 1
                else:
                    links.append((path, target))
            links.sort()
        for path in sorted(linked_files):
            real = os.path.realpath(path)
            self.num_links += real in found
            found.setdefault(real, path)
        self.files, self.written = sorted(found.values()), sorted(self.written)

    def entries(self, folder: Path) -> list[os.DirEntry]:
        """What a folder holds, without the files that scripts wrote into it."""
        try:
            with os.scandir(folder) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{str(folder)!r} can't be read: {error.strerror}.") from error
        names = {entry.name for entry in entries}
        for marker in WRITTEN.keys() & names:
            own = {name for name in names if WRITTEN[marker].fullmatch(name)}
            self.written += [Path(folder, name) for name in own]
            names -= own
        return [entry for entry in entries if entry.name in names]

    def left_out(self) -> list[str]:
        """What is not among the files, and why, in words."""
        parts = []
        if self.written:
            named = ", ".join(repr(os.path.relpath(path, self.folder)) for path in self.written[:MAX_NAMED])
            more = ", ..." if len(self.written) > MAX_NAMED else ""
            parts.append(f"what runs, evaluations and restorations wrote ({named}{more})")
        if self.num_links:
            parts.append(f"{self.num_links} link(s) to what is there already")
        if self.num_hidden:
            parts.append(f"{self.num_hidden} hidden file(s) or folder(s)")
        return parts


def is_written(folder: Path) -> bool:
    """Whether a folder (its real path) is a training run, a saved pipeline, or a part of a run such as its sample sheets."""
    if (folder / ARGUMENTS_FILE).is_file() or (folder / MODEL_FILE).is_file():
        return True
    is_part = folder.name in RUN_FOLDERS or CHECKPOINT.fullmatch(folder.name)
    return bool(is_part) and (folder.parent / ARGUMENTS_FILE).is_file()


def is_inside(folder: str, other: str) -> bool:
    """Whether a folder lies in another one, or is it. Both are real paths."""
    return folder == other or folder.startswith(os.path.join(other, ""))


def readable_extensions() -> set[str]:
    """The file name extensions, in lower case, that Pillow opens."""
    PIL.Image.init()
    return {
        extension
        for extension, name in PIL.Image.EXTENSION.items()
        if name in PIL.Image.OPEN and name not in STUB_FORMATS
    }


class PictureFiles(list):
    """Paths of pictures, with `left_out`: what the folder holds besides, in words."""

    left_out: list[str]


def find_images(folder: str | os.PathLike, argument: str | None = None) -> PictureFiles:
    """
    The pictures of a folder and its sub-folders: what Pillow opens, by the extension of the name.

    Args:
        folder (`str`): The folder.
        argument (`str`, *optional*): Its name on the command line, for errors.

    Raises:
        ValueError: if it is no folder, or can't be read.
    """
    check_picture_folder(argument or "folder", folder)
    readable, found = readable_extensions(), FolderFiles(Path(folder))
    files = PictureFiles(path for path in found.files if path.suffix.lower() in readable)
    others = (path for path in found.files if path.suffix.lower() not in readable)
    files.left_out = unreadable(others) + found.left_out()
    return files


class Pictures:
    """
    Undecoded pictures of a folder or of a data set, as rows `{"image": {"path": ..., "bytes": ...}}`.

    Args:
        source (`PictureFiles` or `datasets.Dataset`): Files, or a data set with the one column `image`, undecoded.
        left_out (`list[str]`, *optional*): What the source holds besides, in words.
    """

    def __init__(self, source, left_out: list[str] | None = None):
        self.source, self.left_out = source, left_out or []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict:
        row = self.source[i]
        return {"image": {"path": str(row), "bytes": None}} if isinstance(row, Path) else row

    def select(self, indices: list[int]) -> "Pictures":
        """Those of the given indices, in their order."""
        chosen = [self.source[i] for i in indices] if isinstance(self.source, list) else self.source.select(indices)
        return Pictures(chosen, self.left_out)


def unreadable(files: Iterator[Path]) -> list[str]:
    """In words, how many files of which kinds Pillow does not open."""
    counts = Counter(path.suffix.lower() or "without an extension" for path in files)
    if not counts:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common(MAX_NAMED))
    more = ", ..." if len(counts) > MAX_NAMED else ""
    return [f"{counts.total()} file(s) of kinds that Pillow does not read ({kinds}{more})"]


def is_text(name: str) -> bool:
    """Tell whether a file's name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def local_data_files(name_or_path: str):
    """
    What a local data set holds that is data, since `datasets` itself would take the pictures and logs of a run in its folder for
    some of it.

    Returns:
        `tuple`: What `datasets.load_dataset` takes as `data_files`, `None` for what it finds by itself; and what is left out, in
        words.
    """
    if not os.path.isdir(name_or_path):
        return None, []
    found = FolderFiles(Path(os.path.realpath(name_or_path)))
    for path in found.files:
        if not is_text(str(path)):
            raise ValueError(f"{str(path)!r} has a name that is no UTF-8, which `datasets` can't read: rename it.")
    readable = readable_extensions()
    is_picture = lambda path: str(mimetypes.guess_type(path.name)[0]).startswith("image/")  # noqa: E731
    pictures = unreadable(path for path in found.files if is_picture(path) and path.suffix.lower() not in readable)
    if not found.written and not found.num_links:
        return None, pictures
    return split_files(found, os.path.realpath(name_or_path)), pictures + found.left_out()


def split_files(found: FolderFiles, folder: str):
    """The files of each split, by the rules of `datasets`. `None` where the data set's own card says which they are."""
    from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, DataFilesList, _get_data_files_patterns
    from fsspec.utils import glob_translate

    card = Path(folder, "README.md")
    if card.is_file() and DatasetCard.load(card).data.get("configs"):
        return None
    files = {path.relative_to(folder).as_posix(): path for path in found.files if path.name not in FILES_TO_IGNORE}
    # In the order of `datasets`, so that a run that is resumed sees its images in the order in which it began.
    names = sorted(name for name in files if not any(part.startswith("__") for part in name.split("/")[:-1]))

    def matching(pattern: str) -> list[str]:
        return [name for name in names if re.match(glob_translate(pattern), name)]

    splits = {}
    for split, patterns in _get_data_files_patterns(matching).items():
        chosen = [str(files[name]) for pattern in patterns for name in matching(pattern)]
        splits[str(split)] = DataFilesList(chosen, [(str(os.path.getmtime(file)),) for file in chosen])
    return DataFilesDict(splits)


def content_hash(image: PIL.Image.Image) -> bytes:
    """
    16 bytes that tell pictures apart by what they show: equal for equal pixels, whatever the file's format and name.

    Args:
        image (`PIL.Image.Image`): An upright RGB image.
    """
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=HASH_BYTES)
    digest.update(image.tobytes())
    return digest.digest()


def write_hashes(hashes: set[bytes], path: Path) -> None:
    """Write hashes as lines of hexadecimal digits, sorted."""
    write_text(path, "".join(f"{one.hex()}\n" for one in sorted(hashes)))


def trained_hashes(name_or_path: str | os.PathLike | None) -> set[bytes] | None:
    """
    Hashes of the images that a local model was trained on, as its run has written them down. `None` where there is no such file.

    Args:
        name_or_path (`str`): A run's folder, its `best/`, or the pipeline of one of its checkpoints.

    Raises:
        ValueError: if the file is damaged.
    """
    if name_or_path is None or not os.path.isdir(name_or_path):
        return None
    folder = Path(name_or_path).resolve()
    for place in (folder, *folder.parents[:2]):
        if (place / HASHES_FILE).is_file():
            try:
                return {bytes.fromhex(line) for line in (place / HASHES_FILE).read_text(encoding="utf-8").split()}
            except ValueError as error:  # damaged text, too
                raise ValueError(
                    f"{str(place / HASHES_FILE)!r} is damaged ({error}): take it out, and what was trained on is not known."
                ) from error
    return None
