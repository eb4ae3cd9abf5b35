"""Failures of a process under torchrun: the sentence for torchrun's summary, and restarts that would fail again.

torchrun restarts all processes after any exit code except 0. It gives each process of each attempt the path of a file
for its error, `…/attempt_N/LOCAL_RANK/error.json`, and prints the first of these errors at the end. A restarted process
finds the errors of the previous attempt there.
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
    """Return the error of the previous attempt if a restart would fail again. torchrun's summary repeats it."""
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
    """Write an error that is one sentence to the file that torchrun reads, and raise it again."""
    from trainer.training.failures import ONE_SENTENCE, is_permanent

    path = os.environ.get(ERROR_FILE_VARIABLE)
    try:
        yield
    except ONE_SENTENCE as error:
        if path:
            with suppress(OSError):  # torchrun's summary is then without the sentence
                _write(Path(path), str(error), is_permanent(error), isinstance(error, PeerError))
        raise


def _write(path: Path, sentence: str, permanent: bool, of_peer: bool) -> None:
    """Write an error in the format of torchrun, which shows the error with the lowest time as the cause of the others.

    An error about another process is dated 1 s later than it was, because times are whole seconds.
    """
    details = {"py_callstack": sentence, "timestamp": str(int(time.time()) + of_peer)}
    message = {"message": sentence, "extraInfo": details, "permanent": permanent}
    path.write_text(json.dumps({"message": message}), encoding="utf-8")
