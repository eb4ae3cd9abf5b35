"""Mutations of bytes and of JSON values: flipped bits, cuts, repeated parts, and values of another kind or size."""

import copy
import json
from random import Random
from typing import Any

FRAGMENTS = (
    b"[", b"{", b"]", b"}", b'"', b",", b":", b"null", b"true", b"-1", b"0", b"1e99", b"-", b"9" * 40, b"NaN",
    b"Infinity", b"\xff", b"\x00", b"\\u0000", b"\\ud800", b"\x1b[31m", b"\r\n", b"[" * 2000, b"{{", b"%}", b"=",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 255, 2**31, 2**32, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308, "", "x", "1", "\x00",
    "\ud800", "▁", "Ġ", "[/red]", "\x1b[31m", "é" * 50, "x" * 5000, [], [[]], {}, {"type": "ByteLevel"},
    {"type": "Nothing"}, [1] * 70,
)  # fmt: skip


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Return a copy with one to five local changes. Empty data can only grow."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(changed) + 1)
        match random.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1 if at < len(changed):
                changed[at] = random.randrange(256)
            case 2:
                del changed[at : at + random.randrange(1, 9)]
            case 3:
                del changed[at:]
            case 4:
                changed[at:at] = changed[max(0, at - 16) : at] * random.randrange(1, 9)
            case 5:
                changed[at : at + 8] = random.choice((b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7))
            case _:
                changed[at:at] = random.choice(FRAGMENTS)
    return bytes(changed)


def mutate_json(random: Random, document: Any) -> Any:
    """Return a deep copy with one to three values replaced, removed, added or renamed."""
    changed = json.loads(json.dumps(document))
    for _ in range(random.choice((1, 1, 2, 3))):
        if not changed:
            break
        container, key = _random_key(random, changed)
        match random.randrange(5):
            case 0 | 1:
                container[key] = _value(random)
            case 2:
                del container[key]
            case 3 if isinstance(container, list):
                container.insert(key, _value(random))
            case _ if isinstance(container, dict):
                container[random.choice(("x", "type", "", "\x1b[31m", *container))] = _value(random)
    return changed


def _random_key(random: Random, document: Any) -> tuple[Any, Any]:
    """Return the container and the key of a random value. Values near the top are more likely."""
    container = document
    while True:
        key = random.choice(list(container)) if isinstance(container, dict) else random.randrange(len(container))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.25:
            return container, key
        container = inner


def _value(random: Random) -> Any:
    return copy.deepcopy(random.choice(VALUES))


def mutate_json_bytes(random: Random, data: bytes) -> bytes:
    """Change a JSON document, its text, or both."""
    if random.random() < 0.7:
        data = json.dumps(mutate_json(random, json.loads(data))).encode("utf-8", "surrogatepass")
    return mutate_bytes(random, data) if random.random() < 0.4 else data
