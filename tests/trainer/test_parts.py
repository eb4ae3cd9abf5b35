"""Teachers whose tokens are not translated: the loss on spans against autograd, its fixed points, and whole runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignment import Vocabulary
from alignment.unaligned import SortedProbs, SpanLikelihoods
from tests.tiny import save_tiny_model
from tests.trainer.runs import held_out, losses, run_config, served_models, write_corpus
from tests.trainer.test_losses import FREE, dense, some_head, some_hidden, some_labels, some_spans
from tests.trainer.test_ranks import assert_equal_runs, torchrun
from trainer.commands.preview import preview
from trainer.config import RunConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample
from trainer.errors import DataError
from trainer.learning.divergences import NAMES, divergence
from trainer.learning.labels import Spans, labels_from
from trainer.learning.losses import Objective, head_loss
from trainer.learning.parts import Part, spans_from, spread_from
from trainer.learning.step import StepPlan, _non_finite, plan_step
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.targets.fuser import Lesson

# --- the loss on spans ---


@pytest.mark.parametrize("span_temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_on_spans_is_that_of_dense_logits_for_every_divergence(name: str, span_temperature: float) -> None:
    head, hidden = some_head(), some_hidden(12)
    labels = replace(some_labels(), spans=(some_spans(0.7), some_spans(0.3, seed=1)))
    objective = Objective(0.3, divergence(name), 1.0, 5, 0.0, span_temperature)
    got, expected = head_loss(head, hidden, labels, objective), dense(head, hidden, labels, objective).sum()
    torch.testing.assert_close(got.total, expected, atol=1e-6, rtol=1e-6)
    inputs = [hidden, head.weight_VD]
    for one, other in zip(torch.autograd.grad(got.total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("span_temperature", [1.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_free_spans_come_to_rest_on_the_teachers_likelihoods(name: str, span_temperature: float) -> None:
    """And the tokens within a span share it as they like: only their sum is known."""
    likely, spans = torch.tensor([0.9, 0.3, 0.05, 0.5, 0.01]), some_spans()
    which_T = (spans.back_T == 0).cumsum(0) - 1
    inside_T = spans.back_T >= 0
    spans = replace(spans, logprobs_T=likely.log()[which_T])
    labels = replace(some_labels(), spans=(spans,))
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
    found = [float(log_q_T[inside_T & (which_T == s)].sum().exp()) for s in range(5)]
    np.testing.assert_allclose(found, likely, rtol=0.02)
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-3 * span_temperature**0.5)
    assert not logits.detach()[~inside_T].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_span_that_is_certain_on_either_side_keeps_the_gradient_finite(name: str) -> None:
    logits = torch.tensor([[80.0, 0.0], [0.0, 80.0], [0.0, 0.0]], requires_grad=True)
    likely = np.array([0.0, 0.0, -80.0], dtype=np.float32)
    spans = Spans.of(np.zeros(3, dtype=np.int64), likely, 1.0)
    labels = replace(labels_from([np.zeros(3, dtype=np.int64)], [None]), spans=(spans,))
    head = replace(FREE, weight_VD=torch.eye(2))
    for temperature in (1.0, 100.0):
        objective = Objective(0.0, divergence(name), target_share=0.0, span_temperature=temperature)
        loss = head_loss(head, logits, labels, objective)
        (slope,) = torch.autograd.grad(loss.total, logits)
        assert bool(torch.isfinite(slope).all())
        assert bool(torch.isfinite(loss.parts_NT).all())


def test_a_sure_student_moves_by_what_its_likelihood_says_in_float32_too() -> None:
    """Its cross-entropy is a small difference of large logits, and a span's gradient divides by it."""
    spans = Spans.of(np.zeros(40, dtype=np.int64), np.full(40, -3, dtype=np.float32), 1.0)
    slopes = {}
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        logits[:, 7] = logits.amax(1) + torch.linspace(8, 12, 40)
        logits = logits.to(torch.float32).to(dtype).requires_grad_()
        labels = replace(labels_from([np.full(40, 7)], [None]), spans=(spans,))
        head = replace(FREE, weight_VD=torch.eye(40, dtype=dtype))
        loss = head_loss(head, logits, labels, Objective(0.0, target_share=0.0))
        (slopes[dtype],) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(slopes[torch.float32].double(), slopes[torch.float64], rtol=0, atol=0.01)


@given(
    st.lists(st.lists(st.integers(-2, 9), max_size=30).map(tuple), min_size=1, max_size=3).map(tuple),
    st.integers(1, 12),
)
def test_no_chunk_ends_within_a_span(lengths: tuple[tuple[int, ...], ...], size: int) -> None:
    """Of one to three teachers, over as many positions as the shortest has; a negative length is a gap."""
    backs = [
        np.concatenate([np.zeros(0, np.int64), *(np.arange(n) if n > 0 else np.full(-n, -1) for n in own)])
        for own in lengths
    ]
    count = min(map(len, backs))
    spans = tuple(Spans.of(back_T[:count], np.zeros(count, np.float32), 1.0) for back_T in backs)
    labels = replace(labels_from([np.arange(count)], [None]), spans=spans)
    chunks = labels.split(size)
    assert torch.equal(torch.cat([chunk.tokens_T for chunk in chunks]), labels.tokens_T)
    joined, first = np.logical_or.reduce([each.joined_T for each in spans]), 0
    for chunk in chunks:
        after = first + len(chunk)
        assert not joined[first:][:1].any()
        assert len(chunk) <= size or joined[first + 1 : after].all()
        assert after == count or len(chunk) >= size or joined[after + 1 : first + size + 1].all()  # no later place
        for own, each in zip(chunk.spans, spans, strict=True):
            assert torch.equal(own.back_T, each.back_T[first:after])
        first = after


