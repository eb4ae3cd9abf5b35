"""Arrow files as tables in memory: the stream format, which `datasets` writes, or the file format."""

from pathlib import Path
from typing import Any

ARROW_FILE = b"ARROW1"  # first bytes of the file format
CONTINUATION = b"\xff\xff\xff\xff"  # in front of every message of a stream
END_OF_STREAM = CONTINUATION + bytes(4)


def map_arrow(path: Path) -> Any:
    """Map an Arrow file into memory as a table.

    Raises ValueError for a stream that does not end with its end mark, and the errors of pyarrow for other damage.
    """
    import pyarrow

    source = pyarrow.memory_map(str(path))
    is_file = source.read(len(ARROW_FILE)) == ARROW_FILE
    source.seek(0)
    if is_file:
        return pyarrow.ipc.open_file(source).read_all()
    table = pyarrow.ipc.open_stream(source).read_all()
    source.seek(0)
    has_marks = source.read(len(CONTINUATION)) == CONTINUATION  # not in a stream of Arrow 0.14 or earlier
    source.seek(max(source.size() - len(END_OF_STREAM), 0))
    if has_marks and source.read() != END_OF_STREAM:  # a stream that is cut between two batches can be read
        raise ValueError(
            "the stream does not end with its end mark: the file is cut, other data follow, or its writer was not "
            "closed: write it again"
        )
    return table
