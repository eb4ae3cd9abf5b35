"""Load a run file: parse TOML, apply overrides and validate the result. Every error is one sentence."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config import RunConfig
from trainer.config_section import SECRET
from trainer.errors import ConfigError
from trainer.plain_text import excerpt

RENAMED_KEYS = {
    "teachers.match": "signal (chain is byte_chain, spans is alm, sorted is uld)",
    "teachers.patience_s": "unavailable_timeout_s",
    "teachers.on_loss": "on_unavailable",
    "train.accumulate": "gradient_accumulation_steps",
    "eval.stop_after": "early_stopping_patience",
    "eval.stop_margin": "early_stopping_min_delta",
    "data.max_broken": "max_invalid",
    "data.broken_chats": "invalid_chats",
    "loss.mix": "alpha for skew_kl and skew_reverse_kl, beta for jensen_shannon",
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run file and apply `key=value` overrides. Raises ConfigError naming key, value and choices."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not TOML of a run file: its values are nested too deeply") from error
    except ValueError as error:  # TOML, UTF-8, an integer of thousands of digits, a path with NUL
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error)}") from error


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set expects key=value, received {excerpt(text)}")
    node: Any = raw
    *path, last = key.strip().split(".")
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = _toml_value(value.strip())
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {excerpt(key)[1:-1]}: the run file has no such table or list item") from error


def _toml_value(text: str) -> Any:
    """Parse a TOML value. Text that is not valid TOML is returned as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _sentence(error: ValidationError) -> str:
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a misspelt key causes other errors
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_hint(first['loc'])}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if not key or first["type"] == SECRET:
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message}, received {excerpt(first['input'])}"


def _hint(path: tuple[int | str, ...]) -> str:
    """Return a hint with the present name of a key, or with the known key whose name is closest."""
    generic = ".".join(part for part in path if isinstance(part, str))
    if generic in RENAMED_KEYS:
        return f"its name is now {RENAMED_KEYS[generic]}"
    nearest = difflib.get_close_matches(str(path[-1]), _known_keys(path[:-1]), n=1, cutoff=0.0)
    return f"the nearest known one is {nearest[0]!r}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)
    return list(model.model_fields)
