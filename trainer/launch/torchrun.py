"""Error files of torchrun: record why a process ends, and end a restarted process that would fail again.

torchrun restarts all processes if one of them exits with a code other than 0. Each process of each attempt has an
error file, `…/attempt_N/LOCAL_RANK/error.json`. At the end torchrun prints the earliest error of the last attempt. A
restarted process can read the error files of the attempt before it.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import PeerError

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_ATTEMPT = re.compile(r"attempt_(\d+)")


def permanent_failure() -> str | None:
    """Return the error of the previous attempt if a restart cannot succeed, otherwise None.

    The error is also written to the error file of this process, so that torchrun prints it again.
    """
    path = Path(os.environ.get(ERROR_FILE_VARIABLE, ""))
    attempt = _ATTEMPT.fullmatch(path.parent.parent.name)
    if attempt is None:
        return None
    previous = path.parent.parent.with_name(f"attempt_{int(attempt[1]) - 1}")
    for file in sorted(previous.glob("*/error.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # written by another version, or not complete
            message = json.loads(file.read_bytes())["message"]
            if message["permanent"]:
                _write(path, message["message"], permanent=True, of_peer=False)
                return str(message["message"])
    return None


@contextmanager
def recorded_failures() -> Iterator[None]:
    """Write an error of ONE_SENTENCE that the block raises to the error file of this process. The error propagates."""
    from trainer.launch.failures import ONE_SENTENCE, is_permanent

    path = os.environ.get(ERROR_FILE_VARIABLE)
    try:
        yield
    except ONE_SENTENCE as error:
        if path:
            with suppress(OSError):  # torchrun's summary is then without the sentence
                _write(Path(path), str(error), is_permanent(error), isinstance(error, PeerError))
        raise


def _write(path: Path, sentence: str, permanent: bool, of_peer: bool) -> None:
    """Write an error file in the format of torchrun.

    torchrun prints the error with the lowest timestamp, in whole seconds. The timestamp of an error that another
    process has caused (`of_peer`) is increased by 1 s, so that torchrun prints the cause.
    """
    details = {"py_callstack": sentence, "timestamp": str(int(time.time()) + of_peer)}
    message = {"message": sentence, "extraInfo": details, "permanent": permanent}
    path.write_text(json.dumps({"message": message}), encoding="utf-8")
