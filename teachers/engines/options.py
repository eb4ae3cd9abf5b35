"""The options that all engines share; each engine adds its own in a subclass. Imports no torch and no vllm."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from teachers.engines.base import Engine


class EngineOptions(BaseModel):
    """How to run a model. Unknown options are errors that name the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of weights and activations. auto: bfloat16 on GPUs and on CPUs that compute in it natively, else float32."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether BOS is put in front of every text. auto: see teachers/bos.py."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, BOS included; without it the model's own limit."""
    max_top_k: Annotated[int, Field(ge=1)] = 128
    """Largest K."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown(cls, values: Any) -> Any:
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, Mapping) else []
        if unknown:
            details = [InitErrorDetails(type=_unknown_option(cls, k), loc=(k,), input=values[k]) for k in unknown]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return values

    @property
    def num_gpus(self) -> int:
        """Number of GPUs that share one model."""
        return 1

    def for_ray(self) -> "EngineOptions":
        """Return the options to use inside a Ray actor."""
        return self

    async def open(self, folder: Path) -> "Engine":
        """Load a model directory, in the event loop that will use the engine. Raises TeacherError if that fails."""
        raise NotImplementedError


def _unknown_option(options: type[EngineOptions], key: str) -> PydanticCustomError:
    known = list(options.model_fields)
    return PydanticCustomError(
        "unknown_option",
        "unknown option, expected one of {known}; the nearest known one is '{nearest}'",
        {"known": ", ".join(known), "nearest": difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]},
    )
