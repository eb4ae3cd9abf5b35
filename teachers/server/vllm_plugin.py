"""Routes of Tutelage inside a vLLM server: VLLM_PLUGINS=tutelage makes an existing server a native teacher.

If TUTELAGE_SYNC_DIR is set too, the server is a rollout server instead (rollouts.py). A server whose weights change
cannot be a teacher, because its card would not describe them.

This is an endpoint plugin of vLLM (entry point group `vllm.endpoint_plugins` in pyproject.toml). The server's own
--api-key guards /v1; no second key is needed. With --api-server-count N, each of the N processes has its own limits.
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from teachers.protocol.errors import TeacherError
from teachers.server.app import teacher_router
from teachers.server.rollout_options import SYNC_DIR_VARIABLE, check_rollout_server, checked_sync_dir
from teachers.server.rollouts import Weights, attach_rollout_routes
from teachers.server.service import Service


class TutelagePlugin:
    """An implementation of vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "tutelage"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service = Service(registry=REGISTRY)  # vLLM's /metrics exports this registry
        sync_dir = os.environ.get(SYNC_DIR_VARIABLE)
        self._weights = Weights(Path(sync_dir)) if sync_dir else None

    def attach_router(self, app: FastAPI) -> None:
        if self._weights is not None:
            attach_rollout_routes(app, self._weights)
        else:
            app.include_router(teacher_router(self._service))

    async def init_state(self, engine_client: Any, state: object, args: Namespace) -> None:
        """Set the engine. Raises TeacherError, which stops the server, if the server lacks what it needs."""
        if engine_client is None:
            raise TeacherError("this vLLM server has no engine: a teacher needs a model that generates text")
        if self._weights is not None:
            checked_sync_dir(self._weights.sync_dir)
            check_rollout_server(engine_client.vllm_config, args)
            self._weights.call = lambda method, *arguments: engine_client.collective_rpc(method, args=arguments)
            return
        from teachers.engines.vllm import VllmEngine

        self._service.engine = await VllmEngine.wrap(engine_client)
