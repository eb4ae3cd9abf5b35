"""A plain vLLM server as a teacher: its card is built from requests, and replicas are checked against it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import teachers.protocol.errors as errors
from teachers.client.dialects.vllm_completions import completion_request
from teachers.client.dialects.vllm_openai import VllmOpenAIClient
from teachers.protocol.messages import PROBE, ScoreRequest
from teachers.protocol.rows import Rows
from tests.fake_vllm import FakeVllmServer, completion
from tests.needs import need
from tests.serve import FormulaEngine
from tests.stock_servers import call, card_of
from tests.teachers.test_vllm_completions import in_logits, make_choices, make_request
from tests.tiny import tiny_vocabulary


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


def test_a_different_tokenizer_is_rejected_with_its_first_different_token(
    tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    ours = tiny_vocabulary("sentencepiece").encode(PROBE).ids[0]
    theirs = tiny_vocabulary("byte_level").encode(PROBE).ids[0]
    with pytest.raises(errors.FingerprintMismatch, match=f"token 0 of 'The light.*should be {ours} and is {theirs}"):
        card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_sentencepiece)


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

    server.alter = logits
    with pytest.raises(errors.InvalidRows, match=r"teacher t at .*position \d: .*--logprobs-mode raw_logprobs"):
        card_of(server, tiny_byte_level)


# --- checks of replicas ---


def test_the_check_of_a_replica_needs_no_tokenizer(tiny_byte_level: Path) -> None:
    first, second = (FakeVllmServer(FormulaEngine(tiny_byte_level)) for _ in range(2))
    card = card_of(first, tiny_byte_level)
    with second.serving() as url:
        call(VllmOpenAIClient, url, lambda c: c.check(card, 5.0))
    assert second.requests[-1]["prompt"] == [[*card.prefix, *card.probe_ids]]


@pytest.mark.parametrize("key", ["id", "root", "max_model_len"])
def test_another_model_root_or_length_is_rejected(tiny_byte_level: Path, key: str) -> None:
    server = FakeVllmServer(FormulaEngine(tiny_byte_level))
    card = card_of(server, tiny_byte_level)
    before, server.model[key] = server.model[key], 100 if key == "max_model_len" else "another"
    name = "model" if key == "id" else key
    message = f"teacher t at .*: expected {name} {before}, received {server.model[key]}: "
    with server.serving() as url, pytest.raises(errors.FingerprintMismatch, match=message):
        call(VllmOpenAIClient, url, lambda c: c.check(card, 5.0))


def test_another_tokenization_is_rejected(tiny_byte_level: Path, tiny_sentencepiece: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    other = FakeVllmServer(FormulaEngine(tiny_byte_level))
    other.tokenizer = FakeVllmServer(FormulaEngine(tiny_sentencepiece)).tokenizer
    with other.serving() as url, pytest.raises(errors.FingerprintMismatch, match="differs from its card"):
        call(VllmOpenAIClient, url, lambda c: c.check(card, 5.0))


def test_an_error_message_of_the_server_is_passed_on(tiny_byte_level: Path) -> None:
    card = card_of(FakeVllmServer(FormulaEngine(tiny_byte_level)), tiny_byte_level)
    request = ScoreRequest(sequences=[[1, 2]], starts=[1], top_k=21)
    with FakeVllmServer(FormulaEngine(tiny_byte_level)).serving() as url:
        with pytest.raises(errors.Rejected, match="teacher t at .*HTTP 400, .*greater than max allowed: 20"):
            call(VllmOpenAIClient, url, lambda c: c.score(request, card, 5.0))


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
