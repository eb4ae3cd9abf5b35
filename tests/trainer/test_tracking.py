"""Trackers hear what metrics.jsonl holds; a run is continued in them, and never ended by them."""

import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from tests.serve import FormulaEngine, free_port, serving
from tests.trainer.runs import losses, run_config, write_corpus
from tests.trainer.test_cli import assert_one_sentence, call, run_file
from trainer.config import RunConfig
from trainer.errors import TrackingError
from trainer.loop import train
from trainer.reports import trackers, tracking
from trainer.reports.history import read_history
from trainer.reports.metrics import Event
from trainer.reports.trackers import Point, Tracked


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, whatever the machine's environment says."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def teacher(tiny_byte_level: Path) -> Iterator[str]:
    with serving(FormulaEngine(tiny_byte_level)) as url:
        yield url


class Killed(Exception):
    """What ends a run between two checkpoints in these tests."""


def kill_at(step: int) -> Any:
    def listen(event: Event) -> None:
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
    """Three steps and a checkpoint, a fourth that is lost, then the rest with --resume."""

    def listen(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, listener=listen)
    train(config, resume=True)


def scalars(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_holds_every_figure_of_every_step(tiny_byte_level: Path, teacher: str, tmp_path: Path) -> None:
    train(config_of(tiny_byte_level, tmp_path, [teacher], tensorboard=True))
    board = scalars(tmp_path / "out" / "tensorboard")
    assert {e.step: e.value for e in board.Scalars("loss")} == pytest.approx(losses(tmp_path / "out"))
    history = read_history(tmp_path / "out")
    for name, column in history.steps.columns.items():
        assert [e.value for e in board.Scalars(name)] == pytest.approx(column.tolist()), name
    assert "teachers/t0/share" in history.steps.columns
    assert [e.step for e in board.Scalars("held_out_bpb")] == [0, 2, 4, 6]
    assert history.tokens is not None
    seen = {e.step: e.value for e in board.Scalars("tokens_seen")}
    assert seen[0] == 0
    assert [seen[step] for step in range(1, 7)] == history.tokens.tolist()
    (text,) = board.Tensors("run/text_summary")
    assert b"window_tokens" in text.tensor_proto.string_val[0]


def test_tensorboard_shows_a_resumed_run_as_one_without_the_lost_steps(
    tiny_byte_level: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_in_two(config_of(tiny_byte_level, tmp_path, [teacher], tensorboard=True), monkeypatch)
    board = scalars(tmp_path / "out" / "tensorboard")
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    history = read_history(tmp_path / "out")
    assert history.tokens is not None
    assert board.Scalars("tokens_seen")[-1].value == history.tokens[-1]


def wandb_records(path: Path) -> list[Record]:
    """What W&B has kept offline of a run that is over; its own process writes it a moment after the run's end."""
    deadline = time.monotonic() + 30
    while not (records := list(wandb_kept(path))) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return records


def wandb_kept(path: Path) -> Iterator[Record]:
    """After 7 bytes of its own the file is in LevelDB's log format: blocks of 32 KiB, in them parts with checksum,
    length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(data):
        room = 32_768 - at % 32_768
        _, length, kind = struct.unpack_from("<IHB", data, at) if room >= 7 else (0, 0, 0)
        if kind == 0:
            at += room
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(path: Path) -> list[dict[str, str]]:
    """What was logged at once, by key, as JSON."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in wandb_records(path)
        if record.HasField("history")
    ]


def test_wandb_goes_on_with_the_same_run(
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
    assert float(logged[6]["teachers/t0/share"]) == 1.0
    assert [r.exit.exit_code for path in (before, after) for r in wandb_records(path) if r.HasField("exit")] == [1, 0]
    metrics = [r.metric for r in wandb_records(after) if r.HasField("metric")]
    assert {m.step_metric for m in metrics if m.glob_name == "*"} == {"step"}


def test_mlflow_goes_on_with_the_same_run(
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
    assert run.data.metrics["teachers/t0/share"] == 1.0
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_ends_with_an_error_is_marked_as_failed(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = config_of(tiny_byte_level, tmp_path, [], mlflow="tiny")
    with pytest.raises(Killed):
        train(config, listener=kill_at(3))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FAILED"


def test_lost_teachers_are_text_in_every_tool(tiny_byte_level: Path, tmp_path: Path) -> None:
    config = config_of(tiny_byte_level, tmp_path, [], tensorboard=True, wandb="tiny", mlflow="a (b)")
    Path(config.output.dir).mkdir()
    with tracking.tracked(config, 0) as listeners:
        assert len(listeners) == 3
        for listener in listeners:
            listener(
                {
                    "event": "step",
                    "time": 1.0,
                    "step": 7,
                    "tokens": 5,
                    "teachers": {"a (b)": {"mass": None, "share": 1}},
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
    assert run.data.metrics["teachers/a _b_/share"] == 1.0
    assert "teachers/a _b_/mass" not in run.data.metrics


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    tiny_byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's tables vanish under it after the second step; TensorBoard beside it misses nothing."""
    config = config_of(tiny_byte_level, tmp_path, [], mlflow="tiny", tensorboard=True)

    def disturb(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 2:
            with sqlite3.connect(tmp_path / "out" / "mlflow" / "mlflow.db", timeout=30) as database:
                database.execute("DROP TABLE metrics")

    assert train(config, listener=disturb).model is not None
    assert losses(tmp_path / "out").keys() == set(range(1, 7))
    said = [message for message in caplog.messages if message.startswith("tracking.mlflow")]
    assert len(said) == 2
    assert "fails" in said[0]
    assert "the run goes on" in said[0]
    assert "has missed" in said[1]
    assert [e.step for e in scalars(tmp_path / "out" / "tensorboard").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


class Stuck:
    """A tracker that answers only when it is let go."""

    let_go = threading.Event()

    def __init__(self, run: Tracked) -> None:
        assert run.done == 0

    def write(self, point: Point) -> None:
        self.let_go.wait(60)

    def close(self, failed: bool) -> None:
        raise AssertionError("it is still writing")


def test_a_stuck_tracker_delays_no_step_and_what_it_missed_is_counted(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Stuck)
    monkeypatch.setattr(tracking, "CLOSE_S", 0.2)
    monkeypatch.setattr(tracking, "MOST_WAITING", 4)
    try:
        assert train(config_of(tiny_byte_level, tmp_path, [], tensorboard=True)).model is not None
        assert not Stuck.let_go.is_set()
    finally:
        Stuck.let_go.set()
    assert losses(tmp_path / "out").keys() == set(range(1, 7))
    assert [m for m in caplog.messages if m.startswith("tracking")] == [
        "tracking.tensorboard fails: 4 events wait for it; the run goes on, metrics.jsonl holds everything",
        "tracking.tensorboard has missed 10 events; metrics.jsonl holds them",  # six steps, four measurements
    ]


def test_a_tracker_that_cannot_be_opened_is_said_before_the_first_step(
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
    assert any("cannot be opened" in m and "the run goes on without it" in m for m in caplog.messages)


@pytest.mark.parametrize("key", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_there_is_one_sentence_before_teachers_are_asked(
    tiny_byte_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setitem(trackers.PACKAGES, key, ("a_package_that_nobody_has",))
    config = config_of(tiny_byte_level, tmp_path, [f"http://127.0.0.1:{free_port()}"])
    value = "true" if key == "tensorboard" else "'x'"
    result = call("train", run_file(tmp_path, config), "--set", f"tracking.{key}={value}")
    assert_one_sentence(
        result, f"tracking.{key}: a_package_that_nobody_has is not installed: install Tutelage's extra {key}"
    )
    assert not (tmp_path / "out").exists()


def test_nothing_is_imported_and_no_thread_runs_without_a_tracker(tiny_byte_level: Path, tmp_path: Path) -> None:
    with tracking.tracked(config_of(tiny_byte_level, tmp_path, []), 0) as listeners:
        assert listeners == []
