"""Lack of memory, threads or permissions ends a command with one sentence, whichever library raises the error."""

import io
import sys
from collections.abc import Callable

import pytest
import torch
import typer

from trainer.cli.app import one_sentence_errors
from trainer.errors import DataError


def allocate() -> None:
    bytearray(1 << 62)


def allocate_tensor() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def import_library() -> None:
    try:
        allocate()
    except MemoryError as error:
        raise ImportError("cannot import the library") from error


def start_thread() -> None:
    raise RuntimeError("can't start new thread")  # as threading raises it


def map_file() -> None:
    raise OSError(12, "Cannot allocate memory", "/a/file")


def fork() -> None:
    raise BlockingIOError(11, "Resource temporarily unavailable")  # as os.fork raises it at the limit of `ulimit -u`


def allocate_on_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


def open_file() -> None:
    raise PermissionError(13, "Permission denied", "/a/\x1b[31mfile")


def message_of(monkeypatch: pytest.MonkeyPatch, function: Callable[[], None]) -> str:
    """Run a function as a command, which must exit with 1. Return its standard error."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(typer.Exit) as ended, one_sentence_errors():
        function()
    assert ended.value.exit_code == 1
    return stderr.getvalue()


@pytest.mark.parametrize("function", [allocate, allocate_tensor, import_library, start_thread, map_file, fork])
def test_exhausted_memory_or_threads_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[], None]
) -> None:
    message = message_of(monkeypatch, function)
    assert message.startswith("error: the memory or the threads of this process are exhausted (")
    assert message.count("\n") == 1


def test_the_memory_of_a_gpu_has_its_own_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    message = message_of(monkeypatch, allocate_on_gpu)
    assert message.startswith(
        "error: the memory of the GPU is exhausted (CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert "train.gradient_accumulation_steps" in message
    assert message.count("\n") == 1


def test_a_path_without_permission_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert message_of(monkeypatch, open_file) == "error: cannot access /a/\\x1b[31mfile: Permission denied\n"


def test_an_error_of_the_project_is_printed_once_although_lack_of_memory_has_caused_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read() -> None:
        try:
            allocate()
        except MemoryError as error:
            raise DataError("cannot read x") from error

    assert message_of(monkeypatch, read) == "error: cannot read x\n"


LOADER = ImportError("libgomp.so.1: cannot allocate memory in static TLS block")  # depends on the order of imports


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), RuntimeError("x"), PermissionError(), OSError(5, "x"), LOADER]
)
def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(type(error)) as raised, one_sentence_errors():
        raise error
    assert raised.value is error
