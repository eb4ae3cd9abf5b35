"""A teacher's answer, and its form on the wire: an Arrow stream, one record batch per sequence.

Position i predicts token i of a sequence, so position 0 has no row. An answer for (sequence, start) holds the
rows of positions start … len − 1. On the wire a row is K uint32 ids, K float16 log-probabilities, the float32
log-probability of the actual token and the float32 tail: 392 bytes at K = 64.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachers.errors import FingerprintMismatch, InvalidRows, ProtocolError, Truncated, VersionMismatch
from teachers.protocol import PROTOCOL, Card, ScoreRequest

HALF_ULP = 2.0**-11  # relative rounding of a float16, so p·|log p|·HALF_ULP is what it may add to a row's mass
MOST = 2.0**-6  # largest relative rounding of a probability above e^−32
MASS_TOLERANCE = 1e-4  # what the engine's own float32 sums may be off by


@dataclass(frozen=True, eq=False)
class Rows:
    """A teacher's answer for positions start … start + S − 1 of one sequence.

    ids       [S, K] token ids, likeliest first
    logprobs  [S, K] nats, descending
    actual    [S] nats, of the token that stands at the position
    tail      [S] probability outside the listed ids
    """

    start: int
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    actual: NDArray[np.float32]
    tail: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.actual)


def schema(top_k: int, fingerprint: str) -> pa.Schema:
    """The stream's schema; version, fingerprint and K travel in its metadata."""
    return pa.schema(
        [
            pa.field("ids", pa.list_(pa.uint32(), top_k), nullable=False),
            pa.field("logprobs", pa.list_(pa.float16(), top_k), nullable=False),
            pa.field("actual", pa.float32(), nullable=False),
            pa.field("tail", pa.float32(), nullable=False),
        ],
        metadata={"protocol": PROTOCOL, "fingerprint": fingerprint, "top_k": str(top_k)},
    )


class StreamWriter:
    """Turns rows into chunks of one Arrow stream, in any order of sequences."""

    def __init__(self, top_k: int, fingerprint: str) -> None:
        self._sink = io.BytesIO()
        self._schema = schema(top_k, fingerprint)
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, index: int, rows: Rows) -> bytes:
        """The bytes to send for sequence `index`."""
        batch = pa.record_batch(
            [
                _fixed(rows.ids.astype(np.uint32, copy=False)),
                _fixed(rows.logprobs.astype(np.float16, copy=False)),
                pa.array(rows.actual, type=pa.float32()),
                pa.array(rows.tail, type=pa.float32()),
            ],
            schema=self._schema,
        )
        self._writer.write_batch(batch, custom_metadata={"index": str(index), "start": str(rows.start)})
        return self._take()

    def close(self) -> bytes:
        """The end-of-stream mark."""
        self._writer.close()
        return self._take()

    def _take(self) -> bytes:
        chunk = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return chunk


def _fixed(values: NDArray[np.generic]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def read_stream(data: bytes, request: ScoreRequest, card: Card) -> list[Rows]:
    """Decode and check a whole answer: one Rows per sequence of the request, in its order.

    Raises Truncated, VersionMismatch, FingerprintMismatch, InvalidRows, or ProtocolError for the rest.
    """
    answers: dict[int, Rows] = {}
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        _check_metadata(reader.schema, request.top_k, card)
        for index, rows in _batches(reader):
            if not 0 <= index < len(request.sequences) or index in answers:
                raise ProtocolError(f"answer for sequence {index}, which was not asked or is already answered")
            actual_ids = np.asarray(request.sequences[index][request.starts[index] :], dtype=np.uint32)
            answers[index] = restore_mass(check_rows(rows, request, index, card), actual_ids)
    except (pa.ArrowInvalid, OSError) as error:
        raise Truncated(f"the answer broke off after {len(answers)} of {len(request.sequences)} sequences") from error
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"a batch without a usable index and start: {error!r}") from error
    if len(answers) < len(request.sequences):
        raise Truncated(f"the answer ended after {len(answers)} of {len(request.sequences)} sequences")
    return [answers[i] for i in range(len(request.sequences))]


def _check_metadata(received: pa.Schema, top_k: int, card: Card) -> None:
    metadata = {k.decode(): v.decode() for k, v in (received.metadata or {}).items()}
    if metadata.get("protocol") != PROTOCOL:
        raise VersionMismatch(f"expected protocol {PROTOCOL}, received {metadata.get('protocol')}: upgrade one side")
    if metadata.get("fingerprint") != card.fingerprint:
        raise FingerprintMismatch(
            f"expected fingerprint {card.fingerprint[:12]}, received {str(metadata.get('fingerprint'))[:12]}: "
            "the teacher was restarted with other weights or another tokenizer"
        )
    if not received.equals(schema(top_k, card.fingerprint), check_metadata=False):
        raise ProtocolError(f"expected {top_k} candidates a row, received the schema {received.remove_metadata()}")


