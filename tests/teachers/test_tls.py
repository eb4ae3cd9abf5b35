"""Certificates and TLS errors of a teacher: one sentence that names the fault and the remedy."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.native import NativeClient
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import TeacherError, TlsError, Truncated, Unavailable
from teachers.server.process import TeacherServer, tls_context
from teachers.server.service import Service
from tests.fake_vllm import FakeVllmServer
from tests.serve import FormulaEngine, responding, running, serving

LOOPBACK = x509.IPAddress(ip_address("127.0.0.1"))
PEM = serialization.Encoding.PEM
Key = ec.EllipticCurvePrivateKey


def make_certificate(
    path: Path,
    name: x509.GeneralName = LOOPBACK,
    days: tuple[int, int] = (-1, 1),
    issuer: tuple[Key, str] | None = None,
) -> Key:
    """Write a certificate and its key as one PEM file. It is signed with its own key if there is no issuer."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    signer, issuer_name = issuer or (key, path.stem)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(path.stem))
        .issuer_name(_name(issuer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(PEM) + private)
    return key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@contextmanager
def serving_tls(engine: FormulaEngine, pem: Path) -> Iterator[str]:
    """Serve HTTPS within the block. Yields host and port."""
    with running(TeacherServer(Service(engine), tls=tls_context(pem, pem))) as port:
        yield f"127.0.0.1:{port}"


def connect(url: str, ca_file: Path | None = None, start_timeout_s: float = 60.0) -> None:
    """Connect as a run does. An error that waiting cannot correct must be raised at once."""

    async def run() -> None:
        address = TeacherAddress("t", (url,), ca_file=ca_file, start_timeout_s=start_timeout_s)
        async with TeacherPool([address]) as pool, asyncio.timeout(30):
            await pool.connect("t")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("certificate", "trusted", "message"),
    [
        (
            {},
            False,
            "self-signed certificate.*: set ca_file of this teacher to a file with the certificate of its auth",
        ),
        ({"days": (-9, -1)}, True, "certificate has expired.*: renew it on the server"),
        ({"days": (1, 9)}, True, "certificate is not yet valid.*: compare the clocks of both machines"),
        ({"name": x509.DNSName("gemma")}, True, "not valid for '127.0.0.1'.*: write a name of the certificate in the"),
    ],
)
def test_a_refused_certificate_ends_the_start_with_its_remedy(
    tiny_byte_level: Path, tmp_path: Path, certificate: dict[str, object], trusted: bool, message: str
) -> None:
    make_certificate(tmp_path / "server.pem", **certificate)  # type: ignore[arg-type]
    with serving_tls(FormulaEngine(tiny_byte_level), tmp_path / "server.pem") as host:
        with pytest.raises(TlsError, match=f"teacher t at https://{host}: its certificate is refused .*{message}"):
            connect(f"https://{host}", tmp_path / "server.pem" if trusted else None)


def test_the_authority_of_a_certificate_or_the_certificate_itself_is_trusted(
    tiny_byte_level: Path, tmp_path: Path
) -> None:
    authority, server, other = (tmp_path / f"{name}.pem" for name in ("authority", "server", "other"))
    make_certificate(server, issuer=(make_certificate(authority), "authority"))
    make_certificate(other)
    with serving_tls(FormulaEngine(tiny_byte_level), server) as host:
        connect(f"https://{host}", authority)
        connect(f"https://{host}", server)
        with pytest.raises(TlsError, match=r"ca_file .*other.pem lacks the certificate of its authority, or"):
            connect(f"https://{host}", other)
        with pytest.raises(TlsError, match="set ca_file of this teacher"):
            connect(f"https://{host}")


def test_http_on_a_tls_port_and_https_on_a_plain_port_name_the_scheme_to_write(
    tiny_byte_level: Path, tmp_path: Path
) -> None:
    make_certificate(tmp_path / "server.pem")
    engine = FormulaEngine(tiny_byte_level)
    with serving_tls(engine, tmp_path / "server.pem") as host, pytest.raises(TlsError, match="write https:// in the"):
        connect(f"http://{host}")
    with serving(engine) as url, pytest.raises(TlsError, match="does not speak TLS: write http:// in the address"):
        connect(url.replace("http:", "https:"))


def test_a_stock_server_with_tls_gives_the_same_remedies(tiny_byte_level: Path, tmp_path: Path) -> None:
    make_certificate(tmp_path / "server.pem")
    app, pem = FakeVllmServer(FormulaEngine(tiny_byte_level)).app(), str(tmp_path / "server.pem")
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ssl_certfile=pem, ssl_keyfile=pem)
    with running(uvicorn.Server(config)) as port:
        with pytest.raises(TlsError, match="write https:// in the address"):
            connect(f"http://127.0.0.1:{port}")
        with pytest.raises(TlsError, match="set ca_file"):
            connect(f"https://127.0.0.1:{port}")


def test_a_server_that_breaks_off_is_unavailable_with_either_scheme() -> None:
    """A container whose server is still starting accepts a connection and closes it."""
    with responding(b"") as url:
        with pytest.raises(Truncated):
            connect(url, start_timeout_s=0)
        with pytest.raises(Unavailable, match="no response") as error:
            connect(url.replace("http:", "https:"), start_timeout_s=0)
    assert not isinstance(error.value, TlsError)


def test_a_ca_file_without_a_certificate_is_one_sentence(tmp_path: Path) -> None:
    make_certificate(tmp_path / "pair.pem")
    pair = (tmp_path / "pair.pem").read_text()
    (tmp_path / "key.pem").write_text(pair[pair.index("-----BEGIN PRIVATE KEY") :])
    (tmp_path / "empty.pem").write_text("")
    (tmp_path / "der.pem").write_bytes(b"\x30\x82\x01\xff")
    for name, message in {
        "key.pem": "contains no certificate: expected PEM",
        "empty.pem": "contains no certificate: expected PEM",
        "der.pem": "contains no certificate: expected PEM",
        "gone.pem": "^teacher t at .*cannot read ca_file .*gone.pem: No such file",
        ".": "cannot read ca_file .*: Is a directory",
    }.items():
        with pytest.raises(TeacherError, match=message) as error:
            NativeClient("t", "https://127.0.0.1:9", ca_file=tmp_path / name)
        assert not re.search(r"\n|_ssl.c", str(error.value))
