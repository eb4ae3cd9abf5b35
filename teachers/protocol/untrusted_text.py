"""Text from a server, made harmless where it enters: in cards, in details of problems and in descriptions of faults.

Cleaned text is one short line of printable characters. It cannot forge a second line of a log or of `doctor`, move the
cursor, set a title or reverse the direction of the text around it. It may contain markup: whoever prints through rich
or writes HTML or Markdown escapes it there, as any other text.
"""

import re

MAX_CHARS = 300  # of one text; two of them and a sentence of ours fit on a few lines
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x9b[0-?]*[ -/]*[@-~]")


def clean(text: object, max_chars: int = MAX_CHARS) -> str:
    """Return `text` without terminal escapes, control and formatting characters, on one line of limited length.

    White space of any kind becomes one space. Text that is cut ends in "…". Cleaning twice changes nothing.
    """
    received = str(text)
    examined = received[: 8 * max_chars]  # limits the work
    spaced = re.sub(r"\s+", " ", _ESCAPES.sub("", examined))
    printable = " ".join("".join(c for c in spaced if c.isprintable()).split())
    if len(printable) <= max_chars and len(examined) == len(received):
        return printable
    return printable[: max_chars - 1].rstrip() + "…"
