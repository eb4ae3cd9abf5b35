"""Compile functions with numba, and cache the machine code in files with a digest that is verified before loading.

The cache of numba unpickles an index and machine code without verification, so a changed bit causes a crash or wrong
results. Here each signature of a function has one file, which begins with a SHA-256 digest. A file whose digest differs
is ignored, and the function is compiled again. The digest also covers the version of numba and the modification time of
the source file. There is no shared index, so concurrent processes do not lose entries. The digest detects damage, not
tampering: a person with write access to the cache can replace file and digest.
"""

import hashlib
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

log = logging.getLogger(__name__)

SUFFIX = ".kernel"
_DIGEST_BYTES = hashlib.sha256().digest_size


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call. It runs without the GIL, and is cached on disk if possible."""
    dispatcher = njit(nogil=True)(function)
    if isinstance(dispatcher, Dispatcher):  # not with NUMBA_DISABLE_JIT
        with suppress(RuntimeError):  # neither the folder of the source file nor the user's cache can be written
            dispatcher._cache = _VerifiedCache(function)
    return dispatcher


class _VerifiedCache(FunctionCache):  # type: ignore[misc]  # numba has no types
    """Cache of one function. If the cache cannot be written, the function is compiled in every process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _VerifiedFiles(
            cache_path=locator.get_cache_path(),
            filename_base=self._impl.filename_base,
            source_stamp=locator.get_source_stamp(),
        )

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            log.warning("%s cannot be written (%s): its kernels are not cached", self.cache_path, error)


class _VerifiedFiles(IndexDataCacheFile):  # type: ignore[misc]  # numba has no types
    """Cache files of one function. Each contains a digest and the pickled pair of key and compilation result."""

    def flush(self) -> None:
        for path in Path(self._cache_path).glob(f"{self._base}.*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def save(self, key: Any, data: Any) -> None:
        content = self._dump((key, data))
        with self._open_for_write(self._path(key)) as file:
            file.write(self._digest(content) + content)

    def load(self, key: Any) -> Any:
        """Return the result of a compilation, or None if it is missing, out of date, unreadable or damaged."""
        path = self._path(key)
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): it is compiled again", path, error)
            return None
        content = data[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] != self._digest(content):
            log.info("%s is out of date or damaged: it is compiled again", path)
            return None
        try:
            saved_key, result = pickle.loads(content)
        except (ImportError, AttributeError):  # a type of the signature has another name now
            return None
        return result if saved_key == key else None

    def _digest(self, content: bytes) -> bytes:
        digest = hashlib.sha256(repr((self._version, self._source_stamp)).encode())
        digest.update(content)
        return digest.digest()

    def _path(self, key: Any) -> str:
        signature_and_target = key[:2]  # the third value depends on the source: a new version replaces the file
        name = hashlib.sha256(repr(signature_and_target).encode()).hexdigest()[:16]
        return f"{self._cache_path}/{self._base}.{name}{SUFFIX}"

    @property
    def _base(self) -> str:
        return str(self._index_name).removesuffix(".nbi")
