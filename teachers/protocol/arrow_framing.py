"""Check the messages of an Arrow stream, their lengths and the end marker, before the content is decoded.

A message consists of a prefix (marker and length of the metadata), the metadata (a flatbuffer, which Arrow verifies)
and a body, whose length is part of the metadata. Uncompressed bodies are read in place, so a stream needs no memory
beyond the received bytes. Compressed bodies are rejected: one of 10 kB can expand to gigabytes.
Format: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

import struct

import pyarrow as pa

from teachers.protocol.errors import ProtocolError, Truncated

END_MARK = b"\xff\xff\xff\xff\0\0\0\0"
_PREFIX = struct.Struct("<II")  # marker, length of the metadata
_MARKER = 0xFFFFFFFF
_HEADER, _COMPRESSION = 2, 3  # fields of the tables Message and RecordBatch, by number (Message.fbs)


def check_frame(data: bytes, num_batches: int) -> None:
    """Check that `data` is a schema, at most `num_batches` uncompressed record batches, and the end marker.

    Raises Truncated if the stream ends early, and ProtocolError for any other fault, such as bytes after the marker.
    """
    source, received = pa.BufferReader(data), 0
    while True:
        start = source.tell()
        if start + _PREFIX.size > len(data):
            raise _truncated(received, num_batches)
        marker, metadata_bytes = _PREFIX.unpack_from(data, start)
        if marker != _MARKER:
            raise ProtocolError(f"expected an Arrow message at byte {start} of the response, received something else")
        if metadata_bytes == 0:
            break
        if received > num_batches:
            raise ProtocolError(f"expected {num_batches} record batches, received more")
        _check_message(_read_message(data, source, received, num_batches), is_first=received == 0)
        received += 1
    if surplus := len(data) - start - len(END_MARK):
        raise ProtocolError(f"expected nothing after the end mark of the response, received {surplus} bytes")


def _read_message(data: bytes, source: pa.BufferReader, received: int, num_batches: int) -> pa.Message:
    """Read one message. Raises Truncated if it is longer than the rest of the data and the end marker is missing."""
    try:
        return pa.ipc.read_message(source)
    except (pa.ArrowException, OSError, EOFError) as error:
        if data.endswith(END_MARK):
            raise ProtocolError(f"Arrow message {received} is malformed or longer than the response") from error
        raise _truncated(received, num_batches) from error


def _check_message(message: pa.Message, is_first: bool) -> None:
    expected = "schema" if is_first else "record batch"
    if message.type != expected:
        raise ProtocolError(f"expected an Arrow message of the type {expected}, received a {message.type}")
    if not is_first and _is_compressed(message.metadata):
        raise ProtocolError("expected an uncompressed record batch, received a compressed one")


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Return whether a record batch is compressed. Arrow must have verified its metadata (a flatbuffer) before."""
    view = memoryview(metadata)
    header = _field(view, _int(view, "I", 0), _HEADER)
    return _field(view, header + _int(view, "I", header), _COMPRESSION) > 0


def _field(view: memoryview, table: int, number: int) -> int:
    """Return the position of a field of a flatbuffer table, 0 if the table does not contain the field."""
    vtable, entry = table - _int(view, "i", table), 4 + 2 * number
    offset = _int(view, "H", vtable + entry) if entry < _int(view, "H", vtable) else 0
    return table + offset if offset else 0


def _int(view: memoryview, format: str, position: int) -> int:
    return int(struct.unpack_from("<" + format, view, position)[0])


def _truncated(received: int, num_batches: int) -> Truncated:
    """Return the error for a stream that ends early after `received` messages. The first message is the schema."""
    sequences = max(received - 1, 0)
    return Truncated(f"the response broke off after {sequences} of {num_batches} sequences, before its end mark")
