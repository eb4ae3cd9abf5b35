"""What a run does when all replicas of a teacher are gone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignment.report import AlignmentReport
from teachers.errors import TeacherLost, Unavailable
from tests.faulty import FaultyTeacher, faulty_teachers
from tests.trainer.runs import run_config, write_corpus
from trainer.config import RunConfig
from trainer.learning.step import StepResult
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.reports.told import BatchPart, TeacherPart, step_values


@pytest.fixture
def duo(tiny_byte_level: Path, tiny_sentencepiece: Path) -> Iterator[list[FaultyTeacher]]:
    with faulty_teachers(tiny_byte_level, 1, 0.02) as one, faulty_teachers(tiny_sentencepiece, 1, 0.02) as two:
        yield one + two


def config_of(duo: list[FaultyTeacher], student: Path, folder: Path, on_loss: str, epochs: int) -> RunConfig:
    config = run_config(
        student,
        write_corpus(folder),
        folder / "out",
        [teacher.url for teacher in duo],
        train={"epochs": epochs, "prefetch_tokens": 1, "target_cache_bytes": 0},
    )
    teachers = [t.model_copy(update={"on_loss": on_loss, "patience_s": 0.5}) for t in config.teachers]
    return config.model_copy(update={"teachers": teachers})


def test_a_dropped_teacher_is_left_out_loudly_and_joins_again(
    duo: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(duo, tiny_byte_level, tmp_path, "drop", epochs=15)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            duo[1].kill()
        if event["event"] == "teacher_lost":
            duo[1].start().await_ready()

    train(config, listener=disturb)
    events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [e["event"] for e in events if e["event"].startswith("teacher")] == ["teacher_lost", "teacher_joined"]
    assert {e["teacher"] for e in events if e["event"].startswith("teacher")} == {"t1"}
    steps = [e for e in events if e["event"] == "step"]
    absent = [step["teachers"]["t1"]["absent"] for step in steps]
    assert absent[0] == 0
    assert absent[-1] == 0
    alone = [step for step in steps if step["teachers"]["t1"]["absent"] == config.train.batch_samples]
    assert alone
    assert all(step["teachers"]["t0"]["share"] == pytest.approx(1) for step in alone)
    assert all(step["coverage"] > 0 for step in steps)
    assert any("teacher t1 is lost" in message for message in caplog.messages)
    assert any("teacher t1 is back" in message for message in caplog.messages)


def test_a_step_without_any_target_has_no_divergence_and_no_mass() -> None:
    teacher = TeacherPart(AlignmentReport(), 0.0, 0, 1, 0.0, {})
    part = BatchPart(1, 9, 0, 0.0, 0.0, 0, 0, 0, 0, {"waited_s": 0.0}, (teacher,))
    told = step_values([part], ["t"], StepResult(2.0, 2.0, 0.0, 9, 1.0, 1e-3), 0.1)
    assert [told[name] for name in ("coverage", "divergence", "mass", "tail")] == [0, None, None, None]


def test_a_run_without_any_teacher_left_ends(duo: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path) -> None:
    config = config_of(duo, tiny_byte_level, tmp_path, "drop", epochs=40)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            for teacher in duo:
                teacher.kill()

    with pytest.raises(TeacherLost, match=r"every teacher is lost.* \(sample "):
        train(config, listener=disturb)
    events = [e["event"] for e in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert events.count("teacher_lost") == 2


@pytest.mark.parametrize("on_loss", ["wait", "stop"])
def test_a_run_that_may_not_go_on_without_a_teacher_ends_and_says_so_in_its_metrics(
    duo: list[FaultyTeacher], tiny_byte_level: Path, tmp_path: Path, on_loss: str
) -> None:
    config = config_of(duo, tiny_byte_level, tmp_path, on_loss, epochs=40)

    def disturb(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            duo[0].kill()

    with pytest.raises(Unavailable, match=r"teacher t0 at .* \(sample [^(]*\)$"):
        train(config, listener=disturb)
    (lost,) = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "teacher_lost"]
    assert lost["teacher"] == "t0"
