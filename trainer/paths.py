"""Paths of models, tokenizers and data files, and of the caches that persist between runs."""

import re
from collections.abc import Callable
from pathlib import Path

from kernel_cache.folder import cache_dir as cache_dir
from trainer.errors import ConfigError

MAX_NAMES = 5  # of the files of a directory that an error lists
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # OWNER/NAME


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
    hint = _hint(name, cache_folder)
    raise ConfigError(f"{name} is neither {description} nor a name in {cache_dir() / cache_folder}{hint}")


def _names(folder: Path) -> str:
    """Return the names of the first files of a directory."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"cannot list {folder}: {error.strerror}") from error
    return ", ".join([*names[:MAX_NAMES], *(["…"] if len(names) > MAX_NAMES else [])]) or "no file"


def _hint(name: str, cache_folder: str) -> str:
    """Return advice for a name that is not found: a file of a model, a model of the hub, or a name without a path."""
    if cache_folder == "models" and exists(path := _expanded(name)):
        return ": it is a file; write its directory" if path.is_file() else f": it contains {_names(path)}"
    if cache_folder == "models" and _HUB_NAME.fullmatch(name):
        return f"; download a model of the Hugging Face hub and write its directory, which `hf download {name}` prints"
    return "" if "/" in name else "; `tutelage demo --prepare` creates the models and data of the demo"
