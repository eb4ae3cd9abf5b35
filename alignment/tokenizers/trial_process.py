"""Script of the subprocess in alignment/tokenizers/trial.py: load a tokenizer under limits and tokenize texts with it.

Without an argument, it reads a tokenizer.json from standard input and writes {} or {"error": message}. With a directory
as argument, it loads the directory with transformers and writes {"tokenizer", "tokens", "adds_bos", "chat_template",
"warning"}: the tokenizer as JSON, null if the tokenizer.json of the directory is used; special tokens by role; whether
BOS precedes an encoded text. It is run as a script, so that it imports only what a job needs. The memory limit needs
Linux.
"""

import json
import os
import resource
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MEMORY_BYTES = 1 << 30  # besides the memory in use at the start, and
MEMORY_PER_BYTE = 24  # for each byte of the file: Gemma 3 needs 13
FOLDER_MEMORY_BYTES = 4 << 30  # transformers itself, and its lists of vocabulary and merges
CPU_S = 60
FOLDER_CPU_S = 300  # the merges of a SentencePiece model with 256,000 pieces take half a minute
MAX_TOKENS_PER_BYTE = 16
ROLES = ("bos", "eos", "pad", "unk")
TEKKEN_TOKENS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}  # of mistral-common, which adds BOS
ENCODED_BY_POST_PROCESSOR = ("post_processor", "truncation", "padding")  # parts without effect on plain encoding
PROBE = (
    "The harbour office opened at six — „elf Säcke“, 日本語, 😀.\n\tif x == 10:  # 1,234.5\n"
    "A second line, with \u00a0 odd\u200b spaces, e\u0301 and \ufb01 and \ufdfa.\n"
) * 8
WORDS = "The harbour office opened"
PROBES = (PROBE, WORDS, f" {WORDS}", "two  words ", "\nCamelCase x_1 = 'é'", "1234567", "")
# Packages that transformers needs for a format, by suffix of the file.
PACKAGES = {
    ".model": ("sentencepiece", "google.protobuf"),
    ".tiktoken": ("tiktoken",),
    "tiktoken.model": ("tiktoken",),
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    data = b"" if folder else sys.stdin.buffer.read()
    num_bytes = sum(path.stat().st_size for path in folder.iterdir()) if folder else len(data)
    _limit_resources(num_bytes, *((FOLDER_MEMORY_BYTES, FOLDER_CPU_S) if folder else (MEMORY_BYTES, CPU_S)))
    try:
        with redirect_stdout(sys.stderr):
            response = _load_folder(folder) if folder else _load(data.decode())
    except BaseException as error:  # Rust panics do not derive from Exception
        response = {"error": _reason(error)}
    sys.stdout.write(json.dumps(response))


def _reason(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it requires custom code (auto_map of tokenizer_config.json), which is never executed: convert it to a "
            "tokenizer.json, and remove auto_map"
        )
    return f"{type(error).__name__}: {str(error)[:300]}"


def _limit_resources(num_bytes: int, memory_bytes: int, cpu_s: int) -> None:
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = used + memory_bytes + MEMORY_PER_BYTE * num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(text: str) -> dict[str, Any]:
    tokenizer = _without_limits_of_length(text)
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if len(ids) > MAX_TOKENS_PER_BYTE * len(PROBE.encode()):
        return {"error": f"it makes {len(ids)} tokens of {len(PROBE.encode())} bytes"}
    tokenizer.decode(ids)
    return {}


def _without_limits_of_length(text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_folder(folder: Path) -> dict[str, Any]:
    """Load a directory with AutoTokenizer, and compare the tokenizer with its JSON on the probe texts."""
    if missing := _missing_package(folder):
        return {"error": f"{missing[0]} needs the package {missing[1]}: install the extra `tokenizers` of Tutelage"}
    try:
        loaded = _auto_tokenizer(folder)
    except ValueError as error:
        if "Error parsing line" not in str(error):
            raise
        names = ", ".join(sorted(path.name for path in folder.glob("*.model*")))
        return {
            "error": f"{names} is neither a SentencePiece model nor a list of tiktoken's ranks: use the file that the "
            "model was published with, or its tokenizer.json"
        }
    if not hasattr(loaded, "backend_tokenizer"):
        return {"error": f"transformers has no fast tokenizer for {type(loaded).__name__}"}
    text, path = loaded.backend_tokenizer.to_str(), folder / "tokenizer.json"
    own = _without_limits_of_length(path.read_text(encoding="utf-8")) if path.is_file() else None
    keeps_own = own is not None and _encode_equally(own.to_str(), text)
    built = own if keeps_own else _without_limits_of_length(text)
    warning = ""
    if own is not None and _writes(own) and not _writes(built):
        warning = (
            f"transformers builds a {type(loaded).__name__} from it, which does not write texts with its vocabulary; "
            "its tokenizer.json is used instead (tokenizer_class of tokenizer_config.json is wrong)"
        )
        keeps_own = True
    elif problem := _difference(loaded, built):
        return {"error": problem}
    is_tekken = own is None and (folder / "tekken.json").is_file()
    tokens = TEKKEN_TOKENS if is_tekken else {role: getattr(loaded, f"{role}_token") for role in ROLES}
    encoded = loaded(WORDS, truncation=False, padding=False).input_ids
    return {
        "tokenizer": None if keeps_own else text,
        "tokens": {role: None if token is None else str(token) for role, token in tokens.items()},
        "adds_bos": is_tekken or (loaded.bos_token_id is not None and encoded[:1] == [loaded.bos_token_id]),
        "chat_template": loaded.chat_template if isinstance(loaded.chat_template, str) else None,
        "warning": warning,
    }


def _auto_tokenizer(folder: Path) -> Any:
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would copy the file to a shared folder
    sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it, which takes seconds
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, mistral_format=False)


def _missing_package(folder: Path) -> tuple[str, str] | None:
    """Return a file of the directory and the package that reading it needs, if the package is not installed."""
    if (folder / "tokenizer.json").exists():
        return None
    for path in sorted(folder.iterdir()):
        suffix = max((suffix for suffix in PACKAGES if path.name.endswith(suffix)), key=len, default="")
        for package in PACKAGES.get(suffix, ()):
            if _is_missing(package):
                return path.name, package.replace("google.", "")
    return None


def _is_missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # the parent package
        return True


def _difference(loaded: Any, built: Any) -> str:
    """Return how a tokenizer and the one that is built from its JSON differ on the probe texts; empty if they agree."""
    for probe in PROBES:
        expected = loaded(probe, add_special_tokens=False, truncation=False, padding=False).input_ids
        received = built.encode(probe, add_special_tokens=False).ids
        if expected != received:
            return f"its conversion changes the tokens of {probe[:20]!r}: {expected[:8]}, {received[:8]}"
    written = built.encode(WORDS, add_special_tokens=False).tokens
    if set(written) <= {loaded.unk_token}:
        return f"it writes {WORDS!r} as {written[:4]}: the vocabulary is damaged or in another format"
    return ""


def _writes(tokenizer: Any) -> bool:
    """Return whether the tokens of a plain text decode to it, apart from case and blanks at the ends."""
    ids = tokenizer.encode(WORDS, add_special_tokens=False).ids
    return bool(tokenizer.decode(ids).strip().lower() == WORDS.lower())


def _encode_equally(first: str, second: str) -> bool:
    """Return whether two tokenizers encode equally without special tokens, which the post-processor would add."""
    one, other = json.loads(first), json.loads(second)
    return all(one[part] == other.get(part) for part in one if part not in ENCODED_BY_POST_PROCESSOR)


if __name__ == "__main__":
    main()
