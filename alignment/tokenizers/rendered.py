"""Tokenize rendered chats and locate the tokens in the text. Texts of special tokens are encoded as special tokens."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from alignment.offsets import Tokens, join_tokens
from alignment.placement import locate_tokens
from alignment.tokenizers.kinds import TokenizerError

_PROBE = "a"


@dataclass(frozen=True, eq=False)
class RenderedEncoder:
    """Tokenizes rendered chats for one vocabulary.

    name        name of the vocabulary in error messages
    tokenizer   tokenizer that recognizes special tokens in a text, as the model's server does
    tokens      [V] string of each id
    token_bytes [V] bytes of each id, None if it has none
    unknown_id  id of the unknown token, if there is one
    unwritable  bytes that no token writes alone
    plain       tokenizer that encodes texts of special tokens as ordinary text
    continuing  the same tokenizer without the space that some tokenizers add in front of a text
    """

    name: str
    tokenizer: Tokenizer
    tokens: Sequence[str]
    token_bytes: Sequence[bytes | None]
    unknown_id: int | None
    unwritable: frozenset[int]
    plain: Tokenizer
    continuing: Tokenizer

    def encode(self, text: str, literals: Sequence[tuple[int, int]] = ()) -> Tokens:
        """Tokenize a rendered chat. No BOS is added. `literals` are the bytes of texts that are not special tokens.

        A special token ends at the last byte of its text, including white space that some special tokens absorb. The
        text between two special tokens is located like a text of its own.

        Raises TokenizerError if the tokens do not cover the text: with shifted ends other bytes would be supervised.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if ids and max(ids) >= len(self.token_bytes):
            token = self.tokenizer.id_to_token(max(ids))
            raise TokenizerError(f"{self.name}: a rendered chat has {token!r}, which its model does not know")
        segments: list[Tokens] = []
        char = byte = first = 0  # start of the current segment of ordinary tokens: in characters, bytes and tokens
        spelled = _characters(text, literals)
        special = [
            i
            for i, token in enumerate(ids)
            if self._is_special_at(token, text[slice(*offsets[i])]) and not _overlaps(offsets[i], spelled)
        ]
        for i in [*special, len(ids)]:
            start, stop = offsets[i] if i < len(ids) else (len(text), len(text))
            if _overlaps((char, start), spelled):
                texts = {text[begin:end] for begin, end in spelled}
                segment = self._encode_literally(text[char:start], ids[first - 1] if first else None, texts)
            else:
                inside = [(begin - char, end - char) for begin, end in offsets[first:i]]
                segment = self._encode_segment(text[char:start], ids[first:i], inside)
            segments.append(segment.excerpt(slice(None), -byte, 0))  # offsets count from the start of the chat
            byte += len(text[char:start].encode())
            if i < len(ids):
                covered = text[start:stop]
                self._check_special(ids[i], covered, start, char)
                byte += len(covered.encode())
                segments.append(Tokens(b"", np.array(ids[i : i + 1]), np.array([byte])))
            char, first = stop, i + 1
        return join_tokens(text.encode(), segments)

    def _is_special_at(self, token: int, covered: str) -> bool:
        """Return whether the text of a token without bytes is in the chat; false for the unknown token."""
        return self.token_bytes[token] is None and (token != self.unknown_id or covered == self.tokens[token])

    def _check_special(self, token: int, covered: str, start: int, previous_stop: int) -> None:
        """Raise TokenizerError if a special token overlaps the token before or does not cover its own text."""
        expected = self.tokens[token]
        if start < previous_stop or covered.strip() != expected.strip():
            raise TokenizerError(f"{self.name}: expected {expected!r} at character {start}, received {covered!r}")

    def _encode_literally(self, text: str, previous: int | None, literals: set[str]) -> Tokens:
        """Tokenize the text between two special tokens. Texts of special tokens in it are encoded as ordinary text.

        previous  the special token in front of the text; None at the beginning of the chat
        """
        tokenizer = self.plain
        if previous is not None:  # does the tokenizer add a space to a text after this token?
            after = self.tokenizer.encode(f"{self.tokens[previous]}{_PROBE}", add_special_tokens=False).ids[1:]
            if after == self.continuing.encode(_PROBE, add_special_tokens=False).ids:
                tokenizer = self.continuing
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        for token in ids:
            if self.tokens[token] in literals or (self.token_bytes[token] is None and token != self.unknown_id):
                raise TokenizerError(f"{self.name}: {self.tokens[token]!r} cannot be written as ordinary text")
        return self._encode_segment(text, ids, list(encoding.offsets))

    def _encode_segment(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
        """Locate the ordinary tokens between two special tokens."""
        if all(0 <= begin <= end <= len(text) for begin, end in offsets):
            pieces = [self.token_bytes[i] or b"" for i in ids]
            tokens = locate_tokens(text, np.array(ids, dtype=np.int64), pieces, offsets, self.unwritable)
            # A normalizer that composes the last letter with its marks reports the offset of the letter only.
            if ids and _is_one_character(text[offsets[-1][1] - 1 :]):
                tokens = replace(tokens, ends=np.append(tokens.ends[:-1], len(text.encode())))
            known = tokens.ends[tokens.ends >= 0]
            complete = not text or (len(ids) > 0 and tokens.ends[-1] == len(text.encode()))
            if complete and not (np.diff(known) < 0).any():
                return tokens
        raise TokenizerError(
            f"{self.name}: its tokens do not cover a segment of a rendered chat: expected {text[:60]!r}, "
            f"received {[self.tokens[i] for i in ids[:12]]}"
        )


def _characters(text: str, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Convert ranges of bytes in a text to ranges of characters."""
    data = text.encode() if ranges else b""
    return [(len(data[:start].decode()), len(data[:stop].decode())) for start, stop in ranges]


def _overlaps(place: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> bool:
    return any(start < place[1] and place[0] < stop for start, stop in ranges)


def _is_one_character(text: str) -> bool:
    """Return whether a text is a letter with marks that a normalizer composes into one character: e and U+0301."""
    return 1 < len(text) < 8 and len(unicodedata.normalize("NFC", text)) == 1