# --- from lessons to tensors ---

PART = Part(0, "t", "spans", 0.5)


def lesson_of(said: SpanLikelihoods | SortedProbs | None, supervised: str, model: Path) -> Lesson:
    """Supervised where there is a 1."""
    reading = Reader(Vocabulary.load(model), []).read(Sample(0, "s", "x" * len(supervised)))
    assert len(reading) == len(supervised)
    return Lesson(
        Sample(0, "s"),
        replace(reading, supervised_T=np.array([c == "1" for c in supervised])),
        unaligned=(said,),
    )


def spans_at(*bounds: tuple[int, int]) -> SpanLikelihoods:
    at = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return SpanLikelihoods(at, at, -1.0 - at[:, 0].astype(np.float64), np.diff(at)[:, 0])


def test_spans_that_are_not_supervised_whole_are_left_out(tiny_byte_level: Path) -> None:
    lessons = [
        lesson_of(spans_at((0, 2), (2, 4), (4, 5), (6, 8)), "11111111", tiny_byte_level),
        lesson_of(None, "1111", tiny_byte_level),
        lesson_of(spans_at(), "111", tiny_byte_level),
        lesson_of(spans_at((1, 2), (2, 4), (4, 6)), "0110111", tiny_byte_level),
    ]
    without_bos = spans_from(lessons, PART, 1)
    assert without_bos.back_T.tolist() == [-1, 0, 1, 0, -1, 0, 1, *[-1] * 5, 0, -1, 0, 1, -1]
    assert without_bos.logprobs_T.tolist() == [0, -3, -3, -5, 0, -7, -7, *[0] * 5, -2, 0, -5, -5, 0]
    with_bos = spans_from(lessons, PART, 0)
    assert with_bos.back_T.tolist()[:8] == [0, 1, 0, 1, 0, -1, 0, 1]
    assert with_bos.share == 0.5


@pytest.mark.parametrize(
    ("column", "words"), [(0, "the loss of sample s at"), (3, "the loss of teacher b of sample s at")]
)
def test_what_is_not_finite_names_its_sample_its_token_and_its_teacher(
    tiny_byte_level: Path, column: int, words: str
) -> None:
    lessons = [lesson_of(None, "11", tiny_byte_level), lesson_of(None, "0110", tiny_byte_level)]
    columns = torch.zeros(4, 4)
    columns[column, 3] = torch.nan
    parts = tuple(Part(i, name, "spans", 0.5) for i, name in enumerate("ab"))
    plan = StepPlan(1e-3, Objective(), 1, 1.0, ("a", "b"), parts=parts)
    assert str(_non_finite(list(columns), lessons, 0, plan)).startswith(f"{words} token 2 is nan (teachers: a, b)")


def test_sorted_probabilities_stand_at_their_positions(tiny_byte_level: Path) -> None:
    said = SortedProbs(
        np.array([0, 2]), np.array([[0.5, 0.2], [0.6, 0.1]], np.float32), np.array([0.3, 0.3], np.float32)
    )
    lessons = [lesson_of(None, "11", tiny_byte_level), lesson_of(said, "1110", tiny_byte_level)]
    spread = spread_from(lessons, replace(PART, match="sorted"), 1)
    np.testing.assert_allclose(spread.probs_TK, np.array([[0, 0], [0, 0], [0.6, 0.1]]))
    np.testing.assert_allclose(spread.tail_T, [0, 0, 0.3])


# --- whole runs ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece teacher that has learned the page."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny_model(folder / "base", kind="sentencepiece", seed=2)
    config = run_config(base, write_corpus(folder), folder / "out", [], train={"epochs": 20}, optim={"lr": 1e-2})
    model = train(config).model
    assert model is not None
    return model


def matched(config: RunConfig, *matches: str, **more: Any) -> RunConfig:
    raw = config.model_dump()
    for teacher, match in zip(raw["teachers"], matches, strict=True):
        teacher |= {"match": match} | more
    return RunConfig.model_validate(raw)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"]


def taught_alone(folder: Path, student: Path, urls: list[str], match: str) -> RunConfig:
    """Ten epochs without the text's own word."""
    sections: dict[str, Any] = {"loss": {"ce_weight": 0.0}, "train": {"epochs": 10}, "optim": {"lr": 1e-2}}
    return matched(run_config(student, write_corpus(folder), folder / "out", urls, **sections), match)


