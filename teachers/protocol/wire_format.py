"""The wire format of a response: an Arrow stream with one record batch per sequence.

On the wire a row consists of K uint32 ids, K float16 log-probabilities, the float32 log-probability of the actual token
and the float32 tail: 392 bytes at K = 64. If the request has chosen ids, their float32 log-probabilities follow in the
order of the request. The metadata of the schema contain protocol version, fingerprint and K. The metadata of a record
batch contain the index of its sequence, its first position and the digest of the request (messages.request_digest).
"""

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachers.protocol.arrow_framing import check_frame
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import (
    FingerprintMismatch,
    InvalidRows,
    ProtocolError,
    RequestMismatch,
    Truncated,
    VersionMismatch,
)
from teachers.protocol.kernels import decode_rows, half_table
from teachers.protocol.messages import PROTOCOL, ScoreRequest, TeacherCard, id_array, request_digest
from teachers.protocol.rows import Rows, check_chosen, check_length, raise_for_fault
from teachers.protocol.untrusted_text import clean

_HALF_TABLE = half_table()
_BATCH_METADATA = {b"index": rb"[0-9]{1,9}", b"start": rb"[0-9]{1,9}", b"request": rb"[0-9a-f]{32}"}


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
    """Encode the rows of a request as chunks of one Arrow stream. The sequences may be written in any order."""

    def __init__(self, request: ScoreRequest, fingerprint: str) -> None:
        self._request = request
        self._sink = io.BytesIO()
        self._schema = schema(request.top_k, fingerprint, request.num_chosen)
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
        digest = _digest(self._request, index, id_array(self._request.sequences[index]))
        self._writer.write_batch(
            batch, custom_metadata={"index": str(index), "start": str(rows.start), "request": digest}
        )
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


def _digest(request: ScoreRequest, index: int, ids: NDArray[np.uint32]) -> str:
    """Return the request digest of sequence `index`, whose token ids are given as the array `ids`."""
    chosen = request.chosen[index] if request.chosen else ()
    return request_digest(ids, request.starts[index], request.top_k, chosen)


def read_stream(data: bytes, request: ScoreRequest, card: TeacherCard) -> list[Rows]:
    """Decode and check a whole response. Returns one Rows per sequence, in the order of the request.

    ids, actual and tail are views of `data`. Raises Truncated, VersionMismatch, FingerprintMismatch, RequestMismatch or
    InvalidRows, and ProtocolError for any other fault.
    """
    received: dict[int, Rows] = {}
    num_sequences = len(request.sequences)
    with decoding("Arrow stream"):
        check_frame(data, num_sequences)
        reader = pa.ipc.open_stream(pa.BufferReader(data))
        _check_metadata(reader.schema, request, card)
        for batch, metadata in reader.iter_batches_with_custom_metadata():
            index, start, digest = _parse_metadata(metadata)
            if index >= num_sequences or index in received:
                raise ProtocolError(f"received sequence {index}, which was not requested or was received before")
            check_length(start, batch.num_rows, request, index)
            received[index] = _read_batch(batch, digest, request, index, card)
    if len(received) < num_sequences:
        raise Truncated(f"the response ended after {len(received)} of {num_sequences} sequences")
    return [received[i] for i in range(num_sequences)]


def _check_metadata(received: pa.Schema, request: ScoreRequest, card: TeacherCard) -> None:
    metadata = {k.decode(): v.decode() for k, v in (received.metadata or {}).items()}
    check_version(metadata.get("protocol"))
    if metadata.get("fingerprint") != card.fingerprint:
        raise FingerprintMismatch(
            f"expected fingerprint {card.fingerprint[:12]}, received {clean(metadata.get('fingerprint'), 12)}: "
            "the teacher was restarted with other weights or another tokenizer"
        )
    if not received.equals(schema(request.top_k, card.fingerprint, request.num_chosen), check_metadata=False):
        raise ProtocolError(
            f"expected {request.top_k} candidates and {request.num_chosen} chosen ids per row, received the schema "
            f"{clean(received.remove_metadata())}"
        )


def check_version(received: object) -> None:
    """Raise VersionMismatch if a server's protocol version is not this client's."""
    if received != PROTOCOL:
        advice = "install the same version of tutelage on both sides"
        raise VersionMismatch(f"expected protocol {PROTOCOL}, received {clean(received, 20)}: {advice}")


def _parse_metadata(metadata: Any) -> tuple[int, int, str]:
    """Return index, first position and request digest from the metadata of a record batch."""
    values = [metadata[name] if metadata is not None and name in metadata else b"" for name in _BATCH_METADATA]
    if not all(map(re.fullmatch, _BATCH_METADATA.values(), values)):
        raise ProtocolError("received a batch without a usable index, start or request digest")
    index, start, digest = values
    return int(index), int(start), str(digest, "ascii")


def _read_batch(batch: pa.RecordBatch, digest: str, request: ScoreRequest, index: int, card: TeacherCard) -> Rows:
    """Decode one sequence. Actual token and tail are float32, the candidates float16: see kernels.decode_rows."""
    with decoding(f"record batch of sequence {index}"):
        batch.validate()  # a batch that claims more rows than it holds would be read past its end
    sequence = id_array(request.sequences[index])
    if digest != (expected := _digest(request, index, sequence)):
        raise RequestMismatch(
            f"sequence {index}: expected the response to request {expected}, received that to {digest}: a proxy, a "
            "cache or the server has mixed up two responses"
        )
    shape = (batch.num_rows, request.top_k)
    position = (index, request.starts[index])
    ids = _column(batch, "ids", position).reshape(shape)
    halves = _column(batch, "logprobs", position).view(np.uint16).reshape(shape)
    actual, tail = _column(batch, "actual", position), _column(batch, "tail", position)
    text = (sequence[request.starts[index] :], card.vocab_size)
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
    values = column
    if isinstance(column, pa.FixedSizeListArray):  # without the slice that flatten() copies, which costs 5 µs
        values = column.values[: len(column) * column.type.list_size]
    for array in (column, values):
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) * len(column) // len(array)
            raise InvalidRows(f"sequence {position[0]}, position {position[1] + row}: {name} has a missing value")
    view = np.asarray(values.to_numpy(zero_copy_only=True))
    if not view.flags.aligned:
        raise ProtocolError(f"sequence {position[0]}: expected {name} at a multiple of its size, received it elsewhere")
    return view


def as_received(rows: Rows, sequence: list[int], card: TeacherCard) -> Rows:
    """Encode and decode the rows of an engine, as if a client had received them over the network."""
    request = ScoreRequest(sequences=[sequence], starts=[rows.start], top_k=rows.ids.shape[1])
    writer = StreamWriter(request, card.fingerprint)
    return read_stream(writer.write(0, rows) + writer.close(), request, card)[0]
