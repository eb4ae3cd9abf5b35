"""Byte-chain alignment and fusion of SmolLM2 and Gemma 3 on real text.

The texts are part of every installation: CPython's documentation and source, and the markdown of a library.
"""

import asyncio
import importlib.metadata
import inspect
import json.decoder
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignment import Target, Tokens, Translation, Vocabulary, align, translate
from alignment.byte_chain import align_byte_chain
from alignment.offsets import common_cuts
from alignment.report import AlignmentReport, block_likelihoods, report
from teachers.engines.transformers import TransformersEngine
from teachers.protocol.messages import TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.wire_format import as_received
from tests.rows import random_rows
from trainer.fusion.base import FusionRule
from trainer.fusion.fuse import fuse
from trainer.fusion.inputs import FusionInput
from trainer.paths import tables_dir

pytestmark = pytest.mark.slow

TEXTS = {
    "prose": topics["execmodel"][:3000],
    "code": inspect.getsource(json.decoder)[:3000],
    "markdown": importlib.metadata.metadata("httpx")["Description"][:3000],
}
BEST_K = 64


@dataclass(frozen=True)
class Scored:
    """One model's rows for one text at K = 64."""

    first_row: int
    tokens: Tokens
    rows: Rows
    sequence: list[int]
    card: TeacherCard

    def at(self, top_k: int) -> Rows:
        """Return the rows at a smaller K, as a client receives them."""
        ids, logprobs = self.rows.ids[:, :top_k], self.rows.logprobs[:, :top_k]
        tail = np.maximum(1 - np.exp(logprobs.astype(float)).sum(axis=1), 0)
        rows = Rows(self.rows.start, ids, logprobs, self.rows.actual, tail.astype(np.float32))
        return as_received(rows, self.sequence, self.card)


@pytest.fixture(scope="module")
def vocabularies(smollm2_vocabulary: Vocabulary, gemma_vocabulary: Vocabulary) -> dict[str, Vocabulary]:
    return {"smollm2": smollm2_vocabulary, "gemma": gemma_vocabulary}


@pytest.fixture(scope="module")
def translations(vocabularies: dict[str, Vocabulary]) -> dict[tuple[str, str], Translation]:
    pairs = product(vocabularies, repeat=2)
    return {(a, b): translate(vocabularies[a], vocabularies[b], cache=tables_dir()) for a, b in pairs}


@pytest.fixture(scope="module")
def of_pair(translations: dict[tuple[str, str], Translation]) -> Callable[[tuple[str, str]], Translation]:
    """Return a function instead of a dict: hypothesis prints its arguments, and a vocabulary is long."""
    return translations.__getitem__


@pytest.fixture(scope="module")
def scored(vocabularies: dict[str, Vocabulary], smollm2: Path, gemma: Path) -> dict[tuple[str, str], Scored]:
    scores = {}
    for name, folder in (("smollm2", smollm2), ("gemma", gemma)):
        engine = TransformersEngine(folder)
        prefix = [engine.card.bos_id] if engine.card.expects_bos and engine.card.bos_id is not None else []
        for kind, text in TEXTS.items():
            tokens = vocabularies[name].encode(text)
            sequence = prefix + tokens.ids.tolist()
            rows = asyncio.run(engine.score(sequence, 1, BEST_K))
            scores[name, kind] = Scored(1 - len(prefix), tokens, rows, sequence, engine.card)
        engine.close()
    return scores


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("top_k", [8, BEST_K])
@pytest.mark.parametrize("pair", [("gemma", "smollm2"), ("smollm2", "gemma")], ids=" to ".join)
def test_aligned_bits_per_byte_are_near_those_of_the_teacher(  # type: ignore[no-untyped-def]
    scored, translations, vocabularies, pair: tuple[str, str], top_k: int, kind: str
) -> None:
    teacher, translation = scored[pair[0], kind], translations[pair]
    student = vocabularies[pair[1]].encode(TEXTS[kind])
    rows = teacher.at(top_k)
    target = align(rows, teacher.first_row, teacher.tokens, student, translation)
    figures = report(rows, teacher.first_row, (teacher.tokens, student), target, translation)
    assert target.valid[1:].all()
    assert target.valid[0] == (teacher.first_row == 0)
    assert 0.96 * figures.teacher_bpb <= figures.aligned_bpb <= 1.002 * figures.teacher_bpb
    if top_k == BEST_K:
        assert figures.mean_mass >= 0.88
    cuts = align_byte_chain(rows, teacher.first_row, teacher.tokens, student, translation).uncrossed_cuts
    blocks = block_likelihoods(rows, teacher.first_row, (teacher.tokens, student), target, cuts)
    assert (blocks.student >= blocks.teacher - 1e-4).all()


