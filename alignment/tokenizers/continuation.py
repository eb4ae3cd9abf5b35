"""Tokenize byte strings as continuations of a text: no BOS, no space in front, and any bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from alignment.tokenizers.sentencepiece import SPACE_MARK


@dataclass(frozen=True, eq=False)
class ContinuationWriter:
    """Tokenizes byte strings as continuations of a text, with one vocabulary.

    tokenizer    the tokenizer as it is loaded
    continuing   the same tokenizer without a leading space (`TokenizerKind.as_continuation`)
    token_bytes  [V] bytes of each id, None if it has none
    """

    tokenizer: Tokenizer
    continuing: Tokenizer
    token_bytes: tuple[bytes | None, ...]

    def write(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Tokenize each byte string.

        The tokens have the bytes of the string, or of the string after the normalizer. Strings that are not valid
        UTF-8, or that the tokenizer does not reproduce, are written with the longest token at each position. The list
        of tokens is empty if a string cannot be written.
        """
        texts = [_decoded(piece) for piece in pieces]
        encodings = iter(
            self.continuing.encode_batch_fast([t for t in texts if t is not None], add_special_tokens=False)
        )
        return [
            self._cover(piece) if text is None else self._checked(text, piece, next(encodings).ids)
            for piece, text in zip(pieces, texts, strict=True)
        ]

    @cached_property
    def unwritable(self) -> frozenset[int]:
        """Bytes that no token writes alone."""
        return frozenset(byte for byte in range(256) if bytes([byte]) not in self._id_by_bytes)

    def _checked(self, text: str, piece: bytes, ids: list[int]) -> list[int]:
        """Return the tokens if they write the piece or its normalized form, else a greedy cover."""
        if self._bytes_of(ids) == piece:
            return ids
        normalized = self._normalized(text)
        for candidate in (ids, self.tokenizer.encode(text, add_special_tokens=False).ids):
            if candidate and self._bytes_of(candidate) in (piece, normalized):
                return candidate
        return self._cover(piece) or self._cover(normalized)

    def _bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.token_bytes[i] or b"" for i in ids)

    def _normalized(self, text: str) -> bytes:
        """Return the bytes of the text after the normalizer.

        If no token writes a single space (WordPiece), a run of blanks is one space, and blanks at the end are dropped.
        """
        if self.continuing.normalizer is not None:
            text = self.continuing.normalizer.normalize_str(text).replace(SPACE_MARK, " ")
        if ord(" ") in self.unwritable:
            text = re.sub(r"\s+", " ", text.rstrip())
        return text.encode()

    def _cover(self, piece: bytes) -> list[int]:
        """Write bytes with the longest token at each position; empty if a position has none."""
        ids: list[int] = []
        start = 0
        while start < len(piece):
            for end in range(min(len(piece), start + self._max_token_bytes), start, -1):
                token = self._id_by_bytes.get(piece[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return []
        return ids

    @cached_property
    def _id_by_bytes(self) -> dict[bytes, int]:
        """Lowest id of each byte string."""
        return {data: i for i, data in reversed(list(enumerate(self.token_bytes))) if data}

    @cached_property
    def _max_token_bytes(self) -> int:
        return max(map(len, self._id_by_bytes), default=0)


def _decoded(data: bytes) -> str | None:
    """Return the text of UTF-8 bytes; None if they are not valid."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
