"""Errors in the files of torchrun, and restarts that would fail again."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from typer.testing import CliRunner

from teachers.protocol.errors import Rejected, Unavailable
from trainer.cli.__main__ import app
from trainer.errors import ConfigError, DataError, PeerError
from trainer.launch.torchrun import ERROR_FILE_VARIABLE, permanent_failure, recorded_failures


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The error file of local rank 1 in the second attempt. The folders of both attempts exist."""
    for attempt in (0, 1):
        for rank in (0, 1):
            (tmp_path / f"attempt_{attempt}" / str(rank)).mkdir(parents=True)
    path = tmp_path / "attempt_1" / "1" / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    return path


def record(path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> ProcessFailure:
    """Record an error in a file, and return what torchrun reads from it."""
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    with pytest.raises(type(error)), recorded_failures():
        raise error
    return ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))


def test_torchrun_reads_the_sentence_and_dates_errors_about_other_processes_later(
    error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_peer = record(error_file, PeerError("process 0 has ended"), monkeypatch)
    first = record(error_file, DataError("line 7 is not JSON"), monkeypatch)
    assert first.message["extraInfo"]["py_callstack"] == "line 7 is not JSON"  # type: ignore[index]
    assert first.timestamp <= of_peer.timestamp


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (ConfigError("no such folder"), True),
        (Rejected("top_k is too large"), True),
        (PeerError("process 0 has ended"), False),
        (Unavailable("no response"), False),
    ],
)
def test_only_what_a_user_can_mend_is_not_retried(
    error_file: Path, error: Exception, repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(error_file.parents[2] / "attempt_0" / "0" / "error.json", error, monkeypatch)
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(error_file))
    assert permanent_failure() == (str(error) if repeats else None)
    assert error_file.exists() == repeats  # the third attempt ends, too


@pytest.mark.parametrize("content", ["", "{", "[]", '{"message": "killed"}', '{"message": {"message": "a bug"}}'])
def test_error_files_of_others_are_ignored(error_file: Path, content: str) -> None:
    (error_file.parents[2] / "attempt_0" / "0" / "error.json").write_text(content, encoding="utf-8")
    assert permanent_failure() is None


def test_without_torchrun_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
    with pytest.raises(ConfigError), recorded_failures():
        raise ConfigError("no such folder")
    assert permanent_failure() is None


def test_a_restarted_train_ends_at_once_without_repeating_the_error(error_file: Path) -> None:
    message = {"message": "no such folder", "permanent": True}
    previous = error_file.parents[2] / "attempt_0" / "0" / "error.json"
    previous.write_text(json.dumps({"message": message}), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", "none.toml"])
    assert (result.exit_code, result.output) == (1, "")
