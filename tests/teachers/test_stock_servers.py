"""Properties that all stock servers share: their cards, the checks of replicas, and their detection."""

import asyncio
import logging
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest

import teachers.protocol.errors as errors
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import connect_replica
from teachers.client.dialects.native import NativeClient
from teachers.client.dialects.probed_card import PROBE_TEXT, PROBE_TOLERANCE
from teachers.protocol.messages import PROBE, ScoreRequest
from teachers.protocol.rows import Rows
from tests.fake_sglang import FakeSglangServer
from tests.fake_stock import FakeStockServer
from tests.fake_vllm import FakeVllmServer
from tests.rows import random_rows
from tests.serve import FormulaEngine, serving
from tests.stock_servers import STOCK_SERVERS, call, card_of, tokenizer_folder

Make = Callable[[FormulaEngine], FakeStockServer]


class OtherWeights(FormulaEngine):
    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        return random_rows(np.array(sequence), self.card.vocab_size, top_k, seed=7 + len(sequence), start=start)


@pytest.fixture(params=STOCK_SERVERS)
def make(request: pytest.FixtureRequest) -> Make:
    """A function that makes a server of one kind."""
    return STOCK_SERVERS[request.param]


@pytest.fixture
def folder(tiny_byte_level: Path, tmp_path: Path) -> Path:
    """A directory with the tokenizer and a config.json."""
    return tokenizer_folder(tiny_byte_level, tmp_path, max_position_embeddings=300)


@pytest.fixture
def server(make: Make, folder: Path) -> FakeStockServer:
    return make(FormulaEngine(folder))


def test_the_card_has_the_properties_of_the_engine(server: FakeStockServer, folder: Path) -> None:
    card = card_of(server, folder)
    for name in ("vocab_size", "tokenizer_sha256", "bos_id", "eos_id"):
        assert getattr(card, name) == getattr(server.engine.card, name)
    assert len(card.probe_logprobs) == len(card.prefix) + len(card.probe_ids) - 1


def test_a_second_replica_of_the_same_teacher_is_accepted(server: FakeStockServer, make: Make, folder: Path) -> None:
    card = card_of(server, folder)
    with make(FormulaEngine(folder)).serving() as url:
        call(server.client_type, url, lambda c: c.check(card, 5.0), folder)
        call(server.client_type, url, lambda c: c.ping(5.0), folder)


def test_other_weights_are_rejected_with_both_numbers_of_bits(
    server: FakeStockServer, make: Make, folder: Path
) -> None:
    card = card_of(server, folder)
    message = r"teacher t at .*expected \d+.\d bits .* received \d+.\d.*restarted with other weights"
    with make(OtherWeights(folder)).serving() as url, pytest.raises(errors.FingerprintMismatch, match=message):
        call(server.client_type, url, lambda c: c.check(card, 5.0), folder)


def test_noise_is_accepted_within_the_tolerance_only(server: FakeStockServer, folder: Path) -> None:
    card = card_of(server, folder)
    noise = np.random.default_rng(0).normal(size=len(card.probe_logprobs))
    noise *= 0.9 * PROBE_TOLERANCE / np.abs(noise).mean()
    noisy = card.model_copy(update={"probe_logprobs": tuple(card.probe_logprobs + noise)})
    noisier = card.model_copy(update={"probe_logprobs": tuple(card.probe_logprobs + 1.2 * noise)})
    with server.serving() as url:
        call(server.client_type, url, lambda c: c.check(noisy, 5.0), folder)
        with pytest.raises(errors.FingerprintMismatch, match="nats per token"):
            call(server.client_type, url, lambda c: c.check(noisier, 5.0), folder)


def test_masked_positions_are_not_compared(folder: Path) -> None:
    card = card_of(STOCK_SERVERS["openai_echo"](FormulaEngine(folder)), folder)
    received = np.full(len(card.probe_logprobs), np.nan)
    with pytest.raises(errors.FingerprintMismatch, match="every position is masked"):
        card.check_scores(received.tolist())
    received[3] = card.probe_logprobs[3]
    card.check_scores(received.tolist())
    received[3] += 2 * PROBE_TOLERANCE
    with pytest.raises(errors.FingerprintMismatch, match="nats per token"):
        card.check_scores(received.tolist())


