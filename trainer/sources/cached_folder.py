"""Folders of the cache that are made from data files once, verified at every start, and made again if damaged.

A folder is written under another name and renamed when it is complete. Its manifest has the digest of every file. One
process makes a folder while the others wait for it.
"""

import atexit
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from trainer.errors import DataError
from trainer.manifest import DamagedError, check_folder, digest_file, write_manifest

log = logging.getLogger("tutelage.data")
T = TypeVar("T")


@dataclass(frozen=True)
class CachedFolder(Generic[T]):
    """One folder of the cache, and the functions that write and load it.

    what         name of the folder in messages, for example "the window index"
    folder       path of the folder
    write        function that writes the files into a new folder
    load         function that loads a verified folder. Raises DamagedError for files that it cannot use
    stays_open   whether `load` keeps the files open. A temporary folder is then deleted directly after `load`
    """

    what: str
    folder: Path
    write: Callable[[Path], None]
    load: Callable[[Path], T]
    stays_open: bool = False

    def get(self) -> T:
        """Return what `load` returns, after the folder was made if necessary.

        If the cache cannot be written, a temporary folder is used. Raises DataError if that cannot be written either.
        """
        try:
            return self._load_or_make()
        except OSError as error:
            log.warning(
                "%s cannot be kept in %s (%s): it is built for this start only; free disk space, or set TUTELAGE_CACHE "
                "to another directory",
                self.what,
                self.folder.parent,
                error.strerror,
            )
        try:
            return self._temporary()
        except OSError as error:
            raise DataError(
                f"cannot write {self.what} to the cache or to a temporary directory ({error.strerror}): free disk "
                "space, or set TUTELAGE_CACHE or TMPDIR to another directory"
            ) from error

    def _load_or_make(self) -> T:
        loaded = self._load()
        if loaded is None:
            with self._lock():
                loaded = self._load()  # another process may have made it in the meantime
                if loaded is None:
                    self._make(self.folder)
                    loaded = self.load(self.folder)
        return loaded

    def _load(self) -> T | None:
        if not self.folder.is_dir():
            return None
        try:
            check_folder(self.folder)
            return self.load(self.folder)
        except (DamagedError, FileNotFoundError) as error:  # the other processes may be replacing it
            log.warning("%s %s is built again: %s", self.what, self.folder, error)
            return None

    def _make(self, folder: Path) -> None:
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            self.write(partial)
            write_manifest(partial, {path.name: digest_file(path) for path in sorted(partial.iterdir())})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _temporary(self) -> T:
        scratch = Path(tempfile.mkdtemp(prefix="tutelage-data-"))
        if not self.stays_open:
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        try:
            self._make(scratch / "folder")
            return self.load(scratch / "folder")
        finally:
            if self.stays_open:
                shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f".{self.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
