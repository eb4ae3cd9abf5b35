"""Translation: every token of a teacher, written in tokens of the student.

Built once per pair of tokenizers. Text is written as the student would continue with it; special tokens have
no text and correspond by role (EOS speaks for EOS), never by their spelling; what has neither has no
translation, and its probability stays in the tail.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alignment.kernels import NONE
from alignment.vocabulary import Vocabulary

_SHARED_ROLES = ("eos",)
_REMEMBERED = 1 << 18


@dataclass(frozen=True, eq=False)
class Translation:
    """The teacher's W tokens in tokens of the student.

    offsets  [W + 1] int64 and tokens [nnz] int32: teacher token x is written tokens[offsets[x]:offsets[x + 1]]
    first    [W] int32: the first of them, NONE where there is none
    """

    teacher: Vocabulary
    student: Vocabulary
    offsets: NDArray[np.int64] = field(repr=False)
    tokens: NDArray[np.int32] = field(repr=False)
    first: NDArray[np.int32] = field(repr=False)
    _written: dict[bytes, list[int]] = field(default_factory=dict, repr=False)

    @property
    def is_identity(self) -> bool:
        return self.teacher.fingerprint == self.student.fingerprint

    def of(self, token: int) -> tuple[int, ...]:
        """The student's tokens for one teacher token."""
        return tuple(self.tokens[self.offsets[token] : self.offsets[token + 1]].tolist())

    def write(self, pieces: list[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The student's tokens for byte strings, as offsets and tokens; what was written once is remembered."""
        known = {piece: self._written.get(piece) for piece in pieces}
        new = [piece for piece, ids in known.items() if ids is None]
        fresh = dict(zip(new, self.student.write(new), strict=True))
        if len(self._written) + len(fresh) > _REMEMBERED:
            self._written.clear()
        self._written.update(fresh)
        rows = [fresh.get(piece) or known[piece] or [] for piece in pieces]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return offsets, np.array([i for row in rows for i in row], dtype=np.int32)

    def forget(self) -> None:
        """Drop what `write` remembers, as a run that meets new text would have to."""
        self._written.clear()


def translate(teacher: Vocabulary, student: Vocabulary) -> Translation:
    """Build the table. Equal tokenizers translate every id, special or not, into itself."""
    if teacher.fingerprint == student.fingerprint:
        ids = np.arange(len(teacher), dtype=np.int32)
        return Translation(teacher, student, np.arange(len(teacher) + 1, dtype=np.int64), ids, ids)
    written = [i for i, data in enumerate(teacher.token_bytes) if data]
    rows: list[list[int]] = [[] for _ in range(len(teacher))]
    for i, ids_of_token in zip(written, student.write([teacher.token_bytes[i] or b"" for i in written]), strict=True):
        rows[i] = ids_of_token
    for role in _SHARED_ROLES:
        if role in teacher.roles and role in student.roles:
            rows[teacher.roles[role]] = [student.roles[role]]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.array([i for row in rows for i in row], dtype=np.int32)
    first = np.full(len(rows), NONE, dtype=np.int32)
    first[lengths > 0] = tokens[offsets[:-1][lengths > 0]]
    return Translation(teacher, student, offsets, tokens, first)
