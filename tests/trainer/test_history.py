"""Reading a run's metrics: each step once, absent figures absent, and what came of it beside its twin."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.made_runs import step_values, write_run
from trainer.errors import MetricsError
from trainer.reports.history import read_history
from trainer.reports.metrics import Metrics, numbers
from trainer.reports.summary import compare, sentence, summarise


def test_a_step_that_was_made_twice_counts_as_it_was_told_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 20)
    with Metrics(folder / "metrics.jsonl") as metrics:
        metrics.emit("start", step=15, steps=30, run={})
        for step in range(16, 19):
            metrics.emit("step", step=step, loss=9.0, tokens=100)
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


def test_what_was_not_measured_is_not_a_number_and_a_column_of_nothing_is_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 6, more=lambda step: {"late": step} if step > 3 else {"never": None})
    steps = read_history(folder).steps
    late = steps.get("late")
    assert late is not None
    assert np.isnan(late[:3]).all()
    assert late[3:].tolist() == [4, 5, 6]
    assert steps.get("never") is None
    assert steps.get("unheard of") is None


def test_figures_have_paths_and_flags_and_words_are_none() -> None:
    event = {
        "event": "step",
        "time": 5,
        "step": 3,
        "loss": 1,
        "ok": True,
        "who": "x",
        "teachers": {"a": {"mass": None}},
    }
    found = numbers(event)
    assert found.keys() == {"loss", "teachers/a/mass"}
    assert found["loss"] == 1.0
    assert math.isnan(found["teachers/a/mass"])


def test_a_line_cut_in_the_middle_ends_the_run_there(tmp_path: Path) -> None:
    path = write_run(tmp_path, 30) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"step": 25') + 30])
    history = read_history(tmp_path)
    assert history.steps.steps[-1] == 24
    assert not history.finished


def test_a_broken_line_in_between_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, 3) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], '{"event": "st', *lines[3:]]) + "\n", encoding="utf-8")
    with pytest.raises(MetricsError, match=r"metrics.jsonl, line 3 is not JSON"):
        read_history(tmp_path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(MetricsError, match=r"line 1: expected an object with an event, received \[1\]"):
        read_history(tmp_path)


def test_tokens_are_unknown_where_a_step_is_missing(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        for step in (1, 2, 4):
            metrics.emit("step", step=step, **step_values(step, ()))
    history = read_history(tmp_path)
    assert history.tokens is None
    assert summarise(history).tokens is None


def bpb_run(folder: Path, bpbs: list[float], every: int = 10) -> Path:
    """A run measured every so many steps of 100 tokens."""
    folder.mkdir()
    last = every * (len(bpbs) - 1)
    with Metrics(folder / "metrics.jsonl") as metrics:
        metrics.emit("start", step=0, steps=last, run={"data": {"window_tokens": 60}, "train": {"seed": len(bpbs)}})
        for step in range(last + 1):
            if step:
                metrics.emit("step", step=step, loss=1.0, tokens=100)
            if step % every == 0:
                metrics.emit("eval", step=step, held_out_bpb=bpbs[step // every])
        metrics.emit("end", step=last, model=None)
    return folder


def test_the_tokens_to_the_twins_last_value_are_those_of_the_first_measurement_at_it(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.8, 0.7, 0.6, 0.6]))
    twin = read_history(bpb_run(tmp_path / "twin", [1.0, 0.95, 0.9, 0.85, 0.8]))
    beside = compare(run, twin)
    assert beside.twins_last is not None
    assert (beside.twins_last.bpb, beside.twins_last.tokens, beside.twins_last.twin_tokens) == (0.8, 1000, 4000)
    assert beside.twins_last.ratio == 0.25
    said = sentence(summarise(run), beside)
    assert "0.6000 bits per byte of held-out text, from 1.0000 before training" in said
    assert (
        "the twin's last value the student was measured first after 1,000 tokens, the twin after 4,000 (ratio 0.25)"
        in said
    )


def test_a_twin_that_ends_worse_than_it_began_is_compared_at_its_best(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.95, 0.85]))
    twin = read_history(bpb_run(tmp_path / "twin", [1.0, 0.9, 1.2]))
    beside = compare(run, twin)
    assert beside.twins_last is None
    assert beside.twins_best is not None
    assert (beside.twins_best.tokens, beside.twins_best.twin_tokens, beside.twins_best.ratio) == (2000, 1000, 2.0)
    assert "had 0.9000 at its best" in sentence(summarise(run), beside)


def test_a_student_that_never_gets_there_is_said_so(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.99]))
    twin = read_history(bpb_run(tmp_path / "twin", [1.0, 0.5]))
    beside = compare(run, twin)
    assert beside.twins_last is not None
    assert beside.twins_last.tokens is None
    assert "the student has not reached the twin's last" in sentence(summarise(run), beside)


def test_a_twin_on_other_text_is_no_comparison(tmp_path: Path) -> None:
    run = read_history(bpb_run(tmp_path / "run", [1.0, 0.8]))
    twin = read_history(bpb_run(tmp_path / "twin", [1.3, 1.2, 1.1]))
    beside = compare(run, twin)
    assert not beside.same_start
    assert beside.differs_in == {"train.seed": (2, 3)}
    assert "this is not the same student on the same text" in sentence(summarise(run), beside)


def test_a_run_without_held_out_text_says_so(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.emit("step", step=1, loss=3.5)
        metrics.emit("step", step=2, loss=2.5)
    summary = summarise(read_history(tmp_path))
    assert summary.held_out is None
    assert summary.seconds is None
    assert sentence(summary, None) == (
        "After 2 steps so far the training loss is 2.5000 nats per token, from 3.5000 at the first step; "
        "no held-out text was measured."
    )


def test_teachers_figures_are_means_over_their_own_tokens(tmp_path: Path) -> None:
    run = {"teachers": [{"name": "a"}]}
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.emit("start", step=0, steps=3, run=run)
        for step, (tokens, bpb) in enumerate([(100, 1.0), (300, 2.0), (100, None)], 1):
            metrics.emit("step", step=step, loss=1.0, tokens=tokens, teachers={"a": {"own_bpb": bpb, "share": 0.5}})
        metrics.emit("teacher_lost", teacher="a", detail="gone")
    figures = summarise(read_history(tmp_path)).teachers["a"]
    assert figures.own_bpb == pytest.approx(1.75)
    assert figures.share == pytest.approx(0.5)
    assert figures.mass is None
    assert figures.num_lost == 1
    json.dumps(figures.__dict__, allow_nan=False)
