"""An OpenAI-compatible endpoint as a teacher: token strings are placed by bytes, and ambiguous positions are masked."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

import teachers.protocol.errors as errors
from teachers.client.dialects.openai_echo import OpenAIEchoClient
from teachers.client.dialects.probed_card import ProbedCard
from teachers.client.dialects.token_strings import TokenStrings, read_tokens
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import LEAST_LOGPROB, Rows
from tests.fake_echo import GENERATED, EchoBehaviour, FakeEchoServer
from tests.rows import random_rows
from tests.serve import FormulaEngine
from tests.stock_servers import call, card_of, tokenizer_folder

TEXT = "The harbour office opened at six, and the keeper was there: naïve 東京.\n"


@pytest.fixture
def folder(tiny_byte_level: Path, tmp_path: Path) -> Path:
    """A directory with the tokenizer and a config.json."""
    return tokenizer_folder(tiny_byte_level, tmp_path, max_position_embeddings=300)


def score(folder: Path, behaviour: EchoBehaviour, ids: list[int], top_k: int = 3) -> tuple[ProbedCard, Rows]:
    server = FakeEchoServer(FormulaEngine(folder), behaviour)

    async def run(client: OpenAIEchoClient) -> tuple[ProbedCard, Rows]:
        card = await client.card()
        await client.check(card, 10)
        request = ScoreRequest(sequences=[[*card.prefix, *ids]], starts=[1], top_k=top_k)
        return card, (await client.score(request, card, 10))[0]

    with server.serving() as url:
        return call(OpenAIEchoClient, url, run, folder)


def encode(folder: Path, text: str = TEXT) -> list[int]:
    return FakeEchoServer(FormulaEngine(folder), EchoBehaviour()).encode(text)


def engine_rows(folder: Path, sequence: list[int], top_k: int = 3) -> Rows:
    vocab_size = FormulaEngine(folder).card.vocab_size
    all_ids = np.array([*sequence, GENERATED])
    return random_rows(all_ids, vocab_size, top_k, seed=len(all_ids), start=1)


BEHAVIOURS = {
    "OpenAI": EchoBehaviour("escaped", takes_ids=True, shifts=False),
    "OpenAI, texts": EchoBehaviour("escaped", shifts=False),
    "BOS added and listed": EchoBehaviour("escaped", adds_bos=True, lists_bos=True, shifts=False),
    "llama-cpp-python with BOS": EchoBehaviour(adds_bos=True),
    "llama-cpp-python without BOS": EchoBehaviour(),
    "replacement characters": EchoBehaviour("replaced", shifts=False),
    "pieces": EchoBehaviour("piece", takes_ids=True, shifts=False),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_rows_that_are_not_masked_are_those_of_the_engine(folder: Path, name: str) -> None:
    behaviour, ids = BEHAVIOURS[name], encode(folder)
    card, rows = score(folder, behaviour, ids)
    assert card.expects_bos == behaviour.adds_bos
    expected = engine_rows(folder, [*card.prefix, *ids])
    known = ~np.isnan(rows.actual)
    np.testing.assert_array_equal(rows.ids[known], expected.ids[:-1][known])
    np.testing.assert_allclose(rows.logprobs[known], expected.logprobs[:-1][known], rtol=1e-5)
    np.testing.assert_allclose(rows.actual[known], expected.actual[:-1][known], rtol=1e-5)
    np.testing.assert_allclose(rows.tail[known], expected.tail[:-1][known], atol=1e-5)
    assert known.sum() > 3
    if behaviour.rendering in ("escaped", "piece"):
        assert rows.num_masked == 0, "every string stands for one token"


@pytest.mark.parametrize("name", [n for n in BEHAVIOURS if BEHAVIOURS[n].rendering in ("ignored", "replaced")])
def test_ambiguous_candidates_are_masked(folder: Path, name: str) -> None:
    behaviour, ids = BEHAVIOURS[name], encode(folder)
    card, rows = score(folder, behaviour, ids)
    server = FakeEchoServer(FormulaEngine(folder), behaviour)
    strings = TokenStrings(server.tokens, [behaviour.rendering])
    for row, listed in enumerate(engine_rows(folder, [*card.prefix, *ids]).ids[:-1].tolist()):
        if any(strings.match(server.string(token)) is None for token in listed):
            assert np.isnan(rows.actual[row])
            assert rows.tail[row] == 1


def test_a_string_is_placed_if_all_its_tokens_have_the_same_bytes(tiny_sentencepiece: Path) -> None:
    tokens = read_tokens((tiny_sentencepiece / "tokenizer.json").read_bytes())
    strings = TokenStrings(tokens, ["escaped"])
    match = strings.match("a")
    assert match is not None
    assert tokens[match.id].data == b"a"
    assert not match.is_only, "the piece a and the byte token <0x61>"
    assert TokenStrings(tokens, ["stripped"]).match("a") is None, "▁a and a have different bytes"


def test_special_tokens_without_a_name_are_ambiguous(tiny_byte_level: Path) -> None:
    tokens = read_tokens((tiny_byte_level / "tokenizer.json").read_bytes())
    assert TokenStrings(tokens, ["ignored"]).match("") is None


def test_the_largest_k_and_the_context_are_found_by_requests(folder: Path) -> None:
    card, _ = score(folder, EchoBehaviour("escaped", max_top_k=5, shifts=False), encode(folder))
    assert (card.max_top_k, card.max_tokens) == (5, 399)


def test_a_sequence_that_no_text_expresses_is_masked(folder: Path) -> None:
    ids, server = encode(folder), FakeEchoServer(FormulaEngine(folder), EchoBehaviour())
    half = next(token.id for token in server.tokens.values() if token.data == b"\xe6")  # of a character
    _, rows = score(folder, EchoBehaviour("escaped", shifts=False), [*ids[:5], half, half])
    assert rows.num_masked == len(rows)


def with_choice(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def alter(response: dict[str, Any]) -> dict[str, Any]:
        if response["usage"]["prompt_tokens"] > 20:
            change(response["choices"][0])
        return response

    return alter


FAULTS: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], object]]] = {
    "another token": (errors.RequestMismatch, "other token", lambda c: c["logprobs"]["tokens"].__setitem__(2, "xyzzy")),
    "lists of different lengths": (errors.ProtocolError, "one length", lambda c: c["logprobs"]["tokens"].pop()),
    "falling offsets": (errors.ProtocolError, "ascending", lambda c: c["logprobs"]["text_offset"].reverse()),
    "no log-probabilities": (errors.ProtocolError, "ignores `echo`", lambda c: c.update(logprobs=None)),
    "a mass above 1": (
        errors.InvalidRows,
        "have mass",
        lambda c: c["logprobs"]["top_logprobs"][3].update(dict.fromkeys(c["logprobs"]["top_logprobs"][3], -0.01)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_response_is_rejected(folder: Path, name: str) -> None:
    kind, message, change = FAULTS[name]
    server = FakeEchoServer(FormulaEngine(folder), BEHAVIOURS["OpenAI"])

    async def run(client: OpenAIEchoClient) -> None:
        card = await client.card()
        server.alter = with_choice(change)
        await client.score(ScoreRequest(sequences=[encode(folder)], starts=[1], top_k=3), card, 10)

    with server.serving() as url, pytest.raises(kind, match=f"teacher t at .*{message}"):
        call(OpenAIEchoClient, url, run, folder)


@pytest.mark.parametrize("value", [None, -1000.0, -9999.0, -3.4e38])
def test_every_form_of_a_zero_probability_is_the_least_logprob(folder: Path, value: float | None) -> None:
    server = FakeEchoServer(FormulaEngine(folder), BEHAVIOURS["OpenAI"])

    def exclude(choice: dict[str, Any]) -> None:
        entry = choice["logprobs"]["top_logprobs"][3]
        entry[list(entry)[2]] = value

    async def run(client: OpenAIEchoClient) -> Rows:
        card = await client.card()
        server.alter = with_choice(exclude)
        return (await client.score(ScoreRequest(sequences=[encode(folder)], starts=[1], top_k=3), card, 10))[0]

    with server.serving() as url:
        rows = call(OpenAIEchoClient, url, run, folder)
    assert rows.num_masked == 0
    assert rows.logprobs[2, 2] == LEAST_LOGPROB
    assert (rows.logprobs[:, 1] > LEAST_LOGPROB).all()


def test_another_split_of_the_same_text_is_masked(folder: Path) -> None:
    server = FakeEchoServer(FormulaEngine(folder), BEHAVIOURS["OpenAI, texts"])

    def merge(choice: dict[str, Any]) -> None:
        lists = choice["logprobs"]
        lists["tokens"][4:6] = ["".join(lists["tokens"][4:6])]
        for name in ("text_offset", "token_logprobs", "top_logprobs"):
            del lists[name][4]

    async def run(client: OpenAIEchoClient) -> Rows:
        card = await client.card()
        server.alter = with_choice(merge)
        text = encode(folder, "The harbour office opened at six, and the keeper was there.")
        return (await client.score(ScoreRequest(sequences=[text], starts=[1], top_k=3), card, 10))[0]

    with server.serving() as url:
        rows = call(OpenAIEchoClient, url, run, folder)
    assert rows.num_masked == len(rows)


def test_several_models_need_a_name(folder: Path) -> None:
    behaviour = EchoBehaviour("escaped", shifts=False, models=[{"id": "a"}, {"id": "b"}])
    server = FakeEchoServer(FormulaEngine(folder), behaviour)
    with server.serving() as url:
        with pytest.raises(errors.TeacherError, match=r"has 2 models: set teachers.t.model to one of a, b"):
            call(OpenAIEchoClient, url, lambda c: c.card(), folder)
        assert call(OpenAIEchoClient, url, lambda c: c.card(), folder, model="b").model == "b"
    assert server.requests[-1]["model"] == "b"


def test_a_model_that_disappears_from_the_list_has_the_length_of_the_error_message(folder: Path) -> None:
    server = FakeEchoServer(FormulaEngine(folder), EchoBehaviour("escaped", shifts=False, context=200))

    async def run(client: OpenAIEchoClient) -> TeacherCard:
        await client._server(time.monotonic() + 10)
        server.behaviour.models = [{"id": "another", "max_model_len": 9}]
        return await client.card()

    with server.serving() as url:
        assert call(OpenAIEchoClient, url, run, folder).max_tokens == 199


@pytest.mark.parametrize("length", [10**9, 0, -5, True, "300"])
def test_a_length_that_is_no_length_is_an_error_before_a_prompt_is_made_of_it(folder: Path, length: object) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | {"max_position_embeddings": length}
    (folder / "config.json").write_text(json.dumps(config))
    with FakeEchoServer(FormulaEngine(folder), EchoBehaviour("escaped", shifts=False)).serving() as url:
        with pytest.raises(errors.TeacherError, match=r"with max_position_embeddings from 1 to 4,194,304"):
            call(OpenAIEchoClient, url, lambda c: c.card(), folder)


def test_a_server_that_accepts_twice_the_length_of_the_config_has_this_length(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | {"max_position_embeddings": 40_000}
    (folder / "config.json").write_text(json.dumps(config))
    server = FakeEchoServer(FormulaEngine(folder), EchoBehaviour("escaped", shifts=False, context=100_000))
    assert card_of(server, folder).max_tokens == 79_999


@pytest.mark.parametrize("model", [None, "smol"])
def test_the_list_of_models_states_the_length(folder: Path, model: str | None) -> None:
    models = [{"id": "other", "max_model_len": 9}, {"id": "smol", "max_model_len": 150}]
    behaviour = EchoBehaviour("escaped", shifts=False, models=models if model else models[1:])
    with FakeEchoServer(FormulaEngine(folder), behaviour).serving() as url:
        assert call(OpenAIEchoClient, url, lambda c: c.card(), folder, model=model).max_tokens == 149


def test_a_gateway_without_a_list_of_models_needs_the_name_of_the_model(folder: Path) -> None:
    class Gateway(FakeEchoServer):
        def app(self) -> FastAPI:
            app = super().app()
            app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/models"]
            return app

    with Gateway(FormulaEngine(folder), EchoBehaviour("escaped", shifts=False)).serving() as url:
        assert call(OpenAIEchoClient, url, lambda c: c.card(), folder, model="smol").max_tokens == 399
        with pytest.raises(errors.NotFound, match="teacher t at .*/v1/models"):
            call(OpenAIEchoClient, url, lambda c: c.card(), folder)


def test_a_server_that_is_restarted_with_another_setting_is_noticed(folder: Path) -> None:
    server = FakeEchoServer(FormulaEngine(folder), EchoBehaviour("escaped", max_top_k=8, shifts=False))

    async def run(client: OpenAIEchoClient) -> None:
        card = await client.card()
        num_requests = len(server.requests)
        await client.check(card, 10)
        assert len(server.requests) == num_requests + 1, "the first check uses the examination for the card"
        server.behaviour.max_top_k = 5
        with pytest.raises(errors.FingerprintMismatch, match="expected max_top_k 8, received 5: "):
            await client.check(card, 10)
        server.behaviour.max_top_k = 8
        await client.check(card, 10)

    with server.serving() as url:
        call(OpenAIEchoClient, url, run, folder)


def test_the_examination_by_a_check_ends_in_time(folder: Path) -> None:
    class Slow(FakeEchoServer):
        async def score(self, body: dict[str, Any]) -> Any:
            await asyncio.sleep(0.2)
            return await super().score(body)

    server = Slow(FormulaEngine(folder), EchoBehaviour("escaped", max_top_k=2, shifts=False))
    card = card_of(server, folder)
    with server.serving() as url:
        began = time.monotonic()
        with pytest.raises(errors.Unavailable, match="no complete response within"):
            call(OpenAIEchoClient, url, lambda c: c.check(card, 0.5), folder)
    assert time.monotonic() - began < 2
