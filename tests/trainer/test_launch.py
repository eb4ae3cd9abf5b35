"""A run as a job on a Ray cluster that stands already, as `ray job submit` sends it."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve import free_port
from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_cli import run_file
from trainer.errors import UserError
from trainer.launch import train_on_ray
from trainer.loop import train

RAY = Path(sys.executable).with_name("ray")
START_S = 240


@contextmanager
def cluster() -> Iterator[str]:
    """The dashboard's address of a cluster of this machine; no process outlives it."""
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: a socket's whole path has 107 bytes
    said, url = folder / "said.txt", f"http://127.0.0.1:{free_port()}"
    command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={free_port()}", "--num-cpus=4", "--object-store-memory=100000000", "--temp-dir", str(folder)]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={url.rpartition(':')[2]}"]
    with said.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=file)
    below: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_S
        while not is_up(f"{url}/api/jobs/"):
            assert process.poll() is None, said.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, f"Ray was not up in {START_S} s"
            time.sleep(0.2)
        yield url
    finally:
        with suppress(psutil.NoSuchProcess):
            below = process.children(recursive=True)
            process.terminate()
        for left in psutil.wait_procs([process, *below], timeout=60)[1]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def is_up(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=5).is_success
    return False


def test_a_job_on_a_ray_cluster_runs_the_same_run_file(tmp_path: Path, tiny_byte_level: Path) -> None:
    """Its paths are relative to the working directory that the job takes along, but for output.dir."""
    job = tmp_path / "work"
    shutil.copytree(tiny_byte_level, job / "student")
    corpus = write_corpus(job)
    train(run_config(tiny_byte_level, corpus, tmp_path / "alone", []), stop_at=4)
    relative = run_config(Path("student"), Path(corpus.name), tmp_path / "job", [])
    run_file(job, relative)
    tutelage = [str(RAY.with_name("tutelage")), "train", "run.toml", "--ray-workers", "2", "--stop-at", "4"]
    with cluster() as url:
        submit = [str(RAY), "job", "submit", "--address", url, "--working-dir", str(job), "--", *tutelage]
        done = subprocess.run(submit, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "after a failure the run begins again at its first step" in done.stdout
    assert losses(tmp_path / "job") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert max(losses(tmp_path / "job")) == 4


def test_an_output_folder_that_a_job_would_lose_is_refused(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    config = run_config(tiny_byte_level, write_corpus(tmp_path), Path("runs/one"), [])
    with pytest.raises(UserError, match="output.dir is runs/one, in the copy .*: give an absolute path on a disk that"):
        train_on_ray(config, workers=2, max_failures=0, resume=False)
