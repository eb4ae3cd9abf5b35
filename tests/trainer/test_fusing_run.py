"""Fusion in whole runs: routes, domains, schedules, what is kept of them, and samples that are too long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from alignment import Target, TokenizerError, Vocabulary
from alignment.report import AlignmentReport
from tests.serve import FormulaEngine, serving
from tests.tiny import TEXT
from tests.trainer.runs import losses, run_config, served_models
from tests.trainer.test_ranks import torchrun
from trainer.config import RunConfig
from trainer.data.reading import Reader, Reading
from trainer.data.samples import Sample, shortened
from trainer.errors import CheckpointError, DataError
from trainer.learning.step import make_optimizer, plan_step, train_step
from trainer.learning.student import load_student
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.targets.asking import Answer, Asked
from trainer.targets.fuser import Fuser, Lesson
from trainer.targets.priors import RunningBpb

LINES = TEXT.splitlines(keepends=True)


def write_columns(folder: Path, documents: int = 10) -> Path:
    """Every second document is of another domain and for another teacher."""
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


def test_a_router_asks_the_teacher_that_the_data_names(
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
    shares = [e["teachers"]["t0"]["share"] for e in steps_of(tmp_path / "out")]
    assert all(abs(share * 4 - round(share * 4)) < 0.1 for share in shares)  # but for first positions without BOS
    assert 0 < sum(shares) < len(shares)


def test_the_papers_alignments_teach_where_they_find_tokens(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    coverage = {}
    with served_models(tiny_sentencepiece) as urls:
        for match in ("chain", "min_ed", "em"):
            fusion = {"method": "fusellm_min_ce"}
            config = config_of(tmp_path, tiny_byte_level, urls, match, fusion=fusion, train={"epochs": 1})
            raw = config.model_dump()
            raw["teachers"][0]["match"] = match
            train(RunConfig.model_validate(raw))
            coverage[match] = [step["coverage"] for step in steps_of(tmp_path / match)]
    assert min(coverage["chain"]) == 1
    for some, more in zip(coverage["em"], coverage["min_ed"], strict=True):
        assert 0 < some <= more < 1


def test_weights_move_from_the_first_step_to_the_last(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        config = config_of(tmp_path, tiny_byte_level, urls, "out", fusion={"schedule": "linear"})
        raw = config.model_dump()
        raw["teachers"][0] |= {"weight": 1.0, "final_weight": 0.0}
        raw["teachers"][1] |= {"weight": 0.0, "final_weight": 1.0}
        train(RunConfig.model_validate(raw))
    shares = [e["teachers"]["t1"]["share"] for e in steps_of(tmp_path / "out")]
    left_out = 0.05  # the first position, of which only the teacher with BOS speaks
    assert shares == pytest.approx([i / (len(shares) - 1) for i in range(len(shares))], abs=left_out)


def test_adaptive_fusion_goes_on_after_a_resume_as_if_it_had_not_stopped(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    fusion = {"method": "adaptive", "half_life_bytes": 2000, "temperature": 0.2, "margin_bpb": 5.0}
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        whole = config_of(tmp_path, tiny_byte_level, urls, "whole", fusion=fusion)
        train(whole)
        halves = config_of(tmp_path, tiny_byte_level, urls, "halves", fusion=fusion)
        train(halves, stop_at=3)
        train(halves, resume=True)
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert one == pytest.approx(two, abs=1e-6)
    shares = [e["teachers"]["t0"]["share"] for e in steps_of(tmp_path / "whole")]
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert abs(shares[-1] - shares[0]) > 0.01  # it has learned from what it saw


@pytest.mark.parametrize(
    "fusion", [{"method": "adaptive", "half_life_bytes": 300.0}, {"method": "avg_ce", "scope": "batch"}]
)
def test_what_is_compared_over_a_batch_is_the_same_with_one_and_two_ranks(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, fusion: dict[str, Any]
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        for name in ("one", "two"):
            config = config_of(tmp_path, tiny_byte_level, urls, name, fusion=fusion)
            train(config) if name == "one" else torchrun(config, 2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    one, two = (steps_of(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["teachers"]["t0"]["share"] == pytest.approx(b["teachers"]["t0"]["share"], abs=1e-9)
    assert {round(step["teachers"]["t0"]["share"], 6) for step in one} != {0.5}


def test_what_adaptive_fusion_has_seen_belongs_to_the_teachers_names(tmp_path: Path, tiny_byte_level: Path) -> None:
    fusion = {"method": "adaptive", "temperature": 0.1, "margin_bpb": 5.0}
    config = config_of(tmp_path, tiny_byte_level, ["http://a:1", "http://b:1"], "out", fusion=fusion)
    seen = RunningBpb(("t0", "t1"), 1e6, 5.0).updated("a", [10.0, 100.0], [50, 50]).state()
    raw = config.model_dump()
    raw["teachers"].reverse()
    turned = Fuser(RunConfig.model_validate(raw), 100, state=seen).state
    assert turned is not None
    assert turned["names"] == ["t1", "t0"]
    assert turned["seen"]["a"] == seen["seen"]["a"][::-1]
    assert turned["temperature"] == 0.1
    raw["teachers"][0]["name"] = "t2"
    with pytest.raises(CheckpointError, match="has seen the teachers t0, t1, this run has t2, t0"):
        Fuser(RunConfig.model_validate(raw), 100, state=seen)


def test_the_others_are_fused_where_the_leading_teacher_of_a_domain_is_lost(tiny_byte_level: Path) -> None:
    sections: Any = {"fusion": {"method": "adaptive", "half_life_bytes": 10, "margin_bpb": 0.1}}
    config = run_config(tiny_byte_level, Path("c"), Path("o"), ["http://a:1", "http://b:1"], **sections)
    tokens = Vocabulary.load(tiny_byte_level).encode(TEXT[:60])
    size = len(tokens.ids)
    reading = Reading(tokens, np.ones(size, dtype=bool), np.ones(size, dtype=np.int64))

    def answer(probability: float) -> Answer:
        probs, tails = (np.full(size, p, np.float32) for p in (probability, 1 - probability))
        target = Target(np.arange(size + 1), tokens.ids.astype(np.int32), probs, tails, np.ones(size, dtype=bool))
        return Answer(None, 0, reading, target, AlignmentReport(), 1.0)

    def fused(*answers: Answer) -> Lesson:
        return fuser.fuse([Asked(Sample(0, "s", domain="d"), reading, answers)])[0]

    fuser, lost = Fuser(config, 1000), replace(answer(0.9), target=Target.nothing(size), absent=True)
    fused(answer(0.9), answer(0.5))
    assert fused(answer(0.9), answer(0.5)).shares == (1.0, 0.0)
    alone = fused(lost, answer(0.5))
    assert alone.shares == (0.0, 1.0)
    assert alone.target is not None
    assert alone.target.valid.all()


def test_a_route_to_nobody_is_said_before_the_first_step(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = config_of(tmp_path, tiny_byte_level, ["http://127.0.0.1:1"], "out", fusion={"method": "router"})
    with pytest.raises(DataError, match="expected one of t0, received 't1'"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_batch_with_nothing_to_learn_from_moves_nothing(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_columns(tmp_path), tmp_path / "out", [])
    student = load_student(config.student)
    reading = Reader(student.vocabulary, []).read(Sample(0, "s", "six sacks"))
    lesson = Lesson(Sample(0, "s"), replace(reading, supervised_T=np.zeros(len(reading), dtype=bool)))
    before = [p.detach().clone() for p in student.parameters()]
    with pytest.raises(DataError, match="nothing to learn from in the samples s"):
        train_step(student, make_optimizer(student, config.optim), [lesson], plan_step(config, 0, 1))
    assert all(bool((a == b).all()) for a, b in zip(before, student.parameters(), strict=True))


def test_a_sample_longer_than_a_teacher_takes_is_shortened_for_all(tmp_path: Path, tiny_byte_level: Path) -> None:
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
        shorter = shortened(sample, tokens, limit)
        if shorter is not None:
            assert sample.text.startswith(shorter.text)
            assert len(vocabulary.encode(shorter.text)) <= limit + 1
            assert not shorter.closes
    assert shortened(Sample(0, "s", "日"), vocabulary.encode("日"), 1) is None


def test_a_role_that_cannot_be_is_said_before_anything_is_asked(tmp_path: Path, tiny_byte_level: Path) -> None:
    for who in ("student", "teachers"):
        with serving(FormulaEngine(tiny_byte_level)) as url:
            raw = config_of(tmp_path, tiny_byte_level, [url], who).model_dump()
            model = raw["student"] if who == "student" else raw["teachers"][0]
            model["roles"] = {"eos": "<nope>"}
            with pytest.raises(TokenizerError, match="role eos is to be '<nope>'"):
                train(RunConfig.model_validate(raw))
            model["roles"] = {"end": "<|eos|>"}
            with pytest.raises(ValidationError, match="there is no role 'end'"):
                RunConfig.model_validate(raw)


def test_a_role_of_the_run_file_is_the_one_that_is_used(tmp_path: Path, tiny_byte_level: Path) -> None:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        config = config_of(tmp_path, tiny_byte_level, [url], "out", data={"close_documents": True})
        raw = config.model_dump()
        raw["student"]["roles"] = {"eos": "<|bos|>"}
        student = load_student(RunConfig.model_validate(raw).student)
    assert student.vocabulary.encode("six", close=True).ids[-1] == student.vocabulary.roles["bos"]


def test_plain_lessons_keep_the_reading(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = run_config(tiny_byte_level, write_columns(tmp_path), tmp_path / "out", [])
    vocabulary = Vocabulary.load(tiny_byte_level)
    asked = Asked(Sample(0, "s", "six sacks"), Reader(vocabulary, []).read(Sample(0, "s", "six sacks")), ())
    (lesson,) = Fuser(config, len(vocabulary)).fuse([asked])
    assert lesson.target is None
    assert lesson.tokens is asked.reading.tokens
