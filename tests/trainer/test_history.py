"""History and summary of a run: each step once, absent values absent, comparison with the baseline."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.made_runs import EventFile, step_values, write_run
from trainer.errors import MetricsError
from trainer.report.history import read_history
from trainer.report.page import make_report
from trainer.report.summary import TokensToBpb, compare, sentence, summarise
from trainer.telemetry.jsonl import Metrics, numbers


def test_a_repeated_step_keeps_its_last_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    with EventFile(folder / "metrics.jsonl") as file:
        file.write("start", step=15, steps=30, run={})
        for step in range(16, 19):
            file.write("step", step=step, loss=9.0, tokens=100)
    history = read_history(folder)
    assert history.steps.steps.tolist() == list(range(1, 19))
    loss = history.steps.get("loss")
    assert loss is not None
    assert loss[15:].tolist() == [9.0, 9.0, 9.0]
    assert loss[14] < 3
    assert history.evals.steps.tolist() == [0, 10]
    assert history.tokens is not None
    assert history.tokens[-1] == 1800
    assert (history.num_starts, history.finished) == (2, False)


def test_missing_values_are_nan_and_a_column_without_numbers_is_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 6, more=lambda step: {"late": step} if step > 3 else {"never": None})
    steps = read_history(folder).steps
    late = steps.get("late")
    assert late is not None
    assert np.isnan(late[:3]).all()
    assert late[3:].tolist() == [4, 5, 6]
    assert steps.get("never") is None
    assert steps.get("unknown") is None


def test_numbers_have_paths_and_leave_out_booleans_and_strings() -> None:
    event = {
        "event": "step",
        "time": 5,
        "step": 3,
        "loss": 1,
        "ok": True,
        "name": "x",
        "teachers": {"a": {"mass": None}},
    }
    values = numbers(event)
    assert values.keys() == {"loss", "teachers/a/mass"}
    assert values["loss"] == 1.0
    assert math.isnan(values["teachers/a/mass"])


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    path = write_run(tmp_path, 30) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"step": 25') + 30])
    history = read_history(tmp_path)
    assert history.steps.steps[-1] == 24
    assert not history.finished


def test_an_invalid_line_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, 3) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], '{"event": "st', *lines[3:]]) + "\n", encoding="utf-8")
    with pytest.raises(MetricsError, match=r"metrics.jsonl, line 3 is not JSON"):
        read_history(tmp_path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(MetricsError, match=r"line 1: expected an object with an event, received \[1\]"):
        read_history(tmp_path)


def test_tokens_are_unknown_if_a_step_is_missing(tmp_path: Path) -> None:
    with EventFile(tmp_path / "metrics.jsonl") as file:
        for step in (1, 2, 4):
            file.write("step", step=step, **step_values(step, ()))
    history = read_history(tmp_path)
    assert history.tokens is None
    assert summarise(history).tokens is None


def bpb_run(folder: Path, bpbs: list[float], every: int = 10) -> Path:
    """Write a run with an evaluation every `every` steps of 100 tokens."""
    folder.mkdir()
    last = every * (len(bpbs) - 1)
    with EventFile(folder / "metrics.jsonl") as file:
        file.write("start", step=0, steps=last, run={"data": {"window_tokens": 60}, "train": {"seed": len(bpbs)}})
        for step in range(last + 1):
            if step:
                file.write("step", step=step, loss=1.0, tokens=100)
            if step % every == 0:
                file.write("eval", step=step, held_out_bpb=bpbs[step // every])
        file.write("end", step=last, model=None)
    return folder


def test_tokens_to_the_last_value_of_the_baseline_end_at_the_first_evaluation_below_it(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.8, 0.7, 0.6, 0.6]))
    baseline = read_history(bpb_run(tmp_path / "baseline", [1.0, 0.95, 0.9, 0.85, 0.8]))
    comparison = compare(run, baseline)
    assert comparison.baseline_last == TokensToBpb(0.8, tokens=1000, baseline_tokens=4000, ratio=0.25)
    result = sentence(summarise(run), comparison)
    assert "0.6000 bits per byte of held-out text, from 1.0000 before training" in result
    assert (
        "The student reached the baseline's last value within 1,000 tokens, the baseline within 4,000 (ratio 0.25)."
        in result
    )


def test_a_baseline_that_ends_worse_than_it_started_is_compared_by_its_best_value(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.95, 0.85]))
    baseline = read_history(bpb_run(tmp_path / "baseline", [1.0, 0.9, 1.2]))
    comparison = compare(run, baseline)
    assert comparison.baseline_last is None
    assert comparison.baseline_best == TokensToBpb(0.9, tokens=2000, baseline_tokens=1000, ratio=2.0)
    assert "with 0.9000 as its best value" in sentence(summarise(run), comparison)


def test_a_value_that_the_student_never_reached_is_reported(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.99]))
    baseline = read_history(bpb_run(tmp_path / "baseline", [1.0, 0.5]))
    comparison = compare(run, baseline)
    assert comparison.baseline_last is not None
    assert comparison.baseline_last.tokens is None
    assert "the student has not reached the baseline's last value" in sentence(summarise(run), comparison)


def test_a_baseline_with_other_text_is_not_compared(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.8]))
    baseline = read_history(bpb_run(tmp_path / "baseline", [1.3, 1.2, 1.1]))
    comparison = compare(run, baseline)
    assert not comparison.same_start
    assert comparison.differs_in == {"train.seed": (2, 3)}
    assert "the two runs do not have the same student and held-out text" in sentence(summarise(run), comparison)


def test_a_run_without_held_out_text_reports_its_loss(tmp_path: Path) -> None:
    with EventFile(tmp_path / "metrics.jsonl") as file:
        file.write("step", step=1, loss=3.5)
        file.write("step", step=2, loss=2.5)
    summary = summarise(read_history(tmp_path))
    assert summary.held_out is None
    assert summary.seconds is None
    assert sentence(summary, None) == (
        "After 2 steps so far the training loss is 2.5000 nats per token, from 3.5000 at the first step; "
        "no held-out text was measured."
    )


def test_teacher_means_are_weighted_by_tokens(tmp_path: Path) -> None:
    run = {"teachers": [{"name": "a"}]}
    with EventFile(tmp_path / "metrics.jsonl") as file:
        file.write("start", step=0, steps=3, run=run)
        for step, (tokens, bpb) in enumerate([(100, 1.0), (300, 2.0), (100, None)], 1):
            file.write("step", step=step, loss=1.0, tokens=tokens, teachers={"a": {"own_bpb": bpb, "weight": 0.5}})
        file.write("teacher_lost", teacher="a", detail="gone")
    teacher = summarise(read_history(tmp_path)).teachers["a"]
    assert teacher.own_bpb == pytest.approx(1.75)
    assert teacher.weight == pytest.approx(0.5)
    assert teacher.mass is None
    assert teacher.num_lost == 1
    json.dumps(teacher.__dict__, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\x00\xff\xfe", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"event": "x", "a":' * 900 + b"1" + b"}" * 900, "nested more than 32 deep"),
        (b'{"event": "step", "step": 1, "loss": NaN}', "NaN is not finite"),
        (b'{"event": "step", "step": 1, "loss": 1e999}', "1e999 is not finite or too large"),
        (b'{"event": "step", "step": 1, "loss": ' + b"9" * 400 + b"}", "an integer of 400 digits"),
        (b'{"event": "x", "name": "\\ud800"}', "is not JSON: .*surrogates not allowed"),
        (b'{"event": []}', "expected an object with an event"),
        (b'{"event": "step", "step": "x"}', "step is 'x', expected a number from 0"),
        (b'{"event": "step", "step": -5}', "step is -5, expected"),
        (b'{"event": "step", "step": 1, "time": 1e99}', "time is 1e"),
        (b'{"event": "step"}', "a step event without step"),
        (b'{"event": "step", "step": 1, "loss": "x"}', "loss in the event step is 'x', expected a number"),
        (b'{"event": "step", "step": 1, "teachers": [1]}', "teachers in the event step is a list, expected a table"),
        (b'{"event": "start", "step": 0, "run": 5}', "run in the event start is 5, expected a table"),
        (b'{"event": "start", "step": 0, "run": {"teachers": [{}]}}', r"run\.teachers\.0\.name is a table, field req"),
        (b'{"event": "start", "step": 0, "run": {"data": 3}}', r"run\.data is 3"),
        (b'{"event": "start", "step": 0, "changed": {"loss.x": [1, 2, 3]}}', r"changed\.loss\.x is a list"),
        (b'{"event": "start", "step": 0, "base": null}', "base is None"),
        (b'{"event": "end", "step": 1, "reason": 5}', "reason in the event end is 5, expected a string"),
    ],
)
def test_a_damaged_event_is_one_sentence_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_run(tmp_path, 3) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(MetricsError, match=rf"metrics\.jsonl, line 7.*{message}") as caught:
        make_report(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_metrics_file_is_never_written_through_a_link_nor_cut_if_it_is_not_from_a_run(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for content in (b"secret=1\nno newline at the end", b"an important line without newline"):
        other.write_bytes(content)
        link = tmp_path / "link"
        link.symlink_to(other)
        with pytest.raises(MetricsError, match="cannot write .*link"):
            Metrics(link)
        link.unlink()
        with pytest.raises(MetricsError, match="is not JSON|holds no events"):
            Metrics(other)
        assert other.read_bytes() == content


def test_an_incomplete_first_event_is_removed(tmp_path: Path) -> None:
    for written in (b'{"ev', b'{"event": "start", "time": 1'):
        (tmp_path / "m").write_bytes(written)
        with Metrics(tmp_path / "m"):
            assert (tmp_path / "m").read_bytes() == b""
