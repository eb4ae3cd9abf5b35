"""Arrays that are expensive to make, kept in a folder under a key of everything they depend on.

A file is written beside its place and moved there in one step, so several processes may make the same one at once; it
begins with the digest of what follows, so one that was cut or changed counts as absent. What cannot be written is not
kept.
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


def key_of(*parts: object) -> str:
    """A file name that is another one whenever one of the parts is."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]] | None:
    """The arrays of a file; None where it is absent or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s) and is made again", path, error)
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        _log.warning("%s is damaged and is made again", path)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Put a file in place in one step; where that cannot be done, say so and go on."""
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
        _log.warning("%s is not kept (%s)", path, error)
