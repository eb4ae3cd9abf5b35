"""A disk cache of arrays that are expensive to compute. The name of a file is a digest of everything they depend on.

A file is written under a temporary name and renamed, so several processes may write the same file at once. It begins
with the SHA-256 digest of its content; a truncated or changed file counts as absent. A file that cannot be written is
reported and not cached.
"""

import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_key(*parts: object) -> str:
    """Return the digest of the parts as a file name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]] | None:
    """Load the arrays of a file; None if it is absent or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s): its arrays are computed again", path, error)
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        _log.warning("%s is damaged: its arrays are computed again", path)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write a file atomically. Log a warning if it cannot be written."""
    content, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(content, **named)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".partial-", delete=False) as partial:
            try:
                partial.write(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
                partial.close()
                os.replace(partial.name, path)
            except BaseException:
                Path(partial.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        _log.warning("%s cannot be written (%s): its arrays are not cached", path, error)
