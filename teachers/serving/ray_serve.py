"""A teacher as a Ray Serve application: the server of app.py in every replica. Here, and in asking/handle.py, is ray.

Over HTTP a replica is asked through Ray's proxy, under /NAME; inside the cluster through `Replica.ask`. Both end at
the same application, so limits, keys and refusals are the same. What is added to Ray: its queue is bounded, a full one
answers 503 with Retry-After, and a replica whose engine does not answer is replaced.
"""

import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from teachers.asking.transport import Headers, Reply, ask_app
from teachers.engine import Engine, EngineKind, EngineOptions
from teachers.engines import open_engine
from teachers.errors import TeacherError
from teachers.keys import Keys, keys_from_environment
from teachers.models import model_folder
from teachers.ray_options import ServeOptions, route_prefix
from teachers.serving.app import build_app, key_guard
from teachers.serving.service import Service

CONSTRUCTIONS = 3  # a model that cannot be loaded is not there at the twentieth try either

Opening = Callable[[EngineKind, Path, EngineOptions], Awaitable[Engine]]


class Replica:
    """One process of one teacher. Ray calls all of it in one event loop, which is the engine's too."""

    _engine: Engine | None = None

    async def __init__(self, options: ServeOptions, opening: Opening = open_engine) -> None:  # type: ignore[misc]
        keys = _keys(options)
        self._engine = await opening(options.engine, model_folder(options.model), _engine_options(options))
        service = Service(self._engine, options.limits)
        self._app = build_app(service, key_guard(keys) if keys else None)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray asks for it after __init__
        return self._app

    async def ask(self, method: str, path: str, headers: Headers, body: bytes) -> Reply:
        """The application's answer to a request that comes by handle."""
        return await ask_app(self._app, method, path, headers, body)

    async def check_health(self) -> None:
        """Ray replaces the replica after three failures in a row."""
        status, _, body = await self.ask("GET", "/ready", {}, b"")
        if status != 200:
            raise RuntimeError(f"the engine is not ready: {body.decode()}")

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.close()


def application(options: ServeOptions) -> serve.Application:
    """What `serve run` and its YAML call, with `args` as the options."""
    return bind(options, open_engine)


def bind(options: ServeOptions, opening: Opening) -> serve.Application:
    """An application that is not running yet; its replicas open their engine by `opening`."""
    scaling = {
        "min_replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing_requests,
    }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="teacher",
        **({"autoscaling_config": scaling} if options.max_replicas else {"num_replicas": options.replicas}),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": options.retry_after_s},
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        max_constructor_retry_count=CONSTRUCTIONS,
    )
    return deployment.bind(options, opening)


def serve_teachers(teachers: Mapping[str, ServeOptions], host: str, port: int, address: str | None) -> None:
    """Run them until interrupted on the Ray cluster at `address`, or on a local one of their own.

    Whatever else a cluster serves stays as it is; where Serve runs already, so do its host and port, and Ray's own log
    says so. Raises TeacherError if a teacher cannot be started.
    """
    try:
        ray.init(address or "local", include_dashboard=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own aborts what takes longer than 3 s
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run_many([serve.RunTarget(application(o), name, route_prefix(name)) for name, o in teachers.items()])
            while True:
                signal.pause()
        except RuntimeError as error:  # Ray says which; why is the last line of the replica's own message
            raise TeacherError(f"{error} {' '.join(map(_reason, teachers))}".strip()) from error
        finally:
            for name in teachers:
                serve.delete(name)
    except (RuntimeError, ConnectionError, RayError, RayServeException) as error:
        raise TeacherError(f"Ray Serve: {error}") from error
    finally:
        ray.shutdown()


def _reason(name: str) -> str:
    """The last line with an error in what Ray keeps of an application's replicas; empty if there is none."""
    found = serve.status().applications.get(name)
    messages = [d.message for d in found.deployments.values()] if found else []
    lines = [line for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1] if lines else ""


def _engine_options(options: ServeOptions) -> EngineOptions:
    """With several GPUs vLLM starts its workers itself: Ray has set them aside for this one actor."""
    if options.engine != "vllm" or options.options.tensor_parallel == 1:
        return options.options
    arguments = {"distributed_executor_backend": "mp", **options.options.vllm_args}
    return replace(options.options, vllm_args=arguments)


def _keys(options: ServeOptions) -> Keys | None:
    if options.key_file is not None:
        return Keys.of_file(Path(options.key_file))
    return Keys(keys_from_environment(options.key_env)) if options.key_env else None
