"""Hostile messages: decoders return a correct value or raise one short sentence, within bounded memory."""

import asyncio
import io
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import teachers.protocol.errors as errors
from teachers.client.dialects.native import parse_card
from teachers.client.dialects.vllm_completions import read_completion
from teachers.protocol.decoding import decoding
from teachers.protocol.messages import ScoreRequest, TeacherCard, id_array, request_digest
from teachers.protocol.rows import Rows
from teachers.protocol.untrusted_text import MAX_CHARS, clean
from teachers.protocol.wire_format import StreamWriter, read_stream, schema
from tests.fake_vllm import completion
from tests.rows import random_rows
from tests.teachers.test_protocol import CARD, VOCAB_SIZE, make_request, stream
from tests.teachers.test_vllm_completions import CARD as VLLM_CARD
from tests.teachers.test_vllm_completions import make_choices
from tests.teachers.test_vllm_completions import make_request as make_vllm_request

MAX_MESSAGE_CHARS = 700  # teacher, address, a sentence of this project and a text of the server
CONTROL = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\nok   teacher t: all is well\u202e\u2028\x00\x9b1m"


def assert_one_short_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) <= MAX_MESSAGE_CHARS


# --- text of a server ---


@given(st.text(max_size=2000))
def test_cleaned_text_is_one_short_printable_line_and_cleaning_twice_changes_nothing(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) <= MAX_CHARS
    assert clean(cleaned) == cleaned


def test_printable_text_is_kept_and_escapes_are_removed() -> None:
    assert clean("SmolLM2-135M (東京, é)") == "SmolLM2-135M (東京, é)"
    assert clean(CONTROL) == "red ok teacher t: all is well"
    assert clean("a" * 10_000_000) == "a" * (MAX_CHARS - 1) + "…"


def test_the_texts_of_a_card_are_cleaned_and_equal_cards_remain_equal() -> None:
    data = json.dumps(CARD.model_dump() | {"model": CONTROL, "engine": "e" * 100_000}).encode()
    card = parse_card(data)
    assert card.model == clean(CONTROL)
    assert len(card.engine) == MAX_CHARS
    assert card == parse_card(data) == TeacherCard.model_validate(card.model_dump())


# --- the guard ---


class Panic(BaseException):
    """Imitates a Rust panic of pyo3, which does not derive from Exception."""


@pytest.mark.parametrize(
    "error",
    [
        RecursionError(),
        MemoryError(),
        OverflowError("x"),
        pa.ArrowInvalid(CONTROL * 99),
        Panic(CONTROL),
        UnicodeError(),
    ],
)
def test_every_error_of_a_library_becomes_a_protocol_error(error: BaseException) -> None:
    with pytest.raises(errors.ProtocolError, match="malformed thing: ") as caught, decoding("thing"):
        raise error
    assert_one_short_sentence(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError(), errors.Truncated("cut")])
