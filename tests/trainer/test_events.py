"""Typed events: valid JSON lines, an up-to-date reference, and readers that use only existing keys."""

import ast
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from teachers.client.events import TeacherEvent as HealthEvent
from teachers.client.load_balancer import LoadBalancerStats
from tests.trainer.made_runs import write_run
from tests.trainer.runs import run_config, served_models, write_corpus
from trainer.cli.app import print_json
from trainer.report.chart_specs import chart_specs
from trainer.report.history import read_history
from trainer.report.summary import summarise
from trainer.telemetry.event_records import PoolStep
from trainer.telemetry.events import (
    EVENTS,
    TEACHER_EVENTS,
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    StepEvent,
    TeacherLostEvent,
)
from trainer.telemetry.json_text import to_json
from trainer.telemetry.jsonl import EventRecord, Metrics, numbers, read_metrics
from trainer.telemetry.reference import field_rows, metrics_reference
from trainer.training.loop import train

ROOT = Path(__file__).parents[2]
PLAIN_STEP = [
    "step",
    "ce_weight",
    "loss",
    "cross_entropy",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "step_s",
    "wait_s",
    "queued_batches",
    "queued_tokens",
    "tokenize_s",
    "align_s",
    "fuse_s",
    "shortened",
    "skipped",
    "folded_system",
    "omitted_reasoning",
    "changed_content",
]  # keys of a step without teachers
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class AnyEvent(Event):
    """An event with one field of any type."""

    kind: ClassVar[str] = "any"

    value: Any


def strict_json(text: str | bytes) -> Any:
    """Parse JSON and fail for NaN and Infinity, which the standard does not have."""

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=reject)


def expected(value: Any) -> Any:
    """Return what a parser should return for a value: null for NaN and infinities, lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: expected(item) for key, item in value.items()}
    return [expected(item) for item in value] if isinstance(value, list | tuple) else value


# --- valid JSON ---


@given(values)
def test_every_value_is_written_as_valid_json(value: Any) -> None:
    assert strict_json(to_json(value)) == expected(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values)
def test_every_event_is_written_as_valid_json(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    received: list[EventRecord] = []
    with Metrics(path, received.append) as metrics:
        metrics.write(AnyEvent(value=value))
    (line,) = path.read_bytes().split(b"\n")[:-1]
    record = strict_json(line)
    assert record == received[0]
    assert list(record) == ["event", "time", "value"]
    assert record["value"] == expected(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values)
def test_printed_json_is_valid(capsys: pytest.CaptureFixture[str], value: Any) -> None:
    print_json(value)
    assert strict_json(capsys.readouterr().out) == expected(value)


def test_an_infinite_loss_is_null_in_the_file_and_nan_for_readers(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(EvalEvent(step=1, held_out_bpb=math.inf, held_out_nats_per_token=math.nan))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["held_out_bpb"] is None
    assert all(math.isnan(value) for value in numbers(record).values())


# --- keys ---


def test_a_field_is_absent_unless_it_is_set(tmp_path: Path) -> None:
    step = StepEvent.model_validate(dict.fromkeys(PLAIN_STEP, 1))
    assert list(step.fields()) == PLAIN_STEP
    assert step.model_copy(update={"divergence": None}).fields()["divergence"] is None
    assert EndEvent(step=1, model=None, reason=None).fields() == {"step": 1, "model": None, "reason": None}


def test_unknown_and_missing_fields_are_rejected() -> None:
    with pytest.raises(ValidationError, match="steps"):
        CheckpointEvent.model_validate({"step": 1, "steps": 2})
    with pytest.raises(ValidationError, match="step"):
        CheckpointEvent.model_validate({})


def test_a_run_writes_the_keys_of_the_events_in_their_order(
    tiny_byte_level: Path, tiny_sentencepiece: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path)
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        evaluation = {"every_steps": 3, "agreement_samples": 2}
        train(run_config(tiny_byte_level, corpus, tmp_path / "out", urls, eval=evaluation))
    train(run_config(tiny_byte_level, corpus, tmp_path / "plain", [], eval={"every_steps": 3}))
    kinds = {event.kind: event for event in EVENTS}
    for folder in ("out", "plain"):
        for record in read_metrics(tmp_path / folder / "metrics.jsonl"):
            keys = list(record)[2:]
            assert keys == [name for name in kinds[record["event"]].model_fields if name in record]
            kinds[record["event"]].model_validate({key: record[key] for key in keys})
    steps, plain = (
        [record for record in read_metrics(tmp_path / folder / "metrics.jsonl") if record["event"] == "step"]
        for folder in ("out", "plain")
    )
    assert all(list(step)[2:] == PLAIN_STEP for step in plain)
    names = StepEvent.model_fields.keys() - {"router_loss", "rollouts"}  # of mixtures of experts and of on-policy runs
    assert all(step.keys() == {"event", "time", *names} for step in steps)
    assert list(steps[0]["teachers"]["t0"])[:3] == ["weight", "missing", "unavailable"]
    assert "loss" not in steps[0]["teachers"]["t0"]


def test_the_pool_has_the_counters_of_the_load_balancer() -> None:
    names = [field.name for field in fields(LoadBalancerStats) if field.name != "tokens_per_s"]
    assert names == list(PoolStep.model_fields)


def test_every_event_of_a_teacher_has_a_type() -> None:
    (kinds,) = (get_args(field.type) for field in fields(HealthEvent) if field.name == "kind")
    assert set(kinds) == TEACHER_EVENTS.keys()
    assert all(TEACHER_EVENTS[kind].kind == kind for kind in kinds)


# --- readers ---


def columns_of(event: type[Event], teacher: str) -> set[str]:
    """Return the paths of an event's fields as a history has them."""
    return {key.replace(".", "/").replace("NAME", teacher) for key, _, _ in field_rows(event)}


