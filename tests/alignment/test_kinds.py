"""Every kind of tokenizer as teacher and as student: each hard case of text, and any text at all."""

import json
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment import Target, Tokens, Translation, Vocabulary, align, translate
from alignment.chain import Rows, chained
from alignment.kernels import NONE
from alignment.report import block_likelihoods
from alignment.spelling import TokenizerError
from tests.kinds import KINDS, WRITES_BYTES, vocabulary_of
from tests.rows import random_rows
from tests.tiny import TEXT, tokenizer_json

PAIRS = {(a, b): translate(vocabulary_of(a), vocabulary_of(b)) for a, b in product(KINDS, KINDS)}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
FLOAT32_NATS = -80  # a block less likely than this (random rows, 18 tokens of one emoji) is no normal float32
CASES = {
    "split characters": "naïve 日本語 café",
    "byte fallback runs": "𐍈𐍉 the 𓀀",
    "leading spaces": " the harbour  office",
    "digits": "1904 27 14.5 1234567890",
    "runs of blanks and newlines": "a    b\n\n\n\tc \n d",
    "emoji": "👩‍👩‍👧 and 😀😀 at six",
    "right to left": "the שלום and العربية office",
    "Chinese, Japanese, Korean": "日本語のテキスト 中文 한국어",
    "composed and decomposed": "e\u0301té été Å Å",
    "no-break and wide spaces": "a\u00a0b\u3000c",
    "spellings of special tokens": "<eos> <|eos|> [SEP] </s> <0x0A>",
    "carriage returns and NUL": "a\r\nb\x00c",
    "capitals": "The HARBOUR Office",
    "the space mark itself": "the ▁ office ▁",
}


def aligned(text: str, translation: Translation, top_k: int = 12) -> tuple[Rows, Tokens, Tokens, Target]:
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    rows = random_rows(teacher.ids, len(translation.teacher), top_k, seed=len(text))
    return rows, teacher, student, align(rows, 0, teacher, student, translation)


def check(text: str, translation: Translation) -> Target:
    """What holds for every text and pair; returns the target."""
    rows, teacher, student, target = aligned(text, translation)
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not target.mass[~target.valid].any()
    blocks = block_likelihoods(
        rows, 0, (teacher, student), target, chained(rows, 0, teacher, student, translation).blocks
    )
    kept = blocks.teacher > FLOAT32_NATS
    assert (blocks.student >= blocks.teacher - 1e-4)[kept].all()
    return target


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_every_case_of_text_keeps_its_mass_and_its_likelihood(pair: tuple[str, str], case: str) -> None:
    check(CASES[case], PAIRS[pair])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=20)
@given(text=ANY_TEXT)
def test_any_text_keeps_its_mass_and_its_likelihood(pair: tuple[str, str], text: str) -> None:
    check(text, PAIRS[pair])


@pytest.mark.parametrize("pair", list(product(WRITES_BYTES, KINDS)), ids="-".join)
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"the space mark itself", "composed and decomposed"}))
def test_a_teacher_that_writes_bytes_speaks_of_every_position(pair: tuple[str, str], case: str) -> None:
    assert check(CASES[case], PAIRS[pair]).valid.all()


@pytest.mark.parametrize("teacher", ["wordpiece", "unigram"])
def test_a_teacher_whose_normalizer_drops_blanks_says_nothing_of_them(teacher: str) -> None:
    text = "the harbour office \n\n\n  the tide \n"
    *_, student, target = aligned(text, PAIRS[teacher, "byte_level"])
    inside = text.encode().index(b"\n"), text.encode().index(b"  the") + 1
    for begin, end, valid in zip(student.starts, student.ends, target.valid, strict=True):
        if inside[0] <= begin and end <= inside[1]:
            assert not valid
    assert not target.valid[-1]
    assert target.valid[: np.flatnonzero(student.ends <= inside[0])[-1]].all()


@pytest.mark.parametrize("teacher", ["wordpiece", "unigram"])
def test_what_a_teacher_only_knows_as_unknown_gets_nothing_of_its_probability(teacher: str) -> None:
    text = "the 👩 office"
    *_, student, target = aligned(text, PAIRS[teacher, "byte_level"])
    begin = text.encode().index("👩".encode())
    inside = (student.ends > begin) & (student.starts < begin + 4)
    assert not target.valid[inside].any()
    assert target.valid[student.starts >= begin + 4].all()


