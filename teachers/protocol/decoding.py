"""Convert errors of decoding libraries into ProtocolError, for JSON, Arrow and cards that a teacher sends.

The libraries raise more errors than they document: recursion and memory errors for nested or huge input, Unicode errors
for names, and Rust panics. None of them may end a run.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from teachers.protocol.errors import ProtocolError, TeacherError
from teachers.protocol.untrusted_text import clean

PASSED_ON = (TeacherError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Convert errors raised in the block into ProtocolError. `what` is the name of the message in the error.

    Errors of this project, cancellation, KeyboardInterrupt and SystemExit pass unchanged.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:  # libraries raise any class; Rust panics do not derive from Exception
        raise ProtocolError(f"malformed {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the reason as one short line. For a failed validation, it contains the first invalid field."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return f"{clean(field, 60)}: {clean(first['msg'], 200)}".removeprefix(": ")
    return f"{type(error).__name__}: {clean(error, 200)}"
