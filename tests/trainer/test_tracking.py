"""Trackers receive the events of metrics.jsonl, continue a resumed run, and never end a run."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.serve import FormulaEngine, free_port, serving
from tests.trainer.made_runs import EventFile
from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_cli import assert_one_sentence, call, run_file
from tests.trainer.wandb_files import wandb_history, wandb_records
from trainer.config import RunConfig
from trainer.errors import TrackingError
from trainer.report.history import read_history
from trainer.telemetry import tracking
from trainer.telemetry.jsonl import EventRecord
from trainer.telemetry.trackers import TRACKERS, tracker_class
from trainer.telemetry.trackers.base import LogEntry, TrackedRun
from trainer.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tools off the network, independently of the environment variables of the machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def teacher(tiny_byte_level: Path) -> Iterator[str]:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        yield url


class Killed(Exception):
    """Ends a run between two checkpoints."""


def kill_at(step: int) -> Any:
    def listen(event: EventRecord) -> None:
        if event["event"] == "checkpoint" and event["step"] == step:
            raise Killed

    return listen


def config_of(model: Path, folder: Path, urls: list[str], **tracked: Any) -> RunConfig:
    out = folder / "out"
    return run_config(
        model,
        write_corpus(folder),
        out,
        urls,
        output={"dir": str(out), "checkpoint_every_steps": 3},
        eval={"every_steps": 2},
        tracking=tracked,
    )


def train_in_two(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train five steps with a checkpoint after three, then resume."""

    def listen(event: EventRecord) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, listener=listen)
    train(config, resume=True)


