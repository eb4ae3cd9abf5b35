"""Exclusive lock on the folder of a run. A run holds it from before its first check until its end.

Rank 0 locks the file `.lock` with flock, which the operating system releases when the process ends. On a shared disk,
flock may not be visible to other machines. The file therefore also contains a lease: machine and process of the holder,
which renews the modification time of the file. A lease of another machine is valid while it is renewed. Modification
times are compared with that of a new file, so that the clocks of the machines do not matter.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError, RunInUse, UserError

log = logging.getLogger("tutelage.run")

LOCK_FILE = ".lock"
RENEW_S = 10.0  # interval of renewals
STALE_S = 60.0  # a lease that was not renewed for this long belongs to a process that has ended
POLL_S = 0.5
RELEASE_S = 3.0  # a process that was killed, for example by Ray before it restarts it, may take this long to end
MAX_LEASE_BYTES = 4096
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # network file systems without lock service
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Lease:
    """The holder of a lock.

    host     name of the machine
    pid      process id on that machine
    boot     id of the running operating system; two containers of one machine have the same
    started  time at which the lock was taken, for messages only
    token    random value of this lock
    """

    host: str
    pid: int
    boot: str
    started: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.started})"


class RunLock:
    """Lock of one run, held by rank 0. `check` raises an error if the lock was lost."""

    def __init__(self, path: Path, descriptor: int, lease: Lease) -> None:
        self._path = path
        self._descriptor = descriptor
        self._data = _encode(lease)
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise CheckpointError if the lock was lost: its file was removed, replaced or taken over."""
        if not self._is_held():
            holder = _read_lease(self._path)
            by = f"{holder} has taken over" if holder else f"{LOCK_FILE} was removed from"
            raise CheckpointError(
                f"{by} the folder of this run, {self._path.parent}: this run stops before it writes again, and "
                "--resume continues it from its last checkpoint when no other run uses the folder"
            )

    def release(self) -> None:
        """Remove the lock, unless another process has taken it."""
        self._ended.set()
        self._renewer.join()
        with suppress(OSError):
            if self._is_held():
                self._path.unlink()
        os.close(self._descriptor)

    def _is_held(self) -> bool:
        try:
            content = os.pread(self._descriptor, MAX_LEASE_BYTES, 0)
            return content == self._data and _is_file_of(self._descriptor, self._path)
        except OSError:  # a shared disk that does not respond says nothing about the holder
            return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(OSError):  # tried again at the next renewal
                if self._is_held():
                    os.utime(self._descriptor)  # the file server sets the time


class NoLock(RunLock):
    """Lock of the other ranks, and of a run that does not write. It does nothing."""

    def __init__(self) -> None:
        """Hold nothing."""

    def check(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""


@contextmanager
def run_lock(folder: Path, ranks: Ranks = Ranks()) -> Iterator[RunLock]:
    """Hold the lock on a folder in the block, and create the folder if necessary. All processes must call it together.

    A folder that this function created is removed at the end if it is empty. Raises CheckpointError, which names the
    holder, if another process holds the lock, and ConfigError if the folder cannot be written.
    """
    created: list[Path] = []
    lock: RunLock = NoLock()
    failure: UserError | None = None
    try:
        if ranks.first:
            try:
                created = _make(folder)
                lock = acquire(folder)
            except UserError as error:
                failure = error
        failure = ranks.broadcast(failure)
        if failure is not None:
            raise failure
        yield lock
    finally:
        lock.release()
        for path in created:
            with suppress(OSError):  # it contains a run
                path.rmdir()


def acquire(folder: Path) -> RunLock:
    """Take the lock on an existing folder. Raises CheckpointError or ConfigError, see `run_lock`."""
    path = folder / LOCK_FILE
    lease = _own_lease()
    deadline = time.monotonic() + RELEASE_S
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
            try:
                has_flock = _flock(descriptor, path, deadline)
                if _is_file_of(descriptor, path):
                    _await_stale(path, lease if has_flock else None)
                    _write_lease(descriptor, path, lease)
                    return RunLock(path, descriptor, lease)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the previous holder has just removed the file
    except OSError as error:
        raise ConfigError(f"output.dir: cannot write {path}: {error.strerror}") from error


def _make(folder: Path) -> list[Path]:
    """Create a folder with its parents. Return those that did not exist, the innermost first."""
    if folder.is_file():
        raise ConfigError(f"output.dir: {folder} is a file")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir: cannot make {error.filename or folder}: {error.strerror}") from error
    return missing


def _flock(descriptor: int, path: Path, deadline: float) -> bool:
    """Lock the file. Return False if the file system has no flock. Raises CheckpointError if it stays locked."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ConfigError(f"output.dir: {path} is not a regular file: remove it")
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _in_use(path) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return False
            raise


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> RunInUse:
    """Return the error that names the holder. Wait up to 1 s if the holder has not written its lease yet."""
    deadline = time.monotonic() + 1
    while (holder := _read_lease(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return RunInUse(
        f"{path.parent} is in use by {holder or 'another process'}: wait until that run ends, or choose another "
        "output.dir"
    )


def _await_stale(path: Path, own: Lease | None) -> None:
    """Wait until an existing lease is stale. Raises CheckpointError if it is renewed meanwhile.

    own  lease of this process if it has the flock. A lease of the same machine is then stale at once, because its
         process has ended; None without flock
    """
    holder = _read_lease(path)
    if os.stat(path).st_size == 0 or (holder and own and holder.boot == own.boot):
        return
    renewed = os.stat(path).st_mtime_ns
    remaining = STALE_S - (_file_time(path.parent) - renewed / 1e9)
    if remaining > 0:
        log.warning("%s was in use by %s: waiting %.0f s for a renewal", path.parent, holder or "a process", remaining)
    deadline = time.monotonic() + remaining
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if os.stat(path).st_mtime_ns != renewed:
            raise _in_use(path)
    log.warning("%s has not renewed its lock on %s, which this run takes over", holder or "a process", path.parent)


def _file_time(folder: Path) -> float:
    """Return the current time of the file system that contains the folder, in seconds."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{LOCK_FILE}-") as file:
        file.write(b"now")
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _own_lease() -> Lease:
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        boot = socket.gethostname()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Lease(socket.gethostname(), os.getpid(), boot, now, uuid.uuid4().hex)


def _write_lease(descriptor: int, path: Path, lease: Lease) -> None:
    data = _encode(lease)
    try:
        os.ftruncate(descriptor, 0)
        if os.pwrite(descriptor, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        path.unlink()
        raise


def _encode(lease: Lease) -> bytes:
    return (json.dumps(asdict(lease)) + "\n").encode()


def _read_lease(path: Path) -> Lease | None:
    """Return the lease in a file, or None if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            lease = Lease(**json.loads(file.read(MAX_LEASE_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    values = (lease.host, lease.boot, lease.started, lease.token)
    is_valid = isinstance(lease.pid, int) and all(isinstance(v, str) and v.isprintable() for v in values)
    return lease if is_valid else None
