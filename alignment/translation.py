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
_REMEMBERED = 1 << 19  # byte strings, some 100 MB


@dataclass(frozen=True, eq=False)
class Translation:
    """The teacher's W tokens in tokens of the student.

    W counts the ids that the teacher's model scores, which may be more than its tokenizer has (padded embeddings).

    pieces   [W] the bytes of each teacher token, None where it has none
    offsets  [W + 1] int64 and tokens [nnz] int32: teacher token x is written tokens[offsets[x]:offsets[x + 1]]
    first    [W] int32: the first of them, NONE where there is none
    """

    teacher: Vocabulary
    student: Vocabulary
    pieces: tuple[bytes | None, ...] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    tokens: NDArray[np.int32] = field(repr=False)
    first: NDArray[np.int32] = field(repr=False)
    _written: dict[bytes, list[int]] = field(default_factory=dict, repr=False)

    @property
    def is_identity(self) -> bool:
        return self.teacher.fingerprint == self.student.fingerprint

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


def translate(teacher: Vocabulary, student: Vocabulary, vocab_size: int | None = None) -> Translation:
    """Build the table for ids below `vocab_size`, by default those of the tokenizer.

    Equal tokenizers translate every id, special or not, into itself. Ids that no tokenizer has stay untranslated.
    """
    pieces = teacher.token_bytes + (None,) * ((vocab_size or len(teacher)) - len(teacher))
    rows: list[list[int]] = [[] for _ in pieces]
    if teacher.fingerprint == student.fingerprint:
        rows[: len(teacher)] = [[i] for i in range(len(teacher))]
    else:
        written = [i for i, data in enumerate(pieces) if data]
        for i, ids in zip(written, student.write([pieces[i] or b"" for i in written]), strict=True):
            rows[i] = ids
        for role in _SHARED_ROLES:
            if role in teacher.roles and role in student.roles:
                rows[teacher.roles[role]] = [student.roles[role]]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.array([i for row in rows for i in row], dtype=np.int32)
    first = np.full(len(rows), NONE, dtype=np.int32)
    first[lengths > 0] = tokens[offsets[:-1][lengths > 0]]
    return Translation(teacher, student, pieces, offsets, tokens, first)
