"""Signals alm and uld: the span loss compared with autograd, its minima, and whole runs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment import Vocabulary
from tests.tiny import save_tiny_model
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from tests.trainer.test_losses import FREE, dense, some_head, some_hidden, some_labels, some_spans
from tests.trainer.test_ranks import assert_equal_runs
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.evaluation.preview import Measurement, preview
from trainer.losses import DIVERGENCES
from trainer.losses.divergences import divergence
from trainer.losses.head import head_loss
from trainer.losses.labels import labels_from
from trainer.losses.objective import Objective
from trainer.losses.span_loss import SpanLabels
from trainer.records import DistillationExample, Sample, ScoredSample
from trainer.signals.alm import AlmSignal, SpanLikelihoods
from trainer.signals.auxiliary import AuxiliaryLoss
from trainer.signals.uld import SortedProbs, UldSignal
from trainer.telemetry.jsonl import read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train
from trainer.training.plan import StepPlan, plan_step
from trainer.training.step import _non_finite

pytestmark = pytest.mark.slow

# --- the span loss ---


@pytest.mark.parametrize("span_temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_span_loss_equals_that_of_dense_logits_for_every_divergence(name: str, span_temperature: float) -> None:
    head, hidden = some_head(), some_hidden(12)
    labels = replace(some_labels(), auxiliary=(some_spans(0.7), some_spans(0.3, seed=1)))
    objective = Objective(0.3, divergence(name), 1.0, 5, 0.0, span_temperature)
    got, expected = head_loss(head, hidden, labels, objective), dense(head, hidden, labels, objective).sum()
    torch.testing.assert_close(got.total, expected, atol=1e-6, rtol=1e-6)
    inputs = [hidden, head.weight_VD]
    for one, other in zip(torch.autograd.grad(got.total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("span_temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_minimizing_the_span_loss_gives_the_likelihoods_of_the_teacher(name: str, span_temperature: float) -> None:
    """Only the sum of the log-likelihoods of the tokens in a span is determined."""
    likelihoods_S, spans = torch.tensor([0.9, 0.3, 0.05, 0.5, 0.01]), some_spans()
    span_T = (spans.offset_T == 0).cumsum(0) - 1
    in_span_T = spans.offset_T >= 0
    spans = replace(spans, logprobs_T=likelihoods_S.log()[span_T])
    labels = replace(some_labels(), auxiliary=(spans,))
    objective = Objective(0.0, divergence(name), target_share=0.0, span_temperature=span_temperature)
    logits = torch.zeros(12, 40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        loss = head_loss(FREE, logits, labels, objective)
        loss.total.backward()
        optimizer.step()
        schedule.step()
    log_q_T = logits.detach().log_softmax(-1).gather(1, labels.tokens_T[:, None])[:, 0]
    trained_S = [float(log_q_T[in_span_T & (span_T == s)].sum().exp()) for s in range(5)]
    np.testing.assert_allclose(trained_S, likelihoods_S, rtol=0.02)
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-3 * span_temperature**0.5)
    assert not logits.detach()[~in_span_T].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_is_finite_if_student_or_teacher_is_certain_of_a_span(name: str) -> None:
    logits = torch.tensor([[80.0, 0.0], [0.0, 80.0], [0.0, 0.0]], requires_grad=True)
    teacher_logprobs_T = np.array([0.0, 0.0, -80.0], dtype=np.float32)
    spans = SpanLabels.from_numpy(np.zeros(3, dtype=np.int64), teacher_logprobs_T, 1.0)
    labels = replace(labels_from([np.zeros(3, dtype=np.int64)], [None]), auxiliary=(spans,))
    head = replace(FREE, weight_VD=torch.eye(2))
    for temperature in (1.0, 100.0):
        objective = Objective(0.0, divergence(name), target_share=0.0, span_temperature=temperature)
        loss = head_loss(head, logits, labels, objective)
        (gradient,) = torch.autograd.grad(loss.total, logits)
        assert bool(torch.isfinite(gradient).all())
        assert bool(torch.isfinite(loss.auxiliary_NT).all())


def test_the_float32_gradient_of_a_confident_student_equals_the_float64_gradient() -> None:
    """The cross-entropy is a small difference of large logits, and the gradient of a span divides by it."""
    spans = SpanLabels.from_numpy(np.zeros(40, dtype=np.int64), np.full(40, -3, dtype=np.float32), 1.0)
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        logits[:, 7] = logits.amax(1) + torch.linspace(8, 12, 40)
        logits = logits.to(torch.float32).to(dtype).requires_grad_()
        labels = replace(labels_from([np.full(40, 7)], [None]), auxiliary=(spans,))
        head = replace(FREE, weight_VD=torch.eye(40, dtype=dtype))
        loss = head_loss(head, logits, labels, Objective(0.0, target_share=0.0))
        (gradients[dtype],) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(gradients[torch.float32].double(), gradients[torch.float64], rtol=0, atol=0.01)


@given(
    st.lists(st.lists(st.integers(-2, 9), max_size=30).map(tuple), min_size=1, max_size=3).map(tuple),
    st.integers(1, 12),
)
def test_no_chunk_ends_inside_a_span(lengths: tuple[tuple[int, ...], ...], size: int) -> None:
    """Spans of one to three teachers, truncated to the shortest; a negative length is a gap."""
    offsets = [
        np.concatenate([np.zeros(0, np.int64), *(np.arange(n) if n > 0 else np.full(-n, -1) for n in teacher)])
        for teacher in lengths
    ]
    count = min(map(len, offsets))
    spans = tuple(SpanLabels.from_numpy(offset_T[:count], np.zeros(count, np.float32), 1.0) for offset_T in offsets)
    labels = replace(labels_from([np.arange(count)], [None]), auxiliary=spans)
    chunks = labels.split(size)
    assert torch.equal(torch.cat([chunk.tokens_T for chunk in chunks]), labels.tokens_T)
    continues_T, first = np.logical_or.reduce([labels.continues_T for labels in spans]), 0
    for chunk in chunks:
        after = first + len(chunk)
        assert not continues_T[first:][:1].any()
        assert len(chunk) <= size or continues_T[first + 1 : after].all()
        # a shorter chunk has no later boundary within its size
        assert after == count or len(chunk) >= size or continues_T[after + 1 : first + size + 1].all()
        for chunk_spans, all_spans in zip(chunk.auxiliary, spans, strict=True):
            assert isinstance(chunk_spans, SpanLabels)
            assert torch.equal(chunk_spans.offset_T, all_spans.offset_T[first:after])
        first = after


# --- from examples to tensors ---


def example_of(scores: SpanLikelihoods | SortedProbs | None, supervised: str, model: Path) -> DistillationExample:
    """Build an example of one byte per position; `supervised` has a 1 for each supervised position."""
    tokenized = SampleTokenizer(Vocabulary.load(model), []).tokenize(Sample(0, "s", "x" * len(supervised)))
    assert len(tokenized) == len(supervised)
    return DistillationExample(
        Sample(0, "s"),
        replace(tokenized, supervised_T=np.array([c == "1" for c in supervised])),
        auxiliary=(scores,),
    )


def spans_at(*bounds: tuple[int, int]) -> SpanLikelihoods:
    """Return spans with these bounds, the same in both tokenizations, of −1 − begin nats."""
    bounds_S2 = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return SpanLikelihoods(bounds_S2, bounds_S2, -1.0 - bounds_S2[:, 0].astype(np.float64), np.diff(bounds_S2)[:, 0])


def test_partly_supervised_spans_are_omitted(tiny_byte_level: Path) -> None:
    examples = [
        example_of(spans_at((0, 2), (2, 4), (4, 5), (6, 8)), "11111111", tiny_byte_level),
        example_of(None, "1111", tiny_byte_level),
        example_of(spans_at(), "111", tiny_byte_level),
        example_of(spans_at((1, 2), (2, 4), (4, 6)), "0110111", tiny_byte_level),
    ]
    without_bos = AlmSignal.labels(examples, 0, 1, 0.5)
    assert without_bos.offset_T.tolist() == [-1, 0, 1, 0, -1, 0, 1, *[-1] * 5, 0, -1, 0, 1, -1]
    assert without_bos.logprobs_T.tolist() == [0, -3, -3, -5, 0, -7, -7, *[0] * 5, -2, 0, -5, -5, 0]
    with_bos = AlmSignal.labels(examples, 0, 0, 0.5)
    assert with_bos.offset_T.tolist()[:8] == [0, 1, 0, 1, 0, -1, 0, 1]
    assert with_bos.share == 0.5


@pytest.mark.parametrize(
    ("column", "words"), [(0, "the loss of sample s at"), (3, "the loss of teacher b of sample s at")]
)
def test_the_error_for_a_non_finite_loss_names_sample_token_and_teacher(
    tiny_byte_level: Path, column: int, words: str
) -> None:
    examples = [example_of(None, "11", tiny_byte_level), example_of(None, "0110", tiny_byte_level)]
    columns = torch.zeros(4, 4)
    columns[column, 3] = torch.nan
    auxiliary = tuple(AuxiliaryLoss(i, name, "alm", 0.5) for i, name in enumerate("ab"))
    plan = StepPlan(1e-3, Objective(), 1, 1.0, ("a", "b"), auxiliary=auxiliary)
    assert str(_non_finite(list(columns), examples, 0, plan)).startswith(f"{words} token 2 is nan (teachers: a, b)")


def test_sorted_probabilities_are_placed_at_their_positions(tiny_byte_level: Path) -> None:
    scores = SortedProbs(
        np.array([0, 2]), np.array([[0.5, 0.2], [0.6, 0.1]], np.float32), np.array([0.3, 0.3], np.float32)
    )
    examples = [example_of(None, "11", tiny_byte_level), example_of(scores, "1110", tiny_byte_level)]
    labels = UldSignal.labels(examples, 0, 1, 0.5)
    np.testing.assert_allclose(labels.probs_TK, np.array([[0, 0], [0, 0], [0.6, 0.1]]))
    np.testing.assert_allclose(labels.tail_T, [0, 0, 0.3])


# --- whole runs ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a SentencePiece teacher on the page."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny_model(folder / "base", kind="sentencepiece", seed=2)
    config = run_config(base, write_corpus(folder), folder / "out", [], train={"epochs": 20}, optim={"lr": 1e-2})
    model = train(config).model
    assert model is not None
    return model


def with_signals(config: RunConfig, *signals: str) -> RunConfig:
    """Return the run with one signal per teacher."""
    raw = config.model_dump()
    for teacher, signal in zip(raw["teachers"], signals, strict=True):
        teacher["signal"] = signal
    return RunConfig.model_validate(raw)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"]


def auxiliary_only(folder: Path, student: Path, urls: list[str], signal: str) -> RunConfig:
    """Build a run of ten epochs without cross-entropy."""
    sections: dict[str, Any] = {"loss": {"ce_weight": 0.0}, "train": {"epochs": 10}, "optim": {"lr": 1e-2}}
    return with_signals(run_config(student, write_corpus(folder), folder / "out", urls, **sections), signal)


def test_a_student_learns_from_span_likelihoods_without_cross_entropy(
    tmp_path: Path, tiny_byte_level: Path, trained: Path
) -> None:
    with served_models(trained) as urls:
        train(auxiliary_only(tmp_path, tiny_byte_level, urls, "alm"))
    bpb = list(held_out(tmp_path / "out").values())
    assert bpb[-1] < bpb[0] - 1.0
    steps = steps_of(tmp_path / "out")
    first, last = steps[0]["teachers"]["t0"], steps[-1]["teachers"]["t0"]
    assert last["loss"] < first["loss"] / 2
    assert steps[0]["loss"] == pytest.approx(first["loss"])
    assert (first["mass"], first["aligned_bpb"], steps[0]["coverage"], steps[0]["divergence"]) == (None,) * 4
    assert 0 < first["own_bpb"] < bpb[0]


def test_the_sorted_probability_loss_fits_confidence_but_not_tokens(
    tmp_path: Path, tiny_byte_level: Path, trained: Path
) -> None:
    with served_models(trained) as urls:
        train(auxiliary_only(tmp_path, tiny_byte_level, urls, "uld"))
    steps = steps_of(tmp_path / "out")
    first, last = steps[0]["teachers"]["t0"], steps[-1]["teachers"]["t0"]
    assert last["loss"] < first["loss"] / 2
    assert 0 < first["mass"] < 1
    assert first["aligned_bpb"] is None
    bpb = list(held_out(tmp_path / "out").values())
    assert bpb[-1] > bpb[0]  # confident in the wrong tokens: only cross-entropy identifies the tokens


@pytest.mark.parametrize("signal", ["alm", "uld"])
def test_the_auxiliary_loss_of_the_student_as_its_own_teacher_is_zero(
    tmp_path: Path, tiny_byte_level: Path, signal: str
) -> None:
    with served_models(tiny_byte_level) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, loss={"ce_weight": 0.5})
        train(with_signals(config, signal), stop_at=1)
    (step,) = steps_of(tmp_path / "out")
    assert step["teachers"]["t0"]["loss"] == pytest.approx(0, abs=1e-3)
    assert step["loss"] == pytest.approx(0.5 * step["cross_entropy"], abs=1e-3)


def test_the_loss_is_the_weighted_sum_of_its_terms(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """Two fused teachers, one alm, one uld; the weights of the fused teachers decrease to 0."""
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        four = [urls[0], urls[1], urls[1], urls[1]]
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", four)
        raw = with_signals(config, "byte_chain", "byte_chain", "alm", "uld").model_dump()
        raw["fusion"]["schedule"] = "linear"
        for teacher, weight, final in zip(raw["teachers"], (2.0, 1.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), strict=True):
            teacher |= {"weight": weight, "final_weight": final}
        config = RunConfig.model_validate(raw)
        train(config)
    steps = steps_of(tmp_path / "out")
    for number, step in enumerate(steps):
        plan, teachers = plan_step(config, number, len(steps)), step["teachers"]
        assert sum(t["weight"] for t in teachers.values()) == pytest.approx(1)
        assert {auxiliary.name: auxiliary.weight for auxiliary in plan.auxiliary} == pytest.approx(
            {name: teachers[name]["weight"] for name in ("t2", "t3")}
        )
        fused = teachers["t0"]["weight"] + teachers["t1"]["weight"]
        assert fused == pytest.approx(plan.objective.target_share)
        assert "loss" not in teachers["t0"]
        distillation = fused * (step["divergence"] or 0) + sum(
            teachers[n]["weight"] * teachers[n]["loss"] for n in ("t2", "t3")
        )
        assert step["loss"] == pytest.approx(0.3 * step["cross_entropy"] + 0.7 * distillation, rel=1e-5)
    assert steps[0]["teachers"]["t3"]["weight"] == 0
    assert (steps[-1]["divergence"], steps[-1]["coverage"]) == (None, None)
    assert steps[0]["coverage"] == 1


@pytest.mark.parametrize("signal", ["alm", "uld"])
def test_gradient_accumulation_and_target_cache_do_not_change_the_losses(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, signal: str
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        for name, sections in (
            ("1", {"gradient_accumulation_steps": 1}),
            ("2", {"gradient_accumulation_steps": 2, "target_cache_bytes": 0}),
        ):
            config = run_config(tiny_byte_level, corpus, tmp_path / name, urls, train=sections)
            train(with_signals(config, signal))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)


@pytest.mark.slow
def test_one_and_two_ranks_give_the_same_losses_with_auxiliary_losses(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        for name in ("one", "two"):
            sections: dict[str, Any] = {
                "train": {"gradient_accumulation_steps": 2},
                "loss": {"divergence": "jensen_shannon"},
            }
            config = run_config(tiny_byte_level, corpus, tmp_path / name, [*urls, *urls, *urls], **sections)
            config = with_signals(config, "byte_chain", "alm", "uld")
            train(config) if name == "one" else train_on_ranks(config, 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    one, two = (steps_of(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for teacher in ("t1", "t2"):
            assert a["teachers"][teacher]["loss"] == pytest.approx(b["teachers"][teacher]["loss"], abs=1e-5)


def test_a_preview_contains_only_fused_teachers(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls)
        result = preview(with_signals(config, "alm", "byte_chain"))
    assert [teacher.name for teacher in result.teachers] == ["t1"]
    assert not result.fused_bpb
    with pytest.raises(DataError, match="no teacher to preview: add .* with a signal that is fused"):
        preview(with_signals(config, "alm", "uld"))


def test_a_preview_gives_fused_teachers_of_weight_0_their_final_weight(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """The first teacher is not fused, so it cannot supply the weight."""
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [*urls, *urls[:1]])
        raw = with_signals(config, "alm", "byte_chain", "byte_chain").model_dump()
        for teacher in raw["teachers"][1:]:
            teacher |= {"weight": 0.0, "final_weight": 1.0}
        result = preview(type(config).model_validate(raw))
    assert [teacher.name for teacher in result.teachers] == ["t1", "t2"]
    assert result.fused_bpb["mean"] > 0


def test_a_preview_measures_held_out_text_batch_by_batch(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    add = Measurement.add

    def record(self: Measurement, batch: Sequence[ScoredSample]) -> None:
        sizes.append(len(batch))
        add(self, batch)

    monkeypatch.setattr(Measurement, "add", record)
    with served_models(tiny_byte_level) as urls:
        sections: dict[str, Any] = {"train": {"batch_samples": 2, "prefetch_tokens": 1}}
        preview(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, **sections))
    assert len(sizes) > 1
    assert max(sizes) == 2
