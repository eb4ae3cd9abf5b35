"""How a teacher is run on Ray Serve, and the configuration that `serve run` takes. No ray here: run files hold it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from teachers.engine import EngineKind, EngineOptions
from teachers.limits import Limits

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServeOptions(BaseModel):
    """One teacher: its model, what one replica takes, and how many replicas there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face directory, or the name of one under $TUTELAGE_CACHE/models, on the machine of the replica."""
    engine: EngineKind = "transformers"
    """What runs it."""
    options: EngineOptions = EngineOptions()
    """How the engine runs it: dtype, device, max_tokens, tensor_parallel, …"""
    limits: Limits = Limits()
    """What one request, and all that wait in one replica, may hold."""
    replicas: Count = 1
    """Processes that serve it; with max_replicas, how many there are at the least."""
    max_replicas: Count | None = None
    """Let Ray add replicas up to this number; without it their number is fixed."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    """With max_replicas: requests per replica that Ray adds or removes replicas to reach."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica, a part of one included; more than one is the engine's tensor_parallel."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray sets aside for one replica, and the threads that torch has in it: Ray sets OMP_NUM_THREADS."""
    max_ongoing_requests: Count = 32
    """Requests that one replica works on at once."""
    max_queued_requests: Count = 256
    """Requests that wait in one proxy or handle; one more is refused. Ray counts a request as waiting until a replica
    has taken it, so a number below a client's concurrency refuses bursts that would have found room."""
    retry_after_s: Seconds = 1.0
    """When a refused client is told to come back."""
    health_check_period_s: Seconds = 10.0
    """How often the engine is asked whether it answers; three failures in a row replace the replica."""
    health_check_timeout_s: Seconds = 30.0
    """Time for its answer."""
    graceful_shutdown_timeout_s: Seconds = 60.0
    """Time that a replica which is taken away has for the answers under way."""
    key_file: str | None = None
    """File with the bearer key to ask for, on the machine of the replica."""
    key_env: str | None = None
    """Environment variable with it, in the replica's process."""

    @model_validator(mode="after")
    def _check(self) -> "ServeOptions":
        if max(self.gpus, self.options.tensor_parallel) > 1 and self.gpus != self.options.tensor_parallel:
            raise ValueError(
                f"gpus is {self.gpus:g} and options.tensor_parallel {self.options.tensor_parallel}: "
                "a model on several GPUs needs both to be their number"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, expected at least replicas, {self.replicas}")
        if self.key_file is not None and self.key_env is not None:
            raise ValueError("key_file and key_env: expected one of them")
        return self


def route_prefix(name: str) -> str:
    """Where a teacher is under the address of its Serve."""
    return f"/{name}"


def serve_config(teachers: Mapping[str, ServeOptions], host: str, port: int) -> dict[str, Any]:
    """What `serve run` reads as YAML: one application per teacher, by name."""
    return {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": name,
                "route_prefix": route_prefix(name),
                "import_path": "teachers.serving.ray_serve:application",
                "args": options.model_dump(mode="json", exclude_defaults=True),
            }
            for name, options in teachers.items()
        ],
    }
