"""Validation of the lines of a metrics file, which can be damaged or come from another person.

All readers use `parse_event`. Fields that readers use must have the types of trainer/telemetry/events.py. Other fields
may be absent or unknown, but must be plain JSON with finite numbers.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.plain_text import excerpt
from trainer.telemetry.events import EVENTS

MAX_LINE_BYTES = 1 << 26
MAX_DEPTH = 32
MAX_NUMBER = 1e100  # sums and differences of such numbers are finite
MAX_DIGITS = 20  # of an integer: 64 bits and a sign
BOUNDS = {"step": (int, 2**53), "time": (int | float, 253_402_300_799)}  # the last second of the year 9999


class _Fields(BaseModel):
    """Base class of a start event and of its records. Additional fields are allowed."""

    model_config = ConfigDict(extra="allow")


class _Teacher(_Fields):
    name: str
    top_k: int | None = None
    weight: float | None = None
    final_weight: float | None = None


class _RunFile(_Fields):
    __pydantic_extra__: dict[str, dict[str, Any] | None] = Field(init=False)

    teachers: list[_Teacher] = []


class _Model(_Fields):
    model: str
    revision: str | None = None


class _Source(_Fields):
    name: str
    documents: int
    windows: int
    tokens: int | None
    num_bytes: int
    epoch_samples: int


class _Start(_Fields):
    run: _RunFile = _RunFile()
    steps: int | None = None
    samples: int | None = None
    held_out: int | None = None
    base: _Model = _Model(model="unknown")
    identity: dict[str, Any] = {}
    sources: list[_Source] = []
    changed: dict[str, tuple[Any, Any]] = {}
    changed_results: list[str] = []
    teachers: dict[str, dict[str, str | int | None]] = {}
    software: dict[str, str] = {}
    remarks: list[str] = []
    precision: str = ""


def parse_event(line: bytes) -> dict[str, Any]:
    """Parse one line. Raises ValueError, whose message continues "FILE, line N"."""
    if len(line) >= MAX_LINE_BYTES:
        raise ValueError(f" is longer than {MAX_LINE_BYTES >> 20} MiB: expected one event")
    try:
        record = json.loads(line, parse_float=_number, parse_int=_integer, parse_constant=_number)
        if line.count(b"{") + line.count(b"[") > MAX_DEPTH:
            _check_depth(record, MAX_DEPTH)
        if b"\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f" is not JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        shown = excerpt(record) if isinstance(record, dict) else repr(record)[:200]
        raise ValueError(f": expected an object with an event, received {shown}")
    _check_fields(record)
    return record


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= MAX_NUMBER:
        raise ValueError(f"the number {text[:40]} is not finite or too large")
    return value if abs(value) > 1 / MAX_NUMBER else 0.0


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits is too large")
    return int(text)


def _check_depth(value: Any, num_levels: int) -> None:
    if isinstance(value, dict | list):
        if not num_levels:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, num_levels - 1)


def _check_fields(record: Mapping[str, Any]) -> None:
    kind = record["event"]
    for key, (types, most) in BOUNDS.items():
        value = record.get(key, 0)
        if not isinstance(value, types) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f": {key} is {excerpt(value)}, expected a number from 0 to {most:,}")
    for key, expected in _field_types().get(kind, {}).items():
        value = record.get(key)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ValueError(f": {key} in the event {kind} is {excerpt(value)}, expected {_names(expected)}")
    if kind in _field_types() and "step" in _field_types()[kind] and "step" not in record:
        raise ValueError(f": a {kind} event without step")
    if kind == "start":
        try:
            _Start.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f": {where} is {excerpt(first['input'])}, {first['msg'].lower()}") from error


@cache
def _field_types() -> dict[str, dict[str, tuple[type, ...]]]:
    """Return the expected types of the numeric, text and table fields, by kind of event."""
    json_types: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
    kinds: dict[str, dict[str, tuple[type, ...]]] = {}
    for event in EVENTS:
        types = kinds.setdefault(event.kind, {})
        for name, field in event.model_fields.items():
            plain = next((a for a in (field.annotation, *get_args(field.annotation)) if a in json_types), None)
            container = getattr(field.annotation, "__origin__", None)
            if container is dict:
                types[name] = (dict,)
            elif container is not list and plain is not None:
                types[name] = json_types[plain]
    return kinds


def _names(types: tuple[type, ...]) -> str:
    return {int: "an integer", float: "a number", str: "a string", dict: "a table"}[types[-1]]
