"""Paths of models, tokenizers and data files, and of the caches that persist between runs."""

from collections.abc import Callable
from pathlib import Path

from kernel_cache.folder import cache_dir as cache_dir
from trainer.errors import ConfigError


def tables_dir() -> Path:
    """Return the cache folder of the tables that alignment computes once per pair of tokenizers."""
    return cache_dir() / "alignment"


def windows_dir() -> Path:
    """Return the cache folder of the window indexes, one per source, tokenizer and window length."""
    return cache_dir() / "windows"


def converted_dir() -> Path:
    """Return the cache folder of data files that were decompressed or converted to JSON lines."""
    return cache_dir() / "converted"


def resolve_model_dir(name: str) -> Path:
    """Return a model directory, given as a path or as a name under the cache. Raises ConfigError if it is missing."""
    return _resolve(name, "models", "a model directory", _is_model)


def resolve_tokenizer_dir(name: str) -> Path:
    """Return a folder with a tokenizer, given as a path or as a model's name under the cache.

    Raises ConfigError if it is missing.
    """
    from alignment.tokenizers.folder import has_tokenizer  # loads numba

    return _resolve(name, "models", "a folder with a tokenizer", has_tokenizer)


def resolve_data_file(name: str) -> Path:
    """Return a file, given as a path or as a name under the cache. Raises ConfigError if it is missing."""
    return _resolve(name, "data", "a file", exists)


def exists(path: Path) -> bool:
    """Return whether a path exists. Raises ConfigError if it cannot be examined, for example without permission."""
    try:
        return path.exists()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _is_model(folder: Path) -> bool:
    """Return whether a directory contains a model, including kinds that teachers.model_checks refuses with a reason."""
    return any(exists(folder / name) for name in ("config.json", "adapter_config.json")) or any(folder.glob("*.gguf"))


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}: this user has no home folder; write the whole path") from error


def _resolve(name: str, cache_folder: str, description: str, accepts: Callable[[Path], bool]) -> Path:
    for path in (_expanded(name), cache_dir() / cache_folder / name):
        if exists(path) and accepts(path):
            return path
    hint = "" if "/" in name else "; `tutelage demo --prepare` creates the models and data of the demo"
    raise ConfigError(f"{name} is neither {description} nor a name in {cache_dir() / cache_folder}{hint}")
