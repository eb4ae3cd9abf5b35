"""Commands as processes: a killed teacher, a killed run, and demos that end, fail or are interrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.serve import FormulaEngine, free_port, serving
from tests.tiny import TEXT, save_tiny_model
from tests.trainer.runs import losses, run_config
from tests.trainer.test_cli import run_file
from trainer.config import RunConfig
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train

pytestmark = pytest.mark.slow

TUTELAGE = [sys.executable, "-m", "trainer.cli"]
TIMEOUT_S = 240.0  # for a machine under load


def wait_for(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def teacher(model: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [*TUTELAGE, "serve", str(model), "--port", str(port), "--dtype", "float32", "--stop-with-parent"],
        stdin=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def steps_written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"event": "step"') if path.exists() else 0


def patient(config: RunConfig) -> RunConfig:
    """Wait for a teacher as long as its process may take to start on a machine under load."""
    teachers = [teacher.model_copy(update={"unavailable_timeout_s": TIMEOUT_S}) for teacher in config.teachers]
    return config.model_copy(update={"teachers": teachers})


def test_a_teacher_killed_and_restarted_during_a_run_changes_no_loss(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(60)), encoding="utf-8")
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    pace = {"epochs": 1, "batch_samples": 4, "prefetch_tokens": 1}
    data = {"max_samples": 160, "window_tokens": 50}
    runs = {
        name: patient(run_config(tiny_byte_level, corpus, tmp_path / name, urls, train=pace, data=data))
        for name in ("undisturbed", "disturbed")
    }
    with teacher(tiny_byte_level, ports[0]):
        with teacher(tiny_sentencepiece, ports[1]) as second:
            wait_for(lambda: listens(ports[0]) and listens(ports[1]), TIMEOUT_S, "teachers")
            train(runs["undisturbed"])
            path = run_file(tmp_path, runs["disturbed"])
            run = subprocess.Popen([*TUTELAGE, "train", str(path)], stderr=subprocess.PIPE, text=True)
            wait_for(lambda: steps_written(tmp_path / "disturbed") >= 3, TIMEOUT_S, "first steps")
            os.kill(second.pid, signal.SIGKILL)
            second.communicate()
        num_steps = steps_written(tmp_path / "disturbed")
        time.sleep(2)
        assert steps_written(tmp_path / "disturbed") < 40, "the run did not need the teacher"
        with teacher(tiny_sentencepiece, ports[1]):
            _, stderr = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 0, stderr
    assert "teacher t1 at" in stderr
    assert "the replica is quarantined and trial requests are sent to it" in stderr
    assert num_steps < 40
    assert losses(tmp_path / "disturbed") == pytest.approx(losses(tmp_path / "undisturbed"), abs=1e-6)
    waits = [e["wait_s"] for e in read_metrics(tmp_path / "disturbed" / "metrics.jsonl") if e["event"] == "step"]
    assert max(waits) > 1.5


def test_a_killed_run_resumes_with_the_same_losses(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(30)), encoding="utf-8")

    def config_of(name: str) -> RunConfig:
        sections: dict[str, Any] = {
            "data": {"max_samples": 160, "window_tokens": 50},
            "output": {"checkpoint_every_steps": 5},
            "train": {"epochs": 1},
        }
        return run_config(tiny_byte_level, corpus, tmp_path / name, [], **sections)

    train(config_of("uninterrupted"))
    killed = config_of("killed")
    path = run_file(tmp_path, killed)
    for after in (7, 23):
        run = subprocess.Popen([*TUTELAGE, "train", str(path), "--resume", "--json"])
        wait_for(partial(has_steps, tmp_path / "killed", after), TIMEOUT_S, "steps")
        run.kill()
        run.wait()
    train(killed, resume=True)
    one, two = losses(tmp_path / "uninterrupted"), losses(tmp_path / "killed")
    assert [two[n] for n in one] == pytest.approx(list(one.values()), abs=1e-6)


def has_steps(out: Path, steps: int) -> bool:
    return steps_written(out) > 0 and max(losses(out)) >= steps


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache like that of `demo --prepare`, with tiny models and little text."""
    folder = tmp_path_factory.mktemp("cache")
    save_tiny_model(folder / "models" / "smollm2-135m-instruct", kind="byte_level", seed=1)
    save_tiny_model(folder / "models" / "gemma-3-270m", kind="sentencepiece", seed=2)
    (folder / "data").mkdir()
    lines = "".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(40))
    (folder / "data" / "pydoc-topics.jsonl").write_text(lines, encoding="utf-8")
    return folder


