"""Match the token strings of a server that returns no ids with the ids of a local tokenizer.

A string stands for the bytes of a token, which need not be whole characters. Servers render such a token differently:
OpenAI as `bytes:\\xe2\\x80`, llama-cpp-python without the incomplete character (often as an empty string), others with
U+FFFD or as the tokenizer's own piece (`Ġthe`, `▁the`). The rendering of a server is found from the strings of a text
whose ids are known; several renderings may agree with them. A string is matched only if all tokens that it can stand
for in these renderings have the same bytes. No string is guessed.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from teachers.protocol.errors import FingerprintMismatch, TeacherError

SPACE = "▁"  # as SentencePiece writes a space


@dataclass(frozen=True)
class Token:
    """A token of a vocabulary.

    id     id of the token
    piece  string of the token in tokenizer.json
    data   bytes of text that the token stands for; None for a special token
    """

    id: int
    piece: str
    data: bytes | None


def _escaped(token: Token) -> str:
    try:
        return (token.data or b"").decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data or b"")


def _replaced(token: Token) -> str:
    return (token.data or b"").decode(errors="replace")


RENDERINGS: Mapping[str, Callable[[Token], str]] = {
    "escaped": _escaped,
    "replaced": _replaced,
    "ignored": lambda token: (token.data or b"").decode(errors="ignore"),
    "piece": lambda token: token.piece,
    "stripped": lambda token: _replaced(token).removeprefix(" "),
}


@dataclass(frozen=True)
class StringMatch:
    """The token that a string of a response identifies.

    id       id of the token
    is_only  no other token has this string
    """

    id: int
    is_only: bool


class TokenStrings:
    """The strings of one tokenizer in the renderings of one server.

    tokens      all tokens by id
    renderings  names in RENDERINGS
    """

    def __init__(self, tokens: Mapping[int, Token], renderings: Iterable[str]) -> None:
        self.tokens = tokens
        self.renderings = tuple(renderings)

    @classmethod
    def observed(cls, tokens: Mapping[int, Token], ids: list[int], strings: list[str]) -> "TokenStrings":
        """Find the renderings that agree with the strings of known ids. Raises FingerprintMismatch if none does."""
        agreeing = [name for name in RENDERINGS if cls(tokens, [name]).first_difference(ids, strings) is None]
        if not agreeing:
            first = max(cls(tokens, [name]).first_difference(ids, strings) or 0 for name in RENDERINGS)
            expected = tokens[ids[first]].piece if first < len(ids) else "the end"
            received = strings[first] if first < len(strings) else "the end"
            raise FingerprintMismatch(
                f"the server's tokens differ from those of tokenizer.json: token {first} of the probe text should be "
                f"{expected!r} and is {received!r}"
            )
        return cls(tokens, agreeing)

    def first_difference(self, ids: list[int], strings: list[str]) -> int | None:
        """Return the first index at which a string cannot stand for the id; None if there is none."""
        if len(ids) != len(strings):
            return min(len(ids), len(strings))
        pairs = enumerate(zip(ids, strings, strict=True))
        return next((i for i, (token, string) in pairs if not self.is_string_of(token, string)), None)

    def is_string_of(self, token: int, string: str) -> bool:
        """Return whether the server may have written a token as `string`."""
        return any(string in _strings(self.tokens[token], name) for name in self.renderings)

    def match(self, string: str) -> StringMatch | None:
        """Return the id that a string stands for; None if there is none, or tokens of different bytes."""
        return self._matches.get(string)

    @cached_property
    def _matches(self) -> dict[str, StringMatch]:
        by_string: dict[str, dict[int, bytes | None]] = defaultdict(dict)
        for token in self.tokens.values():
            for name in self.renderings:
                for string in _strings(token, name):
                    by_string[string][token.id] = token.data
        return {
            string: StringMatch(max(ids), len(ids) == 1)  # SentencePiece has the byte tokens before the pieces
            for string, ids in by_string.items()
            if len(ids) == 1 or (len(set(ids.values())) == 1 and None not in ids.values())
        }


def _strings(token: Token, rendering: str) -> tuple[str, ...]:
    """Return the strings of a token in a rendering. A special token is its name or an empty string."""
    return (token.piece, "") if token.data is None else (RENDERINGS[rendering](token),)


def read_tokens(tokenizer_json: bytes) -> dict[int, Token]:
    """Return all tokens of a tokenizer by id. Raises TeacherError if it is neither byte-level nor SentencePiece."""
    spec = json.loads(tokenizer_json)
    vocabulary = spec["model"]["vocab"]
    pieces = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
    to_bytes = _piece_decoder(spec)
    tokens = {index: Token(index, piece, to_bytes(piece)) for piece, index in pieces}
    for added in spec.get("added_tokens", []):
        data = None if added["special"] else added["content"].encode()
        tokens[added["id"]] = Token(added["id"], added["content"], data)
    return tokens


def _piece_decoder(spec: dict[str, Any]) -> Callable[[str], bytes]:
    text = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer"), spec.get("normalizer")], ensure_ascii=False)
    if '"ByteLevel"' in text:
        alphabet = _byte_level_alphabet()
        return lambda piece: bytes(alphabet[c] for c in piece) if set(piece) <= alphabet.keys() else piece.encode()
    if SPACE in text:
        return _sentencepiece_bytes
    raise TeacherError(
        "the token strings of this tokenizer cannot be placed: expected a byte-level or SentencePiece tokenizer"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level pieces. Unprintable bytes have the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _sentencepiece_bytes(piece: str) -> bytes:
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
