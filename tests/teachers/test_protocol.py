"""The wire format: rows arrive as sent, and invalid responses are rejected."""

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.protocol.errors import FingerprintMismatch, InvalidRows, ProtocolError, Truncated, VersionMismatch
from teachers.protocol.messages import ScoreRequest, TeacherCard, id_array, request_digest
from teachers.protocol.rows import Rows, check_rows
from teachers.protocol.wire_format import StreamWriter, read_stream, schema
from tests.rows import random_rows
from tests.teachers.numpy_rows import decode_with_numpy

VOCAB_SIZE = 300
CARD = TeacherCard(
    model="m", fingerprint="a" * 64, engine="e", dtype="float32", vocab_size=VOCAB_SIZE, tokenizer_sha256="b" * 64,
    bos_id=None, eos_id=None, expects_bos=False, max_tokens=100, max_top_k=64,
)  # fmt: skip
SEQUENCES = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=20), min_size=1, max_size=4)


def make_request(sequences: list[list[int]], top_k: int) -> tuple[ScoreRequest, list[Rows]]:
    request = ScoreRequest(sequences=sequences, starts=[1] * len(sequences), top_k=top_k)
    return request, [random_rows(np.array(s), VOCAB_SIZE, top_k, seed=i, start=1) for i, s in enumerate(sequences)]


def stream(request: ScoreRequest, rows: list[Rows], order: list[int], fingerprint: str = CARD.fingerprint) -> bytes:
    writer = StreamWriter(request, fingerprint)
    return b"".join(writer.write(i, rows[i]) for i in order) + writer.close()


@given(SEQUENCES, st.integers(1, 64), st.randoms())
def test_rows_arrive_as_sent_in_any_order(sequences, top_k, random) -> None:  # type: ignore[no-untyped-def]
    request, rows = make_request(sequences, top_k)
    order = list(range(len(rows)))
    random.shuffle(order)
    received = read_stream(stream(request, rows, order), request, CARD)
    for got, sent in zip(received, rows, strict=True):
        np.testing.assert_array_equal(got.ids, sent.ids)
        np.testing.assert_allclose(got.logprobs, sent.logprobs, rtol=2**-11, atol=3e-3)
        np.testing.assert_allclose(np.exp(got.logprobs.astype(float)).sum(axis=1) + got.tail, 1, atol=2e-6)
        np.testing.assert_array_equal(got.actual, sent.actual)
        np.testing.assert_array_equal(got.tail, sent.tail)
        assert got.start == 1


