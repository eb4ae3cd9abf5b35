"""Byte-chain alignment: compared with a slow reference, and properties that hold for any text."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from alignment import AlignmentError, Target, Tokens, Translation, align, translate
from alignment.byte_chain import ScoredRows, align_byte_chain
from alignment.kernels import NONE
from alignment.offsets import common_cuts
from alignment.report import block_likelihoods, report
from tests.rows import random_rows
from tests.tiny import TEXT, tiny_vocabulary

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")
PAIRS = {
    "sentencepiece to byte level": translate(SENTENCEPIECE, BYTE_LEVEL),
    "byte level to sentencepiece": translate(BYTE_LEVEL, SENTENCEPIECE),
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
MIXED_TEXT = st.lists(st.sampled_from([*TEXT.split(), " ", "\n\n", "  ", "é", "▁", "😀", "日本", "x=1;"])).map("".join)


def aligned(
    text: str, translation: Translation, top_k: int, first_row: int, **bounds: float
) -> tuple[ScoredRows, Tokens, Tokens, Target]:
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    rows = random_rows(teacher.ids, len(translation.teacher), top_k, seed=len(text), start=first_row)
    return rows, teacher, student, align(rows, first_row, teacher, student, translation, **bounds)


def rows_of(target: Target) -> list[dict[int, float]]:
    cut = [slice(a, b) for a, b in zip(target.offsets, target.offsets[1:], strict=False)]
    return [dict(zip(target.ids[c].tolist(), target.probs[c].tolist(), strict=True)) for c in cut]


class Branch(NamedTuple):
    """Student tokens from the start of the text, probability, student position at which the branch's block begins."""

    written: list[int]
    prob: float
    block: int


def reference(rows: ScoredRows, teacher: Tokens, student: Tokens, translation: Translation) -> list[dict[int, float]]:
    """Apply the chain rule literally, for a teacher with BOS, without tables and arrays.

    All branches of the whole text are written in student tokens; a position sums over the branches that begin with the
    student tokens before it.
    """
    cuts, text = common_cuts(teacher, student), student.ids.tolist()
    branches: list[Branch] = []
    out: list[dict[int, float]] = []
    weight = 1.0
    for b in range(len(cuts.at) - 1):
        read, prefix, before = text[: cuts.student[b]], b"", weight
        for t in range(cuts.teacher[b], cuts.teacher[b + 1]):
            for x, logprob in zip(rows.ids[t].tolist(), rows.logprobs[t].tolist(), strict=True):
                if x != teacher.ids[t]:
                    data = translation.teacher.token_bytes[x]
                    if data is None and not prefix:
                        is_eos = x == translation.teacher.roles["eos"]
                        written = [translation.student.roles["eos"]] if is_eos else []
                    else:
                        (written,) = translation.student.write([prefix + (data or b"")])
                    branches.append(Branch(read + written, weight * np.exp(logprob), len(read)))
            weight *= np.exp(float(rows.actual[t]))
            prefix += translation.teacher.token_bytes[teacher.ids[t]] or b""
        with_text = [*branches, Branch(text, weight, len(read))]
        for i in range(cuts.student[b], cuts.student[b + 1]):
            alive = [branch for branch in with_text if branch.written[:i] == text[:i]]
            out.append(row_at(i, alive, before if i == len(read) else None))
    return out


def row_at(position: int, alive: list[Branch], before: float | None) -> dict[int, float]:
    """Return one row. `before` is the probability of the text before the position, given at a common boundary only.

    At a boundary Z is that probability, of listed and unlisted continuations, plus the carried branches.
    """
    continuing = [branch for branch in alive if len(branch.written) > position]
    reached = sum(branch.prob for branch in alive)
    if before is not None:
        reached = before + sum(branch.prob for branch in continuing if branch.block < position)
    row: dict[int, float] = defaultdict(float)
    for branch in continuing:
        row[branch.written[position]] += branch.prob / reached
    return dict(row)


