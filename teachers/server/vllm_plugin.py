"""The teacher routes inside a vLLM server: VLLM_PLUGINS=tutelage makes an existing server a native teacher.

This is an endpoint plugin of vLLM (entry point group `vllm.endpoint_plugins` in pyproject.toml). The server's own
--api-key guards /v1; no second key is needed. With --api-server-count N, each of the N processes has its own limits.
"""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from teachers.protocol.errors import TeacherError
from teachers.server.app import teacher_router
from teachers.server.service import Service


class TutelagePlugin:
    """An implementation of vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "tutelage"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service = Service(registry=REGISTRY)  # vLLM's /metrics exports this registry

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(teacher_router(self._service))

    async def init_state(self, engine_client: Any, state: object, args: Namespace) -> None:
        """Set the engine. Raises TeacherError, which stops the server, if it cannot be a teacher."""
        from teachers.engines.vllm import VllmEngine

        if engine_client is None:
            raise TeacherError("this vLLM server has no engine: a teacher needs a model that generates text")
        self._service.engine = await VllmEngine.wrap(engine_client)
