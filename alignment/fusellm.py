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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from alignment.kernels import NONE, compiled
from alignment.vocabulary import Vocabulary

DIAGONAL, TEACHER, STUDENT = 0, 1, 2
AT_ONCE = 64  # unmapped tokens whose distances to a whole vocabulary exist at once


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Ragged rows: row i holds entries offsets[i] … offsets[i + 1] of ids and values, as the reference gives them."""

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Teacher token → student token by spelling, the space mark exchanged: equal strings first.

    With `nearest`, a token without an equal goes to the string at the smallest edit distance, ties to the lowest id,
    and is remembered; without it, it goes nowhere.
    """

    teacher: Vocabulary
    student: Vocabulary
    nearest: bool
    _known: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for i, token in reversed(list(enumerate(self.student.tokens))):
            self._known[token] = i

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Student ids, NONE where there is none; any shape."""
        unique, inverse = np.unique(ids, return_inverse=True)
        spelled = [self._spelling(i) for i in unique.tolist()]
        if self.nearest:
            self._learn([token for token in spelled if token not in self._known])
        mapped = np.array([self._known.get(token, NONE) for token in spelled], dtype=np.int64)
        return mapped[inverse].reshape(ids.shape)

    def _spelling(self, token_id: int) -> str:
        return self.teacher.tokens[token_id].replace(self.teacher.space_mark, self.student.space_mark)

    def _learn(self, tokens: Sequence[str]) -> None:
        for begin in range(0, len(tokens), AT_ONCE):
            some = tokens[begin : begin + AT_ONCE]
            distances = cdist(some, self.student.tokens, scorer=Levenshtein.distance, dtype=np.uint16)
            self._known.update(zip(some, distances.argmin(axis=1).tolist(), strict=True))


def align_fusellm(
    ids: NDArray[np.integer],
    values: NDArray[np.floating],
    teacher_ids: NDArray[np.int64],
    student_ids: NDArray[np.int64],
    token_map: TokenMap,
) -> MappedRows:
    """The teacher's rows [T_t, K] of candidates and values, each after its token, for every student token."""
    teacher = [token_map.teacher.tokens[i].replace(token_map.teacher.space_mark, "") for i in teacher_ids.tolist()]
    student = [token_map.student.tokens[i].replace(token_map.student.space_mark, "") for i in student_ids.tolist()]
    met = only_match(teacher, student)
    whole = met != NONE
    whole[whole] = token_map.of(teacher_ids[met[whole]]) == student_ids[whole]
    mapped = token_map.of(ids[met[whole]].astype(np.int64))
    offsets, out_ids, out_values = _map_rows(student_ids, whole, mapped, values[met[whole]].astype(np.float64))
    return MappedRows(offsets, out_ids, out_values)


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
        if used == begin:
            ids[used], out[used] = student_ids[i], 1.0
            used += 1
        offsets[i + 1] = used
    return offsets, ids[:used].copy(), out[:used].copy()
