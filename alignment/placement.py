"""Positions of tokens in a text: from the bytes of the tokens if possible, else from the tokenizer's character offsets.

`locate_tokens` tries three methods, the most exact first:

1. the bytes of the tokens are the bytes of the text;
2. the same, except for bytes that the vocabulary cannot write;
3. a normalizer changed the text: the character offsets of the tokenizer are converted to byte offsets.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.offsets import INSIDE, Placement, Tokens, previous_ends
from alignment.tokenizers.sentencepiece import SPACE_MARK


def locate_tokens(
    text: str,
    ids: NDArray[np.int64],
    pieces: Sequence[bytes],
    offsets: Sequence[tuple[int, int]],
    unwritable: frozenset[int],
) -> Tokens:
    """Find the byte offsets of tokens in the text from which they were made.

    pieces      bytes of each token, empty if it has none
    offsets     character span of each token, from the tokenizer
    unwritable  bytes that no token of the vocabulary writes alone
    """
    data = text.encode()
    ends = exact_ends(data, pieces)
    if ends is not None:
        # The pieces are longer than the text only by a space that the tokenizer added in front.
        has_prefix = len(ids) > 0 and sum(map(len, pieces)) > len(data)
        return Tokens(data, ids, ends, _prefixed_placement(ends) if has_prefix else None)
    ends = ends_without_unwritable(data, pieces, unwritable)
    if ends is not None:
        starts = previous_ends(ends)
        written = np.array([data[a:b] == piece for a, b, piece in zip(starts, ends, pieces, strict=True)])
        return Tokens(data, ids, ends, Placement(starts, np.zeros(len(ids), dtype=bool), written))
    ends = ends_from_offsets(text, offsets)
    starts = _starts_from_offsets(text, offsets, ends)
    _resolve_inside_characters(data, starts, ends, pieces)
    return Tokens(data, ids, ends, _placement_from_offsets(data, starts, ends, pieces))


def exact_ends(text: bytes, pieces: Sequence[bytes]) -> NDArray[np.int64] | None:
    """Return the byte ends of tokens whose bytes are the text; None if they are not (a normalizer changed the text).

    A space that the tokenizer added in front of the text is not counted.
    """
    written = b"".join(pieces)
    prefix = 1 if written == b" " + text else 0
    if written[prefix:] != text:
        return None
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - prefix


def ends_without_unwritable(
    text: bytes, pieces: Sequence[bytes], unwritable: frozenset[int]
) -> NDArray[np.int64] | None:
    """Return the byte ends of tokens whose bytes are the text without the bytes that the vocabulary cannot write.

    Byte-level BPE drops such bytes silently (SmolLM2 lacks 0xF1, the first byte of some four-byte characters), and the
    character offsets of the tokenizer are then wrong. A dropped byte belongs to the next token; dropped bytes at the
    end of the text belong to the last token. None if the bytes differ in any other way.
    """
    kept = np.array([i for i, byte in enumerate(text) if byte not in unwritable], dtype=np.int64)
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    if bytes(text[i] for i in kept) != b"".join(pieces) or not lengths.all() or not len(lengths):
        return None
    ends = kept[np.cumsum(lengths) - 1] + 1
    ends[-1] = len(text)
    return ends


def ends_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Convert character offsets to byte ends; INSIDE if the next token begins in the same character."""
    starts = np.array([start for start, _ in offsets] + [len(text)], dtype=np.int64)
    stops = np.array([stop for _, stop in offsets], dtype=np.int64)
    return np.where(starts[1:] >= stops, _byte_offsets(text)[stops], INSIDE)


def _starts_from_offsets(text: str, offsets: Sequence[tuple[int, int]], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Convert character offsets to byte starts; INSIDE if the previous token ends inside a character."""
    starts = _byte_offsets(text)[np.array([start for start, _ in offsets], dtype=np.int64)]
    starts[1:][ends[:-1] == INSIDE] = INSIDE
    return starts


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """[characters + 1] byte offset of each character and of the end of the text."""
    return np.concatenate([[0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)])


def _prefixed_placement(ends: NDArray[np.int64]) -> Placement:
    """Mark the leading space of the first token as added by the tokenizer."""
    first = np.arange(len(ends)) < 1
    return Placement(previous_ends(ends), first, np.ones(len(ends), dtype=bool))


def _resolve_inside_characters(
    data: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], pieces: Sequence[bytes]
) -> None:
    """Replace INSIDE, in place, where several tokens together write exactly the bytes of one character.

    The lengths of their pieces then give their ends inside the character.
    """
    first = 0  # first token after the last known end: tokens first … i end inside characters, except i
    for i in np.flatnonzero(ends != INSIDE).tolist():
        lengths = np.cumsum([len(piece) for piece in pieces[first : i + 1]])
        begin = int(starts[first])
        if i > first and b"".join(pieces[first : i + 1]) == data[begin : ends[i]]:
            ends[first : i + 1] = begin + lengths
            starts[first + 1 : i + 1] = ends[first:i]
        first = i + 1


def _placement_from_offsets(
    data: bytes, begins: NDArray[np.int64], ends: NDArray[np.int64], pieces: Sequence[bytes]
) -> Placement:
    """Build a placement from the byte offsets of tokens. Leading spaces that the tokenizer added are detected."""
    starts, own, written = begins.copy(), np.zeros(len(ends), dtype=bool), np.zeros(len(ends), dtype=bool)
    previous_end = 0
    for i, (begin, end, piece) in enumerate(zip(begins.tolist(), ends.tolist(), pieces, strict=True)):
        if INSIDE in (previous_end, begin, end):
            previous_end = end
            continue
        if piece.startswith(b" ") and previous_end < begin and data[begin - 1 : begin] == b" ":
            starts[i] = begin - 1  # the offsets left out a space of the text that the token writes
        elif piece.startswith(b" ") and not _is_blank_at(data, begin):
            own[i] = True
        written[i] = piece[int(own[i]) :] == data[starts[i] : end]
        previous_end = end
    return Placement(starts, own, written)


def _is_blank_at(data: bytes, begin: int) -> bool:
    """Return whether the character at `begin` is one that a tokenizer may write as a space."""
    char = data[begin : begin + 4].decode(errors="ignore")[:1]
    return char.isspace() or char == SPACE_MARK
