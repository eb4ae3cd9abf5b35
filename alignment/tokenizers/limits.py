"""Limits of tokenizer files, checked before memory is allocated. Teachers send these files over the network.

A file of a few kilobytes can declare a token id of two billion, or a normalizer that multiplies the length of a text.
The growth of a text is bounded by the product of the largest factors of all components.
"""

import base64
import json
from typing import Any

from alignment.tokenizers.kinds import Spec, TokenizerError, components, tokenizer_errors

MAX_FILE_BYTES = 1 << 26  # tokenizer.json of Gemma 3 has 33 MB
MAX_IDS = 1 << 24
MAX_UNUSED_IDS = 1 << 16  # ids may have gaps: at most so many more than twice the tokens
MAX_TOKEN_CHARS = 4096
MAX_ADDED_CHARS = 256  # that a component may put in front of a text
MAX_GROWTH = 64.0  # bytes per byte of text; SentencePiece and ByteLevel need 3, the charsmap of T5 is not counted
CHARSMAP_GROWTH = 64  # the longest replacement of one character; NFKC has 33 bytes


def parse_object(data: bytes, file: str, name: str) -> dict[str, Any]:
    """Parse a JSON object of at most MAX_FILE_BYTES. Raises TokenizerError if it is larger or not a JSON object."""
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"the tokenizer of {name} cannot be read: {file} has {len(data)} bytes, expected at most {MAX_FILE_BYTES}"
        )
    with tokenizer_errors(name):
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a JSON object, received {type(value).__name__}")
    return value


def check_limits(spec: Spec, name: str) -> None:
    """Check a parsed tokenizer.json against all limits. Raises TokenizerError if it exceeds one."""
    with tokenizer_errors(name):
        _check_ids(spec)
        if spec["model"].get("dropout"):
            raise ValueError("it drops merges at random (dropout), so that a text has no fixed tokens; remove the key")
        growth = _growth(spec.get("normalizer")) * _growth(spec.get("pre_tokenizer"))
        if growth > MAX_GROWTH:
            raise ValueError(
                f"its normalizer and pre-tokenizer can multiply a text by {growth:.3g}, expected at most {MAX_GROWTH:g}"
            )


def _check_ids(spec: Spec) -> None:
    """Check the token ids and the token lengths. Raises ValueError if one is invalid or exceeds its limit."""
    model, added = spec["model"], spec.get("added_tokens") or []
    vocab = model["vocab"]
    pieces = [piece for piece, _ in vocab] if isinstance(vocab, list) else list(vocab)
    ids = list(range(len(vocab))) if isinstance(vocab, list) else list(vocab.values())
    ids += [token["id"] for token in added]
    if wrong := [i for i in ids if type(i) is not int or i < 0]:
        raise ValueError(f"expected ids of 0 and above, received {str(wrong[0])[:40]!r}")
    largest = min(MAX_IDS, 2 * len(ids) + MAX_UNUSED_IDS)
    if max(ids, default=0) > largest:
        raise ValueError(f"{len(ids)} tokens may have ids up to {largest}, the largest id is {max(ids)}")
    longest = max(map(len, [*pieces, *(token["content"] for token in added)]), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise ValueError(f"a token has {longest} characters, expected at most {MAX_TOKEN_CHARS}")
    unknown = model.get("unk_id")
    if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
        raise ValueError(f"unk_id is {str(unknown)[:40]}, expected an id below {len(vocab)}")


def _growth(part: Any) -> float:
    """Return the largest factor by which a normalizer or pre-tokenizer can multiply the bytes of a text."""
    total, has_charsmap = 1.0, False
    for component in components(part):
        kind = component.get("type")
        if kind == "Precompiled" and not has_charsmap:
            has_charsmap = True  # one is common, and each character is replaced once; further ones are counted
            _charsmap_growth(component)
        else:
            total *= _component_growth(component)
        prefix = component.get("prepend") or ""
        if len(prefix) > MAX_ADDED_CHARS:
            raise ValueError(f"it puts {len(prefix)} characters in front of a text, expected at most {MAX_ADDED_CHARS}")
    return total


def _component_growth(component: Spec) -> float:
    match component.get("type"):
        case "Replace":
            pattern, content = component["pattern"], len(component["content"].encode())
            matched = len(pattern["String"].encode()) if "String" in pattern else 1
            return max(1.0, content / matched if matched else content + 1.0)
        case "Metaspace":
            return max(1.0, float(len((component.get("replacement") or "").encode())))
        case "Precompiled":
            return _charsmap_growth(component)
        case "ByteLevel" | "BertNormalizer":
            return 2.0
    return 1.0


def _charsmap_growth(component: Spec) -> float:
    """Return the length in bytes of the longest replacement in a charsmap, at least 1.

    A charsmap consists of the size of a trie (4 bytes), the trie, and the replacements, which are separated by NUL.
    """
    data = base64.b64decode(component.get("precompiled_charsmap") or "")
    trie_bytes = int.from_bytes(data[:4], "little")
    if data and not 4 + trie_bytes < len(data):
        raise ValueError("its precompiled_charsmap is truncated")
    longest = max(map(len, data[4 + trie_bytes :].split(b"\0")), default=0)
    if longest > CHARSMAP_GROWTH:
        raise ValueError(f"its charsmap replaces a character by {longest} bytes, expected at most {CHARSMAP_GROWTH}")
    return max(1.0, float(longest))
