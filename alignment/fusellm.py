"""The alignment of FuseLLM (arXiv 2401.10491), methods `em` and `min_ed`, for comparison only.

Dynamic time warping aligns the token strings; the cost is the edit distance without the space mark, and ties are
resolved in the order diagonal, teacher, student. If a student token is matched with exactly one teacher token, and
the vocabulary map sends that token to the student token, it gets the teacher token's row with every candidate mapped.
If two candidates map to one token, the first is kept and the other is dropped. Every other student token gets a one-hot
row on the *current* token with value 1.

The one-hot rows and the dropped candidates are faults of the reference implementation. They are reproduced exactly
(tests/golden/). As in the reference, row j is the distribution *after* token j, and values are not changed.

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

from alignment.array_cache import cache_key, load_arrays, save_arrays
from alignment.byte_chain import ScoredRows, check_rows
from alignment.kernels import NONE
from alignment.offsets import Tokens
from alignment.target import Target, target_from_entries
from alignment.tokenizers.vocabulary import Vocabulary
from kernel_cache.compiled import compiled

DIAGONAL, TEACHER, STUDENT = 0, 1, 2
METHODS = ("em", "min_ed")
UNKNOWN = -2  # a token that has not been mapped yet
_FORMAT = 1
_BATCH_SIZE = 64  # tokens whose distances to a whole vocabulary are in memory at once


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Ragged rows as in the reference: row i has the entries offsets[i] … offsets[i + 1] − 1 of ids and values.

    mapped  [T] bool: the other rows are one-hot on the current token, because nothing could be mapped
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    mapped: NDArray[np.bool_]


class TokenMap:
    """A map from teacher tokens to student tokens by their strings, with the space mark exchanged.

    A token maps to the student token with an equal string. With `nearest`, a token without an equal string maps to the
    string with the smallest edit distance (ties: the lowest id); otherwise it maps to nothing.

    The distances of one token to a whole vocabulary take milliseconds, so tokens are mapped when they first occur. With
    `cache_file`, the tokens that occurred in earlier runs are loaded, and `save` adds those of this run.
    """

    def __init__(
        self, teacher: Vocabulary, student: Vocabulary, *, nearest: bool, cache_file: Path | None = None
    ) -> None:
        self.teacher = teacher
        self.student = student
        self._nearest = nearest
        self._cache_file = cache_file
        self._id_by_string = {token: i for i, token in reversed(list(enumerate(student.tokens)))}
        cached = self._load()
        # [W + 1] student id, NONE or UNKNOWN; the last entry is for ids that the tokenizer does not have
        self._student_ids = np.append(np.full(len(teacher), UNKNOWN), NONE) if cached is None else cached

    def student_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the student ids of teacher ids, NONE if there is none; any shape."""
        ids = np.minimum(ids, len(self.teacher))
        unknown = self._student_ids[ids] == UNKNOWN
        if unknown.any():
            self._compute(np.unique(ids[unknown]).tolist())
        mapped: NDArray[np.int64] = self._student_ids[ids]
        return mapped

    def save(self) -> None:
        """Write the known tokens to the cache file, together with those that other processes have written."""
        if self._cache_file is not None:
            cached = self._load()
            known = self._student_ids
            merged = known if cached is None else np.where(known == UNKNOWN, cached, known)
            save_arrays(self._cache_file, {"student_ids": merged})

    def _load(self) -> NDArray[np.int64] | None:
        arrays = load_arrays(self._cache_file) if self._cache_file else None
        return arrays["student_ids"].astype(np.int64) if arrays else None

    def _compute(self, ids: Sequence[int]) -> None:
        """Map tokens that are not known yet."""
        strings = {i: self._student_string(i) for i in ids}
        mapped = {i: self._id_by_string.get(strings[i], NONE) for i in ids}
        without_equal = [i for i in ids if mapped[i] == NONE] if self._nearest else []
        for begin in range(0, len(without_equal), _BATCH_SIZE):
            batch = without_equal[begin : begin + _BATCH_SIZE]
            distances = cdist(
                [strings[i] for i in batch], self.student.tokens, scorer=Levenshtein.distance, dtype=np.uint16
            )
            mapped |= zip(batch, distances.argmin(axis=1).tolist(), strict=True)
        # One assignment of final values: other threads read the array at the same time.
        self._student_ids[ids] = [mapped[i] for i in ids]

    def _student_string(self, token_id: int) -> str:
        """Return a teacher token's string with the student's space mark."""
        return self.teacher.tokens[token_id].replace(self.teacher.space_mark, self.student.space_mark)


def token_map(teacher: Vocabulary, student: Vocabulary, method: str, cache: Path | None = None) -> TokenMap:
    """Build the map of `em` (equal strings only) or `min_ed`, with the tokens known from the folder `cache`."""
    if method not in METHODS:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, received {method!r}")
    name = f"{method}-{cache_key(_FORMAT, teacher.fingerprint, student.fingerprint, len(teacher), len(student))}"
    return TokenMap(teacher, student, nearest=method == "min_ed", cache_file=cache / name if cache else None)


