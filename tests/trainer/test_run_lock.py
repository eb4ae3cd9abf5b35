"""The lock on a run's folder: one run writes to it at a time."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import losses, run_config, write_corpus
from trainer.errors import CheckpointError, ConfigError
from trainer.telemetry.jsonl import read_metrics
from trainer.training import run_lock as module
from trainer.training.loop import train
from trainer.training.run_lock import LOCK_FILE, Lease, acquire, run_lock

HOLD = """
import sys, time
from pathlib import Path
from trainer.training.run_lock import acquire
lock = acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""
ELSEWHERE = Lease("machine-7", 4321, "another boot", "2026-01-01T00:00:00+00:00", "token")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed every 0.1 s and are stale after 1 s."""
    for name, seconds in (("RENEW_S", 0.1), ("STALE_S", 1.0), ("POLL_S", 0.05)):
        monkeypatch.setattr(module, name, seconds)


def hold(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.slow
def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        message = f"{tmp_path} is in use by process {process.pid} on {os.uname().nodename} .*wait until that run ends"
        with pytest.raises(CheckpointError, match=message), run_lock(tmp_path):
            pytest.fail("two processes have the lock")
        assert (tmp_path / LOCK_FILE).exists()
    finally:
        process.kill()
        process.communicate()
    with run_lock(tmp_path) as lock:
        lock.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("fast")
def test_a_lease_of_another_machine_is_refused_while_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without flock, as on a shared disk without locks. The clock of the other machine is hours ahead."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        with pytest.raises(CheckpointError, match="is in use by process 4321 on machine-7"):
            acquire(tmp_path)
    finally:
        ended.set()
        renewer.join()
    assert json.loads(path.read_text()) == asdict(ELSEWHERE)
    began = time.monotonic()
    lock = acquire(tmp_path)
    assert time.monotonic() - began >= 0.7
    assert "process 4321 on machine-7 (since 2026-01-01T00:00:00+00:00) has not renewed its lock" in caplog.text
    lock.check()
    lock.release()
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    os.utime(path, (time.time() - 9, time.time() - 9))
    began = time.monotonic()
    acquire(tmp_path).release()  # a lease that has been stale for long is not waited for
    assert time.monotonic() - began < 0.7


@pytest.mark.usefixtures("fast")
def test_a_held_lease_is_renewed(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK_FILE).stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
def test_the_lease_decides_on_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    process = hold(tmp_path)
    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr(module, "STALE_S", 15.0)  # longer than RENEW_S of the other process
    try:
        with pytest.raises(CheckpointError, match=f"is in use by process {process.pid} on "):
            acquire(tmp_path)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["removed", "replaced", "taken over"])
def test_a_run_that_loses_its_lock_stops_before_it_writes_again(
    tmp_path: Path, tiny_byte_level: Path, how: str
) -> None:
    config = run_config(
        tiny_byte_level,
        write_corpus(tmp_path),
        tmp_path / "out",
        [],
        output={"dir": str(tmp_path / "out"), "checkpoint_every_steps": 1},
    )
    path = tmp_path / "out" / LOCK_FILE

    def lose(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 3:
            if how != "taken over":
                path.unlink()
            if how != "removed":
                path.write_text(json.dumps(asdict(ELSEWHERE)))

    by = ".lock was removed from" if how == "removed" else r"process 4321 on machine-7 .* has taken over"
    with pytest.raises(CheckpointError, match=f"{by} the folder of this run, .*: this run stops before it writes"):
        train(config, listener=lose)
    events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert events[-1]["event"] == "step"
    assert events[-1]["step"] == 3
    assert not (tmp_path / "out" / "checkpoints" / "step-00000003").exists()
    assert not (tmp_path / "out" / "model").exists()
    assert path.exists() == (how != "removed")


def test_a_run_that_fails_its_checks_leaves_nothing_behind(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections = {"optim": {"warmup_steps": 7}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "a" / "b" / "out", [], **sections)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="more than the 6 steps"):
        train(config)
    assert set(tmp_path.iterdir()) == before
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="more than the 6 steps"):
        train(config)
    assert not list((tmp_path / "a").iterdir())


def test_a_finished_run_leaves_no_lock(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).touch()  # of a process that was killed before its first write
    train(config)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checkpoints", "metrics.jsonl", "model"}
    assert LOCK_FILE not in {p.name for p in (tmp_path / "out" / "model").iterdir()}


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_something_else_named_like_the_lock_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK_FILE
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("x")}[kind]()
    with pytest.raises(ConfigError, match=r"output.dir: .*/\.lock"):
        acquire(tmp_path)
    assert os.path.lexists(path)


@pytest.mark.slow
def test_of_two_processes_in_one_folder_one_is_refused_and_the_other_undisturbed(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    def run(name: str) -> Any:
        sections: Any = {"output": {"dir": str(tmp_path / name), "checkpoint_every_steps": 1}, "train": {"epochs": 4}}
        return run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / name, [], **sections)

    train(run("undisturbed"))
    config = run("out")
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tests.trainer.run_rank", str(path), "--pause=0.3"]
    with (tmp_path / "stderr").open("wb") as errors:
        first, second = (subprocess.Popen(command, stderr=errors) for _ in range(2))
    try:
        while first.poll() is None and second.poll() is None:
            time.sleep(0.05)
        refused, running = (first, second) if first.poll() is not None else (second, first)
        assert refused.returncode == 1
        assert f"is in use by process {running.pid} on " in (tmp_path / "stderr").read_text(encoding="utf-8")
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            time.sleep(0.05)
        with pytest.raises(CheckpointError, match=f"in use by process {running.pid}"):
            train(config, resume=True)
        assert running.wait(120) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    steps = [e["step"] for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert steps == list(range(1, 13))
    assert losses(tmp_path / "out") == losses(tmp_path / "undisturbed")
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert models[0] == models[1]
