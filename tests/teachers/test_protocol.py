"""The wire: what is sent is what arrives, and nothing else is taken for an answer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.errors import FingerprintMismatch, InvalidRows, ProtocolError, Truncated, VersionMismatch
from teachers.protocol import Card, ScoreRequest
from teachers.rows import Rows, StreamWriter, read_stream
from tests.rows import random_rows

VOCAB_SIZE = 300
CARD = Card(
    model="m", fingerprint="a" * 64, engine="e", dtype="float32", vocab_size=VOCAB_SIZE, tokenizer_sha256="b" * 64,
    bos_id=None, eos_id=None, expects_bos=False, max_tokens=100, max_top_k=64,
)  # fmt: skip
SEQUENCES = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=20), min_size=1, max_size=4)


def question(sequences: list[list[int]], top_k: int) -> tuple[ScoreRequest, list[Rows]]:
    request = ScoreRequest(sequences=sequences, starts=[1] * len(sequences), top_k=top_k)
    return request, [random_rows(np.array(s), VOCAB_SIZE, top_k, seed=i, start=1) for i, s in enumerate(sequences)]


def stream(rows: list[Rows], order: list[int], top_k: int, fingerprint: str = CARD.fingerprint) -> bytes:
    writer = StreamWriter(top_k, fingerprint)
    return b"".join(writer.write(i, rows[i]) for i in order) + writer.close()


@given(SEQUENCES, st.integers(1, 64), st.randoms())
def test_rows_arrive_as_sent_whatever_the_order(sequences, top_k, random) -> None:  # type: ignore[no-untyped-def]
    request, rows = question(sequences, top_k)
    order = list(range(len(rows)))
    random.shuffle(order)
    received = read_stream(stream(rows, order, top_k), request, CARD)
    for got, sent in zip(received, rows, strict=True):
        np.testing.assert_array_equal(got.ids, sent.ids)
        np.testing.assert_allclose(got.logprobs, sent.logprobs, rtol=2**-11, atol=3e-3)
        np.testing.assert_allclose(np.exp(got.logprobs.astype(float)).sum(axis=1) + got.tail, 1, atol=2e-6)
        np.testing.assert_array_equal(got.actual, sent.actual)
        np.testing.assert_array_equal(got.tail, sent.tail)
        assert got.start == 1


@given(st.integers(0, 100))
def test_a_stream_cut_anywhere_is_truncated_and_never_a_short_answer(percent: int) -> None:
    request, rows = question([[1, 2, 3], [4, 5]], 8)
    data = stream(rows, [0, 1], 8)
    complete = len(data) - 8  # the end mark alone may be missing: every sequence is there
    with pytest.raises(Truncated, match="of 2 sequences"):
        read_stream(data[: complete * percent // 100 - 1], request, CARD)


def test_a_row_costs_392_bytes_at_k_64() -> None:
    _, rows = question([[7] * 101], 64)
    one, two = (len(StreamWriter(64, CARD.fingerprint).write(0, r)) for r in (rows[0], _half(rows[0])))
    assert (one - two) / 50 == pytest.approx(392, abs=2)


def _half(rows: Rows) -> Rows:
    return Rows(rows.start, rows.ids[:50], rows.logprobs[:50], rows.actual[:50], rows.tail[:50])


def test_another_version_is_refused() -> None:
    request, rows = question([[1, 2]], 4)
    data = stream(rows, [0], 4).replace(b"protocol\x00", b"protokol\x00")
    with pytest.raises(VersionMismatch, match="expected protocol 1"):
        read_stream(data, request, CARD)


def test_another_fingerprint_is_refused() -> None:
    request, rows = question([[1, 2]], 4)
    with pytest.raises(FingerprintMismatch, match="expected fingerprint aaaa.*received cccc"):
        read_stream(stream(rows, [0], 4, "c" * 64), request, CARD)


def test_another_k_than_asked_is_refused() -> None:
    request, rows = question([[1, 2]], 4)
    with pytest.raises(ProtocolError, match="expected 5 candidates"):
        read_stream(stream(rows, [0], 4), request.model_copy(update={"top_k": 5}), CARD)


def test_rows_of_another_length_are_refused() -> None:
    request, rows = question([[1, 2, 3]], 4)
    longer = request.model_copy(update={"sequences": [[1, 2, 3, 4]]})
    with pytest.raises(ProtocolError, match="expected 3 rows from position 1, received 2 from 1"):
        read_stream(stream(rows, [0], 4), longer, CARD)


def test_a_sequence_answered_twice_is_refused() -> None:
    request, rows = question([[1, 2], [3, 4]], 4)
    with pytest.raises(ProtocolError, match="sequence 0"):
        read_stream(stream(rows, [0, 0], 4), request, CARD)


def test_an_empty_answer_is_truncated() -> None:
    request, _ = question([[1, 2]], 4)
    with pytest.raises(Truncated):
        read_stream(b"", request, CARD)


FAULTS = {
    "not finite": lambda r: replace(r, actual=np.where(np.arange(len(r)) == 1, np.nan, r.actual).astype(np.float32)),
    "positive": lambda r: replace(r, actual=np.where(np.arange(len(r)) == 1, 0.5, r.actual).astype(np.float32)),
    "descending": lambda r: replace(r, logprobs=_at_one(r.logprobs, r.logprobs[1, ::-1])),
    "outside the vocabulary": lambda r: replace(r, ids=_at_one(r.ids, VOCAB_SIZE)),
    "sum to 1": lambda r: replace(r, tail=np.where(np.arange(len(r)) == 1, r.tail + 0.01, r.tail).astype(np.float32)),
    "listed twice": lambda r: replace(r, ids=_at_one(r.ids, 7)),
    "contradicts": lambda r: replace(r, actual=np.where(np.arange(len(r)) == 1, -20.0, r.actual).astype(np.float32)),
}


def _at_one(values: np.ndarray, row: object) -> np.ndarray:
    changed = values.copy()
    changed[1] = row
    return changed


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_no_model_can_mean_are_refused_with_their_position(fault: str) -> None:
    ids = list(range(10, 16))
    request = ScoreRequest(sequences=[ids], starts=[1], top_k=VOCAB_SIZE)
    rows = random_rows(np.array(ids), VOCAB_SIZE, VOCAB_SIZE, seed=0, start=1)
    read_stream(stream([rows], [0], VOCAB_SIZE), request, CARD)
    with pytest.raises(InvalidRows, match=f"sequence 0, position 2: .*{fault}"):
        read_stream(stream([FAULTS[fault](rows)], [0], VOCAB_SIZE), request, CARD)


def test_an_unlisted_token_cannot_be_likelier_than_the_tail() -> None:
    request, rows = question([[1, 2]], 4)
    wrong = replace(rows[0], actual=np.array([-0.01], dtype=np.float32), ids=np.array([[5, 6, 7, 8]], dtype=np.uint32))
    with pytest.raises(InvalidRows, match="likelier than the whole tail"):
        read_stream(stream([wrong], [0], 4), request, CARD)


def test_a_batch_without_its_index_is_refused() -> None:
    request, rows = question([[1, 2]], 4)
    data = stream(rows, [0], 4).replace(b"index", b"xedni")
    with pytest.raises(ProtocolError, match="without a usable index"):
        read_stream(data, request, CARD)


def test_a_uniform_distribution_passes_despite_half_precision() -> None:
    uniform = np.full((3, VOCAB_SIZE), -np.log(VOCAB_SIZE), dtype=np.float32)
    ids = np.tile(np.arange(VOCAB_SIZE, dtype=np.uint32), (3, 1))
    rows = Rows(1, ids, uniform, uniform[:, 0], np.zeros(3, dtype=np.float32))
    request = ScoreRequest(sequences=[[0, 1, 2, 3]], starts=[1], top_k=VOCAB_SIZE)
    assert len(read_stream(stream([rows], [0], VOCAB_SIZE), request, CARD)) == 1
