"""Windows: consecutive chunks of a text of any length, cut by the tokens of the student."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import Vocabulary
from tests.tiny import TEXT, tiny_vocabulary
from trainer.sources.windows import CHUNK_BYTES, cut_batch, cut_windows, split_chunks

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé▁😀日 \n")), min_size=1)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(text=TEXTS, size=st.integers(4, 20))
def test_windows_concatenate_to_the_text_and_have_bounded_length(vocabulary, text: str, size: int) -> None:  # type: ignore[no-untyped-def]
    windows = list(cut_windows(text, vocabulary, size))
    assert "".join(windows) == text
    assert all(len(vocabulary.encode(window)) <= size for window in windows)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(texts=st.lists(TEXTS, max_size=4), size=st.integers(2, 20))
def test_a_batch_of_texts_is_cut_like_each_text_alone(vocabulary, texts: list[str], size: int) -> None:  # type: ignore[no-untyped-def]
    together = cut_batch([*texts, ""], vocabulary, size)
    assert together == [*(cut_batch([text], vocabulary, size)[0] for text in texts), []]
    for text, windows in zip(texts, together, strict=False):
        begin = 0
        for end, num_tokens in windows:
            assert num_tokens == len(vocabulary.encode(text.encode()[begin:end].decode()))
            begin = end


def test_windows_are_close_to_the_maximum_length() -> None:
    counts = [num_tokens for _, num_tokens in cut_batch([TEXT * 20], BYTE_LEVEL, 50)[0]]
    assert max(counts) == 50
    assert sum(counts[:-1]) / len(counts[:-1]) > 47


def test_characters_without_a_token_are_kept(smollm2_vocabulary: Vocabulary) -> None:
    for text in ("\x04", "the end\x04", "\x04 the beginning", "a \x04 b"):
        assert "".join(cut_windows(text, smollm2_vocabulary, 4)) == text


def test_a_character_with_more_tokens_than_a_window_is_not_cut() -> None:
    assert list(cut_windows("a😀b", BYTE_LEVEL, 2)) == ["a", "😀", "b"]


@pytest.mark.parametrize("unit", ["é", "日", "😀", "a", "ab é日😀\n", "word ", "line of 😀\r\n"])
@pytest.mark.parametrize("shift", range(4))
def test_chunks_concatenate_to_the_text_and_end_with_whole_characters(unit: str, shift: int) -> None:
    data = ("x" * shift + unit * (3 * CHUNK_BYTES // len(unit.encode()))).encode()
    chunks = list(split_chunks(io.BytesIO(data).read))
    assert b"".join(chunks) == data
    assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)
    assert len(chunks) <= 5
    for chunk in chunks:
        chunk.decode()
    if unit.endswith("\n"):
        assert all(chunk.endswith(unit[-2:].encode()) for chunk in chunks[:-1])
