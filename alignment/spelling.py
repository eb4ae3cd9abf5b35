"""How each kind of tokenizer spells bytes: token strings in, bytes out.

Byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek, tekken and others converted from tiktoken) writes every byte as a
printable stand-in. SentencePiece, BPE or Unigram, writes a space as '▁' and, with byte fallback, a lone byte as
'<0x0A>'. WordPiece marks what continues a word with '##': what does not begins one, after a space.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SPACE_MARK = "▁"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read as bytes, with the file and the reason."""


class Kind(StrEnum):
    BYTE_LEVEL = "byte-level"
    SENTENCEPIECE = "sentencepiece"
    WORDPIECE = "wordpiece"


@dataclass(frozen=True)
class Spelling:
    """One tokenizer's spelling.

    kind         how its tokens are written
    token_bytes  [V] what each id writes; None for special, unknown and unassigned ids, which have no text
    """

    kind: Kind
    token_bytes: tuple[bytes | None, ...] = field(repr=False)


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Every component in a tokenizer.json part, Sequences opened."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from nodes(value)
    elif isinstance(part, list):
        for value in part:
            yield from nodes(value)


def read_spelling(spec: dict[str, Any], name: str) -> Spelling:
    """The bytes of every id of a parsed tokenizer.json. Raises TokenizerError naming a kind that is not understood."""
    model, kind = spec["model"], _kind(spec, name)
    ids = _ids(model)
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    unknown = {model.get("unk_token"), model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None}
    table: list[bytes | None] = [None] * (max([*ids.values(), *added], default=-1) + 1)
    for token, i in ids.items():
        table[i] = None if token in unknown else _read(token, kind, model)
    for i, token in added.items():
        ordinary = token["content"].encode() if kind is Kind.BYTE_LEVEL else _read(token["content"], kind, model)
        table[i] = None if token["special"] else ordinary
    return Spelling(kind, tuple(table))


def _ids(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _kind(spec: dict[str, Any], name: str) -> Kind:
    model = spec["model"]
    parts = list(nodes([spec.get("decoder"), spec.get("pre_tokenizer"), spec.get("normalizer")]))
    kinds = {node.get("type") for node in parts}
    if model.get("type") == "WordPiece":
        return Kind.WORDPIECE
    if model.get("type") not in ("BPE", "Unigram"):
        raise TokenizerError(
            f"the tokenizer of {name} is {model.get('type')}; BPE, Unigram and WordPiece are understood"
        )
    if model.get("end_of_word_suffix"):
        raise TokenizerError(
            f"the tokenizer of {name} marks the ends of words with {model['end_of_word_suffix']!r} and writes no spaces"
        )
    if "ByteLevel" in kinds:
        return Kind.BYTE_LEVEL
    marked = any(SPACE_MARK in (node.get("content"), node.get("prepend"), node.get("replacement")) for node in parts)
    if marked or "Metaspace" in kinds or model.get("byte_fallback") or model["type"] == "Unigram":
        return Kind.SENTENCEPIECE
    raise TokenizerError(f"the tokenizer of {name} is neither byte-level nor SentencePiece: it marks no spaces")


def _read(token: str, kind: Kind, model: dict[str, Any]) -> bytes:
    if kind is Kind.BYTE_LEVEL:
        return _byte_level(token)
    if kind is Kind.WORDPIECE:
        return _wordpiece(token, model.get("continuing_subword_prefix") or "##")
    byte = _FALLBACK.fullmatch(token) if model.get("byte_fallback") else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()


def _wordpiece(token: str, continuing: str) -> bytes:
    if token.startswith(continuing) and token != continuing:
        return token.removeprefix(continuing).encode()
    begins_word = token[:1].isalnum() and not _is_ideograph(token[0])
    return (f" {token}" if begins_word else token).encode()


def _is_ideograph(char: str) -> bool:
    """CJK characters stand alone in BERT's tokenizers, without a space in front."""
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or "\U00020000" <= char <= "\U0002fa1f"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stays, the rest moves to U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(moved)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(c in _BYTE_ALPHABET for c in token):
        return bytes(_BYTE_ALPHABET[c] for c in token)
    return token.encode()
