"""Where things lie: models, tokenizers and texts by path or by name, and what is kept between runs."""

from glob import glob, has_magic
from pathlib import Path

from teachers.models import cache_dir as cache_dir
from trainer.errors import ConfigError


def tables_dir() -> Path:
    """Where alignment keeps what it makes once per pair of tokenizers."""
    return cache_dir() / "alignment"


def find_model(name: str) -> Path:
    """A model directory by path, or by name under the cache. Raises ConfigError if there is neither."""
    return _find(name, "models", "a model directory", "config.json")


def find_tokenizer(name: str) -> Path:
    """A folder with a tokenizer by path, or a model by name under the cache. Raises ConfigError if there is neither."""
    return _find(name, "models", "a folder with a tokenizer", "tokenizer.json")


def windows_dir() -> Path:
    """Where the windows of sources are kept as numbers, so that a text is cut only once."""
    return cache_dir() / "windows"


def find_data(name: str) -> list[Path]:
    """A file by path, or by name under the cache; or those that a pattern (`*`, `?`, `[a-z]`, `**`) matches, sorted.

    Raises ConfigError if there is none.
    """
    if not has_magic(name) or Path(name).expanduser().exists():
        return [_find(name, "data", "a file", "")]
    paths = sorted(path for path in map(Path, glob(str(Path(name).expanduser()), recursive=True)) if path.is_file())
    if not paths:
        raise ConfigError(f"{name} matches no file")
    return paths


def _find(name: str, kind: str, what: str, must_hold: str) -> Path:
    candidates = [Path(name).expanduser(), cache_dir() / kind / name]
    for path in candidates:
        if path.exists() and (path / must_hold).exists():
            return path
    hint = "; `tutelage demo --prepare` makes what the demo needs" if "/" not in name else ""
    raise ConfigError(f"{name} is neither {what} nor a name in {cache_dir() / kind}{hint}")
