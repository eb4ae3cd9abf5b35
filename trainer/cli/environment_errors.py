"""Error messages for a lack of memory, threads or permissions, which any library can report by an exception."""

import errno
import re
from collections.abc import Iterator

_OUT_OF_RESOURCES = re.compile(
    "out of memory|can(no|')t allocate(?! memory in static TLS)|can't start new thread|failed to map segment",
    re.IGNORECASE,
)
_ERRNOS = (errno.ENOMEM, errno.EAGAIN)  # EAGAIN of fork: the limit of processes


def environment_error(error: BaseException) -> str | None:
    """Return the sentence for an error that the environment has caused, None for any other error."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"cannot access {error.filename}: {error.strerror}"
    cause = next((cause for cause in _causes(error) if _is_out_of_resources(cause)), None)
    if cause is None:
        return None
    reason = str(cause).partition("\n")[0][:200] or type(cause).__name__
    if "CUDA" in reason:
        return (
            f"the memory of the GPU is exhausted ({reason}): use a smaller model, train.batch_samples, "
            "data.window_tokens or loss.chunk_tokens, or a larger train.gradient_accumulation_steps"
        )
    return (
        f"the memory or the threads of this process are exhausted ({reason}): raise its limits (ulimit -v, ulimit -u, "
        "those of the container), or use a smaller model, batch or window"
    )


def _is_out_of_resources(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    if isinstance(error, RuntimeError | ImportError):  # of torch, threading and the dynamic linker
        return _OUT_OF_RESOURCES.search(str(error)) is not None
    return isinstance(error, MemoryError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__
