"""Fusion in whole runs: router, domains, schedules, state over a resumption, and samples above the token limit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from alignment import Target, TokenizerError, Vocabulary
from alignment.target import target_from_entries
from tests.serve import FormulaEngine, serving
from tests.tiny import TEXT
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import losses, run_config, served_models
from trainer.config import RunConfig
from trainer.errors import CheckpointError, DataError
from trainer.fusion.run_fuser import Fuser
from trainer.fusion.running_bits_per_byte import RunningBitsPerByte
from trainer.records import DistillationExample, Rollout, Sample, ScoredSample, TeacherScores, TokenizedSample
from trainer.shortening import shorten_text
from trainer.student.loading import load_student
from trainer.telemetry.collector import Collector
from trainer.telemetry.jsonl import read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train
from trainer.training.optimizer import make_optimizer
from trainer.training.plan import plan_step
from trainer.training.step import train_step

pytestmark = pytest.mark.slow

LINES = TEXT.splitlines(keepends=True)


def write_columns(folder: Path, documents: int = 10) -> Path:
    """Write documents that alternate between two domains and two teachers."""
    path = folder / "columns.jsonl"
    rows = [
        {"text": "".join(LINES[n % len(LINES) :] + LINES[: n % len(LINES)]), "domain": "ab"[n % 2], "who": f"t{n % 2}"}
        for n in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_of(folder: Path, model: Path, urls: list[str], name: str, **sections: dict[str, Any]) -> RunConfig:
    columns = {"domain_column": "domain", "teacher_column": "who"}
    return run_config(model, write_columns(folder), folder / name, urls, source=columns, **sections)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"]


def test_the_router_uses_the_teacher_that_the_data_names(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = config_of(tmp_path, tiny_byte_level, urls, "out", fusion={"method": "router"})
        train(config)
        raw = config.model_dump()
        raw["teachers"][1]["name"] = "another"
        raw["output"]["dir"] = str(tmp_path / "other")
        with pytest.raises(
            DataError, match=r"columns.jsonl:\d+#\d+: router: expected one of t0, another, received 't1'"
        ):
            train(RunConfig.model_validate(raw))
    weights = [e["teachers"]["t0"]["weight"] for e in steps_of(tmp_path / "out")]
    assert all(abs(weight * 4 - round(weight * 4)) < 0.1 for weight in weights)  # some first positions count for none
    assert 0 < sum(weights) < len(weights)


def test_em_and_min_ed_cover_fewer_positions_than_byte_chain(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    coverage = {}
    with served_models(tiny_sentencepiece) as urls:
        for signal in ("byte_chain", "min_ed", "em"):
            fusion = {"method": "fusellm_min_ce"}
            config = config_of(tmp_path, tiny_byte_level, urls, signal, fusion=fusion, train={"epochs": 1})
            raw = config.model_dump()
            raw["teachers"][0]["signal"] = signal
            train(RunConfig.model_validate(raw))
            coverage[signal] = [step["coverage"] for step in steps_of(tmp_path / signal)]
    assert min(coverage["byte_chain"]) == 1
    for em, min_ed in zip(coverage["em"], coverage["min_ed"], strict=True):
        assert 0 < em <= min_ed < 1


def test_scheduled_weights_change_linearly_from_the_first_to_the_last_step(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = config_of(tmp_path, tiny_byte_level, urls, "out", fusion={"schedule": "linear"})
        raw = config.model_dump()
        raw["teachers"][0] |= {"weight": 1.0, "final_weight": 0.0}
        raw["teachers"][1] |= {"weight": 0.0, "final_weight": 1.0}
        train(RunConfig.model_validate(raw))
    weights = [e["teachers"]["t1"]["weight"] for e in steps_of(tmp_path / "out")]
    tolerance = 0.05  # only the teacher with BOS has a distribution for the first position
    assert weights == pytest.approx([i / (len(weights) - 1) for i in range(len(weights))], abs=tolerance)


def test_adaptive_fusion_continues_identically_after_a_resumption(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    fusion = {"method": "adaptive", "half_life_bytes": 2000, "temperature": 0.2, "margin_bpb": 5.0}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        uninterrupted = config_of(tmp_path, tiny_byte_level, urls, "uninterrupted", fusion=fusion)
        train(uninterrupted)
        resumed = config_of(tmp_path, tiny_byte_level, urls, "resumed", fusion=fusion)
        train(resumed, stop_at=3)
        train(resumed, resume=True)
    assert losses(tmp_path / "uninterrupted") == pytest.approx(losses(tmp_path / "resumed"), abs=1e-6)
    weights = [e["teachers"]["t0"]["weight"] for e in steps_of(tmp_path / "uninterrupted")]
    assert weights[0] == pytest.approx(0.5, abs=0.05)
    assert abs(weights[-1] - weights[0]) > 0.01  # the weights adapt


@pytest.mark.slow
@pytest.mark.parametrize(
    "fusion", [{"method": "adaptive", "half_life_bytes": 300.0}, {"method": "avg_ce", "scope": "batch"}]
)
def test_weights_from_batch_statistics_are_the_same_with_one_and_two_ranks(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, fusion: dict[str, Any]
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for name in ("one", "two"):
            config = config_of(tmp_path, tiny_byte_level, urls, name, fusion=fusion)
            train(config) if name == "one" else train_on_ranks(config, 2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    one, two = (steps_of(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["teachers"]["t0"]["weight"] == pytest.approx(b["teachers"]["t0"]["weight"], abs=1e-9)
    assert {round(step["teachers"]["t0"]["weight"], 6) for step in one} != {0.5}


def test_the_state_of_adaptive_fusion_is_stored_by_teacher_name(tmp_path: Path, tiny_byte_level: Path) -> None:
    fusion = {"method": "adaptive", "temperature": 0.1, "margin_bpb": 5.0}
    config = config_of(tmp_path, tiny_byte_level, ["http://a:1", "http://b:1"], "out", fusion=fusion)
    saved = RunningBitsPerByte(("t0", "t1"), 1e6, 5.0).updated("a", [10.0, 100.0], [50, 50]).state()
    raw = config.model_dump()
    raw["teachers"].reverse()
    state = Fuser(RunConfig.model_validate(raw), 100, state=saved).state
    assert state is not None
    assert state["names"] == ["t1", "t0"]
    assert state["averages"]["a"] == saved["averages"]["a"][::-1]
    assert state["temperature"] == 0.1
    raw["teachers"][0]["name"] = "t2"
    with pytest.raises(CheckpointError, match="has statistics of the teachers t0, t1, this run has t2, t0"):
        Fuser(RunConfig.model_validate(raw), 100, state=saved)


VALID_STATE = RunningBitsPerByte(("t0", "t1"), 1e6, 5.0).updated("a", [10.0, 100.0], [50, 50]).state()


@pytest.mark.parametrize(
    "change",
    [
        {"averages": {"a": [[1.0, 0.5]]}},  # one teacher of two
        {"averages": {"a": [[1.0, 0.5]] * 3}},
        {"averages": {"a": [[1.0, 0.5, 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [1.0, 2.0]}},
        {"averages": {"a": [["x", 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [[None, 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [[float("nan"), 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [[float("inf"), 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [[-1.0, 0.5], [1.0, 0.5]]}},
        {"averages": {"a": [[1.0, 1.5], [1.0, 0.5]]}},
        {"averages": {"a": 5}},
        {"averages": []},
        {"averages": None},
        {"names": ["t0"]},
        {"names": ["t0", "t0"]},
        {"names": "t0"},
        {"names": [["t0"], "t1"]},
        {"half_life_bytes": 0},
        {"temperature": "x"},
        {"margin": [1]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_state_of_adaptive_fusion_is_one_sentence(
    tmp_path: Path, tiny_byte_level: Path, change: dict[str, Any]
) -> None:
    config = config_of(tmp_path, tiny_byte_level, ["http://a:1", "http://b:1"], "out", fusion={"method": "adaptive"})
    Fuser(config, 100, state=VALID_STATE)
    for state in (VALID_STATE | change, {key: VALID_STATE[key] for key in VALID_STATE.keys() - change.keys()}):
        if state != VALID_STATE:
            with pytest.raises(CheckpointError, match=r"no valid state of fusion.method adaptive \([^\n]+\): restore"):
                Fuser(config, 100, state=state)


def test_the_other_teachers_are_fused_if_the_leading_teacher_is_unavailable(tiny_byte_level: Path) -> None:
    sections: Any = {"fusion": {"method": "adaptive", "half_life_bytes": 10, "margin_bpb": 0.1}}
    config = run_config(tiny_byte_level, Path("c"), Path("o"), ["http://a:1", "http://b:1"], **sections)
    tokens = Vocabulary.load(tiny_byte_level).encode(TEXT[:60])
    size = len(tokens.ids)
    tokenized = TokenizedSample(tokens, np.ones(size, dtype=bool), np.ones(size, dtype=np.int64))

    def scores_with(probability: float) -> TeacherScores:
        probs, tails = (np.full(size, p, np.float32) for p in (probability, 1 - probability))
        target = Target(np.arange(size + 1), tokens.ids.astype(np.int32), probs, tails, np.ones(size, dtype=bool))
        return TeacherScores(tokenized, 0, np.zeros(size, np.float32), 1.0, target)

    def fused(*scores: TeacherScores) -> tuple[DistillationExample, list[float]]:
        collector = Collector()
        scored = ScoredSample(Sample(0, "s", domain="d"), tokenized, scores)
        (example,) = fuser.fuse([scored], telemetry=collector)
        return example, [collector.teacher(teacher.name).weight for teacher in config.teachers]

    fuser = Fuser(config, 1000)
    unavailable = replace(scores_with(0.9), target=Target.empty(size), unavailable=True)
    fused(scores_with(0.9), scores_with(0.5))
    assert fused(scores_with(0.9), scores_with(0.5))[1] == [1.0, 0.0]
    example, weights = fused(unavailable, scores_with(0.5))
    assert weights == [0.0, 1.0]
    assert example.target is not None
    assert example.target.valid.all()


def test_a_route_to_an_unknown_teacher_is_an_error_before_the_first_step(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = config_of(tmp_path, tiny_byte_level, ["http://127.0.0.1:1"], "out", fusion={"method": "router"})
    with pytest.raises(DataError, match="expected one of t0, received 't1'"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_batch_without_supervised_tokens_changes_no_weight(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_columns(tmp_path), tmp_path / "out", [])
    student = load_student(config.student)
    tokenized = SampleTokenizer(student.vocabulary, []).tokenize(Sample(0, "s", "six sacks"))
    example = DistillationExample(Sample(0, "s"), replace(tokenized, supervised_T=np.zeros(len(tokenized), dtype=bool)))
    before = [p.detach().clone() for p in student.parameters()]
    result = train_step(student, make_optimizer(student, config.optim), [example], plan_step(config, 0, 1))
    assert (result.num_tokens, result.loss, result.grad_norm) == (0, None, None)
    assert all(bool((a == b).all()) for a, b in zip(before, student.parameters(), strict=True))


def test_a_sample_above_the_limit_of_one_teacher_is_shortened_for_all(tmp_path: Path, tiny_byte_level: Path) -> None:
    limit = 40
    with (
        serving(FormulaEngine(tiny_byte_level, max_tokens=limit)) as short,
        serving(FormulaEngine(tiny_byte_level)) as long,
    ):
        config = config_of(tmp_path, tiny_byte_level, [short, long], "out", data={"too_long": "shorten"})
        train(config, stop_at=2)
    steps = steps_of(tmp_path / "out")
    assert all(0 < e["shortened"] <= 4 for e in steps)
    assert all(e["tokens"] <= 4 * (limit - 1) for e in steps)
    assert all(e["coverage"] == 1 for e in steps)


def test_a_shortened_text_ends_with_a_whole_character_and_without_eos(tiny_byte_level: Path) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    sample = Sample(0, "s", "sacks 日本語 of tar", closes=True)
    tokens = vocabulary.encode(sample.text, close=True)
    for limit in range(1, len(tokens)):
        shorter = shorten_text(sample, tokens, limit)
        if shorter is not None:
            assert sample.text.startswith(shorter.text)
            assert len(vocabulary.encode(shorter.text)) <= limit + 1
            assert not shorter.closes
    assert shorten_text(Sample(0, "s", "日"), vocabulary.encode("日"), 1) is None


def test_invalid_roles_are_errors_before_any_request(tmp_path: Path, tiny_byte_level: Path) -> None:
    for role_of in ("student", "teachers"):
        with serving(FormulaEngine(tiny_byte_level)) as url:
            raw = config_of(tmp_path, tiny_byte_level, [url], role_of).model_dump()
            model = raw["student"] if role_of == "student" else raw["teachers"][0]
            model["roles"] = {"eos": "<nope>"}
            with pytest.raises(TokenizerError, match="role eos is set to '<nope>'"):
                train(RunConfig.model_validate(raw))
            model["roles"] = {"end": "<|eos|>"}
            with pytest.raises(ValidationError, match="unknown role 'end'"):
                RunConfig.model_validate(raw)


def test_a_role_of_the_run_file_overrides_the_tokenizer(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tmp_path, tiny_byte_level, [url], "out", data={"close_documents": True})
        raw = config.model_dump()
        raw["student"]["roles"] = {"eos": "<|bos|>"}
        student = load_student(RunConfig.model_validate(raw).student)
    assert student.vocabulary.encode("six", close=True).ids[-1] == student.vocabulary.roles["bos"]


@pytest.mark.parametrize("written_by", [None, 0, 3])
def test_the_cut_keeps_the_tokens_of_text_that_the_student_wrote(
    tmp_path: Path, tiny_byte_level: Path, written_by: int | None
) -> None:
    config = run_config(tiny_byte_level, write_columns(tmp_path), tmp_path / "out", ["http://x"], fusion={"top_k": 4})
    rollout = (
        None if written_by is None else Rollout((), (), (), (), 0, "length", written_by, 0, "of another tokenizer")
    )
    vocabulary, sample = Vocabulary.load(tiny_byte_level), Sample(0, "s", "six sacks", rollout=rollout)
    tokenized = SampleTokenizer(vocabulary, []).tokenize(sample)
    num_t, num_ids = len(tokenized), len(vocabulary)
    probs = np.append(np.repeat((1 - 1e-4) / (num_ids - 1), num_ids - 1), 1e-4)  # the label is the least probable token
    ids = [np.append(np.delete(np.arange(num_ids), token), token) for token in tokenized.tokens.ids.tolist()]
    target = target_from_entries(
        np.repeat(np.arange(num_t), num_ids),
        np.concatenate(ids).astype(np.int32),
        np.tile(probs, num_t),
        np.ones(num_t, dtype=bool),
    )
    scores = TeacherScores(tokenized, 0, np.zeros(num_t, dtype=np.float32), 1.0, target)
    (example,) = Fuser(config, num_ids).fuse([ScoredSample(sample, tokenized, (scores,))])
    assert example.target is not None
    assert np.diff(example.target.offsets).tolist() == [4] * num_t
    assert (example.target.prob_of(tokenized.tokens.ids) > 0).tolist() == [written_by is not None] * num_t


def test_examples_without_teachers_keep_the_tokens(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = run_config(tiny_byte_level, write_columns(tmp_path), tmp_path / "out", [])
    vocabulary, sample = Vocabulary.load(tiny_byte_level), Sample(0, "s", "six sacks")
    scored = ScoredSample(sample, SampleTokenizer(vocabulary, []).tokenize(sample), ())
    (example,) = Fuser(config, len(vocabulary)).fuse([scored])
    assert example.target is None
    assert example.tokenized is scored.tokenized
