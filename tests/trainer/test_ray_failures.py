"""What the driver of a run on Ray says about its cluster and its workers. No test here needs a Ray."""

import pickle

import pytest

from teachers.protocol.errors import Overloaded, Rejected
from trainer.errors import ConfigError, PeerError, RunInUse
from trainer.launch.ray_cluster import missing_room
from trainer.launch.ray_failures import WorkerFailure, as_worker_failure, explain


class OfWorkers(Exception):
    """Has the attribute of ray.train.WorkerGroupError."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\nTraceback …")
        self.worker_failures = dict(enumerate(failures))


class OfController(Exception):
    """Has the attribute of ray.train.ControllerError."""

    controller_failure = RuntimeError("a worker did not start\nTraceback …")


def reported(error: Exception) -> WorkerFailure:
    """Return the failure that the driver receives, through pickle."""
    failure = pickle.loads(pickle.dumps(as_worker_failure(error)))
    assert isinstance(failure, WorkerFailure)
    return failure


PEER = reported(PeerError("process 0 has lost the connection"))


@pytest.mark.parametrize(
    ("error", "sentence", "permanent"),
    [
        (OfWorkers(PEER, reported(ConfigError("no such\nfolder"))), "no such folder", True),
        (OfWorkers(PEER, reported(Rejected("top_k is too large"))), "top_k is too large", True),
        (OfWorkers(PEER, reported(RunInUse("runs/a is in use"))), "worker 1 failed: runs/a is in use", False),
        (OfWorkers(PEER, reported(Overloaded("busy", 3.0))), "worker 1 failed: busy", False),
        (OfWorkers(PEER, RuntimeError("The actor died.\n\tpid: 7")), "worker 1 failed: The actor died.", False),
        (OfWorkers(PEER, PEER), "worker 0 failed: process 0 has lost the connection", False),
        (OfController(), "Ray could not start or watch the workers: a worker did not start", False),
    ],
)
def test_the_first_cause_is_one_sentence(error: Exception, sentence: str, permanent: bool) -> None:
    failure = explain(error)
    assert (failure.sentence, failure.permanent) == (sentence, permanent)


def test_the_traceback_of_a_bug_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        failure = explain(OfWorkers(PEER, reported(error)))
    assert (failure.sentence, failure.permanent) == ("worker 1 failed: ZeroDivisionError: division by zero", False)
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize(
    ("workers", "resource", "free", "total", "sentence"),
    [
        (
            2,
            "CPU",
            {"10.0.0.1": {"CPU": 0.8}, "10.0.0.2": {"CPU": 1.6, "GPU": 1.0}},
            {"10.0.0.1": {"CPU": 1.0}, "10.0.0.2": {"CPU": 2.0, "GPU": 1.0}},
            "--ray-workers 2 needs 2 CPUs, one per worker, and this Ray has room for 1 of the workers (CPUs: 0.8 of 1 "
            "free on 10.0.0.1, 1.6 of 2 free on 10.0.0.2): use --ray-workers 1, or free CPUs or add nodes",
        ),
        (
            4,
            "GPU",
            {"10.0.0.1": {"CPU": 8.0}},
            {"10.0.0.1": {"CPU": 8.0}},
            "--ray-workers 4 needs 4 GPUs, one per worker, and this Ray has room for 0 of the workers (GPUs: 0 of 0 "
            "free on 10.0.0.1): set student.device to cpu, or use a larger Ray cluster (--address)",
        ),
    ],
)
def test_missing_room_is_named_by_node(
    workers: int, resource: str, free: dict[str, dict[str, float]], total: dict[str, dict[str, float]], sentence: str
) -> None:
    is_final = sum(node.get(resource, 0) for node in total.values()) < workers
    assert missing_room(workers, resource, free, total, is_final) == sentence


def test_many_nodes_are_summarized() -> None:
    nodes = {f"node-{i}": {"CPU": 0.5} for i in range(100)}
    sentence = missing_room(3, "CPU", nodes, nodes, is_final=False)
    assert "0.5 of 0.5 free on node-7, and 92 more nodes" in sentence
    assert "--ray-workers 0" not in sentence
