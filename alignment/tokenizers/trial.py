"""Load the tokenizer file of a teacher in a subprocess with limited memory and time, before this process loads it.

A regular expression or a charsmap can require unbounded memory or time, and the library aborts the process if memory
runs out. A trial takes about 0.2 s plus the time to load the file. Its result is cached by the hash of the file.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Lock

from alignment.tokenizers.kinds import TokenizerError

TIMEOUT_S = 120.0
_SCRIPT = Path(__file__).with_name("trial_process.py")
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_results: dict[str, str] = {}  # sha256 → error, empty if the file passed
_lock = Lock()


def try_tokenizer(tokenizer_json: bytes, name: str) -> None:
    """Load tokenizer.json in a subprocess. Raises TokenizerError if loading fails or exceeds a limit."""
    digest = hashlib.sha256(tokenizer_json).hexdigest()
    with _lock:
        if digest not in _results:
            _results[digest] = _trial(tokenizer_json)
    if _results[digest]:
        raise TokenizerError(f"the tokenizer of {name} cannot be read: {_results[digest]}")


def _trial(tokenizer_json: bytes) -> str:
    """Return the error message of a trial, or an empty string if the file was loaded."""
    command, environment = [sys.executable, "-P", str(_SCRIPT)], os.environ | _ONE_THREAD
    try:
        done = subprocess.run(
            command, input=tokenizer_json, capture_output=True, timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"loading it took more than {TIMEOUT_S:g} s"
    except OSError as error:
        return f"cannot start a process to try it ({error})"
    if done.returncode < 0:
        return f"loading it exceeded the limits of memory or time (signal {-done.returncode})"
    try:
        return str(json.loads(done.stdout).get("error", ""))
    except ValueError:
        return f"the process that tried it ended with {done.returncode}"
