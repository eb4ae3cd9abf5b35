"""Read the files that Weights & Biases writes for an offline run."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_records(path: Path) -> list[Record]:
    """Read the offline records of a run that has ended. The process of W&B writes them shortly after the end."""
    deadline = time.monotonic() + 30
    while not (records := list(stored_records(path))) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no exit record"
        time.sleep(0.05)
    return records


def stored_records(path: Path) -> Iterator[Record]:
    """Yield the complete records of the file.

    After a header of 7 bytes, the file has the log format of LevelDB: blocks of 32 KiB with fragments of checksum,
    length and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(data):
        remaining = 32_768 - at % 32_768
        _, length, kind = struct.unpack_from("<IHB", data, at) if remaining >= 7 else (0, 0, 0)
        if kind == 0:
            at += remaining
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(path: Path) -> list[dict[str, str]]:
    """Return the logged rows: JSON values by key."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in wandb_records(path)
        if record.HasField("history")
    ]