def test_cancellation_and_errors_of_this_project_pass_the_guard(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, decoding("thing"):
        raise error
    assert caught.value is error


# --- the frame of a response ---


def batch_stream(request: ScoreRequest, rows: Rows, **options: Any) -> bytes:
    """Return a stream of one batch, written by Arrow without StreamWriter."""
    sink, wanted = io.BytesIO(), schema(request.top_k, CARD.fingerprint)
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(rows.ids.ravel()), request.top_k),
        pa.FixedSizeListArray.from_arrays(pa.array(rows.logprobs.astype(np.float16).ravel()), request.top_k),
        pa.array(rows.actual),
        pa.array(rows.tail),
    ]
    with pa.ipc.new_stream(sink, wanted, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        digest = request_digest(id_array(request.sequences[0]), 1, request.top_k)
        batch = pa.record_batch(arrays, schema=wanted)
        writer.write_batch(batch, custom_metadata={"index": "0", "start": "1", "request": digest})
    return sink.getvalue()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_body_is_rejected_before_it_is_decompressed(codec: str) -> None:
    num_rows = 300_000
    request = ScoreRequest(sequences=[[1] * (num_rows + 1)], starts=[1], top_k=64)
    zeros = np.zeros((num_rows, 64), np.float32)
    rows = Rows(1, zeros.astype(np.uint32), zeros, zeros[:, 0].copy(), zeros[:, 0].copy())
    data = batch_stream(request, rows, compression=codec)
    assert len(data) < 2_000_000
    before = pa.total_allocated_bytes()
    with pytest.raises(errors.ProtocolError, match="uncompressed"):
        read_stream(data, request, CARD)
    assert pa.total_allocated_bytes() == before


def test_a_declared_length_beyond_the_response_is_rejected_without_allocation() -> None:
    request, (rows,) = make_request([[1, 2, 3]], 4)
    data = batch_stream(request, rows)
    body = struct.pack("<q", 2 * 4 * 4)  # length of the buffer of ids
    assert body in data
    peak = pa.default_memory_pool().max_memory()
    for length in (1 << 20, 1 << 40, (1 << 63) - 1, -7):
        with pytest.raises(errors.TeacherError):
            read_stream(data.replace(body, struct.pack("<q", length)), request, CARD)
    assert pa.default_memory_pool().max_memory() == peak


def test_the_end_mark_is_required_and_nothing_may_follow_it() -> None:
    request, rows = make_request([[1, 2, 3], [4, 5]], 4)
    data = stream(request, rows, [0, 1])
    with pytest.raises(errors.Truncated, match="broke off after 2 of 2 sequences, before its end mark"):
        read_stream(data[:-8], request, CARD)
    for surplus in (b"x", b"garbage" * 100, data, data[-8:]):
        with pytest.raises(errors.ProtocolError, match="nothing after the end mark"):
            read_stream(data + surplus, request, CARD)


def test_other_messages_and_surplus_batches_are_rejected() -> None:
    request, rows = make_request([[1, 2, 3]], 4)
    writer = StreamWriter(request, CARD.fingerprint)
    twice = writer.write(0, rows[0]) + writer.write(0, rows[0]) + writer.close()
    with pytest.raises(errors.ProtocolError, match="expected 1 record batches, received more"):
        read_stream(twice, request, CARD)
    sink, words = io.BytesIO(), pa.array(["a", "b"]).dictionary_encode()
    with pa.ipc.new_stream(sink, pa.schema([pa.field("w", words.type)])) as other:
        other.write_batch(pa.record_batch([words], names=["w"]))
    with pytest.raises(errors.ProtocolError, match="of the type record batch, received a dictionary"):
        read_stream(sink.getvalue(), request, CARD)
    with pytest.raises(errors.ProtocolError, match="expected an Arrow message at byte 0"):
        read_stream(b"\0" * 1000, request, CARD)


def test_metadata_that_are_no_text_are_malformed() -> None:
    request, rows = make_request([[1, 2, 3]], 4)
    data = stream(request, rows, [0])
    for old, new in (
        (b"fingerprint", b"\xff\xfengerprint"),
        (b"index", b"\xffndex"),
        (b"protocol\x00", b"\xff\xfeotocol\x00"),
    ):
        with pytest.raises(errors.ProtocolError) as caught:
            read_stream(data.replace(old, new), request, CARD)
        assert_one_short_sentence(caught.value)


REQUEST, ROWS = make_request([[5, 6, 7, 8, 9, 10, 11], [9, 8, 7, 30]], 8)
VALID = stream(REQUEST, ROWS, [0, 1])
NUMBERS = st.sampled_from([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 8])


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return `valid` with up to three of its bytes changed, removed, inserted or overwritten with a number."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "number", "remove", "insert"])):
            case "change":
                data[at] = draw(st.integers(0, 255))
            case "number":
                data[at : at + 8] = draw(NUMBERS).to_bytes(8, "little")
            case "remove":
                del data[at : at + draw(st.integers(1, 16))]
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


@given(damaged(VALID))
@settings(max_examples=300)
def test_a_damaged_stream_has_rows_of_the_right_form_or_is_one_short_sentence(data: bytes) -> None:
    try:
        received = read_stream(data, REQUEST, CARD)
    except errors.TeacherError as error:
        assert_one_short_sentence(error)
        return
    for rows, sent in zip(received, ROWS, strict=True):
        assert rows.ids.shape == rows.logprobs.shape == sent.ids.shape
        assert (rows.ids < VOCAB_SIZE).all()
        assert np.isfinite(rows.logprobs).all()


VLLM_REQUEST, VLLM_ROWS = make_vllm_request(4, 6, top_k=4)
VLLM_VALID = json.dumps(completion(make_choices(VLLM_ROWS, VLLM_REQUEST.sequences))).encode()


@given(damaged(VLLM_VALID))
@settings(max_examples=200)
def test_a_damaged_completion_has_rows_of_the_right_form_or_is_one_short_sentence(data: bytes) -> None:
    try:
        received = read_completion(data, VLLM_REQUEST, VLLM_CARD)
    except errors.TeacherError as error:
        assert_one_short_sentence(error)
        return
    assert [rows.ids.shape for rows in received] == [rows.ids.shape for rows in VLLM_ROWS]


@given(damaged(json.dumps(CARD.model_dump()).encode()))
@settings(max_examples=200)
def test_a_damaged_card_is_within_its_bounds_or_is_one_short_sentence(data: bytes) -> None:
    try:
        card = parse_card(data)
    except errors.TeacherError as error:
        assert_one_short_sentence(error)
        return
    assert 1 <= card.max_top_k <= card.vocab_size <= 1 << 24


# --- the response to another request ---


def test_the_response_to_another_request_is_rejected() -> None:
    """Both requests have the same tokens at the scored positions, after another context. Only the digest differs."""
    one = ScoreRequest(sequences=[[5, 6, 7, 40, 41]], starts=[3], top_k=8)
    rows = [random_rows(np.array(one.sequences[0]), VOCAB_SIZE, 8, seed=1, start=3)]
    data = stream(one, rows, [0])
    assert len(read_stream(data, one, CARD)) == 1
    other = one.model_copy(update={"sequences": [[5, 9, 7, 40, 41]]})
    with pytest.raises(errors.RequestMismatch, match=r"sequence 0: .*mixed up two responses"):
        read_stream(data, other, CARD)


def test_the_digest_depends_on_everything_that_is_requested() -> None:
    ids, chosen = id_array([1, 2, 3, 4]), [[7], [8], [9]]
    digests = {
        request_digest(ids, 1, 8),
        request_digest(ids, 2, 8),
        request_digest(ids, 1, 9),
        request_digest(id_array([1, 2, 4, 3]), 1, 8),
        request_digest(ids[:3], 1, 8),
        request_digest(ids, 1, 8, chosen),
        request_digest(ids, 1, 8, [[7], [8], [10]]),
    }
    assert len(digests) == 7
    assert request_digest(ids, 1, 8) == "ac6e0715f978e84b4a2af9485d4fbcfa"  # a change needs another PROTOCOL


def test_sequences_that_are_exchanged_within_a_response_are_rejected() -> None:
    request, rows = make_request([[1, 2, 3], [4, 5, 3]], 8)
    exchanged = request.model_copy(update={"sequences": request.sequences[::-1]})
    with pytest.raises(errors.RequestMismatch, match="sequence 0"):
        read_stream(stream(exchanged, rows, [0, 1]), request, CARD)


def test_a_completion_of_another_prompt_or_model_is_rejected() -> None:
    for change, message in (
        (lambda c: c["choices"][1].update(prompt_token_ids=[*VLLM_REQUEST.sequences[1][:-1], 7]), "from position 5 on"),
        (lambda c: c["choices"][1].update(prompt_token_ids=VLLM_REQUEST.sequences[0]), "of 4 other ids"),
        (lambda c: c.update(model="org/other" + CONTROL), "expected a completion of org/model, received .*org/other"),
    ):
        response = json.loads(VLLM_VALID)
        change(response)
        with pytest.raises(errors.RequestMismatch, match=message) as caught:
            read_completion(json.dumps(response).encode(), VLLM_REQUEST, VLLM_CARD)
        assert_one_short_sentence(caught.value)
    response["choices"][0]["prompt_token_ids"] = None
    with pytest.raises(errors.ProtocolError):
        read_completion(json.dumps(response).encode(), VLLM_REQUEST, VLLM_CARD)


# --- strict ids ---


@pytest.mark.parametrize("value", ["true", '"6"', "6.0", "null", "-1", "1e3", "4294967296"])
def test_only_integers_are_ids(value: str) -> None:
    with pytest.raises(ValueError, match="sequences.0.1"):
        ScoreRequest.model_validate_json(f'{{"sequences": [[5, {value}, 7]], "starts": [1], "top_k": 4}}')
