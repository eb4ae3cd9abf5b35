"""Errors of the environment that any library can raise, as one sentence: no memory, no thread, no permission."""

import errno
import re
from collections.abc import Iterator

_EXHAUSTED = re.compile("out of memory|can(no|')t allocate|can't start new thread|failed to map segment", re.IGNORECASE)


def environment_error(error: BaseException) -> str | None:
    """Return the sentence for an error that the environment has caused, None for any other error."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"cannot access {error.filename}: {error.strerror}"
    exhausted = next((cause for cause in _causes(error) if _is_exhausted(cause)), None)
    if exhausted is None:
        return None
    reason = str(exhausted).partition("\n")[0][:200] or type(exhausted).__name__
    return (
        f"the memory or the threads of this process are exhausted ({reason}): raise its limits (ulimit -v, ulimit -u, "
        "those of the container), or use a smaller model, batch or window"
    )


def _is_exhausted(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError | ImportError):  # of torch, threading and the dynamic linker
        return _EXHAUSTED.search(str(error)) is not None
    return isinstance(error, MemoryError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
