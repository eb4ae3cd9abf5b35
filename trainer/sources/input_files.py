"""Find the input files of all sources: expand patterns, accept regular files only, and remove duplicates.

A file is read once, even if several paths, links or [[data.sources]] lead to it. Sources that read different columns of
one file all read it. The documents of one line or row are then held out together (trainer/sources/corpus.py), so that
no document is in both training and held-out text.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from glob import has_magic
from pathlib import Path

from trainer.errors import ConfigError, DataError
from trainer.paths import cache_dir, exists, resolve_data_file
from trainer.sources.config import CONTENT_KEYS, SourceConfig

Key = tuple[object, ...]
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class SourceInputs:
    """Files or dataset of one source.

    paths     files in order, or the dataset as a path
    keys      identity of each path; two paths of the same file or dataset have equal keys
    repeated  descriptions of files and datasets that are not read again, with both names
    """

    source: SourceConfig
    paths: tuple[Path, ...]
    keys: tuple[Key, ...]
    repeated: tuple[str, ...]


def find_inputs(sources: Sequence[SourceConfig]) -> list[SourceInputs]:
    """Find the files and datasets of all sources. Sources without a remaining file are omitted.

    Raises ConfigError if a name or pattern matches no file, and DataError if a match is not a regular file.
    """
    first_paths: dict[tuple[Key, Key], Path] = {}  # by key and columns
    repeated_so_far: list[str] = []
    found: list[SourceInputs] = []
    for source in sources:
        columns = _columns(source)
        new: dict[Key, Path] = {}
        for key, path in _inputs(source):
            first = first_paths.setdefault((key, columns), path)
            if first is path:
                new[key] = path
            else:
                repeated_so_far.append(f"{path} is {first}, which is read once")
        if new:
            found.append(SourceInputs(source, tuple(new.values()), tuple(new), tuple(repeated_so_far)))
            repeated_so_far = []
    last = found[-1]
    found[-1] = SourceInputs(last.source, last.paths, last.keys, (*last.repeated, *repeated_so_far))
    return found


def _columns(source: SourceConfig) -> Key:
    """Return the settings that determine the content of a source's documents.

    Two sources with equal settings read the same documents from the same file.
    """
    return (repr(source.model_dump(include=CONTENT_KEYS)),)


def _inputs(source: SourceConfig) -> Iterator[tuple[Key, Path]]:
    for name in source.files:
        for path in _expand(name):
            yield _regular_file_key(path), path
    if source.dataset is not None:
        folders = [Path(source.dataset).expanduser(), cache_dir() / "data" / source.dataset]
        folder = next((os.path.realpath(path) for path in folders if exists(path)), source.dataset)
        yield ("dataset", folder, source.config_name, source.split), Path(source.dataset)


def _regular_file_key(path: Path) -> Key:
    """Return device, inode, size and modification time of a regular file. It is not opened: a pipe would block."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise DataError(
                f'{path} is a directory: list its files, for example by the pattern "{path}/*.jsonl"; a folder of '
                "save_to_disk is named by dataset instead of files"
            )
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise DataError(f"{path} is {kind}: expected a regular file; write its content to one")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _expand(name: str) -> list[Path]:
    """Return one file, given as a path or as a name under the cache, or the sorted files that a pattern matches.

    A pattern contains `*`, `?`, `[a-z]` or `**`. A file whose name is exactly `name` takes precedence over the pattern.
    Raises ConfigError if there is no such file.
    """
    pattern = Path(name).expanduser()
    if not has_magic(name) or exists(pattern):
        return [resolve_data_file(name)]
    matches = _matches(Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :])
    paths = sorted(path for path in matches if not path.is_dir())  # a pipe or a broken link is an error, not left out
    if not paths:
        raise ConfigError(f"{name} matches no file")
    return paths


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the paths that match the parts of a pattern. As in glob, `*` and `**` do not match hidden names.

    Unlike in glob, `**` does not follow links to directories, which can form loops.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for each in _folders_below(folder):
            yield from _matches(each, rest or ("*",))
    elif not has_magic(part):
        if os.path.lexists(folder / part):
            yield from _matches(folder / part, rest)
    else:
        matches = re.compile(translate(part)).match
        for entry in _entries(folder):
            is_shown = part.startswith(".") or not entry.name.startswith(".")
            if is_shown and matches(entry.name) and (not rest or entry.is_dir()):
                yield from _matches(folder / entry.name, rest)


def _folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and all folders below it that are neither hidden nor links."""
    pending = [folder]
    while pending:
        folder = pending.pop()
        yield folder
        for entry in _entries(folder):
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                pending.append(folder / entry.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
