"""Who may ask, and over what: keys that are rotated, certificates, and the warning of a teacher that has neither."""

import asyncio
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from teachers.asking.client import TeacherClient
from teachers.errors import TeacherError, Unavailable
from teachers.keys import LOOK_S, Keys, key_from_environment, key_from_file, keys_from_environment, keys_from_file
from teachers.protocol import ScoreRequest
from teachers.serving.app import key_guard
from teachers.serving.process import TeacherServer, tls_context
from teachers.serving.service import Service
from teachers.serving.teach import KEY_VARIABLE, TeachOptions, teach_model
from tests.serve import FormulaEngine, running

QUESTION = {"sequences": [[1, 2, 3]], "starts": [1], "top_k": 4}


# --- keys ---


def status(url: str, key: str) -> int:
    return httpx.get(f"{url}/v1/teacher", headers={"authorization": f"Bearer {key}"}).status_code


def test_several_keys_are_taken_at_once_and_no_part_of_one(tiny_byte_level: Path) -> None:
    with running(TeacherServer(Service(FormulaEngine(tiny_byte_level)), key_guard(Keys(["new", "old"])))) as port:
        url = f"http://127.0.0.1:{port}"
        assert [status(url, key) for key in ("new", "old", "ne", "newer", "NEW", "new old")] == [200, 200] + 4 * [401]
        assert httpx.get(f"{url}/v1/teacher", headers={"authorization": "Basic new"}).status_code == 401


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOOK_S <= 1
    monkeypatch.setattr("teachers.keys.LOOK_S", 0.0)


@pytest.mark.usefixtures("looks_at_once")
def test_keys_follow_their_file_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")
    keys = Keys.of_file(path)
    path.write_text("new\nold\n", encoding="utf-8")
    assert keys.accepts(b"new")
    assert keys.accepts(b"old")
    replacement = tmp_path / "replacement"
    replacement.write_text("new\n", encoding="utf-8")
    replacement.rename(path)
    assert not keys.accepts(b"old")
    assert keys.accepts(b"new")
    assert "keys in force now: 1" in caplog.text
    assert "new\n" not in caplog.text


@pytest.mark.usefixtures("looks_at_once")
@pytest.mark.parametrize("damage", [b"", b"\n\n", b"new key\n", b"\xff\xfe", None])
def test_a_key_file_that_breaks_leaves_the_old_keys_in_force_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n", encoding="utf-8")
    keys = Keys.of_file(path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert [keys.accepts(key) for key in (b"old", b"new", b"", b"old")] == [True, False, False, True]
    assert len([r for r in caplog.records if "stay in force" in r.message]) == 1
    path.write_text("mended\n", encoding="utf-8")
    assert keys.accepts(b"mended")


def test_a_client_that_is_given_several_keys_sends_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_teacher_over_tls_is_asked_by_whoever_trusts_its_certificate(
    tiny_byte_level: Path, certificate: tuple[Path, Path]
) -> None:
    server = TeacherServer(Service(FormulaEngine(tiny_byte_level)), tls=tls_context(*certificate))

    async def ask(ca_file: Path | None) -> int:
        client = TeacherClient("t", url, ca_file=ca_file)
        try:
            card = await client.card()
            (rows,) = await client.score(ScoreRequest.model_validate(QUESTION), card, 10.0)
            return len(rows)
        finally:
            await client.aclose()

    with running(server) as port:
        url = f"https://127.0.0.1:{port}"
        assert asyncio.run(ask(certificate[0])) == 2
        with pytest.raises(Unavailable, match="teacher t at https://127.0.0.1"):
            asyncio.run(ask(None))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_tls_files_that_cannot_be_used_are_one_sentence(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    other, locked = tmp_path / "other.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(other)], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)], check=True
    )
    with pytest.raises(TeacherError, match="cannot read the TLS file .*nothing.pem: No such file"):
        tls_context(cert, tmp_path / "nothing.pem")
    for pair in ((key, cert), (cert, cert), (cert, other), (cert, locked)):
        with pytest.raises(TeacherError, match="are no PEM certificate chain with its unencrypted private key"):
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
def test_a_teacher_that_others_can_reach_without_a_key_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, key: str | None, warns: bool
) -> None:
    monkeypatch.setattr(
        "teachers.serving.process.listen_on", _refuse
    )  # nothing is to listen on this machine's addresses
    if key:
        monkeypatch.setenv(KEY_VARIABLE, key)
    said: list[str] = []
    with pytest.raises(TeacherError, match="not here"):
        teach_model(tmp_path, TeachOptions(host=host), said.append)
    assert [line.startswith(f"warning: {host}") for line in said] == [True] * warns


def _refuse(host: str, port: int) -> socket.socket:
    raise TeacherError("not here")


def test_one_tls_file_without_the_other_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="--tls-cert and --tls-key together"):
        teach_model(tmp_path, TeachOptions(tls_cert=tmp_path / "cert.pem"), lambda _: None)
