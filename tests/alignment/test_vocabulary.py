"""Vocabularies: the bytes of every id, special tokens by role, and the tokens of any text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import TokenizerError, Vocabulary
from tests.tiny import TEXT, tiny_vocabulary, tokenizer_config, tokenizer_json

BYTE_LEVEL, SENTENCEPIECE = tiny_vocabulary("byte_level"), tiny_vocabulary("sentencepiece")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def test_byte_level_tokens_decode_to_bytes() -> None:
    by_bytes = {data: i for i, data in enumerate(BYTE_LEVEL.token_bytes)}
    assert set(by_bytes) >= {bytes([b]) for b in range(256)}
    assert b" the" in by_bytes


def test_sentencepiece_marks_and_byte_tokens_decode_to_spaces_and_bytes() -> None:
    assert b" the" in SENTENCEPIECE.token_bytes
    assert {bytes([b]) for b in range(256)} <= set(SENTENCEPIECE.token_bytes)


def test_special_tokens_have_no_bytes_and_a_role() -> None:
    for vocabulary in (BYTE_LEVEL, SENTENCEPIECE):
        assert vocabulary.token_bytes[vocabulary.roles["eos"]] is None
        assert vocabulary.token_bytes[vocabulary.roles["bos"]] is None


def test_bos_is_expected_if_the_config_sets_it() -> None:
    assert SENTENCEPIECE.prefix == [SENTENCEPIECE.roles["bos"]]
    assert BYTE_LEVEL.prefix == []


def test_bos_is_expected_if_the_template_puts_it_in_front() -> None:
    spec = json.loads(tokenizer_json("sentencepiece"))
    config = json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}).encode()
    for token, expected in (("<bos>", True), ("<eos>", False)):
        special = {token: {"id": token, "ids": [1 if token == "<eos>" else 2], "tokens": [token]}}
        single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}
        spec["post_processor"]["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        assert Vocabulary.parse(json.dumps(spec).encode(), config, name="t").expects_bos is expected


def test_bos_is_expected_of_a_gemma_tokenizer_without_the_flag() -> None:
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "GemmaTokenizer"}
    vocabulary = Vocabulary.parse(tokenizer_json("sentencepiece").encode(), json.dumps(config).encode(), name="g")
    assert vocabulary.expects_bos


@given(ANY_TEXT)
def test_byte_level_tokens_write_any_text_and_reach_its_end(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text)
    assert b"".join(BYTE_LEVEL.token_bytes[i] or b"" for i in tokens.ids) == text.encode()
    assert len(tokens) == 0 or tokens.ends[-1] == len(text.encode())


@given(ANY_TEXT)
def test_sentencepiece_token_ends_are_known_or_inside_a_character(text: str) -> None:
    tokens = SENTENCEPIECE.encode(text)
    known = tokens.ends[tokens.ends >= 0]
    assert (known[1:] >= known[:-1]).all()
    assert len(tokens) == 0 or tokens.ends[-1] == len(text.encode())


@given(st.binary(max_size=24))
def test_any_bytes_can_be_written_as_a_continuation(data: bytes) -> None:
    for vocabulary in (BYTE_LEVEL, SENTENCEPIECE):
        (ids,) = vocabulary.write([data])
        assert b"".join(vocabulary.token_bytes[i] or b"" for i in ids) == data


def test_the_string_of_a_special_token_is_tokenized_as_text() -> None:
    tokens = SENTENCEPIECE.encode("a<eos>b")
    assert SENTENCEPIECE.roles["eos"] not in tokens.ids
    assert SENTENCEPIECE.roles["eos"] not in SENTENCEPIECE.write([b"a<eos>b"])[0]


def test_closing_eos_follows_the_text() -> None:
    tokens = BYTE_LEVEL.encode(TEXT, close=True)
    assert tokens.ids[-1] == BYTE_LEVEL.roles["eos"]
    assert tokens.ends[-1] == tokens.num_bytes + 1


def test_a_space_that_the_tokenizer_adds_is_not_a_byte_of_the_text() -> None:
    spec = json.loads(tokenizer_json("byte_level"))
    spec["pre_tokenizer"]["add_prefix_space"] = True
    vocabulary = Vocabulary.parse(json.dumps(spec).encode(), name="prefixed")
    tokens = vocabulary.encode("the harbour")
    assert vocabulary.token_bytes[tokens.ids[0]] == b" the"
    assert tokens.ends[0] == 3
    assert b"".join(vocabulary.token_bytes[i] or b"" for i in vocabulary.write([b"the"])[0]) == b"the"


def test_an_unsupported_model_type_is_rejected_by_name() -> None:
    spec = json.loads(tokenizer_json("byte_level"))
    spec["model"] = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    spec["added_tokens"] = []
    with pytest.raises(TokenizerError, match="the tokenizer of x is WordLevel"):
        Vocabulary.parse(json.dumps(spec).encode(), name="x")


def test_a_file_that_is_not_a_tokenizer_is_rejected() -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        Vocabulary.parse(b"{}", name="x")


def test_equal_files_have_equal_fingerprints() -> None:
    config = json.dumps(tokenizer_config("byte_level")).encode()
    again = Vocabulary.parse(tokenizer_json("byte_level").encode(), config, name="again")
    assert again.fingerprint == BYTE_LEVEL.fingerprint != SENTENCEPIECE.fingerprint
