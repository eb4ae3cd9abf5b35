"""Bearer keys, read from where they are kept: a file or the environment, never the command line."""

import os
from pathlib import Path

from teachers.errors import TeacherError


def key_from_file(path: Path) -> str:
    """Raises TeacherError if the file cannot be read or holds nothing."""
    try:
        key = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"cannot read the key file {path}: {error}") from error
    if not key:
        raise TeacherError(f"the key file {path} is empty: write the teacher's bearer key into it")
    return _usable(key, f"the key file {path}")


def key_from_environment(variable: str) -> str:
    """Raises TeacherError if the variable is not set or empty."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise TeacherError(f"the environment variable {variable} is not set: put the teacher's bearer key into it")
    return _usable(key, f"the environment variable {variable}")


def _usable(key: str, source: str) -> str:
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise TeacherError(f"{source} holds no bearer key: expected one line of printable ASCII without spaces")
    return key
