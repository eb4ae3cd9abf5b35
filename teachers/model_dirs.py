"""Model directories: where they are, their names and the hashes of their files. Needs no torch and no transformers."""

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def cache_dir() -> Path:
    """Return $TUTELAGE_CACHE or ~/.cache/tutelage. Without a home directory, return a directory for temporary files."""
    folder = os.path.expanduser(os.environ.get("TUTELAGE_CACHE") or "~/.cache/tutelage")
    if folder.startswith("~"):  # a container runs as a user that it does not know
        return Path(tempfile.gettempdir()) / f"tutelage-{os.getuid()}"
    return Path(folder)


def model_dir(name: str) -> Path:
    """Return the directory of a path or of a name under the cache. The path itself is returned if neither exists."""
    path, cached = Path(name).expanduser(), cache_dir() / "models" / name
    return cached if cached.is_dir() and not path.is_dir() else path


def name_of(folder: Path) -> tuple[str, str | None]:
    """Return name and revision of a model. A hub cache has them in its path: models--OWNER--NAME/snapshots/REVISION."""
    if in_hub_cache(folder, "snapshots"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def in_hub_cache(path: Path, kind: str) -> bool:
    """Return whether `path` is in the directory `kind` ("snapshots" or "blobs") of a Hugging Face hub cache."""
    return path.parent.name == kind and path.parent.parent.name.startswith("models--")


def file_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a model directory, or None if it is missing, not regular, or a link out of it.

    A link may point to another file of the directory or, in a snapshot of a hub cache, to the blobs of the same model.
    """
    path, own = folder / name, folder.resolve()
    if not path.is_file():
        return None
    target = path.resolve()
    blobs = own.parents[1] / "blobs" if in_hub_cache(own, "snapshots") else own
    return path if target.is_relative_to(own) or target.parent == blobs else None


def weights_sha256(folder: Path, config_folder: Path | None = None) -> str:
    """Hash the weights of a model: config.json, *.safetensors and *.bin, by name and content.

    `config_folder` is the directory of config.json if it is not in `folder`. Large files of a hub cache are not read
    again: see file_sha256.
    """
    config = (config_folder or folder) / "config.json"
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), config], key=lambda path: path.name)
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL, and weights can be many gigabytes
        for path, sha256 in zip(paths, pool.map(file_sha256, paths), strict=True):
            digest.update(f"{path.name} {sha256}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash the content of a file. A large file of a hub cache is named by its sha256, which is returned as it is."""
    blob = path.resolve()
    if in_hub_cache(blob, "blobs") and len(blob.name) == 64:
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
