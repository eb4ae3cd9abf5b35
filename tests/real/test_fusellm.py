"""The alignment of FuseLLM, compared with the output of the reference implementation (tests/golden/)."""

import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from rapidfuzz.process import cdist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from alignment import Vocabulary
from alignment.fusellm import UNKNOWN, TokenMap, align_fusellm, fusellm_target, unique_matches
from tests.rows import random_rows

pytestmark = pytest.mark.slow

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "fusellm_alignment.json").read_text(encoding="utf-8")
)
NAMES = {"gemma3-270m": "gemma", "smollm2-135m": "smollm2"}


@pytest.fixture(scope="module")
def vocabularies(smollm2_vocabulary: Vocabulary, gemma_vocabulary: Vocabulary) -> dict[str, Vocabulary]:
    return {"smollm2-135m": smollm2_vocabulary, "gemma3-270m": gemma_vocabulary}


def map_of(vocabularies: dict[str, Vocabulary], case: dict[str, Any]) -> TokenMap:
    return TokenMap(vocabularies[case["teacher"]], vocabularies[case["student"]], nearest=case["method"] == "min_ed")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['method']} to {NAMES[c['student']]}")
def test_rows_equal_those_of_the_reference(vocabularies: dict[str, Vocabulary], case: dict[str, Any]) -> None:
    rows = align_fusellm(
        np.array(case["top_k_token_ids"]),
        np.array(case["top_k_values"]),
        np.array(case["teacher_token_ids"]),
        np.array(case["student_token_ids"]),
        map_of(vocabularies, case),
    )
    cut = list(zip(rows.offsets, rows.offsets[1:], strict=False))
    assert [rows.ids[a:b].tolist() for a, b in cut] == case["aligned_token_ids"]
    assert [rows.values[a:b].tolist() for a, b in cut] == case["aligned_values"]


@pytest.mark.parametrize("case", [c for c in CASES if c["method"] == "min_ed"], ids=lambda c: NAMES[c["student"]])
def test_nearest_tokens_equal_those_of_the_reference(vocabularies: dict[str, Vocabulary], case: dict[str, Any]) -> None:
    token_map = map_of(vocabularies, case)
    candidates = np.unique(case["top_k_token_ids"])
    strings = [token_map.teacher.tokens[i].replace(case["teacher_mark"], case["student_mark"]) for i in candidates]
    mapped = [token_map.student.tokens[i] for i in token_map.student_ids(candidates)]
    assert {a: b for a, b in zip(strings, mapped, strict=True) if a in case["min_ed_mapping"]}.items() <= (
        case["min_ed_mapping"].items()
    )


def test_a_token_that_is_matched_twice_has_no_unique_match() -> None:
    assert unique_matches(["ab", "c"], ["a", "b", "c"]).tolist() == [0, 0, 1]
    assert unique_matches(["a", "b", "c"], ["ab", "c"]).tolist() == [-1, 2]


def byte_level(*merges: tuple[str, str]) -> Vocabulary:
    vocab = {"<s>": 0} | {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary.parse(tokenizer.to_str().encode(), b'{"bos_token": "<s>"}', name="bytes")


@pytest.mark.parametrize("nearest", [False, True])
def test_a_token_after_the_last_row_is_invalid(nearest: bool) -> None:
    """In "zabb" two student tokens are matched with the teacher's last token; no row predicts the second."""
    teacher, student = byte_level(("a", "b")), byte_level()
    teacher_tokens, student_tokens = teacher.encode("zabb"), student.encode("zabb")
    rows = random_rows(teacher_tokens.ids, len(teacher), 4, seed=0, start=0)
    target = fusellm_target(rows, 0, teacher_tokens, student_tokens, TokenMap(teacher, student, nearest=nearest))
    assert not target.valid[-1]


def test_a_token_is_unknown_to_other_threads_until_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = byte_level(("a", "b")), byte_level()
    mapping, states = TokenMap(teacher, student, nearest=True), list[int]()

    def recording_cdist(*args: Any, **kwargs: Any) -> Any:
        states.append(int(mapping._student_ids[len(teacher) - 1]))
        return cdist(*args, **kwargs)

    monkeypatch.setattr("alignment.fusellm.cdist", recording_cdist)
    assert mapping.student_ids(np.array([len(teacher) - 1])) >= 0
    assert states == [UNKNOWN]


def test_2048_tokens_are_aligned_at_15_000_per_second(vocabularies: dict[str, Vocabulary]) -> None:
    teacher, student = vocabularies["gemma3-270m"], vocabularies["smollm2-135m"]
    text = "".join(topics[name] for name in sorted(topics)[:12])
    teacher_ids, student_ids = teacher.encode(text).ids[:2048], student.encode(text).ids[:2048]
    pool = np.unique(teacher_ids)
    rows = random_rows(np.searchsorted(pool, teacher_ids), len(pool), 10, seed=0)
    for nearest in (False, True):
        token_map = TokenMap(teacher, student, nearest=nearest)
        align_fusellm(pool[rows.ids], rows.logprobs, teacher_ids, student_ids, token_map)
        durations = []
        for _ in range(3):
            began = time.perf_counter()
            align_fusellm(pool[rows.ids], rows.logprobs, teacher_ids, student_ids, token_map)
            durations.append(time.perf_counter() - began)
        assert 2048 / min(durations) > 15_000  # measured on one core: 173,000 to 184,000


@pytest.mark.parametrize("first_row", [0, 1])
def test_a_row_of_the_target_is_at_the_token_that_it_predicts(
    vocabularies: dict[str, Vocabulary], first_row: int
) -> None:
    teacher, student = vocabularies["gemma3-270m"], vocabularies["smollm2-135m"]
    text = "The oldest house in the street is empty, and the garden is full."
    teacher_tokens, student_tokens = teacher.encode(text), student.encode(text)
    rows = random_rows(teacher_tokens.ids % 500, 500, 8, seed=1, start=first_row)
    mapping = TokenMap(teacher, student, nearest=True)
    target = fusellm_target(rows, first_row, teacher_tokens, student_tokens, mapping)
    expected = align_fusellm(
        rows.ids[1 - first_row :].astype(np.int64),
        np.exp(rows.logprobs[1 - first_row :].astype(np.float64)),
        teacher_tokens.ids[:-1],
        student_tokens.ids[:-1],
        mapping,
    )
    assert not target.valid[0]
    np.testing.assert_array_equal(target.valid[1:], expected.mapped)
    for position in np.flatnonzero(target.valid):
        begin, end = expected.offsets[position - 1 : position + 1]
        row = slice(target.offsets[position], target.offsets[position + 1])
        assert sorted(target.ids[row]) == sorted(expected.ids[begin:end])
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
