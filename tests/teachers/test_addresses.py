"""Forms of a teacher's address: each is the same replica, or is rejected in one sentence."""

import asyncio
from pathlib import Path

import pytest
from fastapi import FastAPI

from teachers.client.addresses import TeacherAddress, canonical_url, resolve_urls
from teachers.client.pool import TeacherPool
from teachers.protocol.errors import TeacherError
from teachers.server.app import build_app
from teachers.server.service import Service
from tests.fake_vllm import FakeVllmServer
from tests.serve import FormulaEngine, responding, serving, serving_app
from trainer.query.config import TeacherConfig

EQUAL = {
    "http://host:8101": ["http://host:8101/", "http://host:8101/v1", "http://host:8101/v1/", "HTTP://HOST:8101//"],
    "https://host": ["https://host:443", "https://HOST/v1", "https://host:"],
    "http://host": ["http://host:80/"],
    "https://host/teachers/gemma": ["https://host:443/teachers/gemma/", "https://Host/teachers/gemma/v1/"],
    "http://[::1]:8101": ["http://[0:0:0:0:0:0:0:1]:8101/v1", "http://[::1]:8101/"],
    "http://[2001:db8::a]": ["http://[2001:DB8:0::A]:80"],
    "http://[fe80::1%eth0]:8101": ["http://[fe80::1%25eth0]:8101"],
    "http://xn--bcher-kva:8101": ["http://b\u00fccher:8101"],
    "https://host/v1": ["https://host/v1/v1/"],
    "dns+http://host:8101": ["DNS+HTTP://host:8101/v1"],
    "serve://Gemma": ["serve://Gemma"],
}


@pytest.mark.parametrize("canonical", EQUAL)
def test_equal_addresses_have_one_form(canonical: str) -> None:
    for url in EQUAL[canonical]:
        assert canonical_url("t", url) == canonical


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:9", "'127.0.0.1:9' is not an address: expected http://HOST:PORT or https://HOST:PORT"),
        ("localhost:8101", "is not an address: expected http://HOST:PORT"),
        ("http://", "is not an address"),
        ("http:/host", "is not an address"),
        ("http://a:abc", "is not an address"),
        ("http://a:99999", "is not an address"),
        ("http://a:0", "is not an address"),
        ("http://a..b", "is not an address"),
        ("http://a\\b", "is not an address"),
        ("http://::1:8101", r"an IPv6 address is written in brackets, for example http://\[::1\]:8101"),
        ("http://[::1:8101", "is not an address"),
        ("http://[::g]", "is not an address"),
        ("http://a/b c", "without spaces"),
        ("dns+https://a", r"expected dns\+http://HOST:PORT, received 'dns\+https://a'"),
        ("dns+serve://a", r"expected dns\+http://HOST:PORT"),
    ],
)
def test_a_malformed_address_is_rejected_with_the_expected_form(url: str, message: str) -> None:
    with pytest.raises(TeacherError, match=f"^teacher t: .*{message}"):
        canonical_url("t", url)
    if " " not in url:  # the type of the key rejects spaces first
        with pytest.raises((TeacherError, ValueError), match="address|expected"):
            TeacherConfig(name="t", urls=[url])


@pytest.mark.parametrize(
    "url",
    [
        "http://hunter2@h",
        "http://u:hunter2@h/v1",
        "http://h/?key=hunter2",
        "http://h#hunter2",
        "http://u%3Ahunter2%40h",
        "http://u:hunter2@h/?key=hunter2",
        "http://h/?key=a@hunter2",
        "http://h#a%40hunter2",
        "http://u%40h%3Fkey=hunter2",
        "http://u:hunter2?@h",
        "http:/u:hunter2@h",
        "u:hunter2@h",
        "dns+http://u:hunter2@h",
        "serve://u:hunter2@h",
    ],
)
def test_a_secret_in_an_address_is_rejected_and_not_repeated(url: str) -> None:
    with pytest.raises(TeacherError, match="teacher t: the address .* key_file or key_env") as error:
        canonical_url("t", url)
    assert "hunter2" not in str(error.value)


def test_a_malformed_address_is_not_repeated_if_it_may_contain_a_password() -> None:
    with pytest.raises(TeacherError, match="teacher t: … is not an address") as error:
        canonical_url("t", "http://u:hunter/2@h")  # a password with an unencoded slash
    assert "hunter" not in str(error.value)


@pytest.mark.parametrize("url", ["http://h/models%40v1", "http://h/models@v1"])
def test_an_at_sign_in_the_path_is_no_password(url: str) -> None:
    assert canonical_url("t", url) == url


def test_equal_addresses_are_one_replica(tmp_path: Path) -> None:
    listed = tmp_path / "replicas"
    listed.write_bytes(b"\xef\xbb\xbf# replicas\r\nhttp://A:80/v1\r\nhttp://b:8101/\r\n\r\n")
    address = TeacherAddress("t", ("http://a", "http://a/", "HTTP://a:80/v1/"), urls_file=listed)
    assert asyncio.run(resolve_urls(address)) == ["http://a", "http://b:8101"]


def test_a_dns_name_keeps_its_port_and_its_path() -> None:
    address = TeacherAddress("t", ("dns+http://127.0.0.1:80/gemma/v1", "dns+http://[::1]:8101/v1/v1"))
    assert asyncio.run(resolve_urls(address)) == ["http://127.0.0.1/gemma", "http://[::1]:8101/v1"]


def connect(*urls: str, tokenizer: Path | None = None) -> int:
    """Connect to a teacher, score a sequence, and return the number of its replicas."""

    async def run() -> int:
        async with TeacherPool([TeacherAddress("t", urls, tokenizer=tokenizer)]) as pool:
            await pool.connect("t")
            assert len(await pool.score("t", [1, 2, 3], 1, 4)) == 2
            return pool.stats()["t"].replicas

    return asyncio.run(run())


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_base_url_of_an_openai_client_is_a_teacher_of_every_dialect(tiny_byte_level: Path, suffix: str) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as native, FakeVllmServer(engine).serving() as vllm:
        assert connect(native + suffix, native) == 1
        assert connect(vllm + suffix, vllm + "/v1", tokenizer=tiny_byte_level) == 1


def test_teachers_below_a_path_of_a_proxy_are_reached(tiny_byte_level: Path) -> None:
    proxy, engine = FastAPI(), FormulaEngine(tiny_byte_level)
    proxy.mount("/teachers/gemma", build_app(Service(engine)))
    proxy.mount("/v1/stock", FakeVllmServer(engine).app())
    with serving_app(proxy) as url:
        assert connect(f"{url}/teachers/gemma", f"{url}/teachers/gemma/", f"{url}/teachers/gemma/v1") == 1
        assert connect(f"{url}/v1/stock/v1/", tokenizer=tiny_byte_level) == 1
        with pytest.raises(TeacherError, match=rf"no teacher below /teachers: .* write {url}$"):
            connect(f"{url}/teachers")
        with pytest.raises(TeacherError, match=r"tutelage serve MODEL"):
            connect(url)


@pytest.mark.parametrize("location", ["https://host/gemma/v1/teacher", "https://host/gemma/v1/teacher?x=secret"])
def test_a_redirect_names_the_address_to_write(location: str) -> None:
    head = f"HTTP/1.1 308 Go\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n"
    with responding(head.encode()) as url:
        with pytest.raises(TeacherError, match="redirects are not followed; if https://host/gemma is the teacher, "):
            connect(url)
