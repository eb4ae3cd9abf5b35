"""Windows: pieces of a text, cut by a student's tokenizer, whatever the length of the text."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import Vocabulary
from tests.tiny import TEXT, tiny_vocabulary
from trainer.data.windows import STRETCH_BYTES, cut, cut_windows, stretches

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé▁😀日 \n")), min_size=1)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(text=TEXTS, size=st.integers(4, 20))
def test_windows_are_the_text_in_pieces_of_bounded_length(vocabulary, text: str, size: int) -> None:  # type: ignore[no-untyped-def]
    pieces = list(cut_windows(text, vocabulary, size))
    assert "".join(pieces) == text
    assert all(len(vocabulary.encode(piece)) <= size for piece in pieces)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(texts=st.lists(TEXTS, max_size=4), size=st.integers(2, 20))
def test_texts_are_cut_together_as_they_are_alone(vocabulary, texts: list[str], size: int) -> None:  # type: ignore[no-untyped-def]
    together = cut([*texts, ""], vocabulary, size)
    assert together == [*(cut([text], vocabulary, size)[0] for text in texts), []]
    for text, windows in zip(texts, together, strict=False):
        begin = 0
        for end, num_tokens in windows:
            assert num_tokens == len(vocabulary.encode(text.encode()[begin:end].decode()))
            begin = end


def test_windows_are_as_long_as_they_may_be() -> None:
    counts = [num_tokens for _, num_tokens in cut([TEXT * 20], BYTE_LEVEL, 50)[0]]
    assert max(counts) == 50
    assert sum(counts[:-1]) / len(counts[:-1]) > 47


def test_text_that_a_tokenizer_has_no_token_for_is_not_lost(smollm2_vocabulary: Vocabulary) -> None:
    for text in ("\x04", "the end\x04", "\x04 the beginning", "a \x04 b"):
        assert "".join(cut_windows(text, smollm2_vocabulary, 4)) == text


def test_a_character_of_more_tokens_than_a_window_is_not_cut() -> None:
    assert list(cut_windows("a😀b", BYTE_LEVEL, 2)) == ["a", "😀", "b"]


@pytest.mark.parametrize("unit", ["é", "日", "😀", "a", "ab é日😀\n", "word ", "line of 😀\r\n"])
@pytest.mark.parametrize("shift", range(4))
def test_stretches_are_the_text_and_end_with_whole_characters(unit: str, shift: int) -> None:
    data = ("x" * shift + unit * (3 * STRETCH_BYTES // len(unit.encode()))).encode()
    parts = list(stretches(io.BytesIO(data).read))
    assert b"".join(parts) == data
    assert all(len(part) <= STRETCH_BYTES for part in parts)
    assert len(parts) <= 5
    for part in parts:
        part.decode()
    if unit.endswith("\n"):
        assert all(part.endswith(unit[-2:].encode()) for part in parts[:-1])
