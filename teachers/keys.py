"""Bearer keys, read from where they are kept: a file or the environment, never the command line.

A server may take several at once, so that keys can be rotated: put the new one in front, move the clients, take the
old one out. A client that is given several sends the first.
"""

import hmac
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from teachers.errors import TeacherError

log = logging.getLogger("tutelage.keys")
LOOK_S = 1.0  # between two looks at a key file


def keys_from_file(path: Path) -> tuple[str, ...]:
    """One key a line. Raises TeacherError if the file cannot be read, holds nothing or something else."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"cannot read the key file {path}: {error}") from error
    keys = _usable([line.strip() for line in lines], f"the key file {path}")
    if not keys:
        raise TeacherError(f"the key file {path} is empty: write the teacher's bearer key into it")
    return keys


def keys_from_environment(variable: str) -> tuple[str, ...]:
    """Keys between white space. Raises TeacherError if the variable is not set or empty."""
    keys = _usable(os.environ.get(variable, "").split(), f"the environment variable {variable}")
    if not keys:
        raise TeacherError(f"the environment variable {variable} is not set: put the teacher's bearer key into it")
    return keys


def key_from_file(path: Path) -> str:
    """The key to send: the file's first."""
    return keys_from_file(path)[0]


def key_from_environment(variable: str) -> str:
    """The key to send: the variable's first."""
    return keys_from_environment(variable)[0]


def _usable(words: Sequence[str], source: str) -> tuple[str, ...]:
    keys = tuple(word for word in words if word)
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise TeacherError(f"{source} holds no bearer key: expected printable ASCII without spaces, one key a line")
    return keys


class Keys:
    """The keys that a server takes; those of a file follow the file, without a restart."""

    def __init__(self, keys: Sequence[str], path: Path | None = None) -> None:
        self._keys = [key.encode() for key in keys]
        self._path = path
        self._mark = _mark(path)
        self._looked_at = time.monotonic()

    @classmethod
    def of_file(cls, path: Path) -> "Keys":
        """Raises TeacherError if there is none now; a file that breaks later leaves the old keys in force."""
        return cls(keys_from_file(path), path)

    def __len__(self) -> int:
        return len(self._keys)

    def accepts(self, given: bytes) -> bool:
        """Whether it is one of the keys. Takes as long whichever it is, or is not."""
        self._look()
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(given, key)
        return found

    def _look(self) -> None:
        if self._path is None or time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        mark = _mark(self._path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            keys = keys_from_file(self._path)
        except TeacherError as error:
            log.error("%s; the keys read before stay in force", error)
        else:
            self._keys = [key.encode() for key in keys]
            log.warning("the key file %s has changed: keys in force now: %d", self._path, len(keys))


def _mark(path: Path | None) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced."""
    try:
        stat = path.expanduser().stat() if path else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ino, stat.st_size) if stat else None
