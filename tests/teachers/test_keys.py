"""Keys, TLS certificates, and the warning of a reachable teacher without a key."""

import asyncio
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from teachers.client.dialects.native import NativeClient
from teachers.engines.transformers_options import TransformersOptions
from teachers.keys import RELOAD_S, Keys, key_from_environment, key_from_file, keys_from_environment, keys_from_file
from teachers.protocol.errors import TeacherError, Unavailable
from teachers.protocol.messages import ScoreRequest
from teachers.server.guards import key_guard
from teachers.server.process import TeacherServer, tls_context
from teachers.server.serve import KEY_VARIABLE, ServerOptions, serve_model
from teachers.server.service import Service
from tests.serve import FormulaEngine, running

REQUEST = {"sequences": [[1, 2, 3]], "starts": [1], "top_k": 4}


# --- keys ---


def status(url: str, key: str) -> int:
    return httpx.get(f"{url}/v1/teacher", headers={"authorization": f"Bearer {key}"}).status_code


def test_several_keys_are_accepted_but_no_prefix_of_one(tiny_byte_level: Path) -> None:
    with running(TeacherServer(Service(FormulaEngine(tiny_byte_level)), key_guard(Keys(["new", "old"])))) as port:
        url = f"http://127.0.0.1:{port}"
        assert [status(url, key) for key in ("new", "old", "ne", "newer", "NEW", "new old")] == [200, 200] + 4 * [401]
        assert httpx.get(f"{url}/v1/teacher", headers={"authorization": "Basic new"}).status_code == 401


@pytest.fixture
def reload_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RELOAD_S <= 1
    monkeypatch.setattr("teachers.keys.RELOAD_S", 0.0)


@pytest.mark.usefixtures("reload_at_once")
def test_changes_of_a_key_file_take_effect_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")
    keys = Keys.from_file(path)
    path.write_text("new\nold\n", encoding="utf-8")
    assert keys.accepts(b"new")
    assert keys.accepts(b"old")
    replacement = tmp_path / "replacement"
    replacement.write_text("new\n", encoding="utf-8")
    replacement.rename(path)
    assert not keys.accepts(b"old")
    assert keys.accepts(b"new")
    assert "number of valid keys: 1" in caplog.text
    assert "new\n" not in caplog.text


@pytest.mark.usefixtures("reload_at_once")
@pytest.mark.parametrize("damage", [b"", b"\n\n", b"new key\n", b"\xff\xfe", None])
def test_a_key_file_that_becomes_invalid_keeps_the_old_keys_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")
    keys = Keys.from_file(path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert [keys.accepts(key) for key in (b"old", b"new", b"", b"old")] == [True, False, False, True]
    assert len([r for r in caplog.records if "remain valid" in r.message]) == 1
    path.write_text("repaired\n", encoding="utf-8")
    assert keys.accepts(b"repaired")


def test_a_client_with_several_keys_sends_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("new\r\n\n old \n", encoding="utf-8")
    monkeypatch.setenv("SOME_KEYS", " new old\n")
    assert keys_from_file(tmp_path / "keys") == keys_from_environment("SOME_KEYS") == ("new", "old")
    assert key_from_file(tmp_path / "keys") == key_from_environment("SOME_KEYS") == "new"


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_requires_a_trusted_certificate(tiny_byte_level: Path, certificate: tuple[Path, Path]) -> None:
    server = TeacherServer(Service(FormulaEngine(tiny_byte_level)), tls=tls_context(*certificate))

    async def score(ca_file: Path | None) -> int:
        client = NativeClient("t", url, ca_file=ca_file)
        try:
            card = await client.card()
            (rows,) = await client.score(ScoreRequest.model_validate(REQUEST), card, 10.0)
            return len(rows)
        finally:
            await client.aclose()

    with running(server) as port:
        url = f"https://127.0.0.1:{port}"
        assert asyncio.run(score(certificate[0])) == 2
        with pytest.raises(Unavailable, match="teacher t at https://127.0.0.1"):
            asyncio.run(score(None))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_invalid_tls_files_are_one_sentence(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    other, locked = tmp_path / "other.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(other)], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)], check=True
    )
    with pytest.raises(TeacherError, match="cannot read the TLS file .*nothing.pem: No such file"):
        tls_context(cert, tmp_path / "nothing.pem")
    for pair in ((key, cert), (cert, cert), (cert, other), (cert, locked)):
        with pytest.raises(TeacherError, match="are not a PEM certificate chain and its unencrypted private key"):
            tls_context(*pair)


# --- as a command ---


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("0.0.0.0", "k", False),
        ("0.0.0.0", None, True),
        ("teacher.example", None, True),
    ],
)
def test_a_reachable_teacher_without_a_key_prints_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, key: str | None, warns: bool
) -> None:
    monkeypatch.setattr("teachers.server.process.listen_on", _refuse)  # do not listen on other addresses
    if key:
        monkeypatch.setenv(KEY_VARIABLE, key)
    output: list[str] = []
    with pytest.raises(TeacherError, match="not here"):
        serve_model(tmp_path, ServerOptions(TransformersOptions(), host=host), output.append)
    assert [line.startswith(f"warning: {host}") for line in output] == [True] * warns


def _refuse(host: str, port: int) -> socket.socket:
    raise TeacherError("not here")


def test_one_tls_file_without_the_other_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="--tls-cert and --tls-key together"):
        serve_model(tmp_path, ServerOptions(TransformersOptions(), tls_cert=tmp_path / "cert.pem"), lambda _: None)
