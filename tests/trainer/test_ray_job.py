"""Train as a job on a running Ray cluster, submitted with `ray job submit`."""

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
from tests.trainer.made_runs import EventFile
from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_cli import run_file
from trainer.errors import UserError
from trainer.launch.ray_driver import read_result, train_on_ray
from trainer.training.loop import train

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")
START_S = 240


@contextmanager
def cluster() -> Iterator[str]:
    """Run a Ray cluster on this machine within the block. Yields the address of its dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="r"))  # short: the path of a socket has at most 107 bytes
    log, url = folder / "log.txt", f"http://127.0.0.1:{free_port()}"
    command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={free_port()}", "--num-cpus=4", "--object-store-memory=100000000", "--temp-dir", str(folder)]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={url.rpartition(':')[2]}"]
    # the default ports of the agent and of the client server collide with those of another cluster on this machine
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    with log.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=file)
    descendants: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + START_S
        while not is_up(f"{url}/api/jobs/"):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, f"Ray did not start within {START_S} s"
            time.sleep(0.2)
        yield url
    finally:
        with suppress(psutil.NoSuchProcess):
            descendants = process.children(recursive=True)
            process.terminate()
        for remaining in psutil.wait_procs([process, *descendants], timeout=60)[1]:
            with suppress(psutil.NoSuchProcess):
                remaining.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def is_up(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=5).is_success
    return False


def test_a_job_on_a_ray_cluster_gives_the_same_losses(tmp_path: Path, tiny_byte_level: Path) -> None:
    """All paths except output.dir are relative to the working directory of the job."""
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
    assert "after a failure the run restarts at step 0" in done.stdout
    assert losses(tmp_path / "job") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert max(losses(tmp_path / "job")) == 4


def test_a_relative_output_folder_of_a_job_is_rejected(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    config = run_config(tiny_byte_level, write_corpus(tmp_path), Path("runs/one"), [])
    with pytest.raises(UserError, match="output.dir is runs/one, which is in .* copy .*: set an absolute path"):
        train_on_ray(config, workers=2, max_failures=0, resume=False)


@pytest.mark.parametrize(
    ("step", "reason", "stop_at", "terminated"),
    [(8, None, None, False), (4, None, None, True), (4, None, 4, False), (4, "no improvement", None, False)],
)
def test_a_run_that_ends_before_its_last_planned_step_was_terminated(
    tmp_path: Path, step: int, reason: str | None, stop_at: int | None, terminated: bool
) -> None:
    with EventFile(tmp_path / "metrics.jsonl") as file:
        file.write("start", step=0, steps=8)
        file.write("eval", step=0, held_out_bpb=1.0)
        file.write("end", step=step, model=None, reason=reason)
    result = read_result(tmp_path, stop_at)
    assert (result.steps, result.held_out, result.terminated) == (step, ((0, 1.0),), terminated)
