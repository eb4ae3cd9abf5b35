"""Span likelihoods and sorted probabilities of a teacher's rows, for tokenizers of any kind."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment import AlignmentError
from tests.kinds import KINDS, WRITES_BYTES, vocabulary_of
from tests.rows import random_rows
from tests.tiny import TEXT
from trainer.signals.alm import span_likelihoods
from trainer.signals.uld import sorted_probs

ANY_TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), st.just(TEXT))
PAIRS = list(product(KINDS, KINDS))


@pytest.mark.parametrize("pair", list(product(WRITES_BYTES, WRITES_BYTES)))
@pytest.mark.parametrize("first_row", [0, 1])
def test_spans_cover_the_whole_text_and_all_of_its_log_likelihood(pair: tuple[str, str], first_row: int) -> None:
    teacher, student = (vocabulary_of(kind).encode(TEXT) for kind in pair)
    rows = random_rows(teacher.ids, len(vocabulary_of(pair[0])), 8, seed=1, start=first_row)
    spans = span_likelihoods(rows, first_row, teacher, student)
    begin = int(spans.teacher[0, 0])
    assert spans.logprobs.sum() == pytest.approx(float(rows.actual[begin - first_row :].sum(dtype=np.float64)))
    assert spans.num_bytes.sum() == student.num_bytes - int(teacher.starts[begin])
    assert spans.student[-1, 1] == len(student)
    np.testing.assert_array_equal(spans.student[1:, 0], spans.student[:-1, 1])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=20)
@given(text=ANY_TEXT)
def test_both_sides_of_a_span_have_the_same_bytes(pair: tuple[str, str], text: str) -> None:
    teacher, student = (vocabulary_of(kind).encode(text) for kind in pair)
    rows = random_rows(teacher.ids, len(vocabulary_of(pair[0])), 8, seed=1)
    spans = span_likelihoods(rows, 0, teacher, student)
    for (a, b), (c, d), logprob in zip(spans.teacher, spans.student, spans.logprobs, strict=True):
        assert teacher.ends[b - 1] == student.ends[d - 1] or student.placement is not None
        assert logprob == pytest.approx(float(rows.actual[a:b].sum(dtype=np.float64)), abs=1e-5)
        assert c < d


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_sorted_rows_keep_their_mass_without_token_ids(pair: tuple[str, str]) -> None:
    teacher, student = (vocabulary_of(kind).encode(TEXT) for kind in pair)
    rows = random_rows(teacher.ids, len(vocabulary_of(pair[0])), 8, seed=2)
    sorted_rows = sorted_probs(rows, 0, teacher, student)
    spans = span_likelihoods(rows, 0, teacher, student)
    np.testing.assert_array_equal(sorted_rows.positions, spans.student[:, 0])
    np.testing.assert_allclose(sorted_rows.probs.sum(axis=1) + sorted_rows.tail, 1, atol=1e-6)
    assert (np.diff(sorted_rows.probs, axis=1) <= 0).all()
    for row, t in zip(sorted_rows.probs, spans.teacher[:, 0], strict=True):
        np.testing.assert_allclose(row, np.exp(rows.logprobs[t]), rtol=1e-5)


def test_rows_of_another_text_are_rejected() -> None:
    teacher, student = (vocabulary_of(kind).encode(TEXT) for kind in WRITES_BYTES[:2])
    rows = random_rows(teacher.ids[1:], len(vocabulary_of("byte_level")), 8, seed=2)
    for function in (span_likelihoods, sorted_probs):
        with pytest.raises(AlignmentError, match=f"expected {len(teacher)} rows"):
            function(rows, 0, teacher, student)
