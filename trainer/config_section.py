"""Base class and field types of the run file's sections. Imports no third-party package but pydantic."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
ROLES = ("bos", "eos", "end_of_turn", "pad", "unk")


class Section(BaseModel):
    """Base of all sections: frozen models that reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class _OneOf:
    """Validator of a name in a registry."""

    registry: Mapping[str, str]

    def __call__(self, name: str) -> str:
        if name in self.registry:
            return name
        nearest = difflib.get_close_matches(name, self.registry, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"expected one of {', '.join(self.registry)}{hint}")


def one_of(registry: Mapping[str, str]) -> AfterValidator:
    """Return a validator that accepts the names in a registry.

    The registry is read when a value is validated. The validator raises ValueError naming the choices and the closest
    one.
    """
    return AfterValidator(_OneOf(registry))


def choices_of(metadata: object) -> tuple[str, ...]:
    """Return the names that a validator from `one_of` accepts; empty for other metadata of a field."""
    function = metadata.func if isinstance(metadata, AfterValidator) else None
    return tuple(function.registry) if isinstance(function, _OneOf) else ()


def _known_roles(roles: dict[str, str]) -> dict[str, str]:
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
    return roles


Roles = Annotated[dict[str, str], AfterValidator(_known_roles)]
