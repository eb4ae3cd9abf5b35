"""The Ray Serve applications of one `tutelage serve-ray`: deploy, watch and delete them. Imports ray.

An application belongs to the command that deployed it. The name of its deployment contains a random token of the
command. Commands of other users can share the cluster: a name that is in use is not deployed, unless the user asks for
it, and only applications with the own token are deleted.
"""

import logging
import secrets
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NoReturn

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from teachers.protocol.errors import TeacherError
from teachers.server.ray_options import RayServeOptions, route_prefix
from teachers.server.ray_serve import DEPLOYMENT, bind, open_engine

log = logging.getLogger("tutelage.serve")

WATCH_S = 5.0  # interval of the checks that the applications still exist


def serve_teachers(
    teachers: Mapping[str, RayServeOptions], host: str, port: int, address: str | None, replace: bool = False
) -> None:
    """Serve the teachers until interrupted, on the Ray cluster at `address` or on a new local one.

    Other applications of the cluster are not changed. If Serve is running already, its host and port remain in use, and
    Ray logs that. Raises TeacherError if a teacher cannot be started, if the cluster already serves an application of
    its name and `replace` is false, or if others have replaced all applications.
    """
    try:
        ray.init(address or "local", include_dashboard=False)
        _interrupt_on_stop_signals()
        serve.start(http_options={"host": host, "port": port})
        if not replace:
            _check_names(teachers)
        token = secrets.token_hex(4)
        try:
            _deploy(teachers, token)
            _watch(teachers, token)
        finally:
            for name in _own(teachers, token):
                serve.delete(name)
    except (RuntimeError, ConnectionError, RayError, RayServeException) as error:
        raise TeacherError(f"Ray Serve: {error}") from error
    finally:
        ray.shutdown()


def _interrupt_on_stop_signals() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP. Ray's own handler of SIGTERM aborts after 3 s."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _check_names(names: Iterable[str]) -> None:
    """Raise TeacherError if the cluster already serves an application of one of these names."""
    applications = serve.status().applications
    taken = [name for name in names if name in applications and applications[name].status != "DELETING"]
    if taken:
        raise TeacherError(
            f"the Ray cluster already serves {', '.join(taken)}: rename the teacher in the run file, wait until the "
            "other application is deleted, or replace it with --replace"
        )


def _deploy(teachers: Mapping[str, RayServeOptions], token: str) -> None:
    """Start the applications, and return once they run. Raises TeacherError."""
    targets = [
        serve.RunTarget(bind(options, open_engine, _deployment(token)), name, route_prefix(name))
        for name, options in teachers.items()
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as error:  # it names the teacher; the reason is in the replica's message
        raise TeacherError(f"{error} {' '.join(map(_reason, teachers))}".strip()) from error
    if lost := set(teachers) - set(_own(teachers, token)):
        raise TeacherError(
            f"another user has deployed {', '.join(sorted(lost))} to the Ray cluster at the same time: rename the "
            "teacher in one of the run files"
        )


def _watch(names: Iterable[str], token: str) -> NoReturn:
    """Report applications that others replace or delete. Raises TeacherError when none is left."""
    remaining = set(names)
    while remaining:
        time.sleep(WATCH_S)
        with suppress(RayError, RayServeException):  # the controller restarts
            for name in remaining - set(_own(names, token)):
                log.warning("teacher %s: another user has replaced or deleted its application", name)
                remaining.discard(name)
    raise TeacherError("other users have replaced or deleted all applications of this command, which therefore ends")


def _own(names: Iterable[str], token: str) -> list[str]:
    """Return the names of the applications that this command has deployed and that nobody has replaced."""
    applications = serve.status().applications
    return [name for name in names if name in applications and _deployment(token) in applications[name].deployments]


def _deployment(token: str) -> str:
    return f"{DEPLOYMENT}-{token}"


def _reason(name: str) -> str:
    """Return the last line with an error in the messages of an application's replicas; empty if there is none."""
    status = serve.status().applications.get(name)
    messages = [d.message for d in status.deployments.values()] if status else []
    lines = [line for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1] if lines else ""
