"""Every ordered pair of the real tokenizers in tests/zoo.py, on a text that no normalizer leaves alone.

Rows are random over a few hundred ids of the teacher, and only those are translated, numbered anew: a translation of
all ids takes seconds for each of the 306 pairs. benchmarks/tokenizers.py measures with whole ones and likely answers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignment import Target, Tokens, Translation, Vocabulary, translate
from alignment.chain import chained
from alignment.report import BlockLikelihoods, block_likelihoods
from benchmarks.tokenizers import BEGIN, END, replaced, tables
from teachers.rows import Rows
from tests.rows import random_rows
from tests.zoo import ZOO, prepare_zoo

ROOT = Path(__file__).parents[2]
NAMES = [entry.name for entry in ZOO]
PAIRS = [(teacher, student) for teacher in NAMES for student in NAMES]
NASTY = (
    "Hello world! The quick   brown fox (jumps) over 12345.67 lazy dogs.\n\n\tdef f(x):\n        return x  # café\n"
    "Ünïcödé Ĳ ﬁne e\u0301 日本語テキスト 中文 한국어 العربية עברית हिन्दी Русский "
    "👩\u200d👩\u200d👧 😀 \u00a0nbsp\r\nend ▁x <s> </s> \u3000wide \U00040000 q\n  "
)
BYTE_WRITING = [  # all but WordPiece, Unigram, two byte-level ones that normalize, and SmolLM2, which lacks 21 bytes
    *("gpt-2", "llama-3", "deepseek-v4", "cl100k", "tekken", "o200k"),
    *("llama-2", "mistral-v1", "mistral-v3", "chatglm-3", "gemma-3-270m"),
]
FLOAT32_NATS = -80  # a less likely block underflows
NUM_OTHERS, TOP_K = 240, 16

Zoo = Callable[[str], Vocabulary]


@dataclass(frozen=True)
class Aligned:
    """One pair on one text."""

    teacher: Tokens
    rows: Rows
    target: Target
    blocks: BlockLikelihoods


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    """As a function: pytest prints what a failing test was given, and a vocabulary is long."""
    folders = prepare_zoo(print)
    return cache(lambda name: Vocabulary.load(folders[name]))


@pytest.fixture(scope="module")
def aligned(zoo: Zoo) -> Callable[[str, str, str], Aligned]:
    @cache
    def asked(name: str, text: str) -> tuple[NDArray[np.int64], Tokens, Rows]:
        return _few(zoo(name), zoo(name).encode(text), seed=NAMES.index(name))

    @cache
    def same(name: str) -> Translation:
        return translate(zoo(name), zoo(name))

    @cache
    def aligned(teacher: str, student: str, text: str) -> Aligned:
        (pool, tokens, rows), read = asked(teacher, text), zoo(student).encode(text)
        if teacher == student:  # one tokenizer translates by number
            tokens, rows, translation = read, replace(rows, ids=pool[rows.ids].astype(np.uint32)), same(teacher)
        else:
            few = tuple(zoo(teacher).token_bytes[i] for i in pool)
            translation = translate(replace(zoo(teacher), token_bytes=few, roles={}), zoo(student))
        found = chained(rows, 0, tokens, read, translation)
        blocks = block_likelihoods(rows, 0, (tokens, read), found.target, found.blocks)
        return Aligned(tokens, rows, found.target, blocks)

    return aligned


def _few(vocabulary: Vocabulary, tokens: Tokens, seed: int) -> tuple[NDArray[np.int64], Tokens, Rows]:
    """The ids of the text's own tokens and some of all others, the text in numbers of these, and random rows."""
    others = np.random.default_rng(seed).choice(len(vocabulary), NUM_OTHERS, replace=False)
    pool = np.unique(np.concatenate([tokens.ids, others]))
    tokens = replace(tokens, ids=np.searchsorted(pool, tokens.ids))
    return pool, tokens, random_rows(tokens.ids, len(pool), TOP_K, seed)


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_mass_and_tail_are_one_wherever_a_target_is(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    target = aligned(*pair, NASTY).target
    assert target.valid.any()
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not (target.mass + target.tail)[~target.valid].any()


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_no_block_is_less_likely_than_to_its_teacher(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    blocks = aligned(*pair, NASTY).blocks
    likely = blocks.teacher > FLOAT32_NATS
    assert likely.sum() >= 20
    assert (blocks.student >= blocks.teacher - 1e-4)[likely].all()


@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0] in BYTE_WRITING], ids=" to ".join)
def test_a_teacher_that_writes_bytes_speaks_of_every_position(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    found = aligned(*pair, NASTY.replace("▁", ""))  # SentencePiece reads its own mark as a space
    assert found.teacher.written.all()
    assert found.target.valid.all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BYTE_WRITING])
def test_any_other_teacher_is_masked_somewhere(aligned, name: str) -> None:  # type: ignore[no-untyped-def]
    found = aligned(name, "gpt-2", NASTY)
    assert not found.teacher.written.all()
    assert not found.target.valid.all()


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_every_teacher_speaks_of_all_of_a_plain_text(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    assert aligned(*pair, "the cat sat on the mat, and ate 12 small fish.").target.valid.all()


@pytest.mark.parametrize("name", NAMES)
def test_one_tokenizer_gives_its_rows_back(aligned, zoo: Zoo, name: str) -> None:  # type: ignore[no-untyped-def]
    found = aligned(name, name, NASTY)
    target, rows = found.target, found.rows
    assert target.valid.all()
    dense = np.zeros((len(target), len(zoo(name))), dtype=np.float32)
    dense[target.rows, target.ids] = target.probs
    listed = np.take_along_axis(dense, rows.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(listed, np.exp(rows.logprobs), rtol=1e-5)
    np.testing.assert_allclose(target.prob_of(found.teacher.ids), np.exp(rows.actual), rtol=1e-5)
    assert (np.diff(target.offsets) <= TOP_K + 1).all()


@pytest.mark.parametrize("pair", [("bert-base-uncased", "llama-2"), ("gpt-2", "t5")], ids=" to ".join)
def test_a_kept_translation_is_the_fresh_one(
    zoo: Zoo, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = zoo(pair[0]), zoo(pair[1])
    fresh = translate(teacher, student)
    translate(teacher, student, cache=tmp_path)
    monkeypatch.setattr(Vocabulary, "write", lambda *_: pytest.fail("it was not kept"))
    _assert_same(translate(teacher, student, cache=tmp_path), fresh)


def _assert_same(kept: Translation, fresh: Translation) -> None:
    for a, b in ((kept.offsets, fresh.offsets), (kept.tokens, fresh.tokens), (kept.first, fresh.first)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert kept.pieces == fresh.pieces


PAGE = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_how_each_tokenizer_is_read(name: str) -> None:
    assert f"`{name}`" in PAGE.split(BEGIN)[0]


def test_the_page_shows_the_figures_that_are_kept() -> None:
    kept = json.loads((ROOT / "benchmarks" / "baselines" / "tokenizers.json").read_text(encoding="utf-8"))
    assert replaced(PAGE, tables(kept)) == PAGE


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="each once"):
        replaced(f"a\n{BEGIN}\nold\n", "new\n")