def test_fusion_is_five_percent_below_the_better_teacher_on_mixed_text(scored, translations, vocabularies) -> None:  # type: ignore[no-untyped-def]
    student = vocabularies["smollm2"]
    samples = []
    for kind, text in TEXTS.items():
        tokens = student.encode(text)
        teachers = [scored[name, kind] for name in ("smollm2", "gemma")]
        to_student = [translations[name, "smollm2"] for name in ("smollm2", "gemma")]
        targets = tuple(
            align(a.at(BEST_K), a.first_row, a.tokens, tokens, t) for a, t in zip(teachers, to_student, strict=True)
        )
        samples.append(FusionInput(targets, tokens.ids, tokens.bytes_per_token, np.ones(2)))
    alone = [_nats([s.targets[n] for s in samples], samples) for n in range(2)]
    fused = {
        method: _nats([f.target for f in fuse(samples, FusionRule(method, scope), len(student))], samples)
        for method, scope in (("mean", "sample"), ("min_ce", "sample"), ("avg_ce", "sample"), ("geometric", "sample"))
    }
    assert min(fused.values()) <= 0.95 * min(alone), (alone, fused)
    assert fused["mean"] < 0.98 * min(alone)


def _nats(targets: list[Target], samples: list[FusionInput]) -> float:
    """Return the sum over all positions but the first, which is not valid for both teachers."""
    return -sum(float(np.log(t.prob_of(s.labels_T)[1:]).sum()) for t, s in zip(targets, samples, strict=True))


def test_identical_tokenizers_return_the_rows_of_the_model(scored, translations, vocabularies) -> None:  # type: ignore[no-untyped-def]
    teacher = scored["smollm2", "markdown"]
    rows = teacher.at(BEST_K)
    target = align(rows, 1, teacher.tokens, teacher.tokens, translations["smollm2", "smollm2"])
    figures = report(rows, 1, (teacher.tokens, teacher.tokens), target, translations["smollm2", "smollm2"])
    assert figures.aligned_bpb == pytest.approx(figures.teacher_bpb, rel=1e-6)
    listed = np.exp(rows.logprobs.astype(float)).sum(axis=1)
    missing = np.where((rows.ids == teacher.tokens.ids[1:, None]).any(axis=1), 0, np.exp(rows.actual.astype(float)))
    np.testing.assert_allclose(target.mass[1:], np.minimum(listed + missing, 1), atol=1e-3)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(text=ANY_TEXT, seed=st.integers(0, 100))
@pytest.mark.parametrize("pair", [("gemma", "smollm2"), ("smollm2", "gemma")], ids=" to ".join)
def test_any_unicode_is_covered_in_both_directions(of_pair, pair: tuple[str, str], text: str, seed: int) -> None:  # type: ignore[no-untyped-def]
    translation = of_pair(pair)
    teacher, student = translation.teacher.encode(text), translation.student.encode(text)
    assume(len(teacher) and len(student))  # SmolLM2 has no token for some control characters and drops them
    rows = _few_rows(teacher, seed)
    target = align(rows, 0, teacher, student, translation)
    np.testing.assert_allclose((target.mass + target.tail)[target.valid], 1, atol=1e-6)
    cuts = align_byte_chain(rows, 0, teacher, student, translation).uncrossed_cuts
    blocks = block_likelihoods(rows, 0, (teacher, student), target, cuts)
    assert (blocks.student >= blocks.teacher - 1e-4).all()
    if teacher.written.all():  # SmolLM2 has no token for some bytes: those are masked
        assert target.valid.all()
        assert blocks.num_bytes.sum() == len(text.encode())
    assert common_cuts(teacher, student).at[-1] == len(text.encode())


def _few_rows(teacher: Tokens, seed: int) -> Rows:
    """Return random rows over the ids of the text and some others; rows over all 262,144 ids would take long."""
    pool = np.unique(np.concatenate([teacher.ids, np.arange(300, 340)]))
    small = random_rows(np.searchsorted(pool, teacher.ids), len(pool), min(16, len(pool)), seed)
    return Rows(0, pool[small.ids].astype(np.uint32), small.logprobs, small.actual, small.tail)


def test_reports_can_be_added(scored, translations, vocabularies) -> None:  # type: ignore[no-untyped-def]
    total = AlignmentReport()
    for kind, text in TEXTS.items():
        teacher, student = scored["gemma", kind], vocabularies["smollm2"].encode(text)
        target = align(teacher.rows, 0, teacher.tokens, student, translations["gemma", "smollm2"])
        total += report(teacher.rows, 0, (teacher.tokens, student), target, translations["gemma", "smollm2"])
    assert total.num_bytes == sum(len(text.encode()) for text in TEXTS.values())
    assert total.valid == total.positions
