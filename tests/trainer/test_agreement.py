"""Agreement of a student with its teachers on held-out text, compared with a direct computation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment import Target
from alignment.target import target_from_entries
from tests.serve import FormulaEngine, serving
from tests.trainer.runs import run_config, served_models, write_corpus
from tests.trainer.test_fusion_run import write_columns
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.evaluation.agreement import Agreement, agreement_samples, compare, fuse_held_out, most_likely
from trainer.fusion.run_fuser import Fuser
from trainer.losses.lm_head import LMHead
from trainer.query.stream import ExampleStream
from trainer.records import Sample
from trainer.sources.corpus import load_corpus
from trainer.student.config import StudentConfig
from trainer.student.loading import load_student, student_tokenizer
from trainer.telemetry.jsonl import read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train

SAMPLE = Sample(0, "s", "The harbour office opened at six. Two clerks sorted the letters.")


def evals(out: Path) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "eval"]


def random_target(num_positions: int, vocab_size: int, seed: int) -> Target:
    """Build a target with up to four tokens per row; every fifth row is not valid, every seventh has only a tail."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(num_positions), 4)
    rows = rows[rows % 7 != 3]
    ids = rng.integers(0, vocab_size, len(rows)).astype(np.int32)
    return target_from_entries(rows, ids, rng.random(len(rows)) / 4, np.arange(num_positions) % 5 != 2)


def direct_agreement(target: Target, logits_TV: torch.Tensor, positions: list[int]) -> Agreement:
    """Compute the agreement position by position, from the softmax over the whole vocabulary."""
    sums = Agreement()
    for t, logits_V in zip(positions, logits_TV, strict=True):
        row = slice(int(target.offsets[t]), int(target.offsets[t + 1]))
        p = dict(zip(target.ids[row].tolist(), target.probs[row].tolist(), strict=True))
        if not p:
            continue
        q = torch.softmax(logits_V.double(), 0)
        kl = sum(p_i * np.log(p_i / float(q[i])) for i, p_i in p.items())
        tail, rest = float(target.tail[t]), 1 - sum(float(q[i]) for i in p)
        kl += tail * np.log(tail / rest) if tail > 0 else 0.0
        sums += Agreement(int(p.get(int(logits_V.argmax())) == max(p.values())), float(kl), 1)
    return sums


@pytest.mark.parametrize("kind", ["tiny_byte_level", "tiny_sentencepiece"])
def test_agreement_equals_that_of_the_full_distribution(kind: str, request: pytest.FixtureRequest) -> None:
    """Models with and without BOS; only supervised positions count."""
    student = load_student(StudentConfig(model=str(request.getfixturevalue(kind)), precision="fp32"))
    tokenized = SampleTokenizer(student.vocabulary, student.vocabulary.prefix).tokenize(SAMPLE)
    tokenized.supervised_T[[0, 4, 11]] = False
    ids = torch.tensor([[*student.vocabulary.prefix, *tokenized.tokens.ids.tolist()]])
    logits_TV = student.model(ids).logits[0, :-1].detach()
    positions = [t for t in range(student.first_position, len(tokenized)) if tokenized.supervised_T[t]]
    logits_TV = logits_TV[[t - student.first_position for t in positions]]
    targets = [random_target(len(tokenized), len(student.vocabulary), seed) for seed in range(3)]
    top = logits_TV.argmax(1).numpy().astype(np.int32)
    confident = target_from_entries(
        np.array(positions), top, np.full(len(top), 0.6), np.ones(len(tokenized), dtype=bool)
    )
    agreements = compare(student, tokenized, [*targets, confident], chunk_tokens=7)
    assert student.model.training
    for agreement, target in zip(agreements, [*targets, confident], strict=True):
        expected = direct_agreement(target, logits_TV, positions)
        assert (agreement.agreeing, agreement.positions) == (expected.agreeing, expected.positions)
        assert agreement.nats == pytest.approx(expected.nats, rel=1e-5)
    assert agreements[-1].figures["top1"] == 1.0
    assert agreements[0].agreeing < agreements[0].positions < len(positions)


