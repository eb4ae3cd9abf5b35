"""The numba decorator of this project: compile at the first call, cache on disk, release the interpreter lock."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba, without the interpreter lock, cached on disk if a cache can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the folder of the source file nor the user's cache can be written
        return njit(nogil=True)(function)
