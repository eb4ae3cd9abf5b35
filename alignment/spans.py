"""Where tokens end, in bytes of the text, and where two tokenizations of one text cut it alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INSIDE = -1  # the end of a token that lies inside a character, where its byte position is not known


class AlignmentError(ValueError):
    """Two tokenizations that do not belong to one text, or rows that do not belong to a tokenization."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenization of one text.

    text  the UTF-8 bytes
    ids   [T] int64 token ids, without BOS
    ends  [T] int64 byte offset at which each token ends; INSIDE where only the tokenizer's own character
          offsets are known and the token ends within a character. A closing EOS ends at len(text) + 1.
    """

    text: bytes
    ids: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        return len(self.text)


class Cuts(NamedTuple):
    """Common boundaries: block b holds teacher tokens [teacher[b], teacher[b+1]) and student tokens likewise.

    teacher, student  [B + 1] token indices;  at  [B + 1] byte offsets
    """

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    at: NDArray[np.int64]


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
    byte_at = np.concatenate([[0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)])
    starts = np.array([start for start, _ in offsets] + [len(text)], dtype=np.int64)
    stops = np.array([stop for _, stop in offsets], dtype=np.int64)
    return np.where(starts[1:] >= stops, byte_at[stops], INSIDE)


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
    if len(teacher_at) != 0 and (len(at) == 0 or at[-1] != teacher_at[-1] or at[-1] != student_at[-1]):
        raise AlignmentError(
            f"the tokenizations end at different bytes: teacher {teacher_at[-1]}, "
            f"student {student_at[-1] if len(student_at) else 0} of {teacher.num_bytes}"
        )
    start = np.zeros(1, dtype=np.int64)
    return Cuts(
        teacher=np.concatenate([start, teacher_cut[in_teacher]]),
        student=np.concatenate([start, student_cut[in_student]]),
        at=np.concatenate([start, at]),
    )


def _boundaries(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Known positive byte ends, each once, with the number of tokens up to and including the last that ends there."""
    index = np.flatnonzero(tokens.ends > 0)
    ends = tokens.ends[index]
    last = np.append(ends[1:] != ends[:-1], True) if len(ends) else np.zeros(0, dtype=bool)
    return ends[last], index[last] + 1
