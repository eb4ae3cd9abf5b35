"""Find model directories, and return their names and the hashes of their files. Imports no torch or transformers."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernel_cache.folder import cache_dir
from kernel_cache.hub_cache import in_hub_cache


def model_dir(name: str) -> Path:
    """Return the directory of a path or of a name under the cache. The path itself is returned if neither exists."""
    path, cached = Path(name).expanduser(), cache_dir() / "models" / name
    return cached if cached.is_dir() and not path.is_dir() else path


def name_of(folder: Path) -> tuple[str, str | None]:
    """Return name and revision of a model. A hub cache has them in its path: models--OWNER--NAME/snapshots/REVISION."""
    if in_hub_cache(folder, "snapshots"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


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
