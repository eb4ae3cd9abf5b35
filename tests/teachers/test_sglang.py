"""An SGLang server as a teacher: its card is built from requests, and every response is compared with its request."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

import teachers.protocol.errors as errors
from teachers.client.dialects.sglang import SglangClient
from teachers.protocol.messages import ScoreRequest
from teachers.protocol.rows import LEAST_LOGPROB, Rows
from tests.fake_sglang import FakeSglangServer
from tests.rows import random_rows
from tests.serve import FormulaEngine
from tests.stock_servers import call, card_of, tokenizer_folder

REQUEST = ScoreRequest(sequences=[[5, 6, 7, 8, 9, 2], [1, 2, 3, 4]], starts=[1, 3], top_k=6)


@pytest.fixture
def folder(tiny_byte_level: Path, tmp_path: Path) -> Path:
    """A directory with the tokenizer and a config.json."""
    return tokenizer_folder(tiny_byte_level, tmp_path)


def scores(server: FakeSglangServer, folder: Path, request: ScoreRequest = REQUEST) -> list[Rows]:
    card = card_of(server, folder)
    with server.serving() as url:
        return call(SglangClient, url, lambda c: c.score(request, card, 10), folder)


@pytest.mark.parametrize("prefix", ["", "get_"])
def test_the_card_is_built_from_requests(folder: Path, prefix: str) -> None:
    engine = FormulaEngine(folder)
    card = card_of(FakeSglangServer(engine, prefix=prefix), folder)
    assert (card.engine, card.dtype, card.model) == ("sglang 0.5.23", "bfloat16", "org/model")
    assert card.max_tokens == 123, "one token below the scheduler's limit, which is below the context"
    assert card.max_top_k == engine.card.vocab_size, "a K above the vocabulary would end the server's process"


@pytest.mark.parametrize("has_flat", [True, False])
def test_rows_are_those_of_the_engine(folder: Path, has_flat: bool) -> None:
    engine = FormulaEngine(folder)
    received = scores(FakeSglangServer(engine, has_flat), folder)
    for rows, sequence, start in zip(received, REQUEST.sequences, REQUEST.starts, strict=True):
        # the engine of the fake server scores from position 1 on
        all_rows = random_rows(np.array(sequence), engine.card.vocab_size, 6, seed=len(sequence), start=1)
        assert rows.start == start
        np.testing.assert_array_equal(rows.ids, all_rows.ids[start - 1 :])
        np.testing.assert_allclose(rows.logprobs, all_rows.logprobs[start - 1 :], rtol=1e-6)
        np.testing.assert_allclose(rows.actual, all_rows.actual[start - 1 :], rtol=1e-6)
        np.testing.assert_allclose(rows.tail, all_rows.tail[start - 1 :], atol=1e-6)


def test_logprobs_are_requested_from_the_position_before_the_first_one(folder: Path) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    scores(server, folder)
    assert server.requests[-1]["logprob_start_len"] == [0, 2]


class WithoutRepetition(FormulaEngine):
    """Give token 5 the probability 0 everywhere."""

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        rng = np.random.default_rng(len(sequence))
        logits = rng.normal(size=(len(sequence) - start, self.card.vocab_size))
        logits[:, 5] = -np.inf
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        order = np.argsort(-logprobs, axis=1)[:, :top_k]
        listed = np.maximum(np.take_along_axis(logprobs, order, axis=1), LEAST_LOGPROB).astype(np.float32)
        actual = np.maximum(logprobs[np.arange(len(logprobs)), sequence[start:]], LEAST_LOGPROB).astype(np.float32)
        tail = np.maximum(1 - np.exp(listed).sum(axis=1), 0).astype(np.float32)
        return Rows(start, order.astype(np.uint32), listed, actual, tail)


@pytest.mark.parametrize("has_flat", [True, False])
def test_a_probability_of_zero_is_accepted(folder: Path, has_flat: bool) -> None:
    engine = WithoutRepetition(folder)
    vocab_size = engine.card.vocab_size
    request = ScoreRequest(sequences=[[6, 5, 7]], starts=[1], top_k=vocab_size)
    rows = scores(FakeSglangServer(engine, has_flat), folder, request)[0]
    assert rows.actual[0] == LEAST_LOGPROB
    assert rows.ids[0, -1] == 5
    assert rows.logprobs[0, -1] == LEAST_LOGPROB


@pytest.mark.parametrize("has_flat", [True, False])
@pytest.mark.parametrize("value", [-1000.0, -9999.0, -1e30])
def test_a_very_low_logprob_is_a_probability_of_zero(folder: Path, has_flat: bool, value: float) -> None:
    server = FakeSglangServer(FormulaEngine(folder), has_flat)
    card = card_of(server, folder)
    request = ScoreRequest(sequences=[[5, 6, 7]], starts=[1], top_k=6)

    def exclude(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        meta = results[0]["meta_info"]
        tokens(meta)[1][0] = value
        if has_flat:
            array = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4").reshape(2, 6).copy()
            array[0, 4] = value
            meta["input_top_logprobs_val_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        else:
            tops(meta)[1][4][0] = value
        return results

    server.alter = exclude
    with server.serving() as url:
        rows = call(SglangClient, url, lambda c: c.score(request, card, 10), folder)[0]
    assert rows.actual[0] == LEAST_LOGPROB
    assert rows.logprobs[0, 5] == LEAST_LOGPROB, "moved behind the others"
    assert rows.logprobs[0, 4] > LEAST_LOGPROB


def test_the_list_of_models_is_requested_by_its_own_name_only(folder: Path) -> None:
    class WithoutModels(FakeSglangServer):
        def app(self) -> FastAPI:
            app = super().app()
            app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/models"]
            return app

    with pytest.raises(errors.NotFound, match="teacher t at .*: /v1/models: HTTP 404"):
        card_of(WithoutModels(FormulaEngine(folder)), folder)


def test_the_last_id_of_the_vocabulary_is_written_as_zero(folder: Path) -> None:
    engine = FormulaEngine(folder)
    last = engine.card.vocab_size - 1
    request = ScoreRequest(sequences=[[5, last, 7]], starts=[1], top_k=4)
    assert len(scores(FakeSglangServer(engine), folder, request)[0]) == 2


def first(results: list[dict[str, Any]]) -> Any:
    return results[0]["meta_info"]


def nan_values(meta: dict[str, Any]) -> None:
    rows, top_k = meta["input_top_logprobs_shape"]
    meta["input_top_logprobs_val_flat_b64"] = base64.b64encode(np.full(rows * top_k, np.nan, "<f4").tobytes()).decode()


def tops(meta: dict[str, Any]) -> Any:
    return meta["input_top_logprobs"]


def tokens(meta: dict[str, Any]) -> Any:
    return meta["input_token_logprobs"]


def values(text: str) -> Callable[[Any], object]:
    return lambda meta: meta.update(input_top_logprobs_val_flat_b64=text)


FAULTS: dict[str, tuple[type[Exception], str, Callable[[Any], object]]] = {
    "another token": (
        errors.RequestMismatch,
        "token 6, received 9",
        lambda m: tokens(m).__setitem__(1, [-1.0, 9, None]),
    ),
    "a missing token": (errors.RequestMismatch, "scores of 6 of 6 tokens, received 5", lambda m: tokens(m).pop()),
    "another prompt length": (errors.RequestMismatch, "received 6 of 7", lambda m: m.update(prompt_tokens=7)),
    "flat: a cut array": (errors.ProtocolError, "in 4 and", values("AAAAAA==")),
    "flat: no base64": (errors.ProtocolError, "arrays of candidates", values("?")),
    "flat: another K": (errors.ProtocolError, "expected cand", lambda m: m.update(input_top_logprobs_shape=[5, 5])),
    "flat: NaN": (errors.InvalidRows, "not a number", nan_values),
    "no candidates": (errors.ProtocolError, "received None", lambda m: m.pop("input_top_logprobs")),
    "a missing list": (errors.ProtocolError, "5 lists of candidates, received 4", lambda m: tops(m).pop()),
    "no first null": (errors.ProtocolError, "expected null", lambda m: tops(m).__setitem__(0, [])),
    "a null list": (errors.ProtocolError, "6 candidates, received 0", lambda m: tops(m).__setitem__(2, None)),
    "a missing candidate": (errors.ProtocolError, "6 candidates, received 5", lambda m: tops(m)[1].pop()),
    "null for NaN": (errors.InvalidRows, "not a number", lambda m: tops(m)[1][0].__setitem__(0, None)),
    "an id twice": (errors.InvalidRows, "listed twice", lambda m: tops(m)[1][1].__setitem__(1, tops(m)[1][0][1])),
    "unsorted": (errors.InvalidRows, "descending", lambda m: tops(m)[1].reverse()),
    "a large mass": (errors.InvalidRows, "have mass", lambda m: tops(m)[1][0].__setitem__(0, 0.5)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_response_is_rejected(folder: Path, name: str) -> None:
    kind, message, change = FAULTS[name]
    server = FakeSglangServer(FormulaEngine(folder), has_flat=name.startswith("flat"))
    card = card_of(server, folder)

    def alter(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        change(first(results))
        return results

    server.alter = alter
    with server.serving() as url, pytest.raises(kind, match=f"teacher t at .*{message}"):
        call(SglangClient, url, lambda c: c.score(REQUEST, card, 10), folder)


def test_fewer_results_are_rejected(folder: Path) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    card = card_of(server, folder)
    server.alter = lambda results: results[:1]
    with server.serving() as url, pytest.raises(errors.ProtocolError, match="expected 2 results, received 1"):
        call(SglangClient, url, lambda c: c.score(REQUEST, card, 10), folder)


@pytest.mark.parametrize(
    ("name", "message"), [("tokenizer.json", "teachers.t.tokenizer"), ("config.json", "config.json")]
)
def test_a_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    (folder / name).unlink()
    with pytest.raises(errors.TeacherError, match=f"teacher t at .*{message}"):
        card_of(server, folder)


def test_another_tokenization_is_rejected(folder: Path) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    server.special = [7]
    with pytest.raises(errors.FingerprintMismatch, match="the server's tokenizer differs"):
        card_of(server, folder)


def test_bos_is_expected_if_the_tokenizer_of_the_server_adds_it(folder: Path) -> None:
    engine = FormulaEngine(folder)
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace('"add_bos_token"', '"no_declaration"')
    )
    server = FakeSglangServer(engine)
    assert engine.card.bos_id is not None
    server.special = [engine.card.bos_id]
    assert card_of(server, folder).expects_bos


def test_updated_weights_are_noticed(folder: Path) -> None:
    server = FakeSglangServer(FormulaEngine(folder))
    card = card_of(server, folder)
    with server.serving() as url:
        call(SglangClient, url, lambda c: c.check(card, 10), folder)
        server.model_info["weight_version"] = "1"
        with pytest.raises(errors.FingerprintMismatch, match="expected weight_version default, received 1: "):
            call(SglangClient, url, lambda c: c.check(card, 10), folder)
