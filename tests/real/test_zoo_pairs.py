"""Ordered pairs of the real tokenizers in tests/zoo.py, on a text that every normalizer changes.

A third of all pairs, chosen so that each tokenizer is the teacher of six and the student of six, itself included, and
that every kind meets every kind; with TUTELAGE_ALL_PAIRS=1 all of them. Rows are random over a few hundred ids of the
teacher, and only these ids are translated, with new numbers: a translation of all ids takes seconds for each pair.
benchmarks/tokenizers.py measures all pairs with complete translations and realistic rows.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from alignment import Target, Tokens, Translation, Vocabulary, translate
from alignment.byte_chain import align_byte_chain
from alignment.report import BlockLikelihoods, block_likelihoods
from benchmarks.tokenizers import BEGIN, END, tables, with_tables
from teachers.protocol.rows import Rows
from tests.rows import random_rows
from tests.zoo import ZOO, prepare_zoo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = [entry.name for entry in ZOO]
STRIDE = 1 if os.environ.get("TUTELAGE_ALL_PAIRS") else 3
PAIRS = [(t, s) for i, t in enumerate(NAMES) for j, s in enumerate(NAMES) if (j - i) % STRIDE == 0]
DIFFICULT = (
    "Hello world! The quick   brown fox (jumps) over 12345.67 lazy dogs.\n\n\tdef f(x):\n        return x  # café\n"
    "Ünïcödé Ĳ ﬁne e\u0301 日本語テキスト 中文 한국어 العربية עברית हिन्दी Русский "
    "👩\u200d👩\u200d👧 😀 \u00a0nbsp\r\nend ▁x <s> </s> \u3000wide \U00040000 q\n  "
)
WRITES_BYTES = [  # all but WordPiece, Unigram, two byte-level ones that normalize, and SmolLM2, which lacks 21 bytes
    *("gpt-2", "llama-3", "deepseek-v4", "cl100k", "tekken", "o200k"),
    *("llama-2", "mistral-v1", "mistral-v3", "chatglm-3", "gemma-3-270m"),
]
FLOAT32_NATS = -80  # a less likely block underflows
NUM_OTHER_IDS, TOP_K = 240, 16

Zoo = Callable[[str], Vocabulary]


@dataclass(frozen=True)
class AlignedText:
    """A pair of tokenizers on one text."""

    teacher: Tokens
    rows: Rows
    target: Target
    blocks: BlockLikelihoods


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    """Return a function instead of a dict: pytest prints the arguments of a failing test, and a vocabulary is long."""
    folders = prepare_zoo(print)
    return cache(lambda name: Vocabulary.load(folders[name]))


@pytest.fixture(scope="module")
def aligned(zoo: Zoo) -> Callable[[str, str, str], AlignedText]:
    @cache
    def teacher_rows(name: str, text: str) -> tuple[NDArray[np.int64], Tokens, Rows]:
        return _few_ids(zoo(name), zoo(name).encode(text), seed=NAMES.index(name))

    @cache
    def identity(name: str) -> Translation:
        return translate(zoo(name), zoo(name))

    @cache
    def aligned(teacher: str, student: str, text: str) -> AlignedText:
        (pool, tokens, rows), student_tokens = teacher_rows(teacher, text), zoo(student).encode(text)
        if teacher == student:  # identical tokenizers translate ids unchanged
            tokens, rows = student_tokens, replace(rows, ids=pool[rows.ids].astype(np.uint32))
            translation = identity(teacher)
        else:
            pieces = tuple(zoo(teacher).token_bytes[i] for i in pool)
            translation = translate(replace(zoo(teacher), token_bytes=pieces, roles={}), zoo(student))
        result = align_byte_chain(rows, 0, tokens, student_tokens, translation)
        blocks = block_likelihoods(rows, 0, (tokens, student_tokens), result.target, result.uncrossed_cuts)
        return AlignedText(tokens, rows, result.target, blocks)

    return aligned


def _few_ids(vocabulary: Vocabulary, tokens: Tokens, seed: int) -> tuple[NDArray[np.int64], Tokens, Rows]:
    """Return the ids of the text and some others, the tokens renumbered as indices of these ids, and random rows."""
    others = np.random.default_rng(seed).choice(len(vocabulary), NUM_OTHER_IDS, replace=False)
    pool = np.unique(np.concatenate([tokens.ids, others]))
    tokens = replace(tokens, ids=np.searchsorted(pool, tokens.ids))
    return pool, tokens, random_rows(tokens.ids, len(pool), TOP_K, seed)


def test_every_kind_is_paired_with_every_kind() -> None:
    kinds = {entry.name: entry.kind for entry in ZOO}
    assert {(kinds[t], kinds[s]) for t, s in PAIRS} == set(product(kinds.values(), repeat=2))


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_mass_and_tail_sum_to_one_at_valid_positions(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    target = aligned(*pair, DIFFICULT).target
    assert target.valid.any()
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    assert not (target.mass + target.tail)[~target.valid].any()


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_each_block_is_at_least_as_likely_as_under_the_teacher(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    blocks = aligned(*pair, DIFFICULT).blocks
    likely = blocks.teacher > FLOAT32_NATS
    assert likely.sum() >= 20
    assert (blocks.student >= blocks.teacher - 1e-4)[likely].all()


@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0] in WRITES_BYTES], ids=" to ".join)
def test_a_teacher_that_writes_all_bytes_covers_every_position(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    result = aligned(*pair, DIFFICULT.replace("▁", ""))  # SentencePiece reads its own mark as a space
    assert result.teacher.written.all()
    assert result.target.valid.all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WRITES_BYTES])
def test_any_other_teacher_is_masked_at_some_position(aligned, name: str) -> None:  # type: ignore[no-untyped-def]
    result = aligned(name, "gpt-2", DIFFICULT)
    assert not result.teacher.written.all()
    assert not result.target.valid.all()


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_every_teacher_covers_all_of_a_plain_text(aligned, pair: tuple[str, str]) -> None:  # type: ignore[no-untyped-def]
    assert aligned(*pair, "the cat sat on the mat, and ate 12 small fish.").target.valid.all()


@pytest.mark.parametrize("name", NAMES)
def test_identical_tokenizers_return_the_rows(aligned, zoo: Zoo, name: str) -> None:  # type: ignore[no-untyped-def]
    result = aligned(name, name, DIFFICULT)
    target, rows = result.target, result.rows
    assert target.valid.all()
    dense = np.zeros((len(target), len(zoo(name))), dtype=np.float32)
    dense[target.rows, target.ids] = target.probs
    listed = np.take_along_axis(dense, rows.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(listed, np.exp(rows.logprobs), rtol=1e-5)
    np.testing.assert_allclose(target.prob_of(result.teacher.ids), np.exp(rows.actual), rtol=1e-5)
    assert (np.diff(target.offsets) <= TOP_K + 1).all()


@pytest.mark.parametrize("pair", [("bert-base-uncased", "llama-2"), ("gpt-2", "t5")], ids=" to ".join)
def test_a_cached_translation_equals_a_computed_one(
    zoo: Zoo, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = zoo(pair[0]), zoo(pair[1])
    computed = translate(teacher, student)
    translate(teacher, student, cache=tmp_path)
    monkeypatch.setattr(Vocabulary, "write", lambda *_: pytest.fail("the translation was not cached"))
    _assert_same(translate(teacher, student, cache=tmp_path), computed)


def _assert_same(cached: Translation, computed: Translation) -> None:
    for a, b in ((cached.offsets, computed.offsets), (cached.tokens, computed.tokens), (cached.first, computed.first)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert cached.pieces == computed.pieces


PAGE = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_names_each_tokenizer(name: str) -> None:
    assert f"`{name}`" in PAGE.split(BEGIN)[0]


def test_the_page_shows_the_recorded_figures() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "baselines" / "tokenizers.json").read_text(encoding="utf-8"))
    assert with_tables(PAGE, tables(recorded)) == PAGE


def test_only_the_text_between_the_markers_is_replaced() -> None:
    assert with_tables(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="each once"):
        with_tables(f"a\n{BEGIN}\nold\n", "new\n")
