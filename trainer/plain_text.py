"""Sanitize names, paths and messages of libraries for terminals, logs and metrics files."""

import re

_USERINFO = re.compile(r"(?<=://)[^/\s@\"']*@")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # controls that reorder the text around them
MAX_SHOWN = 200


def storable(text: str) -> str:
    """Return the text without passwords in addresses, and with lone surrogates as escape sequences.

    Python represents file names that are not UTF-8 with lone surrogates, which no encoder accepts.
    """
    if "@" in text:
        text = _USERINFO.sub("", text)
    return text if text.isascii() else _SURROGATE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return the text on one line, without control characters, bidirectional controls and passwords in addresses."""
    words = " ".join(storable(text).split())
    return _BIDI.sub("", "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in words))


def printable(text: str) -> str:
    """Return the text with line ends, control characters and bidirectional controls as escape sequences."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in storable(text))
    return _BIDI.sub(lambda match: ascii(match[0])[1:-1], shown)


def excerpt(value: object) -> str:
    """Return a short representation of a value for an error message; for a list or table, its type."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 10**MAX_SHOWN:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{storable(value[:MAX_SHOWN])!r}… ({len(value):,} characters)"
    return repr(storable(value) if isinstance(value, str) else value)
