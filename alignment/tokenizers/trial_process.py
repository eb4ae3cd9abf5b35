"""A process that loads one tokenizer.json from standard input and tokenizes a text: see alignment/tokenizers/trial.py.

Run as a file, so that nothing but json and tokenizers is imported. Writes one JSON object: {"error": …} or {}.
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
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + MEMORY_BYTES + MEMORY_PER_BYTE * len(data)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _load(data.decode())
    except BaseException as error:  # panics of Rust are no Exception
        answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(answer))


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