def align_fusellm(
    ids: NDArray[np.integer],
    values: NDArray[np.floating],
    teacher_ids: NDArray[np.int64],
    student_ids: NDArray[np.int64],
    mapping: TokenMap,
) -> MappedRows:
    """Align a teacher's rows, each the distribution after its token, to every student token.

    ids, values               [T_t, K] candidates of each row
    teacher_ids, student_ids  [T_t] and [T] the two tokenizations of the text
    """
    teacher = [mapping.teacher.tokens[i].replace(mapping.teacher.space_mark, "") for i in teacher_ids.tolist()]
    student = [mapping.student.tokens[i].replace(mapping.student.space_mark, "") for i in student_ids.tolist()]
    matches = unique_matches(teacher, student)
    is_mapped = matches != NONE
    is_mapped[is_mapped] = mapping.student_ids(teacher_ids[matches[is_mapped]]) == student_ids[is_mapped]
    candidates = mapping.student_ids(ids[matches[is_mapped]].astype(np.int64))
    return MappedRows(*_map_rows(student_ids, is_mapped, candidates, values[matches[is_mapped]].astype(np.float64)))


def fusellm_target(rows: ScoredRows, first_row: int, teacher: Tokens, student: Tokens, mapping: TokenMap) -> Target:
    """Align as `align_fusellm` does, and return a target whose rows are at the tokens that they predict.

    A row that could not be mapped is invalid: the reference trains it towards the current token. Probabilities are
    those of the rows, not renormalized. Raises AlignmentError if the rows do not belong to the teacher's tokens.
    """
    check_rows(rows, first_row, teacher)
    after = slice(1 - first_row, None)  # row j is the distribution after token j; there is none after the last token
    no_candidates = np.full_like(rows.ids[:1], len(mapping.teacher))
    ids = np.concatenate([rows.ids[after], no_candidates]).astype(np.int64)
    probs = np.exp(np.concatenate([rows.logprobs[after], np.zeros_like(rows.logprobs[:1])]), dtype=np.float64)
    aligned = align_fusellm(ids, probs, teacher.ids, student.ids, mapping)
    valid = np.concatenate([[False], aligned.mapped[:-1]])[: len(student)]
    positions = np.repeat(np.arange(len(student)), np.diff(aligned.offsets)) + 1
    kept = positions < len(student)
    return target_from_entries(positions[kept], aligned.ids[kept].astype(np.int32), aligned.values[kept], valid)


def unique_matches(teacher: Sequence[str], student: Sequence[str]) -> NDArray[np.int64]:
    """[T] Return the one teacher token that each student token is matched with; NONE if there are several."""
    teacher_strings, teacher_index = np.unique(np.array(teacher, dtype=object), return_inverse=True)
    student_strings, student_index = np.unique(np.array(student, dtype=object), return_inverse=True)
    cost = cdist(teacher_strings.tolist(), student_strings.tolist(), scorer=Levenshtein.distance, dtype=np.uint16)
    matches: NDArray[np.int64] = _warp(cost, teacher_index, student_index)
    return matches


@compiled
def _warp(cost: Any, teacher_index: Any, student_index: Any) -> Any:
    """Compute the warping path by dynamic programming; return the unique match of each student token, or NONE.

    D[i, j] = cost(i, j) + min(D[i − 1, j − 1], D[i − 1, j], D[i, j − 1]), where i and j count tokens from 1,
    D[0, 0] = 0, and all other border entries are infinite. cost [different teacher strings, different student strings].
    """
    num_teacher, num_student = len(teacher_index), len(student_index)
    infinity = np.int64(1) << 60
    above = np.full(num_student + 1, infinity)  # D[i − 1, :]
    above[0] = 0
    came_from = np.zeros((num_teacher + 1, num_student + 1), dtype=np.int8)
    for i in range(1, num_teacher + 1):
        here = np.full(num_student + 1, infinity)  # D[i, :]; entries up to j − 1 are final
        for j in range(1, num_student + 1):
            best, source = above[j - 1], DIAGONAL
            if above[j] < best:  # strict comparisons: ties go to the diagonal, then to the teacher
                best, source = above[j], TEACHER
            if here[j - 1] < best:
                best, source = here[j - 1], STUDENT
            here[j] = best + cost[teacher_index[i - 1], student_index[j - 1]]
            came_from[i, j] = source
        above = here
    matches = np.full(num_student, NONE)
    count = np.zeros(num_student, dtype=np.int64)
    i, j = num_teacher, num_student
    while i > 0 and j > 0:  # follow the path back: the teacher token i − 1 is matched with the student token j − 1
        count[j - 1] += 1
        matches[j - 1] = i - 1 if count[j - 1] == 1 else NONE
        source = came_from[i, j]
        i -= source != STUDENT
        j -= source != TEACHER
    return matches


@compiled
def _map_rows(student_ids: Any, is_mapped: Any, candidates: Any, values: Any) -> Any:
    """Build the ragged rows: mapped candidates and values for mapped tokens, one-hot on the current token otherwise.

    candidates, values  [mapped tokens, K]
    """
    num_k = candidates.shape[1]
    offsets = np.zeros(len(student_ids) + 1, dtype=np.int64)
    has_candidates = np.zeros(len(student_ids), dtype=np.bool_)
    ids, out = np.empty(len(student_ids) * num_k, dtype=np.int64), np.empty(len(student_ids) * num_k)
    used, row = 0, 0  # invariant: entries before `used` belong to tokens before i, `row` of which are mapped
    for i in range(len(student_ids)):
        begin = used
        if is_mapped[i]:
            for k in range(num_k):
                token = candidates[row, k]
                if token != NONE and not (ids[begin:used] == token).any():  # the first of equal tokens is kept
                    ids[used], out[used] = token, values[row, k]
                    used += 1
            row += 1
        has_candidates[i] = used > begin
        if used == begin:  # not mapped, or no candidate has a counterpart
            ids[used], out[used] = student_ids[i], 1.0
            used += 1
        offsets[i + 1] = used
    return offsets, ids[:used].copy(), out[:used].copy(), has_candidates
