"""Load tokenizer files in a subprocess with limited memory and time, before this process loads them.

A regular expression or a charsmap can require unbounded memory or time, and the library aborts the process if memory
runs out. `try_tokenizer` tries a tokenizer.json, which takes about 0.2 s plus the time to load the file; its result is
cached by the hash of the file. `load_with_transformers` loads a directory, which takes 3 s or more.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from alignment.tokenizers.kinds import TokenizerError

TIMEOUT_S = 120.0
FOLDER_TIMEOUT_S = 600.0
SCRIPT = Path(__file__).with_name("trial_process.py")
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "HF_HUB_OFFLINE": "1",
}
_results: dict[str, str] = {}  # sha256 → error, empty if the file passed
_lock = Lock()


def try_tokenizer(tokenizer_json: bytes, name: str) -> None:
    """Load tokenizer.json in a subprocess. Raises TokenizerError if loading fails or exceeds a limit."""
    digest = hashlib.sha256(tokenizer_json).hexdigest()
    with _lock:
        if digest not in _results:
            _results[digest] = str(_run_script([], tokenizer_json, TIMEOUT_S).get("error", ""))
    if _results[digest]:
        raise TokenizerError(f"the tokenizer of {name} cannot be read: {_results[digest]}")


def load_with_transformers(folder: Path, name: str) -> dict[str, Any]:
    """Load a directory of tokenizer files with AutoTokenizer in a subprocess; see trial_process.py for the result.

    Raises TokenizerError if loading fails, exceeds a limit, or needs a package that is not installed.
    """
    response = _run_script([str(folder)], b"", FOLDER_TIMEOUT_S)
    if error := response.get("error"):
        raise TokenizerError(f"the tokenizer of {name} cannot be read: {str(error).replace(str(folder), name)}")
    return response


def _run_script(arguments: list[str], stdin: bytes, timeout_s: float) -> dict[str, Any]:
    """Return the response of the script, or {"error": message} if it did not respond."""
    command, environment = [sys.executable, "-P", str(SCRIPT), *arguments], os.environ | _ONE_THREAD
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"loading it took more than {timeout_s:g} s"}
    except OSError as error:
        return {"error": f"cannot start a process to try it ({error})"}
    if done.returncode < 0:
        return {"error": f"loading it exceeded the limits of memory or time (signal {-done.returncode})"}
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        return {"error": f"the process that tried it ended with {done.returncode}"}
