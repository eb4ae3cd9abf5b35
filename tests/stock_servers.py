"""Stock servers of every kind, and how tests send requests to one."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.probed_card import ProbedCard
from teachers.client.dialects.stock_server import StockServerClient
from tests.fake_echo import EchoBehaviour, FakeEchoServer
from tests.fake_sglang import FakeSglangServer
from tests.fake_stock import FakeStockServer
from tests.fake_vllm import FakeVllmServer
from tests.serve import FormulaEngine

T = TypeVar("T")
C = TypeVar("C", bound=StockServerClient)


STOCK_SERVERS: dict[str, Callable[[FormulaEngine], FakeStockServer]] = {
    "vllm_openai": FakeVllmServer,
    "sglang": FakeSglangServer,
    "openai_echo": lambda engine: FakeEchoServer(engine, EchoBehaviour("escaped", takes_ids=True, shifts=False)),
}


def call(
    client_type: type[C], url: str, do: Callable[[C], Awaitable[T]], tokenizer: Path | None = None, **address: Any
) -> T:
    """Return the result of one operation of a client."""

    async def run() -> T:
        client = client_type(ReplicaAddress("t", url, tokenizer=tokenizer, **address))
        try:
            return await do(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def card_of(server: FakeStockServer, tokenizer: Path | None) -> ProbedCard:
    """Start a server and return the card that a client builds."""
    with server.serving() as url:
        return call(server.client_type, url, lambda client: client.card(), tokenizer)


def tokenizer_folder(model: Path, folder: Path, **config: int) -> Path:
    """Copy the tokenizer of a model into a directory, with a config.json that has the size of its vocabulary."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    config = {"vocab_size": FormulaEngine(model).card.vocab_size, **config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
