"""The same routes inside a vLLM server: VLLM_PLUGINS=tutelage makes an existing server a native teacher.

An endpoint plugin of vLLM (entry point group `vllm.endpoint_plugins`, see pyproject.toml). The server's own --api-key
guards /v1, and nothing asks for a second one. With --api-server-count N every one of the N processes admits questions
by limits of its own.
"""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from teachers.errors import TeacherError
from teachers.serving.app import teacher_router
from teachers.serving.service import Service


class TutelagePlugin:
    """What vLLM asks of an endpoint plugin: vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "tutelage"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service = Service(registry=REGISTRY)  # which vLLM's own /metrics shows

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(teacher_router(self._service))

    async def init_state(self, engine_client: Any, state: object, args: Namespace) -> None:
        """Raises TeacherError, which ends the server's start, if it cannot be a teacher."""
        from teachers.engines.vllm import VllmEngine

        if engine_client is None:
            raise TeacherError("this vLLM server has no engine: a teacher needs one that generates")
        self._service.engine = await VllmEngine.over(engine_client)
