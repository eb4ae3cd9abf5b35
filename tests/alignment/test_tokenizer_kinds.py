"""Every kind of tokenizer as teacher and as student, on difficult texts and on any text; and the registry of kinds."""

import copy
import json
import pkgutil
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment import Target, Tokens, Translation, Vocabulary, align, translate
from alignment.byte_chain import ScoredRows, align_byte_chain
from alignment.kernels import NONE
from alignment.report import block_likelihoods
from alignment.tokenizers import TOKENIZER_KINDS, tokenizer_kind
from alignment.tokenizers.kinds import Spec, TokenizerError, token_bytes_of
from tests.kinds import KINDS, WRITES_BYTES, vocabulary_of
from tests.rows import random_rows
from tests.tiny import TEXT, tokenizer_json

PAIRS = {(a, b): translate(vocabulary_of(a), vocabulary_of(b)) for a, b in product(KINDS, KINDS)}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
FLOAT32_NATS = -80  # blocks less likely than this (random rows, 18 tokens of one emoji) underflow
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
    "strings of special tokens": "<eos> <|eos|> [SEP] </s> <0x0A>",
    "carriage returns and NUL": "a\r\nb\x00c",
    "capitals": "The HARBOUR Office",
    "the space mark": "the ▁ office ▁",
}


def aligned(text: str, translation: Translation, top_k: int = 12) -> tuple[ScoredRows, Tokens, Tokens, Target]:
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    rows = random_rows(teacher.ids, len(translation.teacher), top_k, seed=len(text))
    return rows, teacher, student, align(rows, 0, teacher, student, translation)


def check(text: str, translation: Translation) -> Target:
    """Assert the properties of every text and pair; return the target."""
    rows, teacher, student, target = aligned(text, translation)
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not target.mass[~target.valid].any()
    cuts = align_byte_chain(rows, 0, teacher, student, translation).uncrossed_cuts
    blocks = block_likelihoods(rows, 0, (teacher, student), target, cuts)
    kept = blocks.teacher > FLOAT32_NATS
    assert (blocks.student >= blocks.teacher - 1e-4)[kept].all()
    return target


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_difficult_texts_keep_their_mass_and_their_likelihood(pair: tuple[str, str], case: str) -> None:
    check(CASES[case], PAIRS[pair])


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=20)
@given(text=ANY_TEXT)
def test_any_text_keeps_its_mass_and_its_likelihood(pair: tuple[str, str], text: str) -> None:
    check(text, PAIRS[pair])


@pytest.mark.parametrize("pair", list(product(WRITES_BYTES, KINDS)), ids="-".join)
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"the space mark", "composed and decomposed"}))
def test_a_teacher_that_writes_all_bytes_covers_every_position(pair: tuple[str, str], case: str) -> None:
    assert check(CASES[case], PAIRS[pair]).valid.all()


@pytest.mark.parametrize("teacher", ["wordpiece", "unigram"])
def test_blanks_that_the_normalizer_of_a_teacher_drops_are_masked(teacher: str) -> None:
    text = "the harbour office \n\n\n  the tide \n"
    *_, student, target = aligned(text, PAIRS[teacher, "byte_level"])
    inside = text.encode().index(b"\n"), text.encode().index(b"  the") + 1
    for begin, end, valid in zip(student.starts, student.ends, target.valid, strict=True):
        if inside[0] <= begin and end <= inside[1]:
            assert not valid
    assert not target.valid[-1]
    assert target.valid[: np.flatnonzero(student.ends <= inside[0])[-1]].all()


@pytest.mark.parametrize("teacher", ["wordpiece", "unigram"])
def test_text_that_is_the_unknown_token_of_a_teacher_is_masked(teacher: str) -> None:
    text = "the 👩 office"
    *_, student, target = aligned(text, PAIRS[teacher, "byte_level"])
    begin = text.encode().index("👩".encode())
    inside = (student.ends > begin) & (student.starts < begin + 4)
    assert not target.valid[inside].any()
    assert target.valid[student.starts >= begin + 4].all()


@pytest.mark.parametrize("pair", [("wordpiece", "byte_level"), ("wordpiece", "sentencepiece")], ids="-".join)
def test_a_normalizer_to_lower_case_masks_only_the_rest_of_a_capital_word(pair: tuple[str, str]) -> None:
    _, teacher, student, target = aligned("the HARBOUR office", PAIRS[pair])
    word = (student.starts >= 3) & (student.ends <= 11)
    assert target.valid[~word].all()
    boundaries = {3, *(int(start) for start in teacher.starts if 4 < start < 11)}  # ties train "harb" or "harbo"
    assert [bool(v) for v in target.valid[word]] == [int(start) in boundaries for start in student.starts[word]]


def test_a_space_that_the_teacher_adds_is_removed_from_its_candidates() -> None:
    translation = PAIRS["prefixed", "byte_level"]
    rows, teacher, student, target = aligned("the harbour", translation, top_k=40)
    assert teacher.own_space.tolist() == [True] + [False] * (len(teacher) - 1)
    first = target.ids[: target.offsets[1]]
    spaced = {i for i, data in enumerate(translation.student.token_bytes) if data and data.startswith(b" ")}
    candidates = [translation.teacher.token_bytes[x] or b"" for x in rows.ids[0].tolist()]
    assert any(piece.startswith(b" ") and not piece.startswith(b"  ") and len(piece) > 1 for piece in candidates)
    assert not {i for i in first.tolist() if translation.student.token_bytes[i] != b" "} & spaced
    assert len(student) == len(target)