class Demo:
    """A process of `tutelage demo` on two free ports."""

    def __init__(self, cache: Path, out: Path, *more_overrides: str) -> None:
        self.ports = [free_port(), free_port()]
        overrides = [f"teachers.{i}.urls=['http://127.0.0.1:{port}']" for i, port in enumerate(self.ports)]
        overrides += [f"output.dir={out}", "student.train_layers=1", *more_overrides]
        command = [*TUTELAGE, "demo", "--json"] + [word for o in overrides for word in ("--set", o)]
        self.process = subprocess.Popen(
            command, env=os.environ | {"TUTELAGE_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def await_teachers(self) -> None:
        wait_for(lambda: all(map(listens, self.ports)), TIMEOUT_S, "the demo's teachers")

    def assert_ports_are_free(self) -> None:
        wait_for(lambda: not any(map(listens, self.ports)), TIMEOUT_S, "free ports")


def test_a_demo_prints_its_results_and_ends_its_teachers(tiny_cache: Path, tmp_path: Path) -> None:
    demo = Demo(tiny_cache, tmp_path / "out", "train.epochs=2")
    stdout, stderr = demo.process.communicate(timeout=TIMEOUT_S)
    assert demo.process.returncode == 0, stderr.decode()
    result = json.loads(stdout)
    assert [t["name"] for t in result["preview"]["teachers"]] == ["smollm2", "gemma"]
    assert result["student"]["held_out"][0] == result["baseline"]["held_out"][0]
    assert result["student"]["held_out"][-1] != result["baseline"]["held_out"][-1]
    assert (tmp_path / "out" / "distilled" / "model" / "config.json").exists()
    demo.assert_ports_are_free()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_demo_ended_by_a_signal_ends_its_teachers(tiny_cache: Path, tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tiny_cache, tmp_path / "out", "train.epochs=1000")
    try:
        demo.await_teachers()
        time.sleep(0.5)
        demo.process.send_signal(number)
        demo.process.communicate(timeout=TIMEOUT_S)  # the process ends after the current compilation
    finally:
        demo.process.kill()
        demo.process.communicate()
    assert demo.process.returncode == (130 if number == signal.SIGINT else -number)
    demo.assert_ports_are_free()


def test_a_demo_terminated_during_training_does_not_start_the_baseline(tiny_cache: Path, tmp_path: Path) -> None:
    demo = Demo(tiny_cache, tmp_path / "out", "train.epochs=1000")
    try:
        wait_for(lambda: steps_written(tmp_path / "out" / "distilled") > 0, TIMEOUT_S, "the first step")
        demo.process.terminate()
        demo.process.communicate(timeout=TIMEOUT_S)
    finally:
        demo.process.kill()
        demo.process.communicate()
    assert demo.process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "baseline").exists()
    demo.assert_ports_are_free()


def test_a_demo_does_not_use_a_teacher_that_another_process_serves(
    tiny_cache: Path, tmp_path: Path, tiny_byte_level: Path
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        demo = Demo(tiny_cache, tmp_path / "out", f"teachers.1.urls=['{url}']")
        _, stderr = demo.process.communicate(timeout=TIMEOUT_S)
    assert demo.process.returncode == 1
    assert f"cannot listen on {url.removeprefix('http://')}" in stderr.decode()
    assert "teacher gemma did not start" in stderr.decode()
    assert not listens(demo.ports[0])
