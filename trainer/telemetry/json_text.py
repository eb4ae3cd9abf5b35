"""JSON text that every parser accepts: numbers that are not finite become null."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.plain_text import storable


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialize nested mappings, sequences and scalars as valid JSON. See `json_value` for what is converted."""
    return json.dumps(json_value(value), allow_nan=False, indent=indent)


def json_value(value: Any) -> Any:
    """Return `value` with JSON types: string keys, lists, and paths as strings.

    Numbers that are not finite become None, because JSON has no NaN and no infinity. Passwords in addresses are
    removed, and lone surrogates become escape sequences.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {storable(str(key)): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return storable(str(value)) if isinstance(value, str | Path) else value
