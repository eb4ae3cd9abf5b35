"""The paper's own alignment, `em` and `min_ed`, as its code does it (FuseLLM, 2401.10491), for comparison only.

Token strings are warped onto each other (dynamic time warping; the cost is the edit distance without the space
mark; ties go to the diagonal, then the teacher, then the student). A student token that meets exactly one teacher
token, to which the vocabulary map sends it, takes that token's row with every candidate mapped; where two candidates
map to one token the first stays and the other is dropped; everything else becomes one-hot on the *current* token with
the value 1. These faults are the reference's and are reproduced to the id (tests/golden/); nothing else inherits them.

Convention here, as there: row j is the distribution *after* token j, and values pass through unchanged.
Cost: one pass over teacher × student tokens; distances are computed once per pair of different strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from alignment.chain import Rows, check_rows
from alignment.compiled import compiled
from alignment.kernels import NONE
from alignment.spans import Tokens
from alignment.store import key_of, load_arrays, save_arrays
from alignment.target import Target, target_from_entries
from alignment.vocabulary import Vocabulary

DIAGONAL, TEACHER, STUDENT = 0, 1, 2
METHODS = ("em", "min_ed")
UNMET = -2  # a token whose place in the student's vocabulary has not been looked for
_FORMAT = 1
AT_ONCE = 64  # unmapped tokens whose distances to a whole vocabulary exist at once


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Ragged rows: row i holds entries offsets[i] … offsets[i + 1] of ids and values, as the reference gives them.

    mapped  [T] bool: the others are one-hot on the current token, because nothing could be mapped
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    mapped: NDArray[np.bool_]


class TokenMap:
    """Teacher token → student token by spelling, the space mark exchanged: equal strings first.

    With `nearest`, a token without an equal goes to the string at the smallest edit distance, ties to the lowest id;
    without it, it goes nowhere. A distance to a whole vocabulary takes milliseconds, so tokens are mapped when they
    are met; with `keep_at`, what was met in other runs is known, and `save` adds what was met in this one.
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary, *, nearest: bool, keep_at: Path | None = None) -> None:
        self.teacher = teacher
        self.student = student
        self._nearest = nearest
        self._keep_at = keep_at
        self._equals = {token: i for i, token in reversed(list(enumerate(student.tokens)))}
        kept = self._kept()
        # [W + 1] student id, NONE or UNMET; the last is for ids that no tokenizer has
        self._known = np.append(np.full(len(teacher), UNMET), NONE) if kept is None else kept

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Student ids, NONE where there is none; any shape."""
        ids = np.minimum(ids, len(self.teacher))
        unmet = self._known[ids] == UNMET
        if unmet.any():
            self._learn(np.unique(ids[unmet]).tolist())
        known: NDArray[np.int64] = self._known[ids]
        return known

    def save(self) -> None:
        """Add what was met to the file, beside what other processes have put there meanwhile."""
        if self._keep_at is not None:
            kept = self._kept()
            merged = self._known if kept is None else np.where(self._known == UNMET, kept, self._known)
            save_arrays(self._keep_at, {"student_ids": merged})

    def _kept(self) -> NDArray[np.int64] | None:
        found = load_arrays(self._keep_at) if self._keep_at else None
        return found["student_ids"].astype(np.int64) if found else None

    def _learn(self, ids: Sequence[int]) -> None:
        spelled = {i: self._spelling(i) for i in ids}
        found = {i: self._equals.get(spelled[i], NONE) for i in ids}
        far = [i for i in ids if found[i] == NONE] if self._nearest else []
        for begin in range(0, len(far), AT_ONCE):
            some = far[begin : begin + AT_ONCE]
            strings = [spelled[i] for i in some]
            distances = cdist(strings, self.student.tokens, scorer=Levenshtein.distance, dtype=np.uint16)
            found |= zip(some, distances.argmin(axis=1).tolist(), strict=True)
        self._known[ids] = [found[i] for i in ids]  # at once, for other threads read it meanwhile

    def _spelling(self, token_id: int) -> str:
        return self.teacher.tokens[token_id].replace(self.teacher.space_mark, self.student.space_mark)


def token_map(teacher: Vocabulary, student: Vocabulary, method: str, cache: Path | None = None) -> TokenMap:
    """The map of `em` (equal strings only) or `min_ed`, known so far in the `cache` folder."""
    if method not in METHODS:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, received {method!r}")
    name = f"{method}-{key_of(_FORMAT, teacher.fingerprint, student.fingerprint, len(teacher), len(student))}"
    return TokenMap(teacher, student, nearest=method == "min_ed", keep_at=cache / name if cache else None)


def align_fusellm(
    ids: NDArray[np.integer],
    values: NDArray[np.floating],
    teacher_ids: NDArray[np.int64],
    student_ids: NDArray[np.int64],
    mapping: TokenMap,
) -> MappedRows:
    """The teacher's rows [T_t, K] of candidates and values, each after its token, for every student token."""
    teacher = [mapping.teacher.tokens[i].replace(mapping.teacher.space_mark, "") for i in teacher_ids.tolist()]
    student = [mapping.student.tokens[i].replace(mapping.student.space_mark, "") for i in student_ids.tolist()]
    met = only_match(teacher, student)
    whole = met != NONE
    whole[whole] = mapping.of(teacher_ids[met[whole]]) == student_ids[whole]
    mapped = mapping.of(ids[met[whole]].astype(np.int64))
    return MappedRows(*_map_rows(student_ids, whole, mapped, values[met[whole]].astype(np.float64)))