@pytest.mark.parametrize("path", [None, Path("nowhere")])
def test_a_missing_tokenizer_names_the_key_to_set(server: FakeStockServer, path: Path | None) -> None:
    with pytest.raises(errors.TeacherError, match=r"teacher t at .*set teachers\.t\.tokenizer"):
        card_of(server, path)


def test_a_changed_tokenizer_file_is_rejected(server: FakeStockServer, folder: Path) -> None:
    card = card_of(server, folder)
    with server.serving() as url:
        files = call(server.client_type, url, lambda c: c.tokenizer_files(card), folder)
        assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(files["tokenizer.json"] + b"\n")
        with pytest.raises(errors.FingerprintMismatch, match="expected .*tokenizer.json with sha256"):
            call(server.client_type, url, lambda c: c.tokenizer_files(card), folder)


def test_a_card_of_another_kind_is_rejected(server: FakeStockServer, folder: Path) -> None:
    others = [make(server.engine) for make in STOCK_SERVERS.values()]
    cards = [card_of(other, folder) for other in others if type(other) is not type(server)]
    assert len(cards) == 2
    with server.serving() as url:
        for card in [server.engine.card, *cards]:
            with pytest.raises(errors.FingerprintMismatch, match=f"received {server.client_type.kind.name}"):
                call(server.client_type, url, methodcaller("check", card, 5.0), folder)


def test_a_stock_server_is_rejected_as_a_replica_of_a_native_one(folder: Path) -> None:
    engine = FormulaEngine(folder)

    async def check(url: str) -> None:
        client = NativeClient("t", url)
        try:
            await client.check(card_of_stock_server, 5.0)
        finally:
            await client.aclose()

    card_of_stock_server = card_of(FakeVllmServer(engine), folder)
    with serving(engine) as url, pytest.raises(errors.FingerprintMismatch):
        asyncio.run(check(url))


def test_chosen_ids_are_rejected(server: FakeStockServer, folder: Path) -> None:
    card = card_of(server, folder)
    request = ScoreRequest(sequences=[[5, 6]], starts=[1], top_k=1, chosen=[[[7]]])
    with server.serving() as url, pytest.raises(errors.Rejected, match="teacher t at .*scores no chosen ids"):
        call(server.client_type, url, lambda c: c.score(request, card, 5.0), folder)


def test_the_dialect_is_detected_and_its_cost_is_logged_once_per_teacher(
    server: FakeStockServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def detected(url: str, teacher: str) -> type:
        async def run() -> type:
            client = await connect_replica(ReplicaAddress(teacher, url, tokenizer=folder))
            await client.aclose()
            return type(client)

        return asyncio.run(run())

    one, two = (f"{type(server).__name__}-{number}" for number in (1, 2))
    with server.serving() as url, caplog.at_level(logging.WARNING, "tutelage"):
        assert [detected(url, teacher) for teacher in (one, one, two)] == [server.client_type] * 3
    kind = server.client_type.kind
    assert caplog.messages == [f"teacher {name} is {kind.name}: {kind.cost}" for name in (one, two)]


@pytest.mark.parametrize("name", ["vllm_openai", "sglang"])
def test_the_servers_own_model_directory_is_used_if_it_is_local(name: str, folder: Path) -> None:
    engine = FormulaEngine(folder)
    server: FakeStockServer = FakeVllmServer(engine, root=str(folder))
    if name == "sglang":
        server = FakeSglangServer(engine)
        server.model_info["model_path"] = str(folder)
    with server.serving() as url:
        card = call(server.client_type, url, lambda c: c.card())
        files = call(server.client_type, url, lambda c: c.tokenizer_files(card))
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


def test_the_probe_is_not_only_plain_prose() -> None:
    assert PROBE_TEXT.startswith(PROBE)
    assert not PROBE_TEXT.isascii()