def test_the_most_likely_token_does_not_depend_on_chunks_or_autocast() -> None:
    torch.manual_seed(0)
    hidden_TD, head = torch.randn(50, 16), LMHead(torch.randn(3000, 16), torch.randn(3000))
    expected = head.logits(hidden_TD).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk_tokens in (1, 7, 50, 400):
            assert torch.equal(most_likely(head, hidden_TD, chunk_tokens), expected)


def test_agreement_over_no_positions_is_none() -> None:
    assert Agreement().figures == {"top1": None, "kl": None}


def test_a_student_agrees_with_itself_but_not_with_another_model(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        sections: dict[str, Any] = {"eval": {"agreement_samples": 3, "every_steps": 3}, "train": {"epochs": 8}}
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, **sections))
    before, *_, after = evals(tmp_path / "out")
    assert before["teachers"]["t0"] == {"top1": 1.0, "kl": pytest.approx(0.0, abs=1e-4)}
    assert before["teachers"]["t1"]["top1"] < 0.5
    assert 0 < before["fused"]["kl"] < before["teachers"]["t1"]["kl"]
    assert after["fused"]["kl"] < before["fused"]["kl"]
    assert after["teachers"]["t1"]["kl"] < before["teachers"]["t1"]["kl"]


@pytest.mark.parametrize("agreement_samples", [0, 2])
def test_held_out_text_is_scored_once_per_run(tmp_path: Path, tiny_byte_level: Path, agreement_samples: int) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as url:
        sections = {"eval": {"agreement_samples": agreement_samples, "every_steps": 1}, "train": {"epochs": 1}}
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], **sections))
    assert engine.num_requests == 12 + agreement_samples
    assert len(evals(tmp_path / "out")) == 4
    assert all(("fused" in event) == bool(agreement_samples) for event in evals(tmp_path / "out"))


def test_teachers_that_are_not_fused_have_no_agreement(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        sections = {"eval": {"agreement_samples": 2}, "train": {"epochs": 1}}
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], **sections)
        raw = config.model_dump()
        raw["teachers"][0]["signal"] = "alm"
        train(RunConfig.model_validate(raw))
    none = {"top1": None, "kl": None}
    assert all((event["teachers"]["t0"], event["fused"]) == (none, none) for event in evals(tmp_path / "out"))


def sorted_entries(target: Target) -> np.ndarray:
    """Return [nnz, 2] positions and token ids, sorted."""
    return np.unique(np.stack([target.rows, target.ids], 1), axis=0)


def columns_config(folder: Path, model: Path, urls: list[str], **fusion: Any) -> RunConfig:
    columns = {"domain_column": "domain", "teacher_column": "who"}
    sections: dict[str, Any] = {"eval": {"agreement_samples": 4}, "fusion": fusion, "source": columns}
    return run_config(model, write_columns(folder), folder / "out", urls, **sections)


def test_held_out_targets_use_the_fusion_state_of_the_step_and_do_not_update_it(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = columns_config(tmp_path, tiny_byte_level, urls, method="adaptive", margin_bpb=0.5)
        student = load_student(config.student)
        corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
        tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data, corpus.has_chats)
        with ExampleStream(
            config, tokenizer, [corpus.train[:4]], fuser=Fuser(config, len(student.vocabulary))
        ) as stream:
            next(iter(stream))
            cards, scored = stream.cards, stream.score(agreement_samples(corpus.held_out, 4))
    assert cards["t0"].model == tiny_byte_level.name
    state = Fuser(config, len(student.vocabulary)).state
    assert state is not None
    for domain in "ab":
        state["averages"][domain] = [[1.0, 0.5], [2.0, 0.5]]
    state = json.loads(json.dumps(state))
    targets_of_t0 = [sample.scores[0].target for sample in scored]
    for batch_samples in (1, 4):
        fused_targets = fuse_held_out(
            lambda: Fuser(config, len(student.vocabulary), 1, state), scored, batch_samples, 0
        )
        for fused, target in zip(fused_targets, targets_of_t0, strict=True):
            np.testing.assert_array_equal(sorted_entries(fused), sorted_entries(target))


def test_a_router_without_a_teacher_for_held_out_text_is_rejected_before_training(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = columns_config(tmp_path, tiny_byte_level, [url], method="router")
        with pytest.raises(DataError, match="router: expected one of t0, received 't1'"):
            train(config)
    assert not (tmp_path / "out").exists()