def test_a_space_that_the_student_adds_is_put_before_every_candidate() -> None:
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
def test_ids_beyond_the_tokenizer_have_no_translation(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    padded = translate(vocabulary, vocabulary_of("byte_level"), len(vocabulary) + 64)
    assert len(padded.pieces) == len(vocabulary) + 64
    assert (padded.first[len(vocabulary) :] == NONE).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_continuation_have_its_bytes(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    for piece in (b" the", b"the", b" harbour", b"our", b" office.", b"six"):
        (ids,) = vocabulary.write([piece])
        assert b"".join(vocabulary.token_bytes[i] or b"" for i in ids) == piece


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_continuation_is_accepted_in_its_normalized_form(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    written = "harbour" if kind == "wordpiece" else "ＨＡ"
    expected = vocabulary.write([b" harbour" if kind == "wordpiece" else b" HA"])
    assert vocabulary.write([f" {written.upper()}".encode()]) == expected


def test_roles_can_be_set_to_tokens() -> None:
    vocabulary = vocabulary_of("byte_level")
    assert vocabulary.with_roles({"eos": "<|bos|>"}).roles["eos"] == vocabulary.roles["bos"]
    for roles, message in (({"end": "<|eos|>"}, "unknown role 'end'"), ({"eos": "<nope>"}, "'<nope>', which is none")):
        with pytest.raises(ValueError, match=message):
            vocabulary.with_roles(roles)


def test_a_rendered_chat_with_a_token_that_the_model_lacks_is_rejected() -> None:
    vocabulary = vocabulary_of("byte_level")
    special = vocabulary.tokens[vocabulary.roles["bos"]]
    small = replace(vocabulary, token_bytes=vocabulary.token_bytes[: vocabulary.roles["bos"]])
    with pytest.raises(TokenizerError, match=f"a rendered chat has '{re.escape(special)}', which its model does not"):
        small.encode_rendered(special)


def test_added_tokens_that_are_not_special_write_their_content() -> None:
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


# --- the registry ---


def test_every_registered_kind_has_its_name_and_a_vocabulary_in_these_tests() -> None:
    tested = {vocabulary_of(kind).kind.name: vocabulary_of(kind).kind for kind in KINDS}
    assert tested.keys() == TOKENIZER_KINDS.keys()
    for name, target in TOKENIZER_KINDS.items():
        assert type(tested[name]) is pkgutil.resolve_name(target)


@pytest.mark.parametrize("name", TOKENIZER_KINDS)
def test_every_registered_kind_is_documented(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in page


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_kind_that_matches_a_tokenizer_is_used(kind: str) -> None:
    spec = json.loads(vocabulary_of(kind)._tokenizer.to_str())
    kinds = [pkgutil.resolve_name(target)() for target in TOKENIZER_KINDS.values()]
    matching = [k.name for k in kinds if k.matches(spec)]
    assert matching[0] == vocabulary_of(kind).kind.name == tokenizer_kind(spec, kind).name


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_not_changed_when_its_continuation_form_is_built(kind: str) -> None:
    spec = json.loads(vocabulary_of(kind)._tokenizer.to_str())
    before = copy.deepcopy(spec)
    tokenizer_kind(spec, kind).as_continuation(spec)
    assert spec == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordLevel"}, "the tokenizer of x is WordLevel, not BPE, Unigram or WordPiece: expected one of"),
        ({"type": "BPE", "end_of_word_suffix": "</w>"}, "marks the ends of words with '</w>'"),
        ({"type": "BPE"}, "is neither byte-level nor SentencePiece, its tokens mark no spaces"),
    ],
)
def test_a_tokenizer_of_no_registered_kind_is_rejected_with_the_reason(model: dict[str, str], message: str) -> None:
    with pytest.raises(TokenizerError, match=f"{message}.*byte-level, sentencepiece"):
        tokenizer_kind({"model": model}, "x")


class Marked:
    """A kind of tokenizer that this project does not have."""

    name = "marked"
    space_mark = "_"

    def matches(self, spec: Spec) -> bool:
        return "marked" in spec

    def token_bytes(self, token: str, model: Spec) -> bytes:
        return token.replace("_", " ").encode()

    def added_token_bytes(self, content: str, model: Spec) -> bytes:
        return content.encode()

    def as_continuation(self, spec: Spec) -> Spec:
        return spec


def test_a_new_kind_needs_one_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZER_KINDS, "marked", f"{__name__}:Marked")
    spec = {"marked": True, "model": {"type": "WordLevel", "vocab": {"_the": 0, "_": 1}}, "added_tokens": []}
    kind = tokenizer_kind(spec, "x")
    assert kind.name == "marked"
    assert token_bytes_of(spec, kind) == (b" the", b" ")