def fusellm_target(rows: Rows, first_row: int, teacher: Tokens, student: Tokens, mapping: TokenMap) -> Target:
    """The same, as a target to compare with others: the mapped rows, each at the token that it predicts.

    A row that could not be mapped is not valid: the reference trains it towards the current token. Probabilities are
    those of the rows, not renormalised. Raises AlignmentError if the rows are not those of the teacher's tokens.
    """
    check_rows(rows, first_row, teacher)
    after = slice(1 - first_row, None)  # row j is to be the one after token j; after the last there is none
    nobodys = np.full_like(rows.ids[:1], len(mapping.teacher))
    ids = np.concatenate([rows.ids[after], nobodys]).astype(np.int64)
    probs = np.exp(np.concatenate([rows.logprobs[after], np.zeros_like(rows.logprobs[:1])]), dtype=np.float64)
    found = align_fusellm(ids, probs, teacher.ids, student.ids, mapping)
    valid = np.concatenate([[False], found.mapped[:-1]])[: len(student)]
    entries = np.repeat(np.arange(len(student)), np.diff(found.offsets)) + 1
    kept = entries < len(student)
    return target_from_entries(entries[kept], found.ids[kept].astype(np.int32), found.values[kept], valid)


def only_match(teacher: Sequence[str], student: Sequence[str]) -> NDArray[np.int64]:
    """[T] the teacher token that each student token meets on the warping path; NONE where it meets several."""
    teacher_strings, of_teacher = np.unique(np.array(teacher, dtype=object), return_inverse=True)
    student_strings, of_student = np.unique(np.array(student, dtype=object), return_inverse=True)
    cost = cdist(teacher_strings.tolist(), student_strings.tolist(), scorer=Levenshtein.distance, dtype=np.uint16)
    met: NDArray[np.int64] = _warp(cost, of_teacher, of_student)
    return met


@compiled
def _warp(cost: Any, of_teacher: Any, of_student: Any) -> Any:
    num_teacher, num_student = len(of_teacher), len(of_student)
    far = np.int64(1) << 60
    above = np.full(num_student + 1, far)
    above[0] = 0
    came_from = np.zeros((num_teacher + 1, num_student + 1), dtype=np.int8)
    for i in range(1, num_teacher + 1):
        here = np.full(num_student + 1, far)
        for j in range(1, num_student + 1):
            best, source = above[j - 1], DIAGONAL
            if above[j] < best:
                best, source = above[j], TEACHER
            if here[j - 1] < best:
                best, source = here[j - 1], STUDENT
            here[j] = best + cost[of_teacher[i - 1], of_student[j - 1]]
            came_from[i, j] = source
        above = here
    met = np.full(num_student, NONE)
    count = np.zeros(num_student, dtype=np.int64)
    i, j = num_teacher, num_student
    while i > 0 and j > 0:
        count[j - 1] += 1
        met[j - 1] = i - 1 if count[j - 1] == 1 else NONE
        source = came_from[i, j]
        i -= source != STUDENT
        j -= source != TEACHER
    return met


@compiled
def _map_rows(student_ids: Any, whole: Any, mapped: Any, values: Any) -> Any:
    num_k = mapped.shape[1]
    offsets = np.zeros(len(student_ids) + 1, dtype=np.int64)
    some = np.zeros(len(student_ids), dtype=np.bool_)
    ids, out = np.empty(len(student_ids) * num_k, dtype=np.int64), np.empty(len(student_ids) * num_k)
    used, row = 0, 0
    for i in range(len(student_ids)):
        begin = used
        if whole[i]:
            for k in range(num_k):
                token = mapped[row, k]
                if token != NONE and not (ids[begin:used] == token).any():
                    ids[used], out[used] = token, values[row, k]
                    used += 1
            row += 1
        some[i] = used > begin
        if used == begin:
            ids[used], out[used] = student_ids[i], 1.0
            used += 1
        offsets[i + 1] = used
    return offsets, ids[:used].copy(), out[:used].copy(), some
