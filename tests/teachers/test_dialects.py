"""The registry of dialects: detection, extension, and imports."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from teachers.client import dialects
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import detect_dialect
from teachers.client.dialects.native import NativeClient, NativeDialect
from teachers.client.dialects.ray_handle import RayHandleDialect
from teachers.client.dialects.vllm_openai import VllmOpenAIDialect
from teachers.protocol.errors import TeacherError
from tests.fake_vllm import FakeVllmServer
from tests.serve import FormulaEngine, serving


def detect(url: str) -> object:
    return asyncio.run(detect_dialect(ReplicaAddress("t", url)))


def test_the_dialect_is_detected_by_scheme_or_by_probing(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as native, FakeVllmServer(engine).serving() as vllm:
        assert isinstance(detect(native), NativeDialect)
        assert isinstance(detect(vllm), VllmOpenAIDialect)
    assert isinstance(detect("serve://gemma"), RayHandleDialect)


class EchoDialect:
    """A dialect that a test adds with one line of the registry."""

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