def _batches(reader: pa.ipc.RecordBatchStreamReader) -> Iterator[tuple[int, Rows]]:
    while True:
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return
        top_k = batch.schema.field("ids").type.list_size
        shape = (batch.num_rows, top_k)
        yield (
            int(metadata["index"]),
            Rows(
                start=int(metadata["start"]),
                ids=_flat(batch, "ids").reshape(shape),
                logprobs=_flat(batch, "logprobs").astype(np.float32).reshape(shape),
                actual=batch.column("actual").to_numpy(),
                tail=batch.column("tail").to_numpy(),
            ),
        )


def _flat(batch: pa.RecordBatch, name: str) -> NDArray[np.generic]:
    return np.asarray(batch.column(name).flatten().to_numpy(zero_copy_only=False))


def check_rows(rows: Rows, request: ScoreRequest, index: int, card: Card) -> Rows:
    """Refuse rows that no model can have meant; returns them unchanged."""
    sequence, start = request.sequences[index], request.starts[index]
    expected = len(sequence) - start
    if rows.start != start or len(rows) != expected:
        raise ProtocolError(
            f"sequence {index}: expected {expected} rows from position {start}, received {len(rows)} from {rows.start}"
        )
    for name, wrong in _faults(rows, sequence[start:], card.vocab_size):
        if wrong.any():
            position = start + int(np.flatnonzero(wrong)[0])
            raise InvalidRows(f"sequence {index}, position {position}: {name}")
    return rows


def restore_mass(rows: Rows, actual_ids: NDArray[np.uint32]) -> Rows:
    """Undo what float16 did to each row's mass: the actual token and the tail arrive exactly, so the others are
    scaled, by no more than their rounding, until the row sums to 1. Without it a row can exceed 1 by 0.002.
    """
    probs = np.exp(rows.logprobs.astype(np.float64))
    is_actual = rows.ids == actual_ids[:, None]
    actual = np.exp(rows.actual.astype(np.float64))
    others = np.where(is_actual, 0.0, probs).sum(axis=1)
    wanted = 1.0 - rows.tail - np.where(is_actual.any(axis=1), actual, 0.0)
    scale = np.clip(np.divide(wanted, others, out=np.ones_like(others), where=others > 0), 1 - MOST, 1 + MOST)
    shifted = rows.logprobs + np.log(scale)[:, None]
    logprobs = np.where(is_actual, rows.actual[:, None], np.minimum(shifted, 0.0)).astype(np.float32)
    return Rows(rows.start, rows.ids, logprobs, rows.actual, rows.tail)


def _faults(rows: Rows, actual_ids: Sequence[int], vocab_size: int) -> Iterator[tuple[str, Any]]:
    """Each fault by name with [S] bool, true where it is found."""
    finite = np.isfinite(rows.logprobs).all(axis=1) & np.isfinite(rows.actual) & np.isfinite(rows.tail)
    yield "a value that is not finite", ~finite
    yield "a positive log-probability", (rows.logprobs > 0).any(axis=1) | (rows.actual > 0)
    yield "candidates that are not in descending order", (np.diff(rows.logprobs, axis=1) > 0).any(axis=1)
    yield f"a token id outside the vocabulary of {vocab_size}", (rows.ids >= vocab_size).any(axis=1)
    ids = np.sort(rows.ids, axis=1)
    yield "a candidate that is listed twice", (ids[:, 1:] == ids[:, :-1]).any(axis=1)
    probs = np.exp(rows.logprobs.astype(np.float64))
    rounding = MASS_TOLERANCE + (probs * np.abs(rows.logprobs)).sum(axis=1) * HALF_ULP
    yield "listed mass and tail that do not sum to 1", np.abs(probs.sum(axis=1) + rows.tail - 1) > rounding
    is_actual = rows.ids == np.asarray(actual_ids, dtype=np.uint32)[:, None]
    gap = np.abs(rows.logprobs - rows.actual[:, None])
    rounding = MASS_TOLERANCE + np.abs(rows.actual) * HALF_ULP
    yield "an actual token that contradicts its own listing", (is_actual & (gap > rounding[:, None])).any(axis=1)
    unlisted = ~is_actual.any(axis=1) & (np.exp(rows.actual) > rows.tail + MASS_TOLERANCE)
    yield "an unlisted actual token that is likelier than the whole tail", unlisted


def as_received(rows: Rows, sequence: list[int], card: Card) -> Rows:
    """What a client receives of an engine's answer: once over the wire, without a network."""
    request = ScoreRequest(sequences=[sequence], starts=[rows.start], top_k=rows.ids.shape[1])
    writer = StreamWriter(request.top_k, card.fingerprint)
    return read_stream(writer.write(0, rows) + writer.close(), request, card)[0]
