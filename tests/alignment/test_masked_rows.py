"""Masked rows: a teacher row without a log-probability of the token in the text masks its block, and nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import Target, translate
from alignment.byte_chain import align_byte_chain, block_cuts
from alignment.report import report
from tests.alignment.test_byte_chain import ANY_TEXT, BYTE_LEVEL, MIXED_TEXT, PAIRS, rows_of
from tests.rows import random_rows
from tests.tiny import TEXT

TRANSLATIONS = {**PAIRS, "byte level to itself": translate(BYTE_LEVEL, BYTE_LEVEL)}


@pytest.mark.parametrize("pair", TRANSLATIONS)
@pytest.mark.parametrize("first_row", [0, 1])
@given(text=ANY_TEXT | MIXED_TEXT.filter(bool), data=st.data())
def test_a_masked_row_masks_the_student_positions_of_its_block_and_no_others(
    pair: str, first_row: int, text: str, data: Any
) -> None:
    translation = TRANSLATIONS[pair]
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    rows = random_rows(teacher.ids, len(translation.teacher), 8, seed=len(text), start=first_row)
    masked = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows.actual), max_size=len(rows.actual))), bool)
    masked_rows = replace(rows, actual=np.where(masked, np.float32(np.nan), rows.actual))
    complete = align_byte_chain(rows, first_row, teacher, student, translation)
    result = align_byte_chain(masked_rows, first_row, teacher, student, translation)

    cuts = block_cuts(teacher, student, translation)
    block_T = np.repeat(np.arange(len(cuts.at) - 1), np.diff(cuts.student))
    masked_blocks = np.searchsorted(cuts.teacher, np.flatnonzero(masked) + first_row, side="right") - 1
    depends_T = np.isin(block_T, masked_blocks)
    target = result.target
    np.testing.assert_array_equal(target.valid, complete.target.valid & ~depends_T)
    np.testing.assert_allclose(target.mass + target.tail, target.valid, atol=1e-5)  # 1, or nothing at all
    assert not np.diff(target.offsets)[~target.valid].any()
    assert np.isfinite(target.probs).all()

    # A block into which the same branches continue has the same rows as without masked rows.
    same = result.carried == complete.carried
    for i in np.flatnonzero(target.valid & same[block_T]):
        assert rows_of(target)[i] == rows_of(complete.target)[i]
    figures = report(masked_rows, first_row, (teacher, student), target, translation)
    assert np.isfinite([figures.mass, figures.teacher_nats, figures.aligned_nats]).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_no_branch_continues_from_a_masked_block_into_the_next_one(pair: str) -> None:
    translation = PAIRS[pair]
    teacher, student = translation.teacher.encode(TEXT[:300]), translation.student.encode(TEXT[:300])
    rows = random_rows(teacher.ids, len(translation.teacher), len(translation.teacher), seed=3)
    carried = align_byte_chain(rows, 0, teacher, student, translation).carried
    cuts = block_cuts(teacher, student, translation)
    blocks = np.flatnonzero(carried) - 1  # blocks from which a branch continues
    assert len(blocks)
    actual = rows.actual.copy()
    actual[cuts.teacher[blocks]] = np.nan
    result = align_byte_chain(replace(rows, actual=actual), 0, teacher, student, translation)
    assert not result.carried[blocks + 1].any()


@pytest.mark.parametrize("pair", TRANSLATIONS)
def test_the_other_values_of_a_masked_row_are_not_used(pair: str) -> None:
    translation = TRANSLATIONS[pair]
    teacher, student = (
        each.encode("The tide had turned, and the é bell rang.") for each in (translation.teacher, translation.student)
    )
    rows, other = (random_rows(teacher.ids, len(translation.teacher), 8, seed=seed) for seed in (1, 2))
    masked = np.arange(len(teacher)) % 5 == 2
    actual = np.where(masked, np.float32(np.nan), rows.actual)

    def aligned(ids: Any, logprobs: Any) -> Target:
        masked_rows = replace(rows, ids=ids, logprobs=logprobs, actual=actual)
        return align_byte_chain(masked_rows, 0, teacher, student, translation).target

    first = aligned(rows.ids, rows.logprobs)
    second = aligned(
        np.where(masked[:, None], other.ids, rows.ids), np.where(masked[:, None], other.logprobs, rows.logprobs)
    )
    assert first.valid.any()
    assert not first.valid.all()
    np.testing.assert_array_equal(first.valid, second.valid)
    assert rows_of(first) == rows_of(second)
    np.testing.assert_array_equal(first.tail, second.tail)
