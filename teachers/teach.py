"""`tutelage teach`: take the address, load the model, serve it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teachers.keys import key_from_environment, key_from_file

Dtype = Literal["bfloat16", "float32"]
Bos = Literal["auto", "yes", "no"]
KEY_VARIABLE = "TUTELAGE_KEY"


@dataclass(frozen=True)
class TeachOptions:
    """What the command line says; see EngineOptions for the engine's part."""

    host: str = "127.0.0.1"
    port: int = 8101
    dtype: Dtype = "bfloat16"
    device: str = "cpu"
    bos: Bos = "auto"
    max_tokens: int | None = None
    max_top_k: int = 128
    batch_tokens: int = 0
    key_file: Path | None = None


def teach_model(folder: Path, options: TeachOptions, stop_with_parent: bool, say: Callable[[str], None]) -> None:
    """Serve until stopped. Raises TeacherError for an address, key or model that cannot be used."""
    from teachers import serving

    if options.key_file is not None:
        key: str | None = key_from_file(options.key_file)
    else:
        key = key_from_environment(KEY_VARIABLE) if KEY_VARIABLE in os.environ else None
    if stop_with_parent:
        serving.stop_with_parent()
    sock = serving.listen_on(options.host, options.port)
    from teachers.engines.transformers import EngineOptions, TransformersEngine

    engine = TransformersEngine(
        folder,
        EngineOptions(
            options.dtype, options.device, options.bos, options.max_tokens, options.max_top_k, options.batch_tokens
        ),
    )
    guard = "with a key" if key else "without a key"
    say(f"teacher {engine.card.model} on {options.host}:{options.port} {guard}, up to K = {engine.card.max_top_k}")
    serving.serve(engine, sock, key)
