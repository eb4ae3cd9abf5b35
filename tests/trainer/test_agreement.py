"""How far a student agrees with its teachers on held-out text, against the plain way to compute it."""

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
from tests.trainer.test_fusing_run import write_columns
from trainer.config import RunConfig, StudentConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample, load_corpus
from trainer.errors import DataError
from trainer.learning.losses import Head
from trainer.learning.student import load_student, reader_of
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.results.agreement import Agreement, compare, fused_now, hear, likeliest
from trainer.targets.fuser import Fuser

SAMPLE = Sample(0, "s", "The harbour office opened at six. Two clerks sorted the letters.")


def evals(out: Path) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "eval"]


def random_target(num_positions: int, vocab_size: int, seed: int) -> Target:
    """Rows of up to four tokens; every fifth position has none at all, every seventh has nothing but a tail."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(num_positions), 4)
    rows = rows[rows % 7 != 3]
    ids = rng.integers(0, vocab_size, len(rows)).astype(np.int32)
    return target_from_entries(rows, ids, rng.random(len(rows)) / 4, np.arange(num_positions) % 5 != 2)


def plainly(target: Target, logits_TV: torch.Tensor, positions: list[int]) -> Agreement:
    """Position by position, over all of the vocabulary."""
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
def test_it_is_what_the_whole_distribution_says(kind: str, request: pytest.FixtureRequest) -> None:
    """With BOS in front and without, over the supervised positions alone."""
    student = load_student(StudentConfig(model=str(request.getfixturevalue(kind)), precision="fp32"))
    reading = Reader(student.vocabulary, student.vocabulary.prefix).read(SAMPLE)
    reading.supervised_T[[0, 4, 11]] = False
    ids = torch.tensor([[*student.vocabulary.prefix, *reading.tokens.ids.tolist()]])
    logits_TV = student.model(ids).logits[0, :-1].detach()
    places = [t for t in range(student.first_position, len(reading)) if reading.supervised_T[t]]
    logits_TV = logits_TV[[t - student.first_position for t in places]]
    targets = [random_target(len(reading), len(student.vocabulary), seed) for seed in range(3)]
    top = logits_TV.argmax(1).numpy().astype(np.int32)
    sure = target_from_entries(np.array(places), top, np.full(len(top), 0.6), np.ones(len(reading), dtype=bool))
    found = compare(student, reading, [*targets, sure], chunk_tokens=7)
    assert student.model.training
    for one, target in zip(found, [*targets, sure], strict=True):
        expected = plainly(target, logits_TV, places)
        assert (one.agreeing, one.positions) == (expected.agreeing, expected.positions)
        assert one.nats == pytest.approx(expected.nats, rel=1e-5)
    assert found[-1].figures["top1"] == 1.0
    assert found[0].agreeing < found[0].positions < len(places)


def test_the_likeliest_token_does_not_depend_on_chunks_nor_on_autocast() -> None:
    torch.manual_seed(0)
    hidden_TD, head = torch.randn(50, 16), Head(torch.randn(3000, 16), torch.randn(3000))
    expected = head.logits(hidden_TD).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk_tokens in (1, 7, 50, 400):
            assert torch.equal(likeliest(head, hidden_TD, chunk_tokens), expected)


def test_over_no_position_there_is_no_figure() -> None:
    assert Agreement().figures == {"top1": None, "kl": None}


def test_a_student_agrees_with_itself_and_not_with_a_stranger(
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
def test_teachers_are_asked_about_held_out_text_once(
    tmp_path: Path, tiny_byte_level: Path, agreement_samples: int
) -> None:
    engine = FormulaEngine(tiny_byte_level)
    with serving(engine) as url:
        sections = {"eval": {"agreement_samples": agreement_samples, "every_steps": 1}, "train": {"epochs": 1}}
        train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], **sections))
    assert engine.asked == 12 + agreement_samples
    assert len(evals(tmp_path / "out")) == 4
    assert all(("fused" in event) == bool(agreement_samples) for event in evals(tmp_path / "out"))


def test_teachers_that_are_not_fused_have_no_figure(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        sections = {"eval": {"agreement_samples": 2}, "train": {"epochs": 1}}
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [url], **sections)
        raw = config.model_dump()
        raw["teachers"][0]["match"] = "spans"
        train(RunConfig.model_validate(raw))
    nothing = {"top1": None, "kl": None}
    assert all((event["teachers"]["t0"], event["fused"]) == (nothing, nothing) for event in evals(tmp_path / "out"))


def listed(target: Target) -> np.ndarray:
    """[nnz, 2] position and token, in one order."""
    return np.unique(np.stack([target.rows, target.ids], 1), axis=0)


def columns_config(folder: Path, model: Path, urls: list[str], **fusion: Any) -> RunConfig:
    columns = {"domain_column": "domain", "teacher_column": "who"}
    sections: dict[str, Any] = {"eval": {"agreement_samples": 4}, "fusion": fusion, "source": columns}
    return run_config(model, write_columns(folder), folder / "out", urls, **sections)


def test_the_fused_target_is_the_one_of_that_step_and_learns_nothing_from_held_out_text(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = columns_config(tmp_path, tiny_byte_level, urls, method="adaptive", margin_bpb=0.5)
        student = load_student(config.student)
        corpus = load_corpus(config.data, config.eval, student.vocabulary, 0)
        heard = hear(config, reader_of(student.folder, student.vocabulary, config), corpus.held_out)
    assert heard.cards["t0"].model == tiny_byte_level.name
    assert [a.answers[0].rows for a in heard.asked] == [None] * 4
    trusts_t0 = Fuser(config, len(student.vocabulary))
    state = trusts_t0.state
    assert state is not None
    for domain in "ab":
        state["seen"][domain] = [[1.0, 0.5], [2.0, 0.5]]
    state = json.loads(json.dumps(state))
    alone = [asked.answers[0].target for asked in heard.asked]
    for batch_samples in (1, 4):
        fused = fused_now(lambda: Fuser(config, len(student.vocabulary), 1, state), heard.asked, batch_samples, 0)
        for one, target in zip(fused, alone, strict=True):
            np.testing.assert_array_equal(listed(one), listed(target))


def test_a_router_without_a_teacher_for_held_out_text_is_refused_before_training(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = columns_config(tmp_path, tiny_byte_level, [url], method="router")
        with pytest.raises(DataError, match="router: expected one of t0, received 't1'"):
            train(config)
    assert not (tmp_path / "out").exists()
