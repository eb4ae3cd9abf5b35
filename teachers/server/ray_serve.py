"""A teacher as a Ray Serve application: each replica runs the application of app.py. Imports ray.

Requests over HTTP pass Ray's proxy, under /NAME. Requests inside the cluster use a handle to `Replica.respond`. Both
reach the same application, so limits, keys and errors are the same. Ray's queue is bounded: when it is full, requests
get 503 and Retry-After. A replica whose engine does not respond is replaced.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from teachers.client.http import Headers, Response, send_to_app
from teachers.engines.base import Engine
from teachers.engines.options import EngineOptions
from teachers.keys import Keys, keys_from_environment
from teachers.model_dirs import model_dir
from teachers.server.app import build_app
from teachers.server.guards import key_guard
from teachers.server.ray_options import RayServeOptions
from teachers.server.service import Service

MAX_CONSTRUCTIONS = 3  # attempts to start a replica; Ray's default of 20 would not load an invalid model either

DEPLOYMENT = "teacher"  # name of the only deployment of an application

EngineFactory = Callable[[EngineOptions, Path], Awaitable[Engine]]


async def open_engine(options: EngineOptions, folder: Path) -> Engine:
    """Open the engine of these options inside a Ray actor."""
    return await options.for_ray().open(folder)


class Replica:
    """One process of a teacher. Ray calls all its methods in one event loop, which the engine uses too."""

    _engine: Engine | None = None

    async def __init__(self, options: RayServeOptions, make_engine: EngineFactory = open_engine) -> None:  # type: ignore[misc]
        keys = _keys(options)
        self._engine = await make_engine(options.options, model_dir(options.model))
        service = Service(self._engine, options.limits)
        self._app = build_app(service, key_guard(keys) if keys else None)

    def __serve_build_asgi_app__(self) -> FastAPI:  # called by Ray after __init__
        return self._app

    async def respond(self, method: str, path: str, headers: Headers, body: bytes) -> Response:
        """Return the application's response to a request by handle."""
        return await send_to_app(self._app, method, path, headers, body)

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine does not work. Ray replaces the replica after three failures in a row."""
        status, _, body = await self.respond("GET", "/ready", {}, b"")
        if status != 200:
            raise RuntimeError(f"the engine is not ready: {body.decode()}")

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.close()


def application(options: RayServeOptions) -> serve.Application:
    """Return the application of a teacher; `serve run` calls this function with `args` of its YAML as the options."""
    return bind(options, open_engine)


def bind(options: RayServeOptions, make_engine: EngineFactory, deployment_name: str = DEPLOYMENT) -> serve.Application:
    """Return an application that is not running yet; its replicas create their engine with `make_engine`."""
    scaling = {
        "min_replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing_requests,
    }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=deployment_name,
        **({"autoscaling_config": scaling} if options.max_replicas else {"num_replicas": options.replicas}),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": options.retry_after_s},
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        max_constructor_retry_count=MAX_CONSTRUCTIONS,
    )
    return deployment.bind(options, make_engine)


def _keys(options: RayServeOptions) -> Keys | None:
    if options.key_file is not None:
        return Keys.from_file(Path(options.key_file))
    return Keys(keys_from_environment(options.key_env)) if options.key_env else None
