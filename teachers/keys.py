"""Bearer keys, read from a file or from the environment, never from the command line.

A server accepts several keys at once, so that keys can be rotated: add the new key in front, switch the clients,
remove the old key. A client with several keys sends the first one.
"""

import hmac
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from teachers.protocol.errors import TeacherError

log = logging.getLogger("tutelage.keys")
RELOAD_S = 1.0  # least time between two checks of a key file


def keys_from_file(path: Path) -> tuple[str, ...]:
    """Read one key per line. Raises TeacherError if the file is unreadable, empty or contains an invalid key."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"cannot read the key file {path}: {error}") from error
    keys = _valid_keys([line.strip() for line in lines], f"the key file {path}")
    if not keys:
        raise TeacherError(f"the key file {path} is empty: write the teacher's bearer key into it")
    return keys


def keys_from_environment(variable: str) -> tuple[str, ...]:
    """Read keys separated by white space. Raises TeacherError if the variable is unset, empty or invalid."""
    keys = _valid_keys(os.environ.get(variable, "").split(), f"the environment variable {variable}")
    if not keys:
        raise TeacherError(f"the environment variable {variable} is not set: put the teacher's bearer key into it")
    return keys


def key_from_file(path: Path) -> str:
    """Return the key to send: the first one of the file."""
    return keys_from_file(path)[0]


def key_from_environment(variable: str) -> str:
    """Return the key to send: the first one of the variable."""
    return keys_from_environment(variable)[0]


def _valid_keys(words: Sequence[str], source: str) -> tuple[str, ...]:
    keys = tuple(word for word in words if word)
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise TeacherError(
                f"{source} contains an invalid bearer key: expected printable ASCII without spaces, one key per line"
            )
    return keys


class Keys:
    """The keys that a server accepts. Changes of a key file take effect without a restart."""

    def __init__(self, keys: Sequence[str], path: Path | None = None) -> None:
        self._keys = [key.encode() for key in keys]
        self._path = path
        self._version = _file_version(path)
        self._checked_at = time.monotonic()

    @classmethod
    def from_file(cls, path: Path) -> "Keys":
        """Read a key file. Raises TeacherError if it is invalid; if it becomes invalid later, the old keys remain."""
        return cls(keys_from_file(path), path)

    def __len__(self) -> int:
        return len(self._keys)

    def accepts(self, key: bytes) -> bool:
        """Return whether `key` is one of the keys. The time taken does not depend on the content of `key`."""
        self._reload()
        accepted = False
        for known in self._keys:
            accepted |= hmac.compare_digest(key, known)
        return accepted

    def _reload(self) -> None:
        if self._path is None or time.monotonic() - self._checked_at < RELOAD_S:
            return
        self._checked_at = time.monotonic()
        version = _file_version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            keys = keys_from_file(self._path)
        except TeacherError as error:
            log.error("%s; the previous keys remain valid", error)
        else:
            self._keys = [key.encode() for key in keys]
            log.warning("the key file %s has changed: number of valid keys: %d", self._path, len(keys))


def _file_version(path: Path | None) -> tuple[int, int, int] | None:
    """Return modification time, inode and size: at least one changes when a file is written or replaced."""
    try:
        stat = path.expanduser().stat() if path else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ino, stat.st_size) if stat else None
