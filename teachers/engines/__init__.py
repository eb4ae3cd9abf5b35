"""Engines: the libraries that run a model. One file per engine and one light file with its options.

ENGINES is the registry. A new engine is a class of options with an `open` method, the engine that it opens, and one
line here. Importing this package, or the options of an engine, loads no torch, transformers or vllm.
"""

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.engines.options import EngineOptions

ENGINES = {  # the first one is the default
    "transformers": "teachers.engines.transformers_options:TransformersOptions",
    "vllm": "teachers.engines.vllm_options:VllmOptions",
}
DEFAULT_ENGINE = next(iter(ENGINES))


def options_class(engine: str) -> "type[EngineOptions]":
    """Return the options class of an engine. Raises ValueError for an unknown name."""
    if engine not in ENGINES:
        raise ValueError(f"expected one of {', '.join(ENGINES)}, received {engine!r}")
    found: type[EngineOptions] = pkgutil.resolve_name(ENGINES[engine])
    return found


def engine_options(engine: str, values: Mapping[str, Any]) -> "EngineOptions":
    """Validate the options of an engine. Raises TeacherError naming the option, as a flag of `tutelage serve`."""
    from pydantic import ValidationError

    from teachers.protocol.errors import TeacherError

    try:
        return options_class(engine).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + "-".join(map(str, first["loc"])).replace("_", "-")
        raise TeacherError(f"{flag}: {first['msg']}, received {first['input']!r} for engine {engine}") from error
    except ValueError as error:
        raise TeacherError(f"--engine: {error}") from error
