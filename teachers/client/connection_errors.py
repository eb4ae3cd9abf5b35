"""TLS settings of a client, and errors of failed connections. A message states the cause and what to change."""

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from teachers.protocol.errors import TeacherError, TlsError, Unavailable
from teachers.protocol.untrusted_text import clean

PROBE_TIMEOUT_S = 5.0  # of a TLS handshake that only shows whether a server speaks TLS
REASONS = {
    errno.ECONNREFUSED: "connection refused",
    errno.EHOSTUNREACH: "the host cannot be reached",
    errno.ENETUNREACH: "the network cannot be reached",
    errno.ECONNRESET: "the connection was reset",
    errno.ETIMEDOUT: "the connection timed out",
}
NOT_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
BROKEN_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # a server that is starting or stopping
NOT_YET_VALID, EXPIRED, OTHER_NAME, OTHER_ADDRESS = 9, 10, 62, 64  # X509_V_ERR_… of OpenSSL
REMEDIES = {
    NOT_YET_VALID: "compare the clocks of both machines",
    EXPIRED: "renew it on the server",
    OTHER_NAME: "write a name of the certificate in the address, or issue a certificate for this name",
    OTHER_ADDRESS: "write a name of the certificate in the address, or issue a certificate for this IP address",
}


def tls_context(label: str, base: ssl.SSLContext, ca_file: Path | None) -> ssl.SSLContext:
    """Load the certificates of the system and of ca_file into the context `base`, and return it.

    A server's own certificate in ca_file is trusted too. Raises TeacherError if ca_file contains no certificate.
    """
    base.load_default_certs()
    if ca_file is None:
        return base
    base.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    path = ca_file.expanduser()
    try:
        path.read_bytes()  # the error of OpenSSL does not name the file
        base.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise TeacherError(
            f"{label}: ca_file {ca_file} contains no certificate: expected PEM, with lines -----BEGIN CERTIFICATE-----"
        ) from error
    except OSError as error:
        raise TeacherError(f"{label}: cannot read ca_file {ca_file}: {error.strerror}") from error
    return base


def connection_error(error: BaseException, ca_file: Path | None) -> Unavailable:
    """Convert an error of httpx to TlsError if TLS failed, otherwise to Unavailable. The message states the cause."""
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return TlsError(f"its certificate is refused ({_verify_message(cause)}): {_remedy(cause, ca_file)}")
            case ssl.SSLError() if not isinstance(cause, BROKEN_OFF):
                return TlsError(_tls_fault(cause))
            case socket.gaierror():
                return Unavailable(f"no response (the host name cannot be resolved: {clean(cause.strerror)})")
            case OSError() if cause.errno in REASONS:
                return Unavailable(f"no response ({REASONS[cause.errno]})")
    return Unavailable(f"no response ({type(error).__name__})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its chain of causes, and the members of exception groups in the chain, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        if isinstance(current, BaseExceptionGroup):  # one error per address of a host name
            for each in current.exceptions:
                yield from _causes(each)
        current = current.__cause__ or current.__context__


def _verify_message(error: ssl.SSLCertVerificationError) -> str:
    return clean(error.verify_message).rstrip(".")


def _remedy(error: ssl.SSLCertVerificationError, ca_file: Path | None) -> str:
    if remedy := REMEDIES.get(error.verify_code):
        return remedy
    wanted = "the certificate of its authority, or the server's own certificate"
    return f"ca_file {ca_file} lacks {wanted}" if ca_file else f"set ca_file of this teacher to a file with {wanted}"


def _tls_fault(error: ssl.SSLError) -> str:
    if error.reason in NOT_TLS:
        return "the server does not speak TLS: write http:// in the address, or serve it with a certificate"
    return (
        f"the TLS handshake failed ({clean(error.reason or error)}): compare the TLS versions of both sides; "
        "Tutelage sends no client certificate"
    )


async def speaks_tls(host: str, port: int) -> bool:
    """Return whether a server responds to a TLS handshake. Sends nothing else, and waits up to PROBE_TIMEOUT_S."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:  # an alert, such as that a client certificate is required, is TLS too
        return error.reason not in NOT_TLS and not isinstance(error, BROKEN_OFF)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError, TimeoutError):
        await writer.wait_closed()
    return True
