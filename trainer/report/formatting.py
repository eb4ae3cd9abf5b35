"""Format numbers and settings for tables and pages."""

import math
from collections.abc import Collection, Mapping
from typing import Any

PERFORMANCE_KEYS = (
    "chunk_tokens",
    "prefetch_tokens",
    "prefetch_bytes",
    "target_cache_bytes",
    "text_column",
    "device",
)
"""Settings that change the speed of a run but not its result. Reports leave them out."""


def format_number(value: float | None) -> str:
    """Format a number with four significant digits, thousands with separators; – for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def format_compact(value: float) -> str:
    """Format a number with at most three digits and the suffix k, M, G or T."""
    for power, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{suffix}"
    return f"{value:.3g}"


def format_section(values: Mapping[str, Any], omitted: Collection[str] = PERFORMANCE_KEYS) -> str:
    """Format a section of a run file in one line, without empty values and the omitted keys."""
    return " · ".join(_settings(values, omitted))


def format_setting(value: Any) -> str:
    """Format one value of a run file without brackets; – for an empty value."""
    return "–" if value is None or value == [] else _text(value)


def _settings(values: Mapping[str, Any], omitted: Collection[str]) -> list[str]:
    shown = {key: value for key, value in values.items() if key not in omitted and value not in (None, {}, [], "")}
    return [f"{key} {_text(value)}" for key, value in shown.items()]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        separator = "; " if any(isinstance(item, Mapping) for item in value) else ", "
        return separator.join(map(_text, value))
    if isinstance(value, Mapping):
        return " ".join(_settings(value, PERFORMANCE_KEYS))
    return str(value).lower() if isinstance(value, bool) else str(value)