def scalars(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_contains_every_number_of_every_step(tiny_byte_level: Path, teacher: str, tmp_path: Path) -> None:
    train(config_of(tiny_byte_level, tmp_path, [teacher], tensorboard=True))
    board = scalars(tmp_path / "out" / "tensorboard")
    assert {e.step: e.value for e in board.Scalars("loss")} == pytest.approx(losses(tmp_path / "out"))
    history = read_history(tmp_path / "out")
    for name, column in history.steps.columns.items():
        assert [e.value for e in board.Scalars(name)] == pytest.approx(column.tolist()), name
    assert "teachers/t0/weight" in history.steps.columns
    assert [e.step for e in board.Scalars("held_out_bpb")] == [0, 2, 4, 6]
    assert history.tokens is not None
    seen = {e.step: e.value for e in board.Scalars("tokens_seen")}
    assert seen[0] == 0
    assert [seen[step] for step in range(1, 7)] == history.tokens.tolist()
    (text,) = board.Tensors("run/text_summary")
    assert b"window_tokens" in text.tensor_proto.string_val[0]


def test_tensorboard_shows_a_resumed_run_without_repeated_steps(
    tiny_byte_level: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_two(config_of(tiny_byte_level, tmp_path, [teacher], tensorboard=True), monkeypatch)
    board = scalars(tmp_path / "out" / "tensorboard")
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    history = read_history(tmp_path / "out")
    assert history.tokens is not None
    assert board.Scalars("tokens_seen")[-1].value == history.tokens[-1]


def test_wandb_continues_the_same_run(
    tiny_byte_level: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_two(config_of(tiny_byte_level, tmp_path, [teacher], wandb="tiny"), monkeypatch)
    before, after = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    (one,), (two,) = ([r.run for r in wandb_records(path) if r.HasField("run")] for path in (before, after))
    assert one.run_id == two.run_id
    assert one.project == "tiny"
    assert "window_tokens" in {u.key: u.value_json for u in one.config.update}["data"]
    logged = {int(row["step"]): row for row in wandb_history(before) + wandb_history(after) if "loss" in row}
    assert {step: float(row["loss"]) for step, row in logged.items()} == pytest.approx(losses(tmp_path / "out"))
    assert float(logged[6]["teachers/t0/weight"]) == 1.0
    assert [r.exit.exit_code for path in (before, after) for r in wandb_records(path) if r.HasField("exit")] == [1, 0]
    metrics = [r.metric for r in wandb_records(after) if r.HasField("metric")]
    assert {m.step_metric for m in metrics if m.glob_name == "*"} == {"step"}


def test_mlflow_continues_the_same_run(
    tiny_byte_level: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_two(config_of(tiny_byte_level, tmp_path, [teacher], mlflow="tiny"), monkeypatch)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "out"
    assert run.data.params["data/window_tokens"] == "60"
    assert run.data.params["teachers/0/name"] == "t0"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)} == pytest.approx(
        losses(tmp_path / "out")
    )
    assert run.data.metrics["teachers/t0/weight"] == 1.0
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_ends_with_an_error_is_marked_as_failed(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = config_of(tiny_byte_level, tmp_path, [], mlflow="tiny")
    with pytest.raises(Killed):
        train(config, listener=kill_at(3))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FAILED"


def test_lost_teachers_are_messages_in_every_tool(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = config_of(tiny_byte_level, tmp_path, [], tensorboard=True, wandb="tiny", mlflow="a (b)")
    Path(config.output.dir).mkdir()
    with tracking.open_trackers(config, 0) as listeners:
        assert len(listeners) == 3
        for listener in listeners:
            listener(
                {
                    "event": "step",
                    "time": 1.0,
                    "step": 7,
                    "tokens": 5,
                    "teachers": {"a (b)": {"mass": None, "weight": 1}},
                }
            )
            listener({"event": "teacher_lost", "time": 2.0, "teacher": "a (b)", "detail": "gone"})
    board = scalars(tmp_path / "out" / "tensorboard")
    (event,) = board.Tensors("events/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (7, b"teacher_lost a (b): gone")
    (path,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    assert {"events": '"teacher_lost a (b): gone"', "step": "7"}.items() <= wandb_history(path)[-1].items()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.tags["teacher_lost a _b_"] == "after step 7: gone"
    assert run.data.metrics["teachers/a _b_/weight"] == 1.0
    assert "teachers/a _b_/mass" not in run.data.metrics


def test_a_failing_tracker_is_reported_once_and_the_run_continues(
    tiny_byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's table of metrics is dropped after the second step. TensorBoard receives every event."""
    config = config_of(tiny_byte_level, tmp_path, [], mlflow="tiny", tensorboard=True)

    def drop_table(event: EventRecord) -> None:
        if event["event"] == "step" and event["step"] == 2:
            with sqlite3.connect(tmp_path / "out" / "mlflow" / "mlflow.db", timeout=30) as database:
                database.execute("DROP TABLE metrics")

    assert train(config, listener=drop_table).model is not None
    assert losses(tmp_path / "out").keys() == set(range(1, 7))
    warnings = [message for message in caplog.messages if message.startswith("tracking.mlflow")]
    assert len(warnings) == 2
    assert "fails" in warnings[0]
    assert "the run continues" in warnings[0]
    assert "missed" in warnings[1]
    assert [e.step for e in scalars(tmp_path / "out" / "tensorboard").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


class StuckTracker:
    """A tracker whose write returns only after `release` is set."""

    packages: ClassVar[tuple[str, ...]] = ()
    release = threading.Event()

    def __init__(self, run: TrackedRun) -> None:
        assert run.done == 0

    def write(self, entry: LogEntry) -> None:
        self.release.wait(60)

    def close(self, failed: bool) -> None:
        raise AssertionError("closed while it writes")


def test_a_stuck_tracker_delays_no_step_and_its_missed_events_are_counted(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "tensorboard", f"{__name__}:StuckTracker")
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(tracking, "MAX_QUEUED", 4)
    try:
        assert train(config_of(tiny_byte_level, tmp_path, [], tensorboard=True)).model is not None
        assert not StuckTracker.release.is_set()
    finally:
        StuckTracker.release.set()
    assert losses(tmp_path / "out").keys() == set(range(1, 7))
    assert [m for m in caplog.messages if m.startswith("tracking")] == [
        "tracking.tensorboard fails: 4 events are queued; the run continues, metrics.jsonl holds every event",
        "tracking.tensorboard missed 10 events; metrics.jsonl holds them",  # six steps, four evaluations
    ]


def test_a_tracker_that_cannot_be_opened_is_an_error_only_before_the_first_step(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plain = config_of(tiny_byte_level, tmp_path, [])
    config = config_of(tiny_byte_level, tmp_path, [], mlflow="tiny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match="tracking.mlflow cannot be opened: MlflowException"):
        train(config)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    train(plain, stop_at=3)
    assert train(config, resume=True).steps == 6
    assert any("cannot be opened" in m and "the run continues without it" in m for m in caplog.messages)


@pytest.mark.parametrize("key", TRACKERS)
def test_a_missing_package_is_reported_before_teachers_are_connected(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(tracker_class(key), "packages", ("a_missing_package",))
    config = config_of(tiny_byte_level, tmp_path, [f"http://127.0.0.1:{free_port()}"])
    value = "true" if key == "tensorboard" else "'x'"
    result = call("train", run_file(tmp_path, config), "--set", f"tracking.{key}={value}")
    assert_one_sentence(result, f"tracking.{key}: a_missing_package is not installed: install Tutelage's extra {key}")
    assert not (tmp_path / "out").exists()


def test_a_run_without_trackers_has_no_listener(tiny_byte_level: Path, tmp_path: Path) -> None:
    with tracking.open_trackers(config_of(tiny_byte_level, tmp_path, []), 0) as listeners:
        assert listeners == []


def test_the_run_id_of_each_tool_is_kept(tiny_byte_level: Path, tmp_path: Path) -> None:
    run = TrackedRun(config_of(tiny_byte_level, tmp_path, []), tmp_path, 0)
    assert run.run_ids == {}
    run.save_run_id("wandb", "1")
    run.save_run_id("mlflow", "2")
    assert run.run_ids == {"wandb": "1", "mlflow": "2"}


def test_tokens_before_a_resumed_run_count_every_step_once(tiny_byte_level: Path, tmp_path: Path) -> None:
    with EventFile(tmp_path / "metrics.jsonl") as file:
        for start, steps in ((0, [1, 2, 3, 4]), (2, [3])):
            file.write("start", step=start)
            for step in steps:
                file.write("step", step=step, tokens=10**step + start)
    config = config_of(tiny_byte_level, tmp_path, [])
    seen = [tracking._tokens_before(TrackedRun(config, tmp_path, done)) for done in range(5)]
    assert seen == [0, 10, 110, 1112, None]  # step 4 was not repeated
    assert tracking._tokens_before(TrackedRun(config, tmp_path / "missing", 1)) is None