@pytest.mark.parametrize("pair", PAIRS)
@given(text=MIXED_TEXT.filter(bool))
def test_rows_equal_those_of_the_slow_reference(pair: str, text: str) -> None:
    rows, teacher, student, target = aligned(text, PAIRS[pair], 12, 0, exact_above=0, carry_above=0)
    expected = reference(rows, teacher, student, PAIRS[pair])
    for row, valid, complete in zip(rows_of(target), target.valid, expected, strict=True):
        wanted = complete if valid else {}
        assert row.keys() == wanted.keys()
        np.testing.assert_allclose([row[i] for i in wanted], list(wanted.values()), rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("first_row", [0, 1])
@given(text=st.one_of(ANY_TEXT, MIXED_TEXT.filter(bool)), top_k=st.integers(1, 40))
def test_mass_and_tail_sum_to_one_and_every_position_with_a_row_is_valid(
    pair: str, first_row: int, text: str, top_k: int
) -> None:
    _, teacher, student, target = aligned(text, PAIRS[pair], top_k, first_row)
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not target.mass[~target.valid].any()
    starts = np.concatenate([[0], student.ends[:-1]])
    if not teacher.written.all():
        assert target.valid[-1] or not teacher.written[-1]
    elif first_row == 0:
        assert target.valid.all()
    elif (teacher.ends > 0).all() and (student.ends > 0).all():
        np.testing.assert_array_equal(target.valid, starts >= teacher.ends[0])


@pytest.mark.parametrize("pair", PAIRS)
@given(text=st.one_of(ANY_TEXT, MIXED_TEXT.filter(bool)), top_k=st.integers(1, 40))
def test_each_block_is_at_least_as_likely_as_under_the_teacher(pair: str, text: str, top_k: int) -> None:
    rows, teacher, student, target = aligned(text, PAIRS[pair], top_k, 0)
    cuts = align_byte_chain(rows, 0, teacher, student, PAIRS[pair]).uncrossed_cuts
    blocks = block_likelihoods(rows, 0, (teacher, student), target, cuts)
    if teacher.written.all():
        assert blocks.num_bytes.sum() == teacher.num_bytes
    assert (blocks.student >= blocks.teacher - 1e-4).all()


@given(text=st.one_of(ANY_TEXT, MIXED_TEXT.filter(bool)), first_row=st.integers(0, 1))
@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_identical_tokenizers_return_the_rows_unchanged(vocabulary, text: str, first_row: int) -> None:  # type: ignore[no-untyped-def]
    same = translate(vocabulary, vocabulary)
    rows, teacher, _, target = aligned(text, same, 9, first_row)
    given_rows = [
        dict(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True)) | {actual: float(np.exp(logprob))}
        for ids, logprobs, actual, logprob in zip(
            rows.ids, rows.logprobs, teacher.ids[first_row:].tolist(), rows.actual, strict=True
        )
    ]
    for row, expected in zip(rows_of(target)[first_row:], given_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
    assert target.valid[first_row:].all()


@given(MIXED_TEXT.filter(bool))
def test_inputs_are_not_changed(text: str) -> None:
    translation = PAIRS["sentencepiece to byte level"]
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    rows = random_rows(teacher.ids, len(translation.teacher), 8, seed=0)
    arrays: list[NDArray[np.generic]] = [rows.ids, rows.logprobs, rows.actual, rows.tail, teacher.ids, student.ends]
    before = [a.copy() for a in arrays]
    align(rows, 0, teacher, student, translation)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_target_depends_on_the_rows_and_not_on_the_text() -> None:
    translation = PAIRS["sentencepiece to byte level"]
    teacher, student = translation.teacher.encode(TEXT), translation.student.encode(TEXT)
    rows = random_rows(teacher.ids, len(translation.teacher), 64, seed=3)
    target = align(rows, 0, teacher, student, translation)
    likelihood = np.log(target.prob_of(student.ids)).sum()
    assert likelihood == pytest.approx(float(rows.actual.sum()), rel=0.05)


def test_a_character_that_the_normalizer_changes_masks_only_its_own_later_positions() -> None:
    text = "the harbour ▁ office"
    *_, student, target = aligned(text, PAIRS["sentencepiece to byte level"], 16, 0)
    masked = [(int(student.starts[i]), int(student.ends[i])) for i in np.flatnonzero(~target.valid)]
    at = text.encode().index("▁".encode())
    assert masked
    assert all(at < begin and end <= at + 3 for begin, end in masked)


def test_rows_that_do_not_belong_to_the_tokens_are_rejected() -> None:
    translation = PAIRS["sentencepiece to byte level"]
    teacher, student = translation.teacher.encode(TEXT), translation.student.encode(TEXT)
    rows = random_rows(teacher.ids[:-1], len(translation.teacher), 8, seed=3)
    with pytest.raises(AlignmentError, match=f"expected {len(teacher)} rows"):
        align(rows, 0, teacher, student, translation)


def test_eos_of_the_teacher_corresponds_to_eos_of_the_student() -> None:
    translation = PAIRS["sentencepiece to byte level"]
    teacher, student = (v.encode("six", close=True) for v in (SENTENCEPIECE, BYTE_LEVEL))
    rows = random_rows(teacher.ids, len(SENTENCEPIECE), 8, seed=5)
    target = align(rows, 0, teacher, student, translation)
    last = rows_of(target)[-1]
    assert last[BYTE_LEVEL.roles["eos"]] == pytest.approx(float(np.exp(rows.actual[-1])), rel=1e-5)


def test_bos_and_pad_have_no_counterpart_and_stay_in_the_tail() -> None:
    translation = PAIRS["sentencepiece to byte level"]
    for role in ("bos", "pad"):
        assert translation.first[SENTENCEPIECE.roles[role]] == NONE


def test_report_counts_positions_and_bytes() -> None:
    translation = PAIRS["byte level to sentencepiece"]
    rows, teacher, student, target = aligned(TEXT, translation, 20, 1)
    figures = report(rows, 1, (teacher, student), target, translation)
    assert figures.positions == len(student)
    assert figures.valid == int(target.valid.sum())
    assert (figures + figures).positions == 2 * len(student)
    assert figures.aligned_bpb <= figures.teacher_bpb + 1e-4
    assert 0 < figures.mean_mass <= 1


def test_a_python_source_file_is_covered_in_both_directions() -> None:
    text = Path(__file__).read_text(encoding="utf-8").replace("▁", "_")
    for translation in PAIRS.values():
        *_, target = aligned(text, translation, 16, 0)
        assert target.valid.all()
