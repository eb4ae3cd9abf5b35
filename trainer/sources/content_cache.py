"""Cache of recently read long documents, so that a document with many windows is not parsed for each window.

Several threads read samples in shuffled order. Without the cache, reading one window of an 8 MB line requires parsing
the whole line.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

MIN_BYTES = 1 << 16  # shorter contents are not kept: parsing them takes less than a millisecond
MAX_BYTES = 1 << 27  # memory of all contents together; at least the last one is kept


class ContentCache:
    """Thread-safe LRU cache of contents by key. Concurrent requests for the same key load its content once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._contents: OrderedDict[Hashable, bytes] = OrderedDict()
        self._loading: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], bytes]) -> bytes:
        """Return the content of a key from the cache, or from `load`."""
        if (content := self._find(key)) is not None:
            return content
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            content = self._find(key)  # another thread may have loaded it
            if content is None:
                try:
                    content = load()
                    self._keep(key, content)
                finally:
                    with self._lock:
                        self._loading.pop(key, None)
            return content

    def _find(self, key: Hashable) -> bytes | None:
        with self._lock:
            content = self._contents.get(key)
            if content is not None:
                self._contents.move_to_end(key)
            return content

    def _keep(self, key: Hashable, content: bytes) -> None:
        with self._lock:
            if len(content) < MIN_BYTES or key in self._contents:
                return
            self._contents[key] = content
            self._num_bytes += len(content)
            while self._num_bytes > self._max_bytes and len(self._contents) > 1:
                _, dropped = self._contents.popitem(last=False)
                self._num_bytes -= len(dropped)


contents = ContentCache()  # of this process: the limit is for all sources together
