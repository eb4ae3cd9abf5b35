"""Where models are: a directory, or a name in this project's cache."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$TUTELAGE_CACHE, by default ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or "~/.cache/tutelage").expanduser()


def model_folder(name: str) -> Path:
    """The directory of that path, or of that name under the cache; the path itself if there is neither."""
    path, cached = Path(name).expanduser(), cache_dir() / "models" / name
    return cached if cached.is_dir() and not path.is_dir() else path
