"""Run files with teachers on Ray Serve, and processes of the commands that start them."""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.test_processes import TUTELAGE

RUN_FILE = """
[student]
model = "byte_level"
[[data.sources]]
files = ["none.txt"]
[output]
dir = "none"
{teachers}
"""
TEACHER = """
[[teachers]]
name = "{name}"
urls = ["http://127.0.0.1:{port}/{name}"]
[teachers.serve]
model = "{name}"
cpus = 0.1
replicas = {replicas}
options = {{ dtype = "float32" }}
"""


def run_file(folder: Path, names: Sequence[str], port: int, replicas: int) -> Path:
    """Write a run file with teachers on Ray Serve, and return its path."""
    path = folder / "run.toml"
    teachers = "".join(TEACHER.format(name=name, port=port, replicas=replicas) for name in names)
    path.write_text(RUN_FILE.format(teachers=teachers), encoding="utf-8")
    return path


def printed(run: Path, port: int) -> str:
    """Return the output of `tutelage serve-ray --print` for a run file."""
    command = [*TUTELAGE, "serve-ray", str(run), "--port", str(port), "--print"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process within the block, and check that SIGINT ends it and all its descendants, unless it has ended."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    descendants: list[psutil.Process] = []
    try:
        yield process
        if process.poll() is not None:
            return
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        _, alive = psutil.wait_procs(descendants, timeout=60)
        assert not alive
    finally:
        for remaining in [*descendants, process]:
            remaining.kill()
        process.wait()


def is_ready(process: "subprocess.Popen[bytes]", url: str) -> bool:
    """Return whether a teacher is ready. Fails if the process has ended."""
    assert process.poll() is None
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
