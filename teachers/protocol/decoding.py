"""The guard around everything that is decoded from a teacher: JSON, Arrow, tokenizer files.

The libraries document few of the errors that they raise: recursion and memory errors for nested or huge input, Unicode
errors for names, panics of Rust. A replica must not be able to end a run with any of them.
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
    """Convert any error of a library into a ProtocolError of one sentence. `what` names the message.

    Errors of this project, cancellation and the end of the process pass unchanged.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:  # of foreign libraries; a panic of Rust is no Exception
        raise ProtocolError(f"malformed {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the reason as one short line; of a failed validation, the first wrong field."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        return f"{clean(field, 60)}: {clean(first['msg'], 200)}"
    return f"{type(error).__name__}: {clean(error, 200)}"
