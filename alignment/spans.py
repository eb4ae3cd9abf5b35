"""Where tokens end, in bytes of the text, and where two tokenizations of one text cut it alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignment.spelling import SPACE_MARK

INSIDE = -1  # the end of a token that lies inside a character, where its byte position is not known


class AlignmentError(ValueError):
    """Two tokenizations that do not belong to one text, or rows that do not belong to a tokenization."""


@dataclass(frozen=True, eq=False)
class Placing:
    """How tokens lie on a text that they do not write byte by byte, because a normalizer changed it.

    starts   [T] int64 byte offset at which each token begins; what lies between it and the end of the token before
             belongs to no token. INSIDE where it lies inside a character
    own_space [T] bool: the token carries a leading space of the tokenizer's own, which is no byte of the text
    written  [T] bool: but for that space, the token writes the text's bytes from its start to its end
    """

    starts: NDArray[np.int64]
    own_space: NDArray[np.bool_]
    written: NDArray[np.bool_]

    def closed(self, num_bytes: int) -> "Placing":
        """With an EOS behind the text."""
        return Placing(
            np.append(self.starts, num_bytes), np.append(self.own_space, False), np.append(self.written, True)
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenization of one text.

    text     the UTF-8 bytes
    ids      [T] int64 token ids, without BOS
    ends     [T] int64 byte offset at which each token ends; INSIDE where only the tokenizer's own character
             offsets are known and the token ends within a character. A closing EOS ends at len(text) + 1.
    placing  None where every token writes the bytes between the end of the one before and its own
    """

    text: bytes
    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    placing: Placing | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        return len(self.text)

    def part(self, which: slice, begin: int, stop: int) -> "Tokens":
        """Some of the tokens, as those of the bytes begin … stop of the text."""
        ends, placing = self.ends[which], self.placing
        if placing is not None:
            starts = placing.starts[which]
            moved = np.where(starts < 0, INSIDE, np.maximum(starts - begin, 0))
            placing = Placing(moved, placing.own_space[which], placing.written[which])
        moved_ends = np.where(ends < 0, INSIDE, ends - begin)
        return Tokens(self.text[begin:stop], self.ids[which], moved_ends, placing)

    def closed(self, token: int) -> "Tokens":
        """With one token behind the text that has no bytes and is given one byte of room."""
        return Tokens(
            text=self.text,
            ids=np.append(self.ids, token),
            ends=np.append(self.ends, self.num_bytes + 1),
            placing=self.placing and self.placing.closed(self.num_bytes),
        )

    @property
    def bytes_per_token(self) -> NDArray[np.int64]:
        """[T] bytes of text that each token ends: all bytes of a character at its last token, 0 for a closing EOS."""
        reached = np.maximum.accumulate(np.minimum(self.ends, self.num_bytes).clip(min=0))
        return np.diff(reached, prepend=0)

    @property
    def starts(self) -> NDArray[np.int64]:
        """[T] byte offset at which each token begins."""
        return self.placing.starts if self.placing else np.concatenate([[0], self.ends[:-1]])[: len(self)]

    @property
    def own_space(self) -> NDArray[np.bool_]:
        return self.placing.own_space if self.placing else np.zeros(len(self), dtype=bool)

    @property
    def written(self) -> NDArray[np.bool_]:
        return self.placing.written if self.placing else np.ones(len(self), dtype=bool)


def joined(text: bytes, parts: Sequence[Tokens]) -> Tokens:
    """Tokens of one text from those of its stretches, whose ends already count from the text's beginning."""
    ids, ends = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "ends"))
    if all(part.placing is None for part in parts):
        return Tokens(text, ids.astype(np.int64), ends.astype(np.int64))
    before = np.concatenate([[0], ends[:-1]])[: len(ends)]
    at = np.cumsum([0, *(len(part) for part in parts)])
    starts = np.concatenate(
        [part.placing.starts if part.placing else before[a : a + len(part)] for a, part in zip(at, parts, strict=False)]
    )
    own, written = (np.concatenate([getattr(part, name) for part in parts]) for name in ("own_space", "written"))
    return Tokens(text, ids.astype(np.int64), ends.astype(np.int64), Placing(starts, own, written))


