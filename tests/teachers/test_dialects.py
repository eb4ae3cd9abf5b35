"""The registry of dialects: detection, extension, and imports."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from teachers.client import dialects
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import detect_dialect
from teachers.client.dialects.native import NativeClient, NativeDialect
from teachers.client.dialects.openai_echo import OpenAIEchoDialect
from teachers.client.dialects.ray_handle import RayHandleDialect
from teachers.client.dialects.vllm_openai import VllmOpenAIDialect
from teachers.protocol.errors import NotDeployed, TeacherError, Unauthorized, Unavailable
from teachers.server.app import build_app
from teachers.server.service import Service
from tests.fake_echo import EchoBehaviour, FakeEchoServer
from tests.fake_vllm import FakeVllmServer
from tests.ray_proxy import ray_proxy
from tests.serve import FormulaEngine, free_port, responding, serving


def detect(url: str, **address: Any) -> object:
    return asyncio.run(detect_dialect(ReplicaAddress("t", url, **address)))


def test_the_dialect_is_detected_by_scheme_or_by_probing(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as native, FakeVllmServer(engine).serving() as vllm:
        assert isinstance(detect(native), NativeDialect)
        assert isinstance(detect(vllm), VllmOpenAIDialect)
    assert isinstance(detect("serve://gemma"), RayHandleDialect)


def test_the_dialect_of_the_run_file_is_the_only_one_tried(tiny_byte_level: Path) -> None:
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url:
        assert isinstance(detect(url, dialect="openai_echo"), OpenAIEchoDialect)
        with pytest.raises(TeacherError, match="does not use the dialect sglang: correct or remove teachers.t.dialect"):
            detect(url, dialect="sglang")


def test_a_ray_proxy_with_an_application_for_one_dialect_is_accepted(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with ray_proxy(FakeEchoServer(engine, EchoBehaviour()).app(), "/", "/v1/") as url:
        assert isinstance(detect(url), OpenAIEchoDialect)
        with pytest.raises(NotDeployed, match=r"no application at /model_info"):
            detect(url, dialect="sglang")


def test_an_application_that_ray_deploys_during_the_detection_has_its_best_dialect(tiny_byte_level: Path) -> None:
    app = build_app(Service(FormulaEngine(tiny_byte_level)))

    @app.get("/v1/models")  # of a vLLM server with the plugin, which has both dialects
    async def models() -> dict[str, list[dict[str, str]]]:
        return {"data": [{"id": "m"}]}

    with ray_proxy(app, "/", "/v1/", num_refused=1) as url:
        assert isinstance(detect(url), NativeDialect)


def test_a_tokenizer_for_a_server_that_provides_one_is_rejected(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        with pytest.raises(TeacherError, match=r"t at .* its own tokenizer: remove teachers\.t\.tokenizer"):
            detect(url, tokenizer=tiny_byte_level)


@pytest.mark.parametrize(
    ("dialect", "keys"),
    [("native", ("model",)), ("vllm_openai", ("model",)), ("ray_handle", ("model", "tokenizer", "ca_file"))],
)
def test_a_key_that_the_dialect_does_not_use_is_rejected(
    tiny_byte_level: Path, dialect: str, keys: tuple[str, ...]
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as native, FakeVllmServer(engine).serving() as vllm:
        url = {"native": native, "vllm_openai": vllm, "ray_handle": "serve://gemma"}[dialect]
        for key in keys:
            with pytest.raises(TeacherError, match=rf"t at {url} .*: remove teachers\.t\.{key} \(.*\)$"):
                detect(url, **{key: "x" if key == "model" else tiny_byte_level})
        assert dialect != "vllm_openai" or isinstance(detect(url, dialect="openai_echo", model="x"), OpenAIEchoDialect)


def test_a_server_that_returns_a_web_page_for_every_path_is_no_teacher() -> None:
    page = b"HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=utf-8\r\ncontent-length: 6\r\n\r\n<html>"
    with responding(page) as url, pytest.raises(TeacherError, match="the address is not that of a teacher"):
        detect(url)


def test_a_server_that_is_no_teacher_is_a_clear_error(tiny_byte_level: Path) -> None:
    missing = b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"
    with responding(missing) as url, pytest.raises(TeacherError, match="known dialects: native, sglang, "):
        detect(url)
    with serving(FormulaEngine(tiny_byte_level), key="k") as url, pytest.raises(Unauthorized):
        detect(url)
    with pytest.raises(Unavailable):
        detect(f"http://127.0.0.1:{free_port()}")


class EchoDialect:
    """A dialect that a test adds with one line of the registry."""

    unused_keys: ClassVar[Mapping[str, str]] = {}

    async def accepts(self, address: ReplicaAddress) -> bool:
        return address.scheme == "echo"

    def client(self, address: ReplicaAddress) -> NativeClient:
        return NativeClient(address.teacher, address.url.replace("echo://", "http://"))


def test_a_new_dialect_needs_one_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TeacherError, match=r"teacher t at echo://x:1: .*known dialects: native, sglang, "):
        detect("echo://x:1")
    monkeypatch.setitem(dialects.DIALECTS, "echo", "tests.teachers.test_dialects:EchoDialect")
    assert type(detect("echo://x:1")).__name__ == "EchoDialect"


@pytest.mark.parametrize("url", ["127.0.0.1:9", "no-scheme:8101", "http://", "http://a:abc"])
def test_a_malformed_address_is_an_error_with_the_expected_form(url: str) -> None:
    with pytest.raises(TeacherError, match="teacher t: .* is not an address"):
        detect(url)


HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client", "ray", "vllm")


def imported(code: str, modules: tuple[str, ...]) -> str:
    code += f"; import sys; print([m for m in {modules} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_client_imports_neither_models_nor_servers() -> None:
    resolve = "[pkgutil.resolve_name(target) for target in DIALECTS.values()]"
    code = "import pkgutil, teachers.client.pool; from teachers.client.dialects import DIALECTS; " + resolve
    assert imported(code, HEAVY) == "[]"


def test_engine_options_import_neither_models_nor_the_wire_format() -> None:
    code = "from teachers.engines import ENGINES, options_class; [options_class(engine) for engine in ENGINES]"
    code += "; import teachers.server.ray_options"
    assert imported(code, (*HEAVY, "numba", "pyarrow")) == "[]"
