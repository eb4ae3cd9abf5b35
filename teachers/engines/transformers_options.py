"""Options of the transformers engine."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from teachers.engines.options import EngineOptions

if TYPE_CHECKING:
    from teachers.engines.base import Engine


class TransformersOptions(EngineOptions):
    """How to run a model with transformers, on a CPU or one GPU."""

    device: Annotated[str, Field(min_length=1)] = "cpu"
    """cpu, cuda, cuda:1, …"""
    batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Largest number of padded tokens per forward pass. 0: one sequence per pass, with reproducible scores."""

    async def open(self, folder: Path) -> "Engine":
        from teachers.engines.transformers import TransformersEngine  # loads torch

        return await asyncio.to_thread(TransformersEngine, folder, self)
