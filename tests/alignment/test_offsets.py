"""Byte offsets of tokens, and common boundaries of two tokenizations."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import AlignmentError, Tokens
from alignment.offsets import INSIDE, common_cuts
from alignment.placement import ends_from_offsets, ends_without_unwritable, exact_ends
from tests.tiny import tiny_vocabulary

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")


def tokens(text: bytes, ends: list[int]) -> Tokens:
    return Tokens(text, np.arange(len(ends)), np.array(ends, dtype=np.int64))


def test_cuts_are_the_offsets_at_which_both_end_a_token() -> None:
    cuts = common_cuts(tokens(b"abcdef", [2, 3, 6]), tokens(b"abcdef", [3, 4, 6]))
    assert cuts.at.tolist() == [0, 3, 6]
    assert cuts.teacher.tolist() == [0, 2, 3]
    assert cuts.student.tolist() == [0, 1, 3]


def test_a_token_without_bytes_belongs_to_the_block_of_the_previous_token() -> None:
    cuts = common_cuts(tokens(b"ab", [0, 1, 1, 2]), tokens(b"ab", [1, 2]))
    assert cuts.teacher.tolist() == [0, 3, 4]


def test_an_end_inside_a_character_is_no_boundary() -> None:
    cuts = common_cuts(tokens("é!".encode(), [INSIDE, 2, 3]), tokens("é!".encode(), [1, 2, 3]))
    assert cuts.at.tolist() == [0, 2, 3]
    assert cuts.teacher.tolist() == [0, 2, 3]
    assert cuts.student.tolist() == [0, 2, 3]


def test_different_texts_are_rejected() -> None:
    with pytest.raises(AlignmentError, match="different texts"):
        common_cuts(tokens(b"ab", [2]), tokens(b"abc", [3]))


def test_a_tokenization_that_does_not_reach_the_end_of_the_text_is_rejected() -> None:
    with pytest.raises(AlignmentError, match="teacher 2, student 3"):
        common_cuts(tokens(b"abc", [1, 2]), tokens(b"abc", [1, 3]))


def test_exact_ends_exist_only_if_the_tokens_write_the_text() -> None:
    assert exact_ends(b"ab", [b"a", b"c"]) is None
    ends = exact_ends(b"ab", [b" a", b"b"])
    assert ends is not None
    assert ends.tolist() == [1, 2]


def test_bytes_that_no_token_writes_belong_to_the_next_token() -> None:
    unwritable = frozenset({0xF1})
    ends = ends_without_unwritable("a\U00040000b".encode(), [b"a", b"\x80", b"\x80\x80", b"b"], unwritable)
    assert ends is not None
    assert ends.tolist() == [1, 3, 5, 6]
    last = ends_without_unwritable(b"ab\xf1", [b"a", b"b"], unwritable)
    assert last is not None
    assert last.tolist() == [1, 3]
    assert ends_without_unwritable(b"abc", [b"a", b"b"], unwritable) is None


def test_character_offsets_are_converted_to_bytes() -> None:
    assert ends_from_offsets("aé", [(0, 1), (1, 2), (1, 2)]).tolist() == [1, INSIDE, 3]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_student_tokens_of_a_block_write_the_bytes_of_the_block(text: str) -> None:
    teacher, student = SENTENCEPIECE.encode(text), BYTE_LEVEL.encode(text)
    cuts = common_cuts(teacher, student)
    for (begin, end), (a, b) in zip(pairwise(cuts.student), pairwise(cuts.at), strict=True):
        written = b"".join(BYTE_LEVEL.token_bytes[i] or b"" for i in student.ids[begin:end])
        assert written == student.text[a:b]
    assert cuts.teacher[-1] == len(teacher)
    assert cuts.student[-1] == len(student)