def test_every_column_of_a_chart_is_a_field_of_an_event(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path, 3, teachers=("a",)))
    known = {"steps": columns_of(StepEvent, "a"), "evals": columns_of(EvalEvent, "a")}
    for specs in chart_specs(run).values():
        for spec in specs:
            for series in (*spec.series, *spec.baseline_series):
                assert series.column in known[series.table], spec.title


def test_every_column_of_a_summary_is_a_field_of_an_event(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path, 3, teachers=("a",)))
    names: set[str] = set()

    class Recorded(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            names.add(key)
            return super().get(key, default)

    for table in (run.steps, run.evals):
        object.__setattr__(table, "columns", Recorded(table.columns))
    summarise(run)
    assert "teachers/a/weight" in names
    assert names <= columns_of(StepEvent, "a") | columns_of(EvalEvent, "a")


def strings_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


OLD_NAMES = {"share", "waited_s", "left_out", "absent", "vanished", "fleet", "read_s"}


@pytest.mark.parametrize("folder", ["trainer/telemetry", "trainer/report", "trainer/training", "trainer/evaluation"])
def test_no_reader_uses_an_old_name_of_a_metric(folder: str) -> None:
    for path in [*(ROOT / folder).rglob("*.py"), ROOT / "trainer/cli/console.py"]:
        assert not strings_in(path) & OLD_NAMES, path


# --- the reference ---


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == metrics_reference(), (
        "run: python -m trainer.telemetry.reference > docs/metrics.md"
    )


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_every_field_has_a_description(event: type[Event]) -> None:
    assert event.__doc__
    assert event.kind in {kind for kind in metrics_reference().split() if kind}
    for key, kind, meaning in field_rows(event):
        assert meaning.endswith("."), key
        assert kind, key
        assert "|" not in meaning, key


def test_no_password_and_no_half_of_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl") as metrics:
        detail = "no response from https://user:hunter2@host:1/x, user@host is no address; \udcff 名"
        metrics.write(TeacherLostEvent(teacher="t", detail=detail))
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert record["detail"] == "no response from https://host:1/x, user@host is no address; \\udcff 名"
