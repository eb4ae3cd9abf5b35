"""A teacher's answer, and its form on the wire: an Arrow stream, one record batch per sequence.

Position i predicts token i of a sequence, so position 0 has no row. An answer for (sequence, start) holds the
rows of positions start … len − 1. On the wire a row is K uint32 ids, K float16 log-probabilities, the float32
log-probability of the actual token and the float32 tail: 392 bytes at K = 64. Where ids were chosen beside the K
likeliest, their log-probabilities follow as float32, in the order in which they were asked for.
"""

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachers.errors import FingerprintMismatch, InvalidRows, ProtocolError, Truncated, VersionMismatch
from teachers.kernels import FAULTS, MASS_TOLERANCE, SOUND, check_floats, half_table, read_halves
from teachers.protocol import PROTOCOL, Card, ScoreRequest

_HALF_TABLE = half_table()
CHOSEN_TOLERANCE = 2.0**-8  # relative: a listed one comes in half precision, and is scaled to restore the row's mass


@dataclass(frozen=True, eq=False)
class Rows:
    """A teacher's answer for positions start … start + S − 1 of one sequence.

    ids       [S, K] token ids, likeliest first
    logprobs  [S, K] nats, descending
    actual    [S] nats, of the token that stands at the position
    tail      [S] probability outside the listed ids
    chosen    [S, M] nats, of the ids that were chosen; None where none were
    """

    start: int
    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float32]
    actual: NDArray[np.float32]
    tail: NDArray[np.float32]
    chosen: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.actual)


def schema(top_k: int, fingerprint: str, num_chosen: int = 0) -> pa.Schema:
    """The stream's schema; version, fingerprint and K travel in its metadata."""
    chosen = [pa.field("chosen", pa.list_(pa.float32(), num_chosen), nullable=False)] if num_chosen else []
    return pa.schema(
        [
            pa.field("ids", pa.list_(pa.uint32(), top_k), nullable=False),
            pa.field("logprobs", pa.list_(pa.float16(), top_k), nullable=False),
            pa.field("actual", pa.float32(), nullable=False),
            pa.field("tail", pa.float32(), nullable=False),
            *chosen,
        ],
        metadata={"protocol": PROTOCOL, "fingerprint": fingerprint, "top_k": str(top_k)},
    )


