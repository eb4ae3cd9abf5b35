"""Options of a teacher on Ray Serve, which run files contain, and the configuration for `serve run`. Imports no ray."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from teachers.engines import DEFAULT_ENGINE, options_class
from teachers.engines.options import EngineOptions
from teachers.server.limits import Limits

Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class RayServeOptions(BaseModel):
    """One teacher on Ray Serve: its model, the resources of a replica and the number of replicas."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face directory, or the name of one under $TUTELAGE_CACHE/models, on the machine of the replica."""
    engine: str = DEFAULT_ENGINE
    """Name of the engine: see teachers/engines."""
    options: SerializeAsAny[EngineOptions] = Field(default={}, validate_default=True)
    """Options of the engine: dtype, max_tokens, device or tensor_parallel, …"""
    limits: Limits = Limits()
    """Limits of one request and of the queue of one replica."""
    replicas: Count = 1
    """Number of replicas; with max_replicas the smallest number."""
    max_replicas: Count | None = None
    """Largest number of replicas, up to which Ray scales; without it the number is fixed."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8.0
    """With max_replicas: requests per replica that Ray aims at when it scales."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica, fractions included; more than one must be equal to tensor_parallel of the engine."""
    cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPU cores that Ray reserves for one replica. Ray sets OMP_NUM_THREADS to it, the number of torch's threads."""
    max_ongoing_requests: Count = 32
    """Requests that one replica processes at the same time."""
    max_queued_requests: Count = 256
    """Requests that wait in one proxy or handle; further ones are rejected. Ray counts a request as waiting until a
    replica has accepted it, so a number below a client's concurrency rejects bursts that a replica could process."""
    retry_after_s: Seconds = 1.0
    """Retry-After of a rejected request."""
    health_check_period_s: Seconds = 10.0
    """Interval between two checks of the engine; a replica is replaced after three failures in a row."""
    health_check_timeout_s: Seconds = 30.0
    """Time for one check."""
    graceful_shutdown_timeout_s: Seconds = 60.0
    """Time for the requests in flight of a replica that is removed."""
    key_file: str | None = None
    """File with the bearer key to require, on the machine of the replica."""
    key_env: str | None = None
    """Environment variable with the bearer key, in the process of the replica."""

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: str) -> str:
        options_class(engine)
        return engine

    @field_validator("options", mode="before")
    @classmethod
    def _validate_options(cls, value: Any, info: ValidationInfo) -> Any:
        """Validate with the options class of the engine."""
        if "engine" not in info.data:  # invalid, which is reported already
            return EngineOptions()
        expected = options_class(info.data["engine"])
        if isinstance(value, EngineOptions) and not isinstance(value, expected):
            raise ValueError(f"expected {expected.__name__} for engine {info.data['engine']}")
        return expected.model_validate(value)

    @model_validator(mode="after")
    def _check(self) -> "RayServeOptions":
        num_gpus = self.options.num_gpus
        if max(self.gpus, num_gpus) > 1 and self.gpus != num_gpus:
            raise ValueError(
                f"gpus is {self.gpus:g}, but engine {self.engine} uses {num_gpus} with these options: "
                "gpus and options.tensor_parallel of a model on several GPUs must be equal"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, expected at least replicas, {self.replicas}")
        if self.key_file is not None and self.key_env is not None:
            raise ValueError("key_file and key_env: expected one of them")
        return self


def route_prefix(name: str) -> str:
    """Return the path of a teacher under the address of Ray Serve."""
    return f"/{name}"


def serve_config(teachers: Mapping[str, RayServeOptions], host: str, port: int) -> dict[str, Any]:
    """Return the configuration that `serve run` reads as YAML, with one application per teacher."""
    return {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": name,
                "route_prefix": route_prefix(name),
                "import_path": "teachers.server.ray_serve:application",
                "args": _arguments(options),
            }
            for name, options in teachers.items()
        ],
    }


def _arguments(options: RayServeOptions) -> dict[str, Any]:
    arguments = options.model_dump(mode="json", exclude_defaults=True)
    if not arguments.get("options"):
        arguments.pop("options", None)
    return arguments