class Cuts(NamedTuple):
    """Common boundaries: block b holds teacher tokens [teacher[b], teacher[b+1]) and student tokens likewise.

    teacher, student  [B + 1] token indices;  at  [B + 1] byte offsets
    """

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    at: NDArray[np.int64]


def place(
    text: str,
    ids: NDArray[np.int64],
    pieces: Sequence[bytes],
    offsets: Sequence[tuple[int, int]],
    unwritable: frozenset[int],
) -> Tokens:
    """Find where tokens lie on the text they were made of, from what they write and the tokenizer's offsets.

    pieces are the tokens' bytes (empty where a token has none), offsets their character spans. Tokens that write the
    text byte by byte are placed by that alone; a space of the tokenizer's own in front of it is noted.
    """
    data = text.encode()
    ends = running_ends(data, pieces)
    if ends is not None:
        own = np.arange(len(ids)) < (1 if len(ids) and sum(map(len, pieces)) > len(data) else 0)
        starts = np.concatenate([[0], ends[:-1]])[: len(ids)]
        return Tokens(data, ids, ends, Placing(starts, own, np.ones(len(ids), dtype=bool)) if own.any() else None)
    ends = sparse_ends(data, pieces, unwritable)
    if ends is not None:
        starts = np.concatenate([[0], ends[:-1]])
        written = np.array([data[a:b] == piece for a, b, piece in zip(starts, ends, pieces, strict=True)])
        return Tokens(data, ids, ends, Placing(starts, np.zeros(len(ids), dtype=bool), written))
    ends = offset_ends(text, offsets)
    begins = offset_starts(text, offsets, ends)
    _settle_inside(data, begins, ends, pieces)
    return Tokens(data, ids, ends, _placing(data, begins, ends, pieces))


def _settle_inside(data: bytes, begins: NDArray[np.int64], ends: NDArray[np.int64], pieces: Sequence[bytes]) -> None:
    """Where several tokens write one character's bytes, count them: their ends inside it are known after all."""
    first = 0
    for i in np.flatnonzero(ends != INSIDE).tolist():
        lengths = np.cumsum([len(piece) for piece in pieces[first : i + 1]])
        begin = int(begins[first])
        if i > first and b"".join(pieces[first : i + 1]) == data[begin : ends[i]]:
            ends[first : i + 1] = begin + lengths
            begins[first + 1 : i + 1] = ends[first:i]
        first = i + 1


def _placing(data: bytes, begins: NDArray[np.int64], ends: NDArray[np.int64], pieces: Sequence[bytes]) -> Placing:
    """Decide token by token what the leading space of a piece is: the text's own, or the tokenizer's."""
    starts, own, written = begins.copy(), np.zeros(len(ends), dtype=bool), np.zeros(len(ends), dtype=bool)
    before = 0
    for i, (begin, end, piece) in enumerate(zip(begins.tolist(), ends.tolist(), pieces, strict=True)):
        if INSIDE in (before, begin, end):
            before = end
            continue
        if piece.startswith(b" ") and before < begin and data[begin - 1 : begin] == b" ":
            starts[i] = begin - 1
        elif piece.startswith(b" ") and not _blank_at(data, begin):
            own[i] = True
        written[i] = piece[int(own[i]) :] == data[starts[i] : end]
        before = end
    return Placing(starts, own, written)


def _blank_at(data: bytes, begin: int) -> bool:
    """Whether the character there is what a tokenizer may write as a space."""
    char = data[begin : begin + 4].decode(errors="ignore")[:1]
    return char.isspace() or char == SPACE_MARK


