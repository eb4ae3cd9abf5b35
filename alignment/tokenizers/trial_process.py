"""Script of the subprocess in alignment/tokenizers/trial.py: load a tokenizer.json and tokenize a text with it.

Reads the file from standard input and writes one JSON object to standard output: {} or {"error": message}. It is run as
a script, so that it imports only json and tokenizers. The memory limit needs Linux.
"""

import json
import resource
import sys

MEMORY_BYTES = 1 << 30  # besides the memory in use at the start, and
MEMORY_PER_BYTE = 24  # for each byte of the file: Gemma 3 needs 13
CPU_S = 60
MAX_TOKENS_PER_BYTE = 16
PROBE = (
    "The harbour office opened at six — „elf Säcke“, 日本語, 😀.\n\tif x == 10:  # 1,234.5\n"
    "A second line, with \u00a0 odd\u200b spaces, e\u0301 and \ufb01 and \ufdfa.\n"
) * 8


def main() -> None:
    data = sys.stdin.buffer.read()
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = used + MEMORY_BYTES + MEMORY_PER_BYTE * len(data)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        response = _load(data.decode())
    except BaseException as error:  # Rust panics do not derive from Exception
        response = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(response))


def _load(text: str) -> dict[str, str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if len(ids) > MAX_TOKENS_PER_BYTE * len(PROBE.encode()):
        return {"error": f"it makes {len(ids)} tokens of {len(PROBE.encode())} bytes"}
    tokenizer.decode(ids)
    return {}


if __name__ == "__main__":
    main()