class StreamWriter:
    """Turns rows into chunks of one Arrow stream, in any order of sequences."""

    def __init__(self, top_k: int, fingerprint: str, num_chosen: int = 0) -> None:
        self._sink = io.BytesIO()
        self._schema = schema(top_k, fingerprint, num_chosen)
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, index: int, rows: Rows) -> bytes:
        """The bytes to send for sequence `index`."""
        chosen = [] if rows.chosen is None else [_fixed(rows.chosen.astype(np.float32, copy=False))]
        batch = pa.record_batch(
            [
                _fixed(rows.ids.astype(np.uint32, copy=False)),
                _fixed(rows.logprobs.astype(np.float16, copy=False)),
                pa.array(rows.actual, type=pa.float32()),
                pa.array(rows.tail, type=pa.float32()),
                *chosen,
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

    Their ids, actual and tail are views of `data`. Raises Truncated, VersionMismatch, FingerprintMismatch, InvalidRows,
    or ProtocolError for the rest.
    """
    answers: dict[int, Rows] = {}
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        _check_metadata(reader.schema, request, card)
        for batch, metadata in reader.iter_batches_with_custom_metadata():
            index, start = _place(metadata)
            if not 0 <= index < len(request.sequences) or index in answers:
                raise ProtocolError(f"answer for sequence {index}, which was not asked or is already answered")
            _check_length(start, batch.num_rows, request, index)
            answers[index] = _read_batch(batch, request, index, card)
    except (pa.ArrowInvalid, OSError) as error:
        raise Truncated(f"the answer broke off after {len(answers)} of {len(request.sequences)} sequences") from error
    if len(answers) < len(request.sequences):
        raise Truncated(f"the answer ended after {len(answers)} of {len(request.sequences)} sequences")
    return [answers[i] for i in range(len(request.sequences))]


def _check_metadata(received: pa.Schema, request: ScoreRequest, card: Card) -> None:
    metadata = {k.decode(): v.decode() for k, v in (received.metadata or {}).items()}
    if metadata.get("protocol") != PROTOCOL:
        raise VersionMismatch(f"expected protocol {PROTOCOL}, received {metadata.get('protocol')}: upgrade one side")
    if metadata.get("fingerprint") != card.fingerprint:
        raise FingerprintMismatch(
            f"expected fingerprint {card.fingerprint[:12]}, received {str(metadata.get('fingerprint'))[:12]}: "
            "the teacher was restarted with other weights or another tokenizer"
        )
    if not received.equals(schema(request.top_k, card.fingerprint, request.num_chosen), check_metadata=False):
        raise ProtocolError(
            f"expected {request.top_k} candidates and {request.num_chosen} chosen ids a row, received the schema "
            f"{received.remove_metadata()}"
        )


def _place(metadata: Any) -> tuple[int, int]:
    """Which sequence a batch answers, and from which position on."""
    try:
        return int(metadata["index"]), int(metadata["start"])
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"a batch without a usable index and start: {error!r}") from error


def _read_batch(batch: pa.RecordBatch, request: ScoreRequest, index: int, card: Card) -> Rows:
    """The actual token and the tail arrive exactly, the candidates in half precision: see kernels.read_halves."""
    try:
        batch.validate()  # else a batch that claims more rows than it holds would be read past its end
    except pa.ArrowInvalid as error:
        raise ProtocolError(f"sequence {index}: a batch that contradicts itself: {error}") from error
    shape = (batch.num_rows, request.top_k)
    where = (index, request.starts[index])
    ids = _column(batch, "ids", where).reshape(shape)
    halves = _column(batch, "logprobs", where).view(np.uint16).reshape(shape)
    actual, tail = _column(batch, "actual", where), _column(batch, "tail", where)
    text = _text(request, index, card)
    logprobs, fault, row = read_halves(halves, ids, (actual, tail), text, _HALF_TABLE)
    _refuse(fault, row, where, card)
    rows = Rows(request.starts[index], ids, logprobs, actual, tail)
    if request.num_chosen:
        chosen = _column(batch, "chosen", where).reshape(batch.num_rows, request.num_chosen)
        rows = replace(rows, chosen=chosen)
    _check_chosen(rows, request, index)
    return rows


def _column(batch: pa.RecordBatch, name: str, where: tuple[int, int]) -> NDArray[Any]:
    """A view of a column's values, one after another. A missing one is refused: what stands in its place is no 0."""
    column = batch.column(name)
    values = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
    for array in (column, values):
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) * len(column) // len(array)
            raise InvalidRows(f"sequence {where[0]}, position {where[1] + row}: {name} has a missing value")
    return np.asarray(values.to_numpy(zero_copy_only=True))


def check_rows(rows: Rows, request: ScoreRequest, index: int, card: Card) -> Rows:
    """Refuse float32 rows that no model can have meant, by the checks of `read_stream`; returns them unchanged."""
    _check_length(rows.start, len(rows), request, index)
    text = _text(request, index, card)
    fault, row = check_floats(rows.logprobs, rows.ids, (rows.actual, rows.tail), text)
    _refuse(fault, row, (index, rows.start), card)
    _check_chosen(rows, request, index)
    return rows


def _check_chosen(rows: Rows, request: ScoreRequest, index: int) -> None:
    """Refuse log-probabilities of chosen ids that are none, or that the row itself contradicts."""
    received = (0, 0) if rows.chosen is None else rows.chosen.shape
    if received != ((len(rows), request.num_chosen) if request.num_chosen else (0, 0)):
        raise ProtocolError(f"sequence {index}: expected {request.num_chosen} chosen ids a row, received {received[1]}")
    if rows.chosen is None:
        return
    ids = np.asarray(request.chosen[index], dtype=np.uint32)
    where = ids[:, :, None] == rows.ids[:, None, :]  # [S, M, K]
    own = np.take_along_axis(rows.logprobs, where.argmax(axis=2), axis=1)
    no_number = ~(rows.chosen <= 0) | np.isinf(rows.chosen)  # NaN is not below 0 either
    contradicted = where.any(axis=2) & (np.abs(own - rows.chosen) > CHOSEN_TOLERANCE * (1 + np.abs(own)))
    with np.errstate(over="ignore"):
        too_likely = ~where.any(axis=2) & (np.exp(rows.chosen) > rows.tail[:, None] + MASS_TOLERANCE)
    for fault, said in (
        (no_number, "no log-probability"),
        (contradicted, "not what the row lists of it"),
        (too_likely, "unlisted and likelier than the whole tail"),
    ):
        if fault.any():
            row, m = np.argwhere(fault)[0].tolist()
            value = f"the chosen id {ids[row, m]} has {rows.chosen[row, m]:.6g}, {said}"
            raise InvalidRows(f"sequence {index}, position {rows.start + row}: {value}")


def _check_length(start: int, num_rows: int, request: ScoreRequest, index: int) -> None:
    asked = request.starts[index]
    expected = len(request.sequences[index]) - asked
    if start != asked or num_rows != expected:
        raise ProtocolError(
            f"sequence {index}: expected {expected} rows from position {asked}, received {num_rows} from {start}"
        )


def _text(request: ScoreRequest, index: int, card: Card) -> tuple[NDArray[np.uint32], int]:
    return np.asarray(request.sequences[index][request.starts[index] :], dtype=np.uint32), card.vocab_size


def _refuse(fault: int, row: int, where: tuple[int, int], card: Card) -> None:
    if fault != SOUND:
        named = FAULTS[fault].format(vocab_size=card.vocab_size)
        raise InvalidRows(f"sequence {where[0]}, position {where[1] + row}: {named}")


def as_received(rows: Rows, sequence: list[int], card: Card) -> Rows:
    """What a client receives of an engine's answer: once over the wire, without a network."""
    request = ScoreRequest(sequences=[sequence], starts=[rows.start], top_k=rows.ids.shape[1])
    writer = StreamWriter(request.top_k, card.fingerprint)
    return read_stream(writer.write(0, rows) + writer.close(), request, card)[0]
