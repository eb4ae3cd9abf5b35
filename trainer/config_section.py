"""Base class and field types of the run file's sections. Imports no third-party package but pydantic."""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_INT = 2**31 - 1  # of integers without a separate bound: larger ones overflow in torch, numpy or tokenizers
MAX_BYTES = 2**53
MAX_SEED = 2**63 - 1
FLOATS = 1e-12, 1e12  # magnitudes of every number but 0: float32 computes with them and with their products
MAX_CHARS = 4096  # of every string; the longest path of Linux
MAX_PART_BYTES = 255  # of one part of a path
SECRET = "secret"  # type of a validation error that must not repeat the value

Positive = Annotated[int, Field(gt=0)]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
ROLES = ("bos", "eos", "end_of_turn", "pad", "unk")


class Section(BaseModel):
    """Base of all sections: frozen models that reject unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # an input may be a secret; run_file.py shows the others
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _check_field(cls, given: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Reject booleans in place of numbers, and values that libraries cannot take, in every field of every section.

        The check includes the values of nested tables that are not sections, such as [teachers.serve].
        """
        value = validate(given)
        if errors := [*_booleans_as_numbers(given, value)]:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        metadata = cls.model_fields[info.field_name].metadata if info.field_name in cls.model_fields else []
        _check_value(value, has_bound=any(hasattr(each, "le") for each in metadata))
        return value


def _booleans_as_numbers(given: Any, value: Any, *path: int | str) -> Iterator[InitErrorDetails]:
    """Yield an error for every boolean in a field that pydantic has converted to a number."""
    if isinstance(given, bool):
        if isinstance(value, int | float) and not isinstance(value, bool):
            error = PydanticCustomError("boolean", "expected a number")
            yield InitErrorDetails(type=error, loc=path, input=given)
    elif isinstance(given, dict):
        for key, item in given.items():
            converted = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
            yield from _booleans_as_numbers(item, converted, *path, key)
    elif isinstance(given, list | tuple) and isinstance(value, list | tuple):
        for i, (item, converted) in enumerate(zip(given, value, strict=True)):
            yield from _booleans_as_numbers(item, converted, *path, i)


def _check_value(value: Any, has_bound: bool) -> None:
    match value:
        case bool() | Section():
            pass
        case int() if abs(value) > MAX_INT and not has_bound:
            raise ValueError(f"expected at most {MAX_INT:,}")
        case float() if value and not FLOATS[0] <= abs(value) <= FLOATS[1]:
            raise ValueError(f"expected a number between {FLOATS[0]:g} and {FLOATS[1]:g}")
        case str() if len(value) > MAX_CHARS or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"expected at most {MAX_CHARS:,} characters, none of them NUL or half of a surrogate pair")
        case list() | tuple():
            for item in value:
                _check_value(item, has_bound)
        case dict():
            for item in (*value, *value.values()):
                _check_value(item, has_bound)


@dataclass(frozen=True, eq=False)  # a dict has no hash, which a union of types needs
class _OneOf:
    """Validator of a name in a registry. None, the value of an optional field, is valid."""

    registry: Mapping[str, str]

    def __call__(self, name: str | None) -> str | None:
        if name is None or name in self.registry:
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


def _is_path(text: str) -> str:
    if not text:
        raise ValueError("expected a path")
    if os.path.expanduser(text).startswith("~"):
        raise ValueError("this user has no home folder; write the whole path")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError("this locale has no such file names: set LC_ALL=C.UTF-8") from error
    if any(len(part.encode(errors="replace")) > MAX_PART_BYTES for part in text.split("/")):
        raise ValueError(f"the name of a file or folder has at most {MAX_PART_BYTES} bytes")
    return text


PathText = Annotated[str, AfterValidator(_is_path)]
"""Path of a file or folder, or a pattern of paths. ~ is the home folder."""


def _is_name(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > MAX_PART_BYTES:
        raise ValueError(f"expected 1 to {MAX_PART_BYTES} printable characters")
    return text


Name = Annotated[str, AfterValidator(_is_name)]
"""Name in metrics, tables and errors."""


def _is_variable(text: str) -> str:
    if not text.isidentifier() or not text.isascii():
        message = "expected the name of an environment variable (letters, digits and _), not the key itself"
        raise PydanticCustomError(SECRET, message)
    return text


VariableName = Annotated[str, AfterValidator(_is_variable)]
"""Name of an environment variable that holds a secret. An error does not repeat it: it may be the secret itself."""


def _is_address(text: str) -> str:
    try:
        address = urlsplit(text.removeprefix("dns+"))
        has_secret = address.username is not None or address.password is not None or bool(address.query)
    except ValueError as error:
        raise PydanticCustomError(SECRET, "expected an address such as http://HOST:PORT") from error
    if has_secret or "@" in address.netloc:
        message = "an address holds no user, password or query: give the bearer key by key_file or key_env"
        raise PydanticCustomError(SECRET, message)
    if not text.isprintable() or any(c.isspace() for c in text):
        raise PydanticCustomError(SECRET, "expected an address without spaces and control characters")
    return text


Address = Annotated[str, AfterValidator(_is_address)]
"""Address of a server, without user and password."""
