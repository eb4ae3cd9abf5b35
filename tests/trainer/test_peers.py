"""Processes that wait for others say so, give up, and name the cause in one sentence."""

import subprocess
import sys

import pytest

from tests.serve import free_port
from trainer.errors import CheckpointError, DataError, PeerError
from trainer.peers import peer_errors

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:62168. This is "
    "typically caused by a remote worker crashing."
)


def ranks(num_started: range, size: int, what: str) -> list[tuple[int, str]]:
    """Start processes of a run. Return their exit codes and what they print on standard error."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.trainer.rank_main"]
    processes = [
        subprocess.Popen([*command, str(rank), str(size), port, what], stderr=subprocess.PIPE, text=True)
        for rank in num_started
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_an_error_of_one_process_is_one_sentence_in_each() -> None:
    (first_code, first), (second_code, second) = ranks(range(2), 2, "fail")
    assert (first_code, second_code) == (1, 1)
    waited, lost = first.splitlines()
    assert waited == "process 0 has waited 0.5 s for another process of this run; it gives up after 7200 s"
    assert lost.startswith("error: process 0 of 2 has lost the connection to another process of the run (")
    assert lost.endswith("): the message of the process that ended first names the cause")
    assert second == "error: line 7 is not JSON\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "waits", "error"),
    [
        (0, "process 0 of 2 waits for the other processes at ", "process 0 of 2 has not met the other processes at "),
        (1, "process 1 of 2 waits for process 0 at ", "process 1 of 2 has not reached process 0 at "),
    ],
)
def test_a_process_whose_peers_do_not_start_says_so_and_gives_up(rank: int, waits: str, error: str) -> None:
    ((code, printed),) = ranks(range(rank, rank + 1), 2, "alone")
    first, last = printed.splitlines()
    assert code == 1
    assert first.startswith(waits)
    assert first.endswith("it gives up after 4 s")
    assert last.startswith(f"error: {error}127.0.0.1:")
    assert " within 4 s (" in last


def test_errors_of_collectives_become_peer_errors_wherever_they_were_wrapped() -> None:
    for error in (RuntimeError(GLOO), CheckpointError("cannot write")):
        with pytest.raises(PeerError) as caught, peer_errors(0, 2):
            raise error from RuntimeError(GLOO)
        assert str(caught.value) == (
            "process 0 of 2 has lost the connection to another process of the run (Connection closed by peer "
            "[127.0.0.1]:62168): the message of the process that ended first names the cause"
        )


@pytest.mark.parametrize("error", [DataError("no file in /data/gloo/a.txt"), ValueError("a bug"), KeyError("a bug")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), peer_errors(0, 2):
        raise error