def running_ends(text: bytes, pieces: Sequence[bytes]) -> NDArray[np.int64] | None:
    """Byte ends of tokens that write the text exactly; None where they do not (a normalizer changed it).

    A space of the tokenizer's own in front of the text belongs to no byte of it and is left out.
    """
    written = b"".join(pieces)
    prefix = 1 if written == b" " + text else 0
    if written[prefix:] != text:
        return None
    return np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - prefix


def sparse_ends(text: bytes, pieces: Sequence[bytes], unwritable: frozenset[int]) -> NDArray[np.int64] | None:
    """Byte ends of tokens that write the text but for bytes the vocabulary has no token for.

    Byte-level BPE drops such bytes silently (SmolLM2 lacks 0xF1, the first of some four-byte characters), and the
    tokenizer's own offsets are then wrong. A dropped byte belongs to the token after it, the last to the last.
    """
    kept = np.array([i for i, byte in enumerate(text) if byte not in unwritable], dtype=np.int64)
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    if bytes(text[i] for i in kept) != b"".join(pieces) or not lengths.all() or not len(lengths):
        return None
    ends = kept[np.cumsum(lengths) - 1] + 1
    ends[-1] = len(text)
    return ends


def offset_ends(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Byte ends from character offsets, for tokens that do not write the text's own bytes."""
    starts = np.array([start for start, _ in offsets] + [len(text)], dtype=np.int64)
    stops = np.array([stop for _, stop in offsets], dtype=np.int64)
    return np.where(starts[1:] >= stops, _byte_at(text)[stops], INSIDE)


def offset_starts(text: str, offsets: Sequence[tuple[int, int]], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Byte starts from character offsets; INSIDE where the token before ends inside a character."""
    starts = _byte_at(text)[np.array([start for start, _ in offsets], dtype=np.int64)]
    starts[1:][ends[:-1] == INSIDE] = INSIDE
    return starts


def _byte_at(text: str) -> NDArray[np.int64]:
    """[characters + 1] byte offset of each character and of the end."""
    return np.concatenate([[0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)])


def common_cuts(teacher: Tokens, student: Tokens) -> Cuts:
    """Cut both tokenizations at every byte offset where both have a token end.

    Raises AlignmentError if the texts differ or a tokenization does not reach the end of the text.
    """
    if teacher.text != student.text:
        raise AlignmentError(
            f"teacher and student tokenized different texts ({teacher.num_bytes} and {student.num_bytes} bytes)"
        )
    teacher_at, teacher_cut = _boundaries(teacher)
    student_at, student_cut = _boundaries(student)
    at, in_teacher, in_student = np.intersect1d(teacher_at, student_at, assume_unique=True, return_indices=True)
    ends = [int(side[-1]) if len(side) else 0 for side in (teacher_at, student_at)]
    if ends[0] != ends[1]:
        raise AlignmentError(
            f"the tokenizations end at different bytes: teacher {ends[0]}, student {ends[1]} of {teacher.num_bytes}"
        )
    start = np.zeros(1, dtype=np.int64)
    return Cuts(
        teacher=np.concatenate([start, teacher_cut[in_teacher]]),
        student=np.concatenate([start, student_cut[in_student]]),
        at=np.concatenate([start, at]),
    )


def _boundaries(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Known positive byte offsets at which a token ends or, after a gap, begins: each once and in order, with the
    number of tokens that lie before it.
    """
    at, count = tokens.ends, np.arange(1, len(tokens) + 1)
    if tokens.placing is not None:
        end = tokens.ends[-1:] if len(tokens) and tokens.ends[-1] > tokens.num_bytes else np.array([tokens.num_bytes])
        at = np.append(np.stack([tokens.starts, tokens.ends], axis=1).ravel(), end)
        count = np.append(np.stack([count - 1, count], axis=1).ravel(), len(tokens))
    forward = (at > 0) & (at >= np.maximum.accumulate(at))
    at, count = at[forward], count[forward]
    last = np.append(at[1:] != at[:-1], True) if len(at) else np.zeros(0, dtype=bool)
    return at[last], count[last]
