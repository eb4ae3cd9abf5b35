"""Values of a chat: JSON, or text that contains JSON. Every error is an InvalidChat that names the value."""

import json
from collections.abc import Mapping
from typing import Any

from trainer.plain_text import excerpt

Message = dict[str, Any]
MAX_DEPTH = 64  # of lists and objects in each other: every function that changes the texts of a chat is recursive
_CONTAINERS = (dict, list, tuple)


class InvalidChat(Exception):
    """A chat that cannot be used. The text gives the reason, and names the message or the tool if there is one."""


def objects(value: object, name: str) -> list[Message]:
    """Return a list of objects. The list and its entries may be JSON text. `name` stands for the value in errors."""
    items = parsed_json(value, name)
    if not isinstance(items, list | tuple):
        raise wrong_type(items, name, "a list of objects")
    entries = ((f"entry {i} of {name}", item) for i, item in enumerate(items))
    return [as_object(parsed_json(item, entry), entry) for entry, item in entries]


def as_object(value: object, name: str) -> Message:
    """Return an object as a new dict."""
    if not isinstance(value, Mapping):
        raise wrong_type(value, name, "an object")
    return dict(value)


def as_list(value: object) -> list[Any]:
    """Return a list: the value itself, or a list of the single value; empty for null."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def parsed_json(value: object, name: str) -> Any:
    """Return a value. JSON text is parsed, repeatedly if the result is text again. Blank text is null."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidChat(f"{name}: text that is not JSON: {excerpt(value)}") from error
    check_depth(parsed, name)
    return parsed_json(parsed, name)


def json_text(value: object, name: str) -> str:
    """Return a value as JSON text, with characters outside of ASCII as they are."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # tables hold values that JSON has not, such as dates
        raise InvalidChat(f"{name}: cannot be written as JSON: {error}") from error


def without_nulls(fields: Mapping[str, Any]) -> Message:
    """Return an object without the keys whose value is null."""
    return {key: value for key, value in fields.items() if value is not None}


def check_depth(value: object, name: str) -> None:
    """Raise InvalidChat if lists and objects are nested more than MAX_DEPTH deep."""
    if _is_deeper(value, MAX_DEPTH):
        raise InvalidChat(f"{name}: nested more than {MAX_DEPTH} deep")


def _is_deeper(value: object, num_levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    inner = [item for item in items if isinstance(item, _CONTAINERS)]
    return bool(inner) and (not num_levels or any(_is_deeper(item, num_levels - 1) for item in inner))


def wrong_type(value: object, name: str, expected: str) -> InvalidChat:
    """Return the error for a value of another type than expected."""
    received = "null" if value is None else type(value).__name__
    return InvalidChat(f"{name}: received {received}, expected {expected}")
