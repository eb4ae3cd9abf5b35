"""Implementation of `tutelage serve`: bind the address, load the model, and serve it."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from teachers.engines.options import EngineOptions
from teachers.keys import Keys, keys_from_environment
from teachers.protocol.errors import TeacherError
from teachers.server.limits import Limits
from teachers.server.service import Service

KEY_VARIABLE = "TUTELAGE_KEY"


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server process.

    engine              the engine's own options
    tls_cert, tls_key   PEM files, both or neither
    drain_s             seconds for the requests in flight when the process is stopped
    request_log         write one line to standard error per request, without texts
    stop_with_parent    stop when standard input closes
    """

    engine: EngineOptions
    host: str = "127.0.0.1"
    port: int = 8101
    key_file: Path | None = None
    limits: Limits = Limits()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_s: float = 10.0
    request_log: bool = False
    stop_with_parent: bool = False


def serve_model(folder: Path, options: ServerOptions, echo: Callable[[str], None]) -> None:
    """Serve until stopped. Raises TeacherError for an invalid address, key, certificate or model."""
    import uvloop

    from teachers.server import process
    from teachers.server.guards import is_loopback, key_guard

    keys = _keys(options.key_file)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise TeacherError("expected --tls-cert and --tls-key together: a certificate chain and its private key")
    tls = process.tls_context(options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None
    if keys is None and not is_loopback(options.host):
        echo(f"warning: {options.host} is reachable from other machines and requires no key: use --key-file")
    if options.request_log:
        logging.getLogger("tutelage.requests").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # SystemExit closes the engine
    if options.stop_with_parent:
        process.stop_with_parent()
    sock = process.listen_on(options.host, options.port)

    async def run() -> None:
        engine = await options.engine.open(folder)
        service = Service(engine, options.limits)
        card = engine.card
        access = f"with {len(keys)} key{'s' if len(keys) > 1 else ''}" if keys else "without a key"
        address = f"{options.host}:{options.port}{' over TLS' if tls else ''}"
        echo(f"teacher {card.model} in {card.dtype} on {address} {access}, up to K = {card.max_top_k}")
        server = process.TeacherServer(service, key_guard(keys) if keys else None, tls, options.drain_s)
        await process.serve(service, sock, server)

    uvloop.run(run())


def _keys(path: Path | None) -> Keys | None:
    if path is not None:
        return Keys.from_file(path)
    return Keys(keys_from_environment(KEY_VARIABLE)) if KEY_VARIABLE in os.environ else None
