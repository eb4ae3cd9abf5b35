"""A plain vLLM server as a teacher: its card is built from requests, and replicas are checked against it."""

import asyncio
import json
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

import teachers.protocol.errors as errors
from teachers.client.dialects.base import ReplicaAddress
from teachers.client.dialects.detect import connect_replica
from teachers.client.dialects.native import NativeClient
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard
from teachers.client.dialects.vllm_completions import completion_request
from teachers.client.dialects.vllm_openai import VllmOpenAIClient
from teachers.protocol.messages import PROBE, ScoreRequest
from teachers.protocol.rows import Rows
from tests.fake_vllm import FakeVllmServer, completion
from tests.needs import need
from tests.rows import random_rows
from tests.serve import FormulaEngine, free_port, responding, serving
from tests.teachers.test_vllm_completions import in_logits, make_choices, make_request
from tests.tiny import tiny_vocabulary

T = TypeVar("T")


def call(url: str, do: Callable[[VllmOpenAIClient], Awaitable[T]], tokenizer: Path | None = None, **address: Any) -> T:
    async def run() -> T:
        client = VllmOpenAIClient(ReplicaAddress("t", url, tokenizer=tokenizer, **address))
        try:
            return await do(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def card_of(server: FakeVllmServer, tokenizer: Path | None) -> ProbedCard:
    with server.serving() as url:
        return call(url, lambda c: c.card(), tokenizer)


class OtherWeights(FormulaEngine):
    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        return random_rows(np.array(sequence), self.card.vocab_size, top_k, seed=7 + len(sequence), start=start)


class PrefersBos(FormulaEngine):
    """Give every token after BOS a probability of 0.9; without BOS, return the rows of FormulaEngine."""

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        if sequence[0] != self.card.bos_id:
            return await super().score(sequence, start, top_k)
        actual = np.array(sequence[start:])
        ids = (actual[:, None] + np.arange(top_k)) % self.card.vocab_size
        probs = np.full(ids.shape, 0.1 / (self.card.vocab_size - 1))
        probs[:, 0] = 0.9
        logprobs = np.log(probs).astype(np.float32)
        tail = (1 - probs.sum(axis=1)).astype(np.float32)
        return Rows(start, ids.astype(np.uint32), logprobs, logprobs[:, 0], tail)


# --- the card ---


@pytest.mark.parametrize("max_logprobs", [1, 5, 20, 64, 131, 100_000])
def test_the_card_is_built_from_requests(tiny_byte_level: Path, max_logprobs: int) -> None:
    engine = FormulaEngine(tiny_byte_level)
    server = FakeVllmServer(engine, max_logprobs=max_logprobs)
    card = card_of(server, tiny_byte_level)
    assert card.max_top_k == min(max_logprobs, engine.card.vocab_size)
    assert (
        max(body["prompt_logprobs"] for body in server.requests) <= engine.card.vocab_size
    )  # a larger value may crash an engine
    assert card.max_tokens == 128
    for name in ("vocab_size", "tokenizer_sha256", "bos_id", "eos_id"):
        assert getattr(card, name) == getattr(engine.card, name)
    assert card.engine == "vllm 0.32.0"
    assert (card.model, card.root) == ("org/model", "org/model")


def test_a_server_without_prompt_logprobs_is_rejected(tiny_byte_level: Path) -> None:
    with pytest.raises(errors.TeacherError, match="teacher t at .*--max-logprobs 64"):
        card_of(FakeVllmServer(FormulaEngine(tiny_byte_level), max_logprobs=0), tiny_byte_level)


@pytest.mark.parametrize("vocab_size", [420, 1000, 49_152, 262_144])
def test_without_a_config_the_vocabulary_size_is_determined_by_requests(
    tiny_byte_level: Path, tmp_path: Path, vocab_size: int
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_byte_level / name, tmp_path / name)
    server = FakeVllmServer(FormulaEngine(tiny_byte_level))
    server.vocab_size = vocab_size
    card = card_of(server, tmp_path)
    assert card.vocab_size == vocab_size
    assert (card.bos_id, card.eos_id) == (server.engine.card.bos_id, server.engine.card.eos_id)
    server.vocab_size = 1 << 30
    with pytest.raises(errors.TeacherError, match="put config.json next to tokenizer.json"):
        card_of(server, tmp_path)


def test_the_servers_own_model_directory_is_used_if_it_is_local(tiny_byte_level: Path) -> None:
    server = FakeVllmServer(FormulaEngine(tiny_byte_level), root=str(tiny_byte_level))
    with server.serving() as url:
        card = call(url, lambda c: c.card())
        files = call(url, lambda c: c.tokenizer_files(card))
    assert files["tokenizer.json"] == (tiny_byte_level / "tokenizer.json").read_bytes()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("folder", [None, Path("nowhere")])
def test_a_missing_tokenizer_names_the_key_to_set(tiny_byte_level: Path, folder: Path | None) -> None:
    with pytest.raises(errors.TeacherError, match=r"teacher t at .*set teachers\.t\.tokenizer"):
        card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), folder)