def test_a_student_learns_from_the_likelihoods_of_spans_alone(
    tmp_path: Path, tiny_byte_level: Path, trained: Path
) -> None:
    with served_models(trained) as urls:
        train(taught_alone(tmp_path, tiny_byte_level, urls, "spans"))
    bpb = list(held_out(tmp_path / "out").values())
    assert bpb[-1] < bpb[0] - 1.0
    steps = steps_of(tmp_path / "out")
    first, last = steps[0]["teachers"]["t0"], steps[-1]["teachers"]["t0"]
    assert last["loss"] < first["loss"] / 2
    assert steps[0]["loss"] == pytest.approx(first["loss"])
    assert (first["mass"], first["aligned_bpb"], steps[0]["coverage"], steps[0]["divergence"]) == (None,) * 4
    assert 0 < first["own_bpb"] < bpb[0]


def test_sorted_probabilities_teach_how_sure_to_be_but_not_of_what(
    tmp_path: Path, tiny_byte_level: Path, trained: Path
) -> None:
    with served_models(trained) as urls:
        train(taught_alone(tmp_path, tiny_byte_level, urls, "sorted"))
    steps = steps_of(tmp_path / "out")
    first, last = steps[0]["teachers"]["t0"], steps[-1]["teachers"]["t0"]
    assert last["loss"] < first["loss"] / 2
    assert 0 < first["mass"] < 1
    assert first["aligned_bpb"] is None
    bpb = list(held_out(tmp_path / "out").values())
    assert bpb[-1] > bpb[0]  # sure of the wrong tokens: cross-entropy has to say which


@pytest.mark.parametrize("match", ["spans", "sorted"])
def test_the_student_as_its_own_teacher_has_nothing_to_learn(tmp_path: Path, tiny_byte_level: Path, match: str) -> None:
    with served_models(tiny_byte_level) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls, loss={"ce_weight": 0.5})
        train(matched(config, match), stop_at=1)
    (step,) = steps_of(tmp_path / "out")
    assert step["teachers"]["t0"]["loss"] == pytest.approx(0, abs=1e-3)
    assert step["loss"] == pytest.approx(0.5 * step["cross_entropy"], abs=1e-3)


def test_the_loss_is_the_sum_of_its_parts_by_weight(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    """Two fused teachers, one by spans, one sorted; weights move until the fused ones have none."""
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        four = [urls[0], urls[1], urls[1], urls[1]]
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", four)
        raw = matched(config, "chain", "chain", "spans", "sorted").model_dump()
        raw["fusion"]["schedule"] = "linear"
        for teacher, weight, final in zip(raw["teachers"], (2.0, 1.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), strict=True):
            teacher |= {"weight": weight, "final_weight": final}
        config = RunConfig.model_validate(raw)
        train(config)
    steps = steps_of(tmp_path / "out")
    for number, step in enumerate(steps):
        plan, teachers = plan_step(config, number, len(steps)), step["teachers"]
        assert sum(t["share"] for t in teachers.values()) == pytest.approx(1)
        assert {part.name: part.share for part in plan.parts} == pytest.approx(
            {name: teachers[name]["share"] for name in ("t2", "t3")}
        )
        fused = teachers["t0"]["share"] + teachers["t1"]["share"]
        assert fused == pytest.approx(plan.objective.target_share)
        assert "loss" not in teachers["t0"]
        taught = fused * (step["divergence"] or 0) + sum(
            teachers[n]["share"] * teachers[n]["loss"] for n in ("t2", "t3")
        )
        assert step["loss"] == pytest.approx(0.3 * step["cross_entropy"] + 0.7 * taught, rel=1e-5)
    assert steps[0]["teachers"]["t3"]["share"] == 0
    assert (steps[-1]["divergence"], steps[-1]["coverage"]) == (None, None)
    assert steps[0]["coverage"] == 1


@pytest.mark.parametrize("match", ["spans", "sorted"])
def test_accumulation_and_what_is_cached_change_nothing(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, match: str
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        for name, sections in (("1", {"accumulate": 1}), ("2", {"accumulate": 2, "target_cache_bytes": 0})):
            config = run_config(tiny_byte_level, corpus, tmp_path / name, urls, train=sections)
            train(matched(config, match))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)


def test_one_and_two_ranks_give_the_same_losses_with_parts(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_sentencepiece) as urls:
        for name in ("one", "two"):
            sections: dict[str, Any] = {"train": {"accumulate": 2}, "loss": {"divergence": "jensen_shannon"}}
            config = run_config(tiny_byte_level, corpus, tmp_path / name, [*urls, *urls, *urls], **sections)
            config = matched(config, "chain", "spans", "sorted")
            train(config) if name == "one" else torchrun(config, 2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    one, two = (steps_of(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for teacher in ("t1", "t2"):
            assert a["teachers"][teacher]["loss"] == pytest.approx(b["teachers"][teacher]["loss"], abs=1e-5)


def test_a_preview_is_of_the_teachers_that_are_fused(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", urls)
        alone = preview(matched(config, "spans", "chain"))
    assert [teacher.name for teacher in alone.teachers] == ["t1"]
    assert not alone.fused_bpb
    with pytest.raises(DataError, match="no teacher to preview: add .* that are fused"):
        preview(matched(config, "spans", "sorted"))
