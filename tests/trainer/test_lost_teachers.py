"""Runs in which all replicas of a teacher become unavailable."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from teachers.client.load_balancer import LoadBalancerStats
from teachers.protocol.errors import TeacherLost, Unavailable
from tests.faulty import FaultyTeacher, faulty_teachers
from tests.trainer.runs import run_config, write_corpus
from trainer.config import RunConfig
from trainer.losses.objective import Objective
from trainer.telemetry.collector import Collector
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train
from trainer.training.plan import StepPlan
from trainer.training.step import StepResult
from trainer.training.step_metrics import step_event

pytestmark = pytest.mark.slow


@pytest.fixture
def teachers(tiny_byte_level: Path, tiny_sentencepiece: Path) -> Iterator[list[FaultyTeacher]]:
    with faulty_teachers(tiny_byte_level, 1, 0.02) as one, faulty_teachers(tiny_sentencepiece, 1, 0.02) as two:
        yield one + two


def config_of(
    teachers: list[FaultyTeacher], student: Path, folder: Path, on_unavailable: str, epochs: int
) -> RunConfig:
    config = run_config(
        student,
        write_corpus(folder),
        folder / "out",
        [teacher.url for teacher in teachers],
        train={"epochs": epochs, "prefetch_tokens": 1, "target_cache_bytes": 0},
    )
    configs = [
        t.model_copy(update={"on_unavailable": on_unavailable, "unavailable_timeout_s": 0.5}) for t in config.teachers
    ]
    return config.model_copy(update={"teachers": configs})


def test_an_unavailable_teacher_is_dropped_with_a_warning_and_joins_again(
    teachers: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(teachers, tiny_byte_level, tmp_path, "drop", epochs=15)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            teachers[1].kill()
        if event["event"] == "teacher_lost":
            teachers[1].start().await_ready()

    train(config, listener=disturb)
    events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [e["event"] for e in events if e["event"].startswith("teacher")] == ["teacher_lost", "teacher_joined"]
    assert {e["teacher"] for e in events if e["event"].startswith("teacher")} == {"t1"}
    steps = [e for e in events if e["event"] == "step"]
    unavailable = [step["teachers"]["t1"]["unavailable"] for step in steps]
    assert unavailable[0] == 0
    assert unavailable[-1] == 0
    alone = [step for step in steps if step["teachers"]["t1"]["unavailable"] == config.train.batch_samples]
    assert alone
    assert all(step["teachers"]["t0"]["weight"] == pytest.approx(1) for step in alone)
    assert all(step["coverage"] > 0 for step in steps)
    assert any("teacher t1 is lost" in message for message in caplog.messages)
    assert any("teacher t1 joins again" in message for message in caplog.messages)


def test_a_step_without_targets_has_no_divergence_and_no_mass() -> None:
    collector = Collector(examples=1, positions=9)
    collector.teacher("t").unavailable = 1
    collector.teacher("t").pool = asdict(LoadBalancerStats())
    plan = StepPlan(1e-3, Objective(0.5), 1, 1.0, ("t",))
    event = step_event(1, [collector], plan, StepResult(2.0, 2.0, 0.0, 9, 1.0, 1e-3), 0.1)
    assert (event.coverage, event.divergence, event.mass, event.tail) == (0, None, None, None)


def test_a_run_ends_if_every_teacher_is_unavailable(
    teachers: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path
) -> None:
    config = config_of(teachers, tiny_byte_level, tmp_path, "drop", epochs=40)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            for teacher in teachers:
                teacher.kill()

    with pytest.raises(TeacherLost, match=r"every teacher is unavailable.* \(sample "):
        train(config, listener=disturb)
    events = [e["event"] for e in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert events.count("teacher_lost") == 2


@pytest.mark.parametrize("on_unavailable", ["wait", "stop"])
def test_a_run_that_needs_an_unavailable_teacher_ends_with_an_event(
    teachers: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path, on_unavailable: str
) -> None:
    config = config_of(teachers, tiny_byte_level, tmp_path, on_unavailable, epochs=40)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            teachers[0].kill()

    with pytest.raises(Unavailable, match=r"teacher t0 at .* \(sample [^(]*\)$"):
        train(config, listener=disturb)
    (lost,) = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "teacher_lost"]
    assert lost["teacher"] == "t0"