@pytest.mark.parametrize("pair", [("wordpiece", "byte_level"), ("wordpiece", "sentencepiece")], ids="-".join)
def test_lower_case_of_a_normalizer_costs_the_rest_of_a_capital_word_only(pair: tuple[str, str]) -> None:
    _, teacher, student, target = aligned("the HARBOUR office", PAIRS[pair])
    word = (student.starts >= 3) & (student.ends <= 11)
    assert target.valid[~word].all()
    boundaries = {3, *(int(start) for start in teacher.starts if 4 < start < 11)}  # ties train "harb" or "harbo"
    assert [bool(v) for v in target.valid[word]] == [int(start) in boundaries for start in student.starts[word]]


def test_a_space_that_the_teacher_puts_in_front_is_not_given_to_the_student() -> None:
    translation = PAIRS["prefixed", "byte_level"]
    rows, teacher, student, target = aligned("the harbour", translation, top_k=40)
    assert teacher.own_space.tolist() == [True] + [False] * (len(teacher) - 1)
    first = target.ids[: target.offsets[1]]
    spaced = {i for i, data in enumerate(translation.student.token_bytes) if data and data.startswith(b" ")}
    candidates = [translation.teacher.token_bytes[x] or b"" for x in rows.ids[0].tolist()]
    assert any(piece.startswith(b" ") and not piece.startswith(b"  ") and len(piece) > 1 for piece in candidates)
    assert not {i for i in first.tolist() if translation.student.token_bytes[i] != b" "} & spaced
    assert len(student) == len(target)


def test_a_space_that_the_student_puts_in_front_is_put_before_every_candidate() -> None:
    translation = PAIRS["byte_level", "prefixed"]
    rows, _, student, target = aligned("six clerks", translation, top_k=40)
    first = dict(zip(target.ids[: target.offsets[1]].tolist(), target.probs[: target.offsets[1]].tolist(), strict=True))
    for x, logprob in zip(rows.ids[0].tolist(), rows.logprobs[0].tolist(), strict=True):
        data = translation.teacher.token_bytes[x]
        if data and data.isalpha() and data.decode() not in "six":
            written = translation.student.encode(data.decode()).ids[0]
            assert first[int(written)] >= np.exp(logprob) * (1 - 1e-5)
    assert student.own_space[0]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_no_tokenizer_has_go_to_the_tail(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    padded = translate(vocabulary, vocabulary_of("byte_level"), len(vocabulary) + 64)
    assert len(padded.pieces) == len(vocabulary) + 64
    assert (padded.first[len(vocabulary) :] == NONE).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_writes_reads_as_what_was_asked_for(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    for piece in (b" the", b"the", b" harbour", b"our", b" office.", b"six"):
        (ids,) = vocabulary.write([piece])
        assert b"".join(vocabulary.token_bytes[i] or b"" for i in ids) == piece


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_what_a_normalizer_makes_of_a_string_counts_as_the_string(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    written = "harbour" if kind == "wordpiece" else "ＨＡ"
    expected = vocabulary.write([b" harbour" if kind == "wordpiece" else b" HA"])
    assert vocabulary.write([f" {written.upper()}".encode()]) == expected


def test_roles_can_be_given_by_spelling() -> None:
    vocabulary = vocabulary_of("byte_level")
    assert vocabulary.with_roles({"eos": "<|bos|>"}).roles["eos"] == vocabulary.roles["bos"]
    for spelled, message in (({"end": "<|eos|>"}, "no role 'end'"), ({"eos": "<nope>"}, "'<nope>', which is none")):
        with pytest.raises(ValueError, match=message):
            vocabulary.with_roles(spelled)


def test_a_rendered_chat_with_a_token_that_the_model_lacks_is_refused() -> None:
    vocabulary = vocabulary_of("byte_level")
    spelling = vocabulary.tokens[vocabulary.roles["bos"]]
    small = replace(vocabulary, token_bytes=vocabulary.token_bytes[: vocabulary.roles["bos"]])
    with pytest.raises(TokenizerError, match=f"a rendered chat has '{re.escape(spelling)}', which its model does not"):
        small.encode_rendered(spelling)


def test_added_tokens_that_are_no_special_tokens_write_their_content() -> None:
    spec = json.loads(tokenizer_json("byte_level"))
    size = len(spec["model"]["vocab"])
    token = {"content": "fifty-one", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({"id": size, "special": False, **token})
    added = Vocabulary.parse(json.dumps(spec).encode(), name="added")
    assert added.token_bytes[size] == b"fifty-one"
    assert size in added.encode("then fifty-one sacks").ids
    translation = translate(added, vocabulary_of("sentencepiece"))
    target = check(TEXT.lower(), translation)
    assert target.valid.all()
