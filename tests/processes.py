"""Processes that tests start and end."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

KILL_TIMEOUT_S = 30.0  # after SIGKILL


@contextmanager
def started(command: list[str], log: Path | None = None) -> Iterator[psutil.Popen]:
    """Run a process within the block, and write its stderr to `log`. Kill it and its descendants at the end."""
    with open(log or "/dev/null", "w", encoding="utf-8") as file:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        yield process
    finally:
        for each in (*_descendants(process), process):
            with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                each.kill()
        process.wait(KILL_TIMEOUT_S)


def _descendants(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []
