"""Byte offsets of tokens, and the common boundaries of two tokenizations of one text.

`Tokens` holds one tokenization with the byte offset at which each token ends. `common_cuts` finds the offsets at which
two tokenizations both end a token. `alignment.placement` computes the offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INSIDE = -1  # offset of a token that ends inside a character, at an unknown byte


class AlignmentError(ValueError):
    """Two tokenizations of different texts, or rows that do not belong to a tokenization."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Positions of tokens in a text, for tokenizers whose normalizer changes the text before it is split into tokens.

    starts     [T] int64 byte offset at which each token begins; bytes between the end of one token and the start of the
               next belong to no token. INSIDE if the token begins inside a character
    own_space  [T] bool: the tokenizer added a leading space to the token; this space is not part of the text
    written    [T] bool: without that space, the bytes of the token equal the bytes of the text from start to end
    """

    starts: NDArray[np.int64]
    own_space: NDArray[np.bool_]
    written: NDArray[np.bool_]

    def with_end_token(self, num_bytes: int) -> "Placement":
        """Append an EOS after the text."""
        return Placement(
            np.append(self.starts, num_bytes), np.append(self.own_space, False), np.append(self.written, True)
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one text, by one tokenizer, with their byte positions.

    text       the UTF-8 bytes
    ids        [T] int64 token ids, without BOS
    ends       [T] int64 byte offset at which each token ends; INSIDE if the token ends inside a character and only the
               character offsets of the tokenizer are known. A closing EOS ends at len(text) + 1.
    placement  None if each token has exactly the bytes between the end of the previous token and its own end
    """

    text: bytes
    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    placement: Placement | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Length of the text in bytes."""
        return len(self.text)

    @cached_property
    def known_ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices and end offsets (bytes) of the tokens that do not end inside a character."""
        known = np.flatnonzero(self.ends >= 0)
        return known, self.ends[known]

    def excerpt(self, which: slice, begin: int, stop: int) -> "Tokens":
        """Return the tokens `which` as a tokenization of the bytes begin … stop of the text."""
        ends, placement = self.ends[which], self.placement
        if placement is not None:
            starts = placement.starts[which]
            moved_starts = np.where(starts < 0, INSIDE, np.maximum(starts - begin, 0))
            placement = Placement(moved_starts, placement.own_space[which], placement.written[which])
        moved_ends = np.where(ends < 0, INSIDE, ends - begin)
        return Tokens(self.text[begin:stop], self.ids[which], moved_ends, placement)

    def with_end_token(self, token: int) -> "Tokens":
        """Append one token without bytes after the text. Its end is one byte after the end of the text."""
        return Tokens(
            text=self.text,
            ids=np.append(self.ids, token),
            ends=np.append(self.ends, self.num_bytes + 1),
            placement=self.placement and self.placement.with_end_token(self.num_bytes),
        )

    def continued(self, text: bytes, ids: Sequence[int], num_bytes: Sequence[int]) -> "Tokens":
        """Append a text, with tokens that are known, for example because a model has sampled them.

        num_bytes  number of bytes of each of these tokens
        """
        whole, ends = self.text + text, self.num_bytes + np.cumsum(num_bytes, dtype=np.int64)
        return join_tokens(whole, [self, Tokens(whole, np.array(ids, dtype=np.int64), ends)])

    @property
    def bytes_per_token(self) -> NDArray[np.int64]:
        """[T] bytes of text per token. All bytes of a character count for its last token; a closing EOS has 0."""
        reached = np.maximum.accumulate(np.minimum(self.ends, self.num_bytes).clip(min=0))
        return np.diff(reached, prepend=0)

    @property
    def starts(self) -> NDArray[np.int64]:
        """[T] byte offset at which each token begins."""
        return self.placement.starts if self.placement else previous_ends(self.ends)

    @property
    def own_space(self) -> NDArray[np.bool_]:
        """[T] whether the tokenizer added a leading space that is not part of the text."""
        return self.placement.own_space if self.placement else np.zeros(len(self), dtype=bool)

    @property
    def written(self) -> NDArray[np.bool_]:
        """[T] whether the bytes of the token equal the bytes of the text at its position."""
        return self.placement.written if self.placement else np.ones(len(self), dtype=bool)


def previous_ends(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """[T] end of the previous token; 0 for the first token."""
    return np.concatenate([[0], ends[:-1]])[: len(ends)]


def join_tokens(text: bytes, segments: Sequence[Tokens]) -> Tokens:
    """Concatenate the tokens of consecutive segments of a text; their ends already count from the start of the text."""
    ids = np.concatenate([segment.ids for segment in segments])
    ends = np.concatenate([segment.ends for segment in segments])
    if all(segment.placement is None for segment in segments):
        return Tokens(text, ids.astype(np.int64), ends.astype(np.int64))
    before = previous_ends(ends)
    begins = np.cumsum([0, *(len(segment) for segment in segments)])[:-1]
    starts = np.concatenate(
        [
            segment.placement.starts if segment.placement else before[begin : begin + len(segment)]
            for begin, segment in zip(begins, segments, strict=True)
        ]
    )
    own_space = np.concatenate([segment.own_space for segment in segments])
    written = np.concatenate([segment.written for segment in segments])
    return Tokens(text, ids.astype(np.int64), ends.astype(np.int64), Placement(starts, own_space, written))


class Cuts(NamedTuple):
    """Common boundaries of two tokenizations. Block b is the text between the boundaries b and b + 1.

    teacher, student  [B + 1] token indices: block b contains the teacher tokens teacher[b] … teacher[b + 1] − 1, and
                      the student tokens likewise
    at                [B + 1] byte offsets of the boundaries
    """

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    at: NDArray[np.int64]


def common_cuts(teacher: Tokens, student: Tokens) -> Cuts:
    """Find every byte offset at which both tokenizations end a token.

    Raises AlignmentError if the texts differ or a tokenization does not reach the end of the text.
    """
    if teacher.text != student.text:
        raise AlignmentError(
            f"expected teacher and student tokens of the same text, received tokens of different texts "
            f"({teacher.num_bytes} and {student.num_bytes} bytes)"
        )
    teacher_at, teacher_index = _boundaries(teacher)
    student_at, student_index = _boundaries(student)
    at, in_teacher, in_student = np.intersect1d(teacher_at, student_at, assume_unique=True, return_indices=True)
    ends = [int(side[-1]) if len(side) else 0 for side in (teacher_at, student_at)]
    if ends[0] != ends[1]:
        raise AlignmentError(
            f"the tokenizations end at different bytes: teacher {ends[0]}, student {ends[1]} of {teacher.num_bytes}"
        )
    start = np.zeros(1, dtype=np.int64)
    return Cuts(
        teacher=np.concatenate([start, teacher_index[in_teacher]]),
        student=np.concatenate([start, student_index[in_student]]),
        at=np.concatenate([start, at]),
    )


def _boundaries(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the token boundaries of a text in increasing order, and the number of tokens before each.

    A boundary is a byte offset above 0 at which a token ends, or begins after a gap. Unknown offsets are left out.
    """
    at, count = tokens.ends, np.arange(1, len(tokens) + 1)
    if tokens.placement is not None:
        # Starts differ from the previous ends here, and bytes after the last token may belong to no token.
        end = tokens.ends[-1:] if len(tokens) and tokens.ends[-1] > tokens.num_bytes else np.array([tokens.num_bytes])
        at = np.append(np.stack([tokens.starts, tokens.ends], axis=1).ravel(), end)
        count = np.append(np.stack([count - 1, count], axis=1).ravel(), len(tokens))
    forward = (at > 0) & (at >= np.maximum.accumulate(at))
    at, count = at[forward], count[forward]
    last = np.append(at[1:] != at[:-1], True) if len(at) else np.zeros(0, dtype=bool)
    return at[last], count[last]
