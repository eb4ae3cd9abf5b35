"""Common boundaries of two tokenizations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import AlignmentError, Tokens
from alignment.spans import INSIDE, common_cuts, offset_ends, running_ends, sparse_ends
from tests.tiny import tiny_vocabulary

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")


def tokens(text: bytes, ends: list[int]) -> Tokens:
    return Tokens(text, np.arange(len(ends)), np.array(ends, dtype=np.int64))


def test_cuts_are_where_both_end() -> None:
    cuts = common_cuts(tokens(b"abcdef", [2, 3, 6]), tokens(b"abcdef", [3, 4, 6]))
    assert cuts.at.tolist() == [0, 3, 6]
    assert cuts.teacher.tolist() == [0, 2, 3]
    assert cuts.student.tolist() == [0, 1, 3]


def test_a_token_without_bytes_belongs_to_the_block_of_the_one_before() -> None:
    cuts = common_cuts(tokens(b"ab", [0, 1, 1, 2]), tokens(b"ab", [1, 2]))
    assert cuts.teacher.tolist() == [0, 3, 4]


def test_an_end_inside_a_character_is_no_boundary() -> None:
    cuts = common_cuts(tokens("é!".encode(), [INSIDE, 2, 3]), tokens("é!".encode(), [1, 2, 3]))
    assert cuts.at.tolist() == [0, 2, 3]
    assert cuts.teacher.tolist() == [0, 2, 3]
    assert cuts.student.tolist() == [0, 2, 3]


def test_different_texts_are_refused() -> None:
    with pytest.raises(AlignmentError, match="different texts"):
        common_cuts(tokens(b"ab", [2]), tokens(b"abc", [3]))


def test_a_tokenization_that_stops_short_is_refused() -> None:
    with pytest.raises(AlignmentError, match="teacher 2, student 3"):
        common_cuts(tokens(b"abc", [1, 2]), tokens(b"abc", [1, 3]))


def test_running_ends_are_refused_where_the_bytes_differ() -> None:
    assert running_ends(b"ab", [b"a", b"c"]) is None
    ends = running_ends(b"ab", [b" a", b"b"])
    assert ends is not None
    assert ends.tolist() == [1, 2]


def test_bytes_no_token_writes_belong_to_the_token_after_them() -> None:
    unwritable = frozenset({0xF1})
    ends = sparse_ends("a\U00040000b".encode(), [b"a", b"\x80", b"\x80\x80", b"b"], unwritable)
    assert ends is not None
    assert ends.tolist() == [1, 3, 5, 6]
    last = sparse_ends(b"ab\xf1", [b"a", b"b"], unwritable)
    assert last is not None
    assert last.tolist() == [1, 3]
    assert sparse_ends(b"abc", [b"a", b"b"], unwritable) is None


def test_offset_ends_are_in_bytes() -> None:
    assert offset_ends("aé", [(0, 1), (1, 2), (1, 2)]).tolist() == [1, INSIDE, 3]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_blocks_of_any_text_have_the_same_bytes_on_both_sides(text: str) -> None:
    teacher, student = SENTENCEPIECE.encode(text), BYTE_LEVEL.encode(text)
    cuts = common_cuts(teacher, student)
    for vocabulary, toks, index in ((BYTE_LEVEL, student, cuts.student),):
        for begin, end, a, b in zip(index, index[1:], cuts.at, cuts.at[1:], strict=False):
            written = b"".join(vocabulary.token_bytes[i] or b"" for i in toks.ids[begin:end])
            assert written == toks.text[a:b]
    assert cuts.teacher[-1] == len(teacher)
    assert cuts.student[-1] == len(student)
