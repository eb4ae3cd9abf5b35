"""Sanitize text from a server when it is received: texts of cards, error details and names in error messages.

Sanitized text is one short line of printable characters. It cannot imitate further lines of a log or of `doctor`, and
it cannot control the terminal. It may contain markup: code that prints with rich or writes HTML or Markdown must escape
it.
"""

import re

MAX_CHARS = 300  # of one text; two of them and a sentence of ours fit on a few lines
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x9b[0-?]*[ -/]*[@-~]")


def clean(text: object, max_chars: int = MAX_CHARS) -> str:
    """Return `text` on one line of at most `max_chars`, without escape sequences, control and formatting characters.

    Every run of white space becomes one space. Truncated text ends in "…". The function is idempotent.
    """
    received = str(text)
    examined = received[: 8 * max_chars]  # limits the work
    spaced = re.sub(r"\s+", " ", _ESCAPES.sub("", examined))
    printable = " ".join("".join(c for c in spaced if c.isprintable()).split())
    if len(printable) <= max_chars and len(examined) == len(received):
        return printable
    return printable[: max_chars - 1].rstrip() + "…"
