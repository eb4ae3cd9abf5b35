"""The driver of a run on Ray: what it rejects, what it does not retry, and how it stops. All tests share one Ray."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_chat_run import chat_config, write_chats
from trainer.config import RunConfig
from trainer.errors import ConfigError, UserError
from trainer.launch.ray_driver import train_on_ray
from trainer.training.result import RunResult
from trainer.training.stop_signals import stopped_exit_code

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of Ray are not ours

START_S = 240


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """A Ray of four CPUs. No process outlives it."""
    before = set(psutil.Process().children(recursive=True))  # such as the template process of earlier test files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init("local", num_cpus=4, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=60)
    assert not alive


def train_on(config: RunConfig, workers: int = 1, **options: Any) -> RunResult:
    return train_on_ray(config, workers=workers, max_failures=3, resume=False, **options)


def test_more_workers_than_cores_are_rejected_before_anything_is_written(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    message = r"--ray-workers 64 needs 64 CPUs.*room for 4 .* free on .*: use --ray-workers 4, or use a larger Ray"
    with pytest.raises(ConfigError, match=message):
        train_on(config, workers=64)
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_user_is_one_sentence_and_is_not_retried(
    tmp_path: Path, tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    config = config.model_copy(update={"student": config.student.model_copy(update={"model": "/nowhere"})})
    with pytest.raises(UserError, match="^/nowhere is neither a model directory nor a name in [^ ]*$"):
        train_on(config, workers=2)
    assert "restart" not in caplog.text.partition("is not set")[2].partition("restarts at step 0")[2]
    assert "Traceback" not in caplog.text


def test_sigterm_to_the_driver_saves_a_run_over_chats(tmp_path: Path, tiny_byte_level: Path) -> None:
    """Chat templates are rendered in a subprocess of the worker, which ends with it."""
    config = chat_config(tmp_path, tiny_byte_level, {}, write_chats(tmp_path))
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 2000})})
    threading.Thread(target=terminate_after_steps, args=(tmp_path / "out", 2), daemon=True).start()
    result = train_on(config)
    assert (result.terminated, result.model, stopped_exit_code()) == (True, None, 143)
    assert 2 <= result.steps == max(losses(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / f"step-{result.steps:08d}").is_dir()


def terminate_after_steps(folder: Path, steps: int) -> None:
    """Send SIGTERM to this process after some steps, or after START_S."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and max(losses(folder), default=0) >= steps:
            break
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
