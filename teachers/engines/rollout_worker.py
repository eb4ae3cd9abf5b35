"""Extension of vLLM's worker processes (--worker-extension-cls) that replaces the weights of the model.

A worker first reads and checks all weights. They are loaded by a second call, after every worker has succeeded. Both
calls are executed between two steps of the engine, so that no forward pass sees a part of the new weights. Requests in
flight continue with the new weights and keep the KV cache that the old ones have computed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from teachers.protocol.errors import TeacherError
from teachers.protocol.untrusted_text import clean
from teachers.sync_folder import expected_shapes, read_sync_folder

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.inplace"
NOT_LOADED = "Following weights were not loaded"


class RolloutWorker:
    """Methods of a vLLM worker. vLLM adds this class to the bases of its own worker class."""

    vllm_config: Any
    reload_weights: Any
    rollout_weights: dict[str, Tensor] | None

    def read_rollout_weights(self, folder: str, digest: str) -> str | None:
        """Read and check the weights in a folder. `load_rollout_weights` loads them.

        Returns an error message, or None if the weights are valid.
        """
        self.rollout_weights = None
        try:
            expected = expected_shapes(Path(self.vllm_config.model_config.model))
            self.rollout_weights = read_sync_folder(Path(folder), digest, expected)
        except TeacherError as error:
            return str(error)
        except Exception as error:  # libraries raise errors of any class
            return f"the weights cannot be read ({type(error).__name__}: {clean(error, 150)})"
        return None

    def load_rollout_weights(self) -> None:
        """Load the weights that were read. `reload_weights` of vLLM can be repeated for all kinds of layers.

        Raises RuntimeError if some parameters of the model were not loaded, of which vLLM only warns.
        """
        weights, self.rollout_weights = self.rollout_weights, None
        assert weights is not None, "read_rollout_weights has succeeded"
        with _messages_of(RELOAD_LOGGER) as messages:
            self.reload_weights(weights_iterator=iter(weights.items()))
        for message in messages:
            if message.startswith(NOT_LOADED):
                raise RuntimeError(message)

    def discard_rollout_weights(self) -> None:
        """Release the weights that were read, because another worker has refused them."""
        self.rollout_weights = None


@contextmanager
def _messages_of(name: str) -> Iterator[list[str]]:
    """Collect the warnings that a logger writes within the block, whatever its level is."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages, collector, logger = list[str](), Collector(logging.WARNING), logging.getLogger(name)
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
