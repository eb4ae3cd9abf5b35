"""One process of a run on Ray Train, and the actor through which the driver stops it.

Importing this module loads no torch, which the actor does not need.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from trainer.config import RunConfig
from trainer.launch.ray_failures import as_worker_failure


class StopFlag:
    """Actor that passes the stop request of the driver to the workers."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def set(self) -> None:
        """Request the end of the run."""
        self._event.set()

    async def wait(self) -> None:
        """Return once the end of the run is requested."""
        await self._event.wait()


def train_worker(settings: dict[str, Any]) -> None:
    """Train in one worker. It always resumes, because it may be a restart after a failure.

    Raises WorkerFailure for every error.
    """
    with suppress(FileNotFoundError, NotADirectoryError):  # on another node: use Ray's copy, or absolute paths
        os.chdir(settings["cwd"])
    on_stop = partial(_on_stop_flag, settings["stop_flag"])
    try:
        from trainer.training.loop import train

        config = RunConfig.model_validate_json(settings["config"])
        train(config, resume=True, stop_at=settings["stop_at"], on_stop=on_stop)
    except Exception as error:
        raise as_worker_failure(error) from None


@contextmanager
def _on_stop_flag(flag: Any, callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` once the driver requests the end of the run, also if it did so before the block. A StopSource."""
    import ray
    from ray.exceptions import RayError

    ended = threading.Event()

    def wait() -> None:
        with suppress(RayError):  # the driver has ended, and Ray ends this worker
            ray.get(flag.wait.remote())
            if not ended.is_set():
                callback()

    threading.Thread(target=wait, name="stop flag", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