def test_a_different_tokenizer_is_rejected_with_its_first_different_token(
    tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    ours = tiny_vocabulary("sentencepiece").encode(PROBE).ids[0]
    theirs = tiny_vocabulary("byte_level").encode(PROBE).ids[0]
    with pytest.raises(errors.FingerprintMismatch, match=f"token 0 of 'The light.*should be {ours} and is {theirs}"):
        card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_sentencepiece)


def test_a_changed_tokenizer_file_is_rejected(tiny_byte_level: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_byte_level, tmp_path / "model")
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url:
        card = call(url, lambda c: c.card(), tmp_path / "model")
        spec = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": len(spec["model"]["vocab"]), "content": "<new>"})
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(errors.FingerprintMismatch, match="expected .*tokenizer.json with sha256"):
            call(url, lambda c: c.tokenizer_files(card), tmp_path / "model")


def test_the_tokenizer_config_decides_about_bos(tiny_sentencepiece: Path, tmp_path: Path) -> None:
    assert card_of(FakeVllmServer(FormulaEngine(tiny_sentencepiece)), tiny_sentencepiece).expects_bos
    shutil.copytree(tiny_sentencepiece, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not card_of(FakeVllmServer(PrefersBos(tiny_sentencepiece)), tmp_path / "model").expects_bos


def test_bos_is_expected_if_the_server_adds_it_or_the_model_predicts_better(tiny_byte_level: Path) -> None:
    assert not card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level).expects_bos
    assert card_of(FakeVllmServer(PrefersBos(tiny_byte_level)), tiny_byte_level).expects_bos
    adds = FakeVllmServer(FormulaEngine(tiny_byte_level))
    adds.special = [int(adds.engine.card.bos_id or 0)]
    assert card_of(adds, tiny_byte_level).expects_bos


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_server_in_logits_mode_is_detected_by_the_mass(tiny_byte_level: Path, shift: float) -> None:
    server = FakeVllmServer(FormulaEngine(tiny_byte_level), max_logprobs=64)

    def logits(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position in [p for c in choices for p in c["prompt_logprobs"] if p]:
            in_logits(shift)(position)
        return choices

    server.alter = logits  # type: ignore[method-assign]
    with pytest.raises(errors.InvalidRows, match=r"teacher t at .*position \d: .*--logprobs-mode raw_logprobs"):
        card_of(server, tiny_byte_level)


# --- checks of replicas ---


def test_a_second_replica_of_the_same_teacher_is_accepted(tiny_byte_level: Path) -> None:
    first, second = (FakeVllmServer(FormulaEngine(tiny_byte_level)) for _ in range(2))
    card = card_of(first, tiny_byte_level)
    with second.serving() as url:
        call(url, lambda c: c.check(card, 5.0))  # needs no tokenizer
        call(url, lambda c: c.ping(5.0))
    assert second.requests[-1]["prompt"] == [[*card.prefix, *card.probe_ids]]
    assert len(card.probe_logprobs) == len(card.probe_ids) - 1


def test_other_weights_are_rejected_with_both_numbers_of_bits(tiny_byte_level: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    with FakeVllmServer(OtherWeights(tiny_byte_level)).serving() as url:
        with pytest.raises(errors.FingerprintMismatch, match=r"teacher t at .*expected \d+.\d bits .* received \d+.\d"):
            call(url, lambda c: c.check(card, 5.0))


def test_noise_is_accepted_within_the_tolerance_only(tiny_byte_level: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    noise = np.random.default_rng(0).normal(scale=0.1, size=len(card.probe_logprobs))  # 0.08 on average
    noisy = card.model_copy(update={"probe_logprobs": tuple(card.probe_logprobs + noise)})
    noisier = card.model_copy(update={"probe_logprobs": tuple(card.probe_logprobs + 2 * noise)})
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url:
        call(url, lambda c: c.check(noisy, 5.0))
        with pytest.raises(errors.FingerprintMismatch, match="nats per token"):
            call(url, lambda c: c.check(noisier, 5.0))


@pytest.mark.parametrize("key", ["id", "root", "max_model_len"])
def test_another_model_root_or_length_is_rejected(tiny_byte_level: Path, key: str) -> None:
    server = FakeVllmServer(FormulaEngine(tiny_byte_level))
    card = card_of(server, tiny_byte_level)
    before, server.model[key] = server.model[key], 100 if key == "max_model_len" else "another"
    name = "model" if key == "id" else key
    message = f"teacher t at .*: expected {name} {before}, received {server.model[key]}: "
    with server.serving() as url, pytest.raises(errors.FingerprintMismatch, match=message):
        call(url, lambda c: c.check(card, 5.0))


def test_another_tokenization_is_rejected(tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    other = FakeVllmServer(FormulaEngine(tiny_byte_level))
    other.tokenizer = FakeVllmServer(FormulaEngine(tiny_sentencepiece)).tokenizer
    with other.serving() as url, pytest.raises(errors.FingerprintMismatch, match="differs from its card"):
        call(url, lambda c: c.check(card, 5.0))


def test_a_card_of_one_dialect_is_rejected_by_the_other(tiny_byte_level: Path) -> None:
    engine = FormulaEngine(tiny_byte_level)
    card = card_of(FakeVllmServer(engine), tiny_byte_level)

    async def native_check(url: str) -> None:
        client = NativeClient("t", url)
        try:
            await client.check(card, 5.0)
        finally:
            await client.aclose()

    with FakeVllmServer(engine).serving() as url, pytest.raises(errors.FingerprintMismatch, match="plain vLLM server"):
        call(url, lambda c: c.check(engine.card, 5.0))
    with serving(engine) as url, pytest.raises(errors.FingerprintMismatch):
        asyncio.run(native_check(url))


def test_an_error_message_of_the_server_is_passed_on(tiny_byte_level: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    request = ScoreRequest(sequences=[[1, 2]], starts=[1], top_k=21)
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url:
        with pytest.raises(errors.Rejected, match="teacher t at .*HTTP 400, .*greater than max allowed: 20"):
            call(url, lambda c: c.score(request, card, 5.0))


# --- detection ---


def detected(url: str, name: str = "t", tokenizer: Path | None = None) -> type:
    async def run() -> type:
        client = await connect_replica(ReplicaAddress(name, url, tokenizer=tokenizer))
        await client.aclose()
        return type(client)

    return asyncio.run(run())


def test_the_dialect_is_detected_and_a_plain_server_is_warned_about_once(
    tiny_byte_level: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        assert detected(url) is NativeClient
    assert not caplog.records
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url, caplog.at_level(logging.WARNING, "tutelage"):
        assert [detected(url, "one"), detected(url, "one"), detected(url, "two")] == [VllmOpenAIClient] * 3
    assert [r.args[0] for r in caplog.records if isinstance(r.args, tuple)] == ["one", "two"]
    assert "VLLM_PLUGINS=tutelage" in caplog.text


def test_a_tokenizer_for_a_server_that_provides_one_is_rejected(tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        with pytest.raises(errors.TeacherError, match=r"t at .* its own tokenizer: remove teachers\.t\.tokenizer"):
            detected(url, tokenizer=tiny_byte_level)


def test_a_server_that_is_no_teacher_is_a_clear_error(tiny_byte_level: Path) -> None:
    missing = b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"
    with (
        responding(missing) as url,
        pytest.raises(errors.TeacherError, match="known dialects: native, sglang, "),
    ):
        detected(url)
    with serving(FormulaEngine(tiny_byte_level), key="k") as url, pytest.raises(errors.Unauthorized):
        detected(url)
    with pytest.raises(errors.Unavailable):
        detected(f"http://127.0.0.1:{free_port()}")


# --- vLLM itself ---


@pytest.mark.filterwarnings("ignore")  # vLLM's and torch's own
@pytest.mark.slow
def test_the_fake_server_conforms_to_vllms_own_classes() -> None:
    need("vllm")
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
    from vllm.entrypoints.serve.engine.protocol import ModelCard
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

    request, rows = make_request(4, 6)
    sent = completion(make_choices(rows, request.sequences))
    theirs = CompletionResponse.model_validate(sent).model_dump()
    assert json.loads(json.dumps(theirs)) == sent
    body = json.loads(completion_request("m", request, logit_bias={"5": 0.0}))
    assert set(body) <= set(CompletionRequest.model_fields)
    read = CompletionRequest.model_validate(body).to_sampling_params(1)
    assert (read.prompt_logprobs, read.max_tokens, read.temperature) == (8, 1, 0.0)
    assert {"id", "root", "parent", "max_model_len"} <= set(ModelCard.model_fields)
    assert {"model", "prompt", "add_special_tokens"} <= set(TokenizeCompletionRequest.model_fields)


def test_the_probe_is_not_only_plain_prose() -> None:
    assert PROBE_TEXT.startswith(PROBE)
    assert not PROBE_TEXT.isascii()
