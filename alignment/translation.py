"""Translation: every token of a teacher, written in tokens of the student.

Built once per pair of tokenizers. A token with text is written as the student would continue a text with it. Special
tokens have no text and correspond by role (EOS to EOS, end of turn to end of turn), never by their names. A token with
neither has no translation; its probability stays in the tail.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from alignment.array_cache import cache_key, load_arrays, save_arrays
from alignment.kernels import NONE
from alignment.tokenizers.vocabulary import Vocabulary
from alignment.trie import Flat, flatten

SHARED_ROLES = ("eos", "end_of_turn")  # tokens that models generate; if one id has both roles, the first is used
_FORMAT = 2  # of the cached table; change the number when the content of the table changes
_MAX_CACHED_STRINGS = 1 << 19  # byte strings, about 100 MB


@dataclass(frozen=True, eq=False)
class Translation:
    """The W tokens of a teacher in tokens of the student.

    W is the number of ids that the teacher's model scores. It may exceed the size of the tokenizer (padded embeddings).

    pieces   [W] the bytes of each teacher token, None if it has none
    offsets  [W + 1] int64 and tokens [nnz] int32: teacher token x is written tokens[offsets[x]:offsets[x + 1]]
    first    [W] int32: the first of these tokens, NONE if there is none
    """

    teacher: Vocabulary
    student: Vocabulary
    pieces: tuple[bytes | None, ...] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    tokens: NDArray[np.int32] = field(repr=False)
    first: NDArray[np.int32] = field(repr=False)
    _write_cache: dict[bytes, list[int]] = field(default_factory=dict, repr=False)

    @cached_property
    def flat(self) -> Flat:
        """The bytes of the teacher's tokens in one array."""
        return flatten(self.pieces)

    @property
    def is_identity(self) -> bool:
        """Whether both tokenizers are the same."""
        return self.teacher.fingerprint == self.student.fingerprint

    def write(self, pieces: list[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokenize byte strings for the student; return offsets [n + 1] and tokens. Results are cached in memory."""
        known = {piece: self._write_cache.get(piece) for piece in pieces}
        missing = [piece for piece, ids in known.items() if ids is None]
        written = dict(zip(missing, self.student.write(missing), strict=True))
        if len(self._write_cache) + len(written) > _MAX_CACHED_STRINGS:
            self._write_cache.clear()
        self._write_cache.update(written)
        rows = [written.get(piece) or known[piece] or [] for piece in pieces]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return offsets, np.array([i for row in rows for i in row], dtype=np.int32)


def translate(
    teacher: Vocabulary, student: Vocabulary, vocab_size: int | None = None, *, cache: Path | None = None
) -> Translation:
    """Build the translation for ids below `vocab_size` (default: the size of the tokenizer), or load it from `cache`.

    If both tokenizers are equal, every id is translated into itself, also a special one, except for the tokens of roles
    that have different ids. Ids that the teacher's tokenizer does not have are not translated.

    Raises TokenizerError if the teacher's tokenizer can write ids at or above `vocab_size`.
    """
    num_ids = vocab_size or len(teacher)
    pieces = teacher.within(num_ids).token_bytes + (None,) * (num_ids - len(teacher))
    path = cache / f"translation-{_key(teacher, student, num_ids)}" if cache else None
    cached = load_arrays(path) if path else None
    offsets, tokens = (cached["offsets"], cached["tokens"]) if cached else _build_table(teacher, student, pieces)
    if path and not cached:
        save_arrays(path, {"offsets": offsets, "tokens": tokens})
    has_tokens = np.diff(offsets) > 0
    first = np.full(num_ids, NONE, dtype=np.int32)
    first[has_tokens] = tokens[offsets[:-1][has_tokens]]
    return Translation(teacher, student, pieces, offsets.astype(np.int64), tokens.astype(np.int32), first)


def _key(teacher: Vocabulary, student: Vocabulary, num_ids: int) -> str:
    roles = [(role, v.roles.get(role)) for v in (teacher, student) for role in SHARED_ROLES]
    sizes = (num_ids, len(student))
    return cache_key(_FORMAT, tokenizers.__version__, teacher.fingerprint, student.fingerprint, *sizes, roles)


def _build_table(
    teacher: Vocabulary, student: Vocabulary, pieces: tuple[bytes | None, ...]
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Write every teacher token in student tokens; return offsets [W + 1] and tokens."""
    rows: list[list[int]] = [[] for _ in pieces]
    if teacher.fingerprint == student.fingerprint:
        rows = [[i] if i < min(len(teacher), len(student)) else [] for i in range(len(pieces))]
    else:
        with_text = [i for i, data in enumerate(pieces) if data]
        for i, ids in zip(with_text, student.write([pieces[i] or b"" for i in with_text]), strict=True):
            rows[i] = ids
    for role in reversed(SHARED_ROLES):  # the first role is assigned last and wins
        if role in teacher.roles and role in student.roles:
            rows[teacher.roles[role]] = [student.roles[role]]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return offsets, np.array([i for row in rows for i in row], dtype=np.int32)
