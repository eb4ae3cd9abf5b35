"""`tutelage teach`: take the address, load the model, serve it."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teachers.engine import EngineKind, EngineOptions
from teachers.engines import open_engine
from teachers.keys import key_from_environment, key_from_file

KEY_VARIABLE = "TUTELAGE_KEY"


@dataclass(frozen=True)
class TeachOptions:
    """What the command line says."""

    host: str = "127.0.0.1"
    port: int = 8101
    kind: EngineKind = "transformers"
    engine: EngineOptions = EngineOptions()
    key_file: Path | None = None


def teach_model(folder: Path, options: TeachOptions, stop_with_parent: bool, say: Callable[[str], None]) -> None:
    """Serve until stopped. Raises TeacherError for an address, key or model that cannot be used."""
    from teachers import serving

    if options.key_file is not None:
        key: str | None = key_from_file(options.key_file)
    else:
        key = key_from_environment(KEY_VARIABLE) if KEY_VARIABLE in os.environ else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exit closes the engine on its way
    if stop_with_parent:
        serving.stop_with_parent()
    sock = serving.listen_on(options.host, options.port)

    async def teach() -> None:
        engine = await open_engine(options.kind, folder, options.engine)
        guard = "with a key" if key else "without a key"
        say(f"teacher {engine.card.model} on {options.host}:{options.port} {guard}, up to K = {engine.card.max_top_k}")
        await serving.serve(engine, sock, key)

    asyncio.run(teach())
