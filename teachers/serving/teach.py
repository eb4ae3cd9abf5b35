"""`tutelage teach`: take the address, load the model, serve it."""

import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teachers.engine import EngineKind, EngineOptions
from teachers.engines import open_engine
from teachers.errors import TeacherError
from teachers.keys import Keys, keys_from_environment
from teachers.limits import Limits
from teachers.serving.service import Service

KEY_VARIABLE = "TUTELAGE_KEY"


@dataclass(frozen=True)
class TeachOptions:
    """What the command line says.

    tls_cert, tls_key   PEM files, both or neither
    drain_s             for what is under way when the process is told to stop
    request_log         one line on standard error for every request, without texts
    stop_with_parent    end when standard input closes
    """

    host: str = "127.0.0.1"
    port: int = 8101
    kind: EngineKind = "transformers"
    engine: EngineOptions = EngineOptions()
    key_file: Path | None = None
    limits: Limits = Limits()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_s: float = 10.0
    request_log: bool = False
    stop_with_parent: bool = False


def teach_model(folder: Path, options: TeachOptions, say: Callable[[str], None]) -> None:
    """Serve until stopped. Raises TeacherError for an address, key, certificate or model that cannot be used."""
    import uvloop

    from teachers.serving import process
    from teachers.serving.app import key_guard

    keys = _keys(options.key_file)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise TeacherError("give --tls-cert and --tls-key together: a certificate chain and its private key")
    tls = process.tls_context(options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None
    if keys is None and not _is_loopback(options.host):
        say(f"warning: {options.host} can be reached by others, and this teacher asks for no key: give it --key-file")
    if options.request_log:
        logging.getLogger("tutelage.requests").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exit closes the engine on its way
    if options.stop_with_parent:
        process.stop_with_parent()
    sock = process.listen_on(options.host, options.port)

    async def teach() -> None:
        engine = await open_engine(options.kind, folder, options.engine)
        service = Service(engine, options.limits)
        guarded = f"with {len(keys)} key{'s' if len(keys) > 1 else ''}" if keys else "without a key"
        where = f"{options.host}:{options.port}{' over TLS' if tls else ''}"
        say(f"teacher {engine.card.model} on {where} {guarded}, up to K = {engine.card.max_top_k}")
        server = process.TeacherServer(service, key_guard(keys) if keys else None, tls, options.drain_s)
        await process.serve(service, sock, server)

    uvloop.run(teach())


def _keys(path: Path | None) -> Keys | None:
    if path is not None:
        return Keys.of_file(path)
    return Keys(keys_from_environment(KEY_VARIABLE)) if KEY_VARIABLE in os.environ else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
