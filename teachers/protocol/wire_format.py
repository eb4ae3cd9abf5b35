"""The wire format of a response: an Arrow stream with one record batch per sequence.

On the wire a row consists of K uint32 ids, K float16 log-probabilities, the float32 log-probability of the actual token
and the float32 tail: 392 bytes at K = 64. If the request has chosen ids, their float32 log-probabilities follow in the
order of the request.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachers.protocol.errors import FingerprintMismatch, InvalidRows, ProtocolError, Truncated, VersionMismatch
from teachers.protocol.kernels import decode_rows, half_table
from teachers.protocol.messages import PROTOCOL, ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows, actual_ids, check_chosen, check_length, raise_for_fault

_HALF_TABLE = half_table()


def schema(top_k: int, fingerprint: str, num_chosen: int = 0) -> pa.Schema:
    """Return the schema of a stream. Its metadata holds protocol version, fingerprint and K."""
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
    """Encode rows as chunks of one Arrow stream. The sequences may be written in any order."""

    def __init__(self, top_k: int, fingerprint: str, num_chosen: int = 0) -> None:
        self._sink = io.BytesIO()
        self._schema = schema(top_k, fingerprint, num_chosen)
        self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def write(self, index: int, rows: Rows) -> bytes:
        """Return the bytes of sequence `index`."""
        chosen = [] if rows.chosen is None else [_fixed_size_lists(rows.chosen.astype(np.float32, copy=False))]
        batch = pa.record_batch(
            [
                _fixed_size_lists(rows.ids.astype(np.uint32, copy=False)),
                _fixed_size_lists(rows.logprobs.astype(np.float16, copy=False)),
                pa.array(rows.actual, type=pa.float32()),
                pa.array(rows.tail, type=pa.float32()),
                *chosen,
            ],
            schema=self._schema,
        )
        self._writer.write_batch(batch, custom_metadata={"index": str(index), "start": str(rows.start)})
        return self._take()

    def close(self) -> bytes:
        """Return the end-of-stream marker."""
        self._writer.close()
        return self._take()

    def _take(self) -> bytes:
        chunk = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return chunk


def _fixed_size_lists(values: NDArray[np.generic]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def read_stream(data: bytes, request: ScoreRequest, card: TeacherCard) -> list[Rows]:
    """Decode and check a whole response. Returns one Rows per sequence, in the order of the request.

    ids, actual and tail are views of `data`. Raises Truncated, VersionMismatch, FingerprintMismatch or InvalidRows, and
    ProtocolError for any other fault.
    """
    received: dict[int, Rows] = {}
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        _check_metadata(reader.schema, request, card)
        for batch, metadata in reader.iter_batches_with_custom_metadata():
            index, start = _index_and_start(metadata)
            if not 0 <= index < len(request.sequences) or index in received:
                raise ProtocolError(f"received sequence {index}, which was not requested or was received before")
            check_length(start, batch.num_rows, request, index)
            received[index] = _read_batch(batch, request, index, card)
    except (pa.ArrowInvalid, OSError) as error:
        raise Truncated(
            f"the response broke off after {len(received)} of {len(request.sequences)} sequences"
        ) from error
    if len(received) < len(request.sequences):
        raise Truncated(f"the response ended after {len(received)} of {len(request.sequences)} sequences")
    return [received[i] for i in range(len(request.sequences))]


def _check_metadata(received: pa.Schema, request: ScoreRequest, card: TeacherCard) -> None:
    metadata = {k.decode(): v.decode() for k, v in (received.metadata or {}).items()}
    check_version(metadata.get("protocol"))
    if metadata.get("fingerprint") != card.fingerprint:
        raise FingerprintMismatch(
            f"expected fingerprint {card.fingerprint[:12]}, received {str(metadata.get('fingerprint'))[:12]}: "
            "the teacher was restarted with other weights or another tokenizer"
        )
    if not received.equals(schema(request.top_k, card.fingerprint, request.num_chosen), check_metadata=False):
        raise ProtocolError(
            f"expected {request.top_k} candidates and {request.num_chosen} chosen ids per row, received the schema "
            f"{received.remove_metadata()}"
        )


def check_version(received: object) -> None:
    """Raise VersionMismatch if a server's protocol version is not this client's."""
    if received != PROTOCOL:
        advice = "install the same version of tutelage on both sides"
        raise VersionMismatch(f"expected protocol {PROTOCOL}, received {received}: {advice}")


def _index_and_start(metadata: Any) -> tuple[int, int]:
    """Return the index of the sequence of a batch and its first position."""
    try:
        return int(metadata["index"]), int(metadata["start"])
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"a batch without a usable index and start: {error!r}") from error


def _read_batch(batch: pa.RecordBatch, request: ScoreRequest, index: int, card: TeacherCard) -> Rows:
    """Decode one sequence. Actual token and tail are float32, the candidates float16: see kernels.decode_rows."""
    try:
        batch.validate()  # a batch that claims more rows than it holds would be read past its end
    except pa.ArrowInvalid as error:
        raise ProtocolError(f"sequence {index}: inconsistent record batch: {error}") from error
    shape = (batch.num_rows, request.top_k)
    position = (index, request.starts[index])
    ids = _column(batch, "ids", position).reshape(shape)
    halves = _column(batch, "logprobs", position).view(np.uint16).reshape(shape)
    actual, tail = _column(batch, "actual", position), _column(batch, "tail", position)
    text = actual_ids(request, index, card)
    logprobs, fault, row = decode_rows(halves, ids, (actual, tail), text, _HALF_TABLE)
    raise_for_fault(fault, row, position, card)
    rows = Rows(request.starts[index], ids, logprobs, actual, tail)
    if request.num_chosen:
        chosen = _column(batch, "chosen", position).reshape(batch.num_rows, request.num_chosen)
        rows = replace(rows, chosen=chosen)
    check_chosen(rows, request, index)
    return rows


def _column(batch: pa.RecordBatch, name: str, position: tuple[int, int]) -> NDArray[Any]:
    """Return a flat view of a column. Raises InvalidRows for a missing value, which Arrow would read as 0."""
    column = batch.column(name)
    values = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
    for array in (column, values):
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) * len(column) // len(array)
            raise InvalidRows(f"sequence {position[0]}, position {position[1] + row}: {name} has a missing value")
    return np.asarray(values.to_numpy(zero_copy_only=True))


def as_received(rows: Rows, sequence: list[int], card: TeacherCard) -> Rows:
    """Encode and decode the rows of an engine, as if a client had received them over the network."""
    request = ScoreRequest(sequences=[sequence], starts=[rows.start], top_k=rows.ids.shape[1])
    writer = StreamWriter(request.top_k, card.fingerprint)
    return read_stream(writer.write(0, rows) + writer.close(), request, card)[0]
