"""Properties that all stock servers share: their cards, the checks of replicas, and their detection."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

import teachers.protocol.errors as errors
from alignment.tokenizers.folder import tokenizer_files
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import connect_replica
from teachers.client.dialects.native import NativeClient
from teachers.client.dialects.probed_card import PROBE_TEXT, PROBE_TOLERANCE, ProbedCard
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


def write_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_an_id_of_config_json_that_is_no_integer_is_an_error_of_the_teacher(
    server: FakeStockServer, folder: Path, role: str
) -> None:
    write_config(folder, **{f"{role}_token_id": "x"})
    with pytest.raises(errors.TeacherError, match=f"teacher t at .*expected an id as {role}_token_id, received 'x'"):
        card_of(server, folder)


@pytest.mark.parametrize("size", ["x", 0, -1, 5.0, True])
def test_a_size_of_the_vocabulary_that_is_no_positive_integer_is_an_error_of_the_teacher(
    server: FakeStockServer, folder: Path, size: object
) -> None:
    write_config(folder, vocab_size=size)
    with pytest.raises(errors.TeacherError, match="teacher t at .*expected a positive integer as vocab_size, received"):
        card_of(server, folder)


def test_an_unknown_field_of_a_card_is_an_error(server: FakeStockServer, folder: Path) -> None:
    fields = card_of(server, folder).model_dump() | {"revison": "misspelled"}
    with pytest.raises(ValidationError, match="revison"):
        ProbedCard.model_validate(fields)


def test_the_tokenizer_is_not_loaded_in_the_event_loop(
    server: FakeStockServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set[threading.Thread]()

    def files(path: Path) -> dict[str, bytes]:
        threads.add(threading.current_thread())
        return tokenizer_files(path)

    monkeypatch.setattr("teachers.client.dialects.tokenizer_folder.tokenizer_files", files)
    card = card_of(server, folder)
    with server.serving() as url:
        call(server.client_type, url, lambda c: c.tokenizer_files(card), folder)
    assert threads
    assert threading.main_thread() not in threads


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


@pytest.mark.parametrize("name", ["vllm_openai", "sglang"])
@pytest.mark.parametrize("stated", ["~nosuchuser1/x", "x" * 280])
def test_a_directory_that_the_server_states_and_that_cannot_exist_is_no_tokenizer(
    name: str, stated: str, folder: Path
) -> None:
    engine = FormulaEngine(folder)
    server: FakeStockServer = FakeVllmServer(engine, root=stated)
    if name == "sglang":
        server = FakeSglangServer(engine)
        server.model_info["model_path"] = stated
    with pytest.raises(errors.TeacherError, match=r"teacher t at .*set teachers\.t\.tokenizer"):
        card_of(server, None)


def test_the_reason_why_a_server_does_not_use_the_dialect_of_the_run_file_is_reported(folder: Path) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    server.model_info["model_path"] = "a\x1b[31m"

    def detected(url: str, dialect: str | None) -> object:
        return asyncio.run(connect_replica(ReplicaAddress("t", url, tokenizer=folder, dialect=dialect)))

    with server.serving() as url:
        with pytest.raises(errors.TeacherError, match="the address is not that of a teacher"):
            detected(url, None)
        with pytest.raises(errors.ProtocolError, match=r"teacher t at .*/model_info: .*printable characters"):
            detected(url, "sglang")


def test_the_probe_is_not_only_plain_prose() -> None:
    assert PROBE_TEXT.startswith(PROBE)
    assert not PROBE_TEXT.isascii()
