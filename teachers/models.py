"""Where models are, and what they are called: a directory, or a name in this project's cache."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$TUTELAGE_CACHE, by default ~/.cache/tutelage."""
    return Path(os.environ.get("TUTELAGE_CACHE") or "~/.cache/tutelage").expanduser()


def model_folder(name: str) -> Path:
    """The directory of that path, or of that name under the cache; the path itself if there is neither."""
    path, cached = Path(name).expanduser(), cache_dir() / "models" / name
    return cached if cached.is_dir() and not path.is_dir() else path


def name_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision. In a hub's cache they are in the path: models--OWNER--NAME/snapshots/REVISION."""
    if in_hub_cache(folder, "snapshots"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def in_hub_cache(path: Path, kind: str) -> bool:
    """Whether a hub's cache holds it in its folder `kind`, snapshots or blobs."""
    return path.parent.name == kind and path.parent.parent.name.startswith("models--")
