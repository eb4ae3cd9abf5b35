"""Windows and order."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import Vocabulary
from tests.tiny import TEXT, tiny_vocabulary
from trainer.config import DataConfig, EvalConfig
from trainer.data import Document, batch_indices, cut_windows, load_corpus, read_documents
from trainer.errors import DataError

COLUMNS = DataConfig(files=["d.jsonl"])
BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
@given(
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé▁😀日 \n")), min_size=1),
    size=st.integers(4, 20),
)
def test_windows_are_the_text_in_pieces_of_bounded_length(vocabulary, text: str, size: int) -> None:  # type: ignore[no-untyped-def]
    pieces = list(cut_windows(text, vocabulary, size))
    assert "".join(pieces) == text
    assert all(len(vocabulary.encode(piece)) <= size for piece in pieces)


def test_text_that_a_tokenizer_has_no_token_for_is_not_lost(smollm2_vocabulary: Vocabulary) -> None:
    for text in ("\x04", "the end\x04", "\x04 the beginning", "a \x04 b"):
        assert "".join(cut_windows(text, smollm2_vocabulary, 4)) == text


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "ab\\ud83d"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: character 2 is half of a surrogate pair"):
        list(read_documents(tmp_path / "d.jsonl", COLUMNS))


def test_a_character_of_more_tokens_than_a_window_is_not_cut() -> None:
    assert list(cut_windows("a😀b", BYTE_LEVEL, 2)) == ["a", "😀", "b"]


def test_empty_and_undecodable_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match="empty.txt is empty"):
        list(read_documents(tmp_path / "empty.txt", COLUMNS))
    with pytest.raises(DataError, match="latin.txt is not UTF-8: byte 0xe9 at 3"):
        list(read_documents(tmp_path / "latin.txt", COLUMNS))


@pytest.mark.parametrize("line", ["not json", "[1]", '{"body": "x"}', '{"text": 3}', '"text"'])
def test_broken_lines_are_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="d.jsonl, line 2"):
        list(read_documents(tmp_path / "d.jsonl", COLUMNS))


def test_line_separators_inside_a_document_do_not_end_its_line(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree"
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_documents(tmp_path / "d.jsonl", COLUMNS)) == [Document("d.jsonl:1", text, domain="d.jsonl")]


def corpus_file(tmp_path: Path, count: int = 12) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}. {TEXT}"}) + "\n" for n in range(count)), encoding="utf-8")
    return str(path)


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    data = DataConfig(files=[corpus_file(tmp_path)], window_tokens=40)
    corpus = load_corpus(data, EvalConfig(held_out_documents=3), BYTE_LEVEL, seed=5)
    documents = [{s.name.partition("#")[0] for s in part} for part in (corpus.train, corpus.held_out)]
    assert len(documents[0]) == 9
    assert len(documents[1]) == 3
    assert not documents[0] & documents[1]
    again = load_corpus(data, EvalConfig(held_out_documents=3), BYTE_LEVEL, seed=5)
    assert again == corpus
    assert load_corpus(data, EvalConfig(held_out_documents=3), BYTE_LEVEL, seed=6).held_out != corpus.held_out


def test_samples_are_numbered_as_they_stand(tmp_path: Path) -> None:
    data = DataConfig(files=[corpus_file(tmp_path)], window_tokens=40, max_samples=7, max_windows_per_document=2)
    corpus = load_corpus(data, EvalConfig(), BYTE_LEVEL, seed=0)
    assert [s.index for s in corpus.train] == list(range(7))


def test_only_the_last_window_of_a_document_closes(tmp_path: Path) -> None:
    data = DataConfig(files=[corpus_file(tmp_path, 2)], window_tokens=100, close_documents=True)
    corpus = load_corpus(data, EvalConfig(), BYTE_LEVEL, seed=0)
    closing = [s for s in corpus.train if s.closes]
    assert len(closing) == 2
    assert all(TEXT.endswith(s.text) for s in closing)


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    data = DataConfig(files=[corpus_file(tmp_path, 3)])
    with pytest.raises(DataError, match="there are only 3 documents"):
        load_corpus(data, EvalConfig(held_out_documents=3), BYTE_LEVEL, seed=0)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 5))
def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own(num: int, batch: int, seed: int) -> None:
    flat = [i for step in range(4 * num) for i in batch_indices(num, batch, seed, step)]
    epochs = [flat[n * num : (n + 1) * num] for n in range(4)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    if num >= 12:
        assert epochs[0] != epochs[1]
