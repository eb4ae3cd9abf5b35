"""Runs that start, or are restarted, before their teachers."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faulty import FaultyTeacher
from tests.processes import started
from tests.trainer.ranks import command
from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_cli import call, run_file
from trainer.config import RunConfig
from trainer.training.loop import train

pytestmark = pytest.mark.slow
LIMIT_S = 240.0  # for a machine under load
WAITING = "waiting for the teacher up to 600 s (start_timeout_s)"


@pytest.fixture
def teacher(tiny_sentencepiece: Path) -> Iterator[FaultyTeacher]:
    teacher = FaultyTeacher(tiny_sentencepiece)
    yield teacher
    teacher.kill()


def waiting_config(teacher: FaultyTeacher, student: Path, folder: Path, epochs: int = 2) -> RunConfig:
    output = {"checkpoint_every_steps": 2}
    config = run_config(
        student, write_corpus(folder), folder / "out", [teacher.url], output=output, train={"epochs": epochs}
    )
    teachers = [t.model_copy(update={"start_timeout_s": 600.0}) for t in config.teachers]
    return config.model_copy(update={"teachers": teachers})


def await_text(log: Path, text: str, process: psutil.Popen) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {text!r} in {log.read_text()[-3000:]}"
        time.sleep(0.05)


def test_train_and_doctor_wait_for_a_teacher_that_starts_later(
    teacher: FaultyTeacher, tiny_byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = waiting_config(teacher, tiny_byte_level, tmp_path)
    path = run_file(tmp_path, config)
    began = time.monotonic()
    result = call("doctor", path)
    assert time.monotonic() - began < 60
    assert result.exit_code == 1
    assert "WRONG  teacher t0: at " in result.stdout
    assert "no response (connection refused)" in result.stdout
    threading.Timer(1.0, teacher.start).start()
    train(config)
    assert any(WAITING in message for message in caplog.messages)
    teacher.kill()
    threading.Timer(1.0, teacher.start).start()
    assert call("doctor", path, "--wait").exit_code == 0


def test_sigterm_ends_the_wait_with_143_and_leaves_nothing(
    teacher: FaultyTeacher, tiny_byte_level: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, waiting_config(teacher, tiny_byte_level, tmp_path))
    log = tmp_path / "log.txt"
    with started([sys.executable, "-m", "trainer.cli", "train", str(path)], log) as process:
        await_text(log, WAITING, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()


def test_ranks_that_are_restarted_while_a_teacher_is_away_use_up_one_restart(
    teacher: FaultyTeacher, tiny_byte_level: Path, tmp_path: Path
) -> None:
    config = waiting_config(teacher, tiny_byte_level, tmp_path, epochs=10)
    launch = command(config, 2, "--resume", "--pause=0.1")
    launch.insert(launch.index("--standalone"), "--max-restarts=1")
    teacher.start().await_ready()
    log, out = tmp_path / "log.txt", tmp_path / "out"
    with started(launch, log) as process:
        while not (out / "checkpoints" / "step-00000004").exists():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        teacher.kill()
        process.children()[0].kill()
        await_text(log, WAITING, process)
        time.sleep(3)
        assert process.poll() is None
        teacher.start()
        assert process.wait(timeout=LIMIT_S) == 0, log.read_text()[-3000:]
    assert max(losses(out)) == 30