@given(st.integers(0, 100))
def test_a_stream_cut_anywhere_is_truncated_and_never_a_shorter_response(percent: int) -> None:
    request, rows = make_request([[1, 2, 3], [4, 5]], 8)
    data = stream(request, rows, [0, 1])
    with pytest.raises(Truncated, match="of 2 sequences"):
        read_stream(data[: (len(data) - 1) * percent // 100], request, CARD)


def with_chosen(num_chosen: int, top_k: int = 8) -> tuple[ScoreRequest, list[Rows]]:
    """Two sequences; of each row the last one listed is chosen too, and others anywhere."""
    request, rows = make_request([[1, 2, 3, 4], [5, 6]], top_k)
    chosen, responses = [], []
    for i, (sequence, own) in enumerate(zip(request.sequences, rows, strict=True)):
        full = random_rows(np.array(sequence), VOCAB_SIZE, VOCAB_SIZE, seed=i, start=1)
        every = np.take_along_axis(full.logprobs, np.argsort(full.ids, axis=1), axis=1)
        ids = (own.ids[:, -1:] + np.arange(num_chosen) * 7) % VOCAB_SIZE
        chosen.append(ids.tolist())
        responses.append(replace(own, chosen=np.take_along_axis(every, ids.astype(np.int64), axis=1)))
    return request.model_copy(update={"chosen": chosen}), responses


@given(st.integers(1, 64), st.integers(1, 64))
def test_chosen_ids_arrive_exactly_and_in_the_order_of_the_request(num_chosen: int, top_k: int) -> None:
    request, rows = with_chosen(num_chosen, top_k)
    for got, sent in zip(read_stream(stream(request, rows, [0, 1]), request, CARD), rows, strict=True):
        assert got.chosen is not None
        np.testing.assert_array_equal(got.chosen, sent.chosen)
    for index, sent in enumerate(rows):
        assert check_rows(sent, request, index, CARD) is sent


def test_without_chosen_ids_request_and_stream_contain_no_chosen_field() -> None:
    request, rows = make_request([[1, 2, 3]], 4)
    assert schema(4, CARD.fingerprint).names == ["ids", "logprobs", "actual", "tail"]
    (got,) = read_stream(stream(request, rows, [0]), request, CARD)
    assert got.chosen is None
    assert b"chosen" not in request.model_dump_json(exclude_defaults=True).encode()  # for servers that do not know it


@pytest.mark.parametrize(
    ("value", "m", "message"),
    [
        (np.nan, 1, "which is not a log-probability"),
        (-np.inf, 1, "which is not a log-probability"),
        (0.25, 2, "which is not a log-probability"),
        (-0.001, 1, "which is unlisted and more probable than the whole tail"),
        (-30.0, 0, "which contradicts its listed log-probability"),
    ],
)
def test_an_invalid_logprob_of_a_chosen_id_is_rejected(value: float, m: int, message: str) -> None:
    request, rows = with_chosen(3)
    assert rows[0].chosen is not None
    rows[0].chosen[1, m] = value
    named = rf"sequence 0, position 2: the chosen id {request.chosen[0][1][m]} has {value:.6g}, {message}"
    with pytest.raises(InvalidRows, match=named):
        read_stream(stream(request, rows, [0, 1]), request, CARD)
    with pytest.raises(InvalidRows, match=named):
        check_rows(rows[0], request, 0, CARD)


def test_missing_and_unrequested_chosen_ids_are_rejected() -> None:
    request, rows = with_chosen(3)
    plain, without = [replace(one, chosen=None) for one in rows], request.model_copy(update={"chosen": []})
    for expected, data in (
        (request, stream(without, plain, [0, 1])),
        (without, stream(request, rows, [0, 1])),
    ):
        with pytest.raises(ProtocolError, match=rf"expected 8 candidates and {expected.num_chosen} chosen ids per row"):
            read_stream(data, expected, CARD)
    for expected, one in ((request, plain[0]), (without, rows[0])):
        with pytest.raises(ProtocolError, match=f"sequence 0: expected {expected.num_chosen} chosen ids per row"):
            check_rows(one, expected, 0, CARD)


def test_a_row_costs_392_bytes_at_k_64() -> None:
    request, rows = make_request([[7] * 101], 64)
    one, two = (len(StreamWriter(request, CARD.fingerprint).write(0, r)) for r in (rows[0], _half(rows[0])))
    assert (one - two) / 50 == pytest.approx(392, abs=2)


def _half(rows: Rows) -> Rows:
    return Rows(rows.start, rows.ids[:50], rows.logprobs[:50], rows.actual[:50], rows.tail[:50])


def test_a_stream_of_another_version_is_rejected() -> None:
    request, rows = make_request([[1, 2]], 4)
    data = stream(request, rows, [0]).replace(b"protocol\x00", b"protokol\x00")
    with pytest.raises(VersionMismatch, match="expected protocol 3"):
        read_stream(data, request, CARD)


def test_another_fingerprint_is_rejected() -> None:
    request, rows = make_request([[1, 2]], 4)
    with pytest.raises(FingerprintMismatch, match="expected fingerprint aaaa.*received cccc"):
        read_stream(stream(request, rows, [0], "c" * 64), request, CARD)


def test_another_k_than_requested_is_rejected() -> None:
    request, rows = make_request([[1, 2]], 4)
    with pytest.raises(ProtocolError, match="expected 5 candidates"):
        read_stream(stream(request, rows, [0]), request.model_copy(update={"top_k": 5}), CARD)


def test_rows_of_another_length_are_rejected() -> None:
    request, rows = make_request([[1, 2, 3]], 4)
    longer = request.model_copy(update={"sequences": [[1, 2, 3, 4]]})
    with pytest.raises(ProtocolError, match="expected 3 rows from position 1, received 2 from 1"):
        read_stream(stream(request, rows, [0]), longer, CARD)


def test_a_duplicate_sequence_is_rejected() -> None:
    request, rows = make_request([[1, 2], [3, 4]], 4)
    with pytest.raises(ProtocolError, match="sequence 0"):
        read_stream(stream(request, rows, [0, 0]), request, CARD)


def test_an_empty_response_is_truncated() -> None:
    request, _ = make_request([[1, 2]], 4)
    with pytest.raises(Truncated):
        read_stream(b"", request, CARD)


Change = Callable[[Rows, int], None]


def entry(value: float, k: int = 0) -> Change:
    def change(rows: Rows, row: int) -> None:
        rows.logprobs[row, k] = value

    return change


def actual(value: float) -> Change:
    def change(rows: Rows, row: int) -> None:
        rows.actual[row] = value

    return change


def tail(shift: float) -> Change:
    def change(rows: Rows, row: int) -> None:
        rows.tail[row] += shift

    return change


def mass_with_its_tail(rows: Rows, row: int) -> None:
    rows.logprobs[row] = np.minimum(rows.logprobs[row] + 0.5, 0)
    rows.tail[row] = 1 - np.exp(rows.logprobs[row].astype(np.float16).astype(float)).sum()


def unsort(rows: Rows, row: int) -> None:
    rows.logprobs[row] = rows.logprobs[row, ::-1].copy()


def outside(rows: Rows, row: int) -> None:
    rows.ids[row, -1] = VOCAB_SIZE


def twice(rows: Rows, row: int) -> None:
    rows.ids[row, -1] = rows.ids[row, 0]


def unlist(rows: Rows, row: int) -> None:
    rows.ids[row] = np.setdiff1d(np.arange(VOCAB_SIZE - 1), rows.ids[row])[: rows.ids.shape[1]]
    rows.actual[row] = np.log(np.clip(1.5 * rows.tail[row] + 0.01, 0.01, 1.0))


FAULTS: dict[str, tuple[str, Change]] = {
    "nan": ("not finite", entry(np.nan)),
    "infinite": ("not finite", entry(-np.inf, -1)),
    "nan actual": ("not finite", actual(np.nan)),
    "infinite tail": ("not finite", tail(np.inf)),
    "positive": ("positive", entry(0.5)),
    "positive actual": ("positive", actual(0.5)),
    "unsorted": ("descending", unsort),
    "outside": ("outside the vocabulary of 300", outside),
    "twice": ("listed twice", twice),
    "mass beyond 1, the tail below 0": ("tail below 0", mass_with_its_tail),
    "tail too large": ("sum to 1", tail(0.01)),
    "tail too small": ("sum to 1", tail(-0.01)),
    "contradicted": ("contradicts", actual(-20.0)),
    "unlisted and likely": ("more probable than the whole tail", unlist),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_rows_are_rejected_with_their_position(fault: str) -> None:
    name, change = FAULTS[fault]
    request, (rows,) = make_request([[9, 10, 11, 12]], 64)
    assert 11 in rows.ids[1]
    read_stream(stream(request, [rows], [0]), request, CARD)
    check_rows(rows, request, 0, CARD)
    change(rows, 1)
    with pytest.raises(InvalidRows, match=f"sequence 0, position 2: .*{name}"):
        read_stream(stream(request, [rows], [0]), request, CARD)
    with pytest.raises(InvalidRows, match=f"sequence 0, position 2: .*{name}"):
        check_rows(rows, request, 0, CARD)


def result_of(read: Callable[[], Rows]) -> Rows | str:
    try:
        return read()
    except InvalidRows as error:
        return str(error)


@given(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=30),
    st.integers(1, VOCAB_SIZE),
    st.lists(st.tuples(st.sampled_from(sorted(FAULTS)), st.integers(0, 28)), max_size=3),
    st.integers(0, 1000),
)
def test_compiled_kernels_agree_with_the_numpy_reference(sequence, top_k, faults, seed) -> None:  # type: ignore[no-untyped-def]
    rows = random_rows(np.array(sequence), VOCAB_SIZE, top_k, seed, start=1)
    for fault, row in faults:
        if fault != "unlisted and likely" or top_k < VOCAB_SIZE // 2:
            FAULTS[fault][1](rows, row % len(rows))
    request = ScoreRequest(sequences=[sequence], starts=[1], top_k=top_k)
    sent = stream(request, [rows], [0])
    with np.errstate(over="ignore"):
        halved = replace(rows, logprobs=rows.logprobs.astype(np.float16).astype(np.float32))
    expected = result_of(lambda: decode_with_numpy(halved, np.array(sequence[1:], dtype=np.uint32), VOCAB_SIZE))
    received = result_of(lambda: read_stream(sent, request, CARD)[0])
    if isinstance(expected, str) or isinstance(received, str):
        assert received == expected
        return
    np.testing.assert_allclose(received.logprobs, expected.logprobs, rtol=3e-7, atol=1e-7)
    for name in ("ids", "actual", "tail"):
        np.testing.assert_array_equal(getattr(received, name), getattr(expected, name))


@pytest.mark.parametrize("name", ["ids", "logprobs", "actual", "tail", "a whole list of ids"])
def test_a_missing_value_is_rejected_and_never_read_as_0(name: str) -> None:
    request, (rows,) = make_request([[1, 2, 3, 4]], 4)
    columns = {
        "ids": rows.ids.tolist(),
        "logprobs": rows.logprobs.astype(np.float16).tolist(),
        "actual": rows.actual.tolist(),
        "tail": rows.tail.tolist(),
    }
    if name == "a whole list of ids":
        columns["ids"][1] = None
    elif name in ("ids", "logprobs"):
        columns[name][1][3] = None
    else:
        columns[name][1] = None
    sent_schema = schema(4, CARD.fingerprint)
    arrays = [pa.array(columns[field.name], type=field.type) for field in sent_schema]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, sent_schema) as writer:
        batch = pa.record_batch(arrays, schema=sent_schema)
        digest = request_digest(id_array(request.sequences[0]), 1, request.top_k)
        writer.write_batch(batch, custom_metadata={"index": "0", "start": "1", "request": digest})
    with pytest.raises(InvalidRows, match=f"sequence 0, position 2: {name.split()[-1]} has a missing value"):
        read_stream(sink.getvalue().to_pybytes(), request, CARD)


def test_a_batch_with_fewer_rows_than_it_claims_is_rejected() -> None:
    held, claimed = 1235, 98765
    request, rows = make_request([[7] * held], 1)
    longer = request.model_copy(update={"sequences": [[7] * claimed]})
    data = stream(request, rows, [0]).replace(struct.pack("<q", held - 1), struct.pack("<q", claimed - 1))
    with pytest.raises(ProtocolError, match="malformed record batch of sequence 0"):
        read_stream(data, longer, CARD)


def test_an_unlisted_token_more_probable_than_the_tail_is_rejected() -> None:
    request, rows = make_request([[1, 2]], 4)
    wrong = replace(rows[0], actual=np.array([-0.01], dtype=np.float32), ids=np.array([[5, 6, 7, 8]], dtype=np.uint32))
    with pytest.raises(InvalidRows, match="more probable than the whole tail"):
        read_stream(stream(request, [wrong], [0]), request, CARD)


def test_a_batch_without_its_index_is_rejected() -> None:
    request, rows = make_request([[1, 2]], 4)
    data = stream(request, rows, [0]).replace(b"index", b"xedni")
    with pytest.raises(ProtocolError, match="without a usable index"):
        read_stream(data, request, CARD)


def test_a_uniform_distribution_is_valid_in_half_precision() -> None:
    uniform = np.full((3, VOCAB_SIZE), -np.log(VOCAB_SIZE), dtype=np.float32)
    ids = np.tile(np.arange(VOCAB_SIZE, dtype=np.uint32), (3, 1))
    rows = Rows(1, ids, uniform, uniform[:, 0], np.zeros(3, dtype=np.float32))
    request = ScoreRequest(sequences=[[0, 1, 2, 3]], starts=[1], top_k=VOCAB_SIZE)
    assert len(read_stream(stream(request, [rows], [0]), request, CARD)) == 1
