"""The folder of all caches: models, tables, tokenizers, windows."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Return $TUTELAGE_CACHE or ~/.cache/tutelage. Without a home directory, return a directory for temporary files."""
    folder = os.path.expanduser(os.environ.get("TUTELAGE_CACHE") or "~/.cache/tutelage")
    if folder.startswith("~"):  # a container runs as a user that it does not know
        return Path(tempfile.gettempdir()) / f"tutelage-{os.getuid()}"
    return Path(folder)
