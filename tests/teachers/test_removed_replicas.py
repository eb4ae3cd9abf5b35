"""Replicas that the address of a teacher does not contain any more."""

import asyncio
from pathlib import Path

import pytest

from teachers.client import addresses
from teachers.client.addresses import TeacherAddress
from teachers.client.dialects.native import NativeClient
from teachers.client.load_balancer import LoadBalancer
from tests.serve import FormulaEngine, free_port, serving


def test_a_quarantined_replica_that_is_removed_is_closed_with_the_pool(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "RESOLVE_EVERY_S", 0.05)
    closed, listed = list[str](), tmp_path / "replicas"

    class RecordingClient(NativeClient):
        async def aclose(self) -> None:
            closed.append(self.url)
            await super().aclose()

    async def connect(url: str) -> RecordingClient:
        return RecordingClient("t", url)

    async def run(url: str, away: str) -> None:
        listed.write_text(f"{url}\n{away}\n")
        balancer = LoadBalancer(TeacherAddress("t", urls_file=listed), connect, lambda _: None)
        await balancer.connect()
        listed.write_text(f"{url}\n")
        async with asyncio.timeout(20):
            while balancer.stats.replicas > 1:
                await asyncio.sleep(0.01)
        await balancer.aclose()

    with serving(FormulaEngine(tiny_byte_level)) as url:
        away = f"http://127.0.0.1:{free_port()}"
        asyncio.run(run(url, away))
    assert sorted(closed) == sorted([url, away])
