"""Translation: every token of a teacher, written in tokens of the student.

Built once per pair of tokenizers. Text is written as the student would continue with it; special tokens have
no text and correspond by role (EOS speaks for EOS, end of turn for end of turn), never by their spelling; what has
neither has no translation, and its probability stays in the tail.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from alignment.kernels import NONE
from alignment.store import key_of, load_arrays, save_arrays
from alignment.trie import Flat, flatten
from alignment.vocabulary import Vocabulary

SHARED_ROLES = ("eos", "end_of_turn")  # what a model says by itself; one id in two roles speaks for the first
_FORMAT = 2  # of the kept table; a change of what is written into it needs another number
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

    @cached_property
    def flat(self) -> Flat:
        """The teacher's pieces, one after another."""
        return flatten(self.pieces)

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


def translate(
    teacher: Vocabulary, student: Vocabulary, vocab_size: int | None = None, *, cache: Path | None = None
) -> Translation:
    """Build the table for ids below `vocab_size`, by default those of the tokenizer, or find it in the `cache` folder.

    Equal tokenizers translate every id, special or not, into itself, but for roles that they give to other ids. Ids
    that no tokenizer has stay untranslated. Raises TokenizerError if the teacher writes ids beyond `vocab_size`.
    """
    num_ids = vocab_size or len(teacher)
    pieces = teacher.within(num_ids).token_bytes + (None,) * (num_ids - len(teacher))
    path = cache / f"translation-{_key(teacher, student, num_ids)}" if cache else None
    found = load_arrays(path) if path else None
    offsets, tokens = (found["offsets"], found["tokens"]) if found else _table(teacher, student, pieces)
    if path and not found:
        save_arrays(path, {"offsets": offsets, "tokens": tokens})
    written = np.diff(offsets) > 0
    first = np.full(num_ids, NONE, dtype=np.int32)
    first[written] = tokens[offsets[:-1][written]]
    return Translation(teacher, student, pieces, offsets.astype(np.int64), tokens.astype(np.int32), first)


def _key(teacher: Vocabulary, student: Vocabulary, num_ids: int) -> str:
    roles = [(role, v.roles.get(role)) for v in (teacher, student) for role in SHARED_ROLES]
    sizes = (num_ids, len(student))
    return key_of(_FORMAT, tokenizers.__version__, teacher.fingerprint, student.fingerprint, *sizes, roles)


def _table(
    teacher: Vocabulary, student: Vocabulary, pieces: tuple[bytes | None, ...]
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    rows: list[list[int]] = [[] for _ in pieces]
    if teacher.fingerprint == student.fingerprint:
        rows = [[i] if i < min(len(teacher), len(student)) else [] for i in range(len(pieces))]
    else:
        written = [i for i, data in enumerate(pieces) if data]
        for i, ids in zip(written, student.write([pieces[i] or b"" for i in written]), strict=True):
            rows[i] = ids
    for role in reversed(SHARED_ROLES):
        if role in teacher.roles and role in student.roles:
            rows[teacher.roles[role]] = [student.roles[role]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return offsets, np.array([i for row in rows for i in row], dtype=np.int32)
