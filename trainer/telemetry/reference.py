"""Generate docs/metrics.md, the reference of metrics.jsonl, from the typed events.

Run `python -m trainer.telemetry.reference > docs/metrics.md` after a change of trainer/telemetry/events.py.
"""

import sys
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.telemetry.events import EVENTS, Event

INTRODUCTION = """\
# Metrics

<!-- Generated from trainer/telemetry/events.py: python -m trainer.telemetry.reference > docs/metrics.md -->

A run appends one JSON object per line to `metrics.jsonl` in its folder. Every object has the keys `event`, the kind of
the event, and `time`, in Unix seconds; the tables list the other keys. `NAME` stands for the name of a teacher or of a
domain. An optional key is absent where its value was not measured. A value is null where it does not exist, for
example a mean over nothing, and where it is not a finite number.

A resumed run repeats the steps after its last checkpoint: the last record of a step is the valid one. Trackers receive
the numbers of `step` and `eval` events under paths like `teachers/NAME/weight`.
"""
TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "string", NoneType: "null", Any: "any"}


def metrics_reference() -> str:
    """Return the reference as Markdown: one table for each event."""
    return INTRODUCTION + "".join(_event_section(event) for event in EVENTS)


def _event_section(event: type[Event]) -> str:
    rows = "".join(f"| `{key}` | {kind} | {meaning} |\n" for key, kind, meaning in field_rows(event))
    return f"\n## {event.kind}\n\n{_one_line(event.__doc__)}\n\n| key | type | meaning |\n|---|---|---|\n{rows}"


def field_rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, type, meaning) for every field, nested models after the field that contains them."""
    for name, info in model.model_fields.items():
        optional = "" if info.is_required() else ", optional"
        yield prefix + name, _type_name(info.annotation) + optional, _one_line(info.description)
        nested, suffix = _nested_model(info)
        if nested is not None:
            yield from field_rows(nested, f"{prefix}{name}{suffix}.")


def _nested_model(info: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """Return the model inside a field's type, and the text between the field's key and the model's keys."""
    annotation = info.annotation
    origin = get_origin(annotation)
    suffix = ".NAME" if origin is dict else "[]" if origin is list else ""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate, suffix
    return None, ""


def _type_name(annotation: Any) -> str:
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"object of {_type_name(arguments[1])}"
    if arguments:  # a union
        return " or ".join(_type_name(argument) for argument in arguments)
    return "object"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(metrics_reference())
