"""Manifest of a folder: size and SHA-256 digest of every file, verified before the files are used.

The manifest is written after all other files. It contains a digest of its own list, and only its canonical text is
accepted, so that damage of the manifest is detected too. It detects damage, not tampering: a person with write access
can replace files and manifest.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
MAX_BYTES = 16 << 20  # of a manifest or the state of a run
CHUNK_BYTES = 1 << 20


class DamagedError(Exception):
    """Raised if a folder differs from its manifest. The message is the reason, without the name of the folder."""


class FileDigest(NamedTuple):
    """Size in bytes and SHA-256 digest of one file."""

    size: int
    sha256: str


def digest_file(path: Path) -> FileDigest:
    """Read a regular file and return its digest. Raises DamagedError for links and other kinds of files."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(size, digest.hexdigest())


def open_regular(path: Path) -> Any:
    """Open a file for reading as bytes. Raises DamagedError if it is not a regular file; links are not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a small file, at most MAX_BYTES of it. Raises DamagedError if it cannot be read."""
    with open_regular(path) as file:
        try:
            data: bytes = file.read(MAX_BYTES)
        except OSError as error:  # a damaged disk
            raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error
    return data


def write_manifest(folder: Path, digests: Mapping[str, FileDigest]) -> None:
    """Write the manifest of files whose digests are known."""
    write_synced(folder / MANIFEST, _encode(digests))


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a text file under another name and rename it. A link is replaced, not followed. Raises OSError."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """Return the digests by name of file. Raises DamagedError if the manifest is missing, damaged or malformed."""
    data = read_regular(folder / MANIFEST)
    try:
        files = json.loads(data)["files"]
        digests = {str(name): FileDigest(int(size), str(sha256)) for name, (size, sha256) in files.items()}
        is_exact = _encode(digests) == data
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error
    if not is_exact or any(Path(name).name != name for name in digests):
        raise DamagedError(f"{MANIFEST} is damaged")
    return digests


def check_files(folder: Path, digests: Mapping[str, FileDigest], names: Iterable[str]) -> None:
    """Raise DamagedError for the first of the named files that is missing, cannot be read or has another digest."""
    for name in names:
        try:
            found = digest_file(folder / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if found != digests[name]:
            expected = digests[name]
            size = f"{found.size} bytes instead of {expected.size}" if found.size != expected.size else "wrong digest"
            raise DamagedError(f"{name} is damaged ({size})")


def check_folder(folder: Path) -> dict[str, FileDigest]:
    """Check every file of a folder and return the digests. Raises DamagedError."""
    digests = read_manifest(folder)
    check_files(folder, digests, digests)
    return digests


def _encode(digests: Mapping[str, FileDigest]) -> bytes:
    files = {name: list(digests[name]) for name in sorted(digests)}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=1) + "\n").encode()
