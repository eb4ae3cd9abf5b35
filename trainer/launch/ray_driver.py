"""Train on a Ray cluster. If a worker fails, all workers are restarted from the last checkpoint."""

import logging
import os
import threading
from itertools import count
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.distributed import collective_timeout
from trainer.errors import UserError
from trainer.launch.ray_cluster import connect, wait_for_room
from trainer.launch.ray_failures import WorkerFailure, explain
from trainer.launch.ray_worker import StopFlag, train_worker
from trainer.telemetry.jsonl import METRICS_FILE, read_metrics
from trainer.training.result import RunResult
from trainer.training.run_lock import LOCK_FILE, run_lock
from trainer.training.stop_signals import on_stop_signal

log = logging.getLogger("tutelage.launch")
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # environment variable of processes that `ray job submit` starts
RAY_FOLDER = "ray"  # Ray creates this folder in output.dir before the run writes anything
SIGNAL_POLL_S = 0.2


def train_on_ray(
    config: RunConfig,
    *,
    workers: int,
    max_failures: int,
    resume: bool,
    stop_at: int | None = None,
    address: str | None = None,
) -> RunResult:
    """Train with `workers` processes, each on its own GPU if the student's device is cuda.

    output.dir must be on a disk that all workers share. `address` is the address of a cluster, as for ray.init; without
    it a local Ray is started. Relative paths refer to the present working directory, or to Ray's copy of it on other
    nodes. On SIGTERM and SIGHUP the workers save a checkpoint and end. Raises UserError if more than max_failures
    attempts fail, at once if a restart would fail again, if the workers do not fit on the cluster, if output.dir
    contains a run and `resume` is false, or if output.dir would be in a copy of the working directory.
    """
    out = _output_folder(config, resume)
    if max_failures and not config.output.checkpoint_every_steps:
        log.warning("output.checkpoint_every_steps is not set: after a failure the run restarts at step 0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the working directory, for relative paths
    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(out)})})
    resource = "GPU" if config.student.device.startswith("cuda") else "CPU"
    is_local = connect(address)
    stop = _StopRequest()
    with on_stop_signal(stop.request):
        settings = {"config": config.model_dump_json(), "stop_at": stop_at, "cwd": str(Path.cwd())}
        settings["stop_flag"] = stop.flag
        for failures in count(1):
            wait_for_room(workers, resource, is_local, lambda: stop.requested)
            if stop.requested:
                return RunResult(0, (), None, terminated=True)
            failure = _attempt(_trainer(config, workers, settings), stop)
            if failure is None:
                return read_result(out, stop_at)
            if failure.permanent:
                raise UserError(failure.sentence)
            if failures > max_failures:
                raise UserError(f"the run ended early: {failure.sentence}; --resume continues it")
            log.warning("%s; restart %d of %d", failure.sentence, failures, max_failures)
    raise AssertionError("unreachable")


def _output_folder(config: RunConfig, resume: bool) -> Path:
    """Return output.dir as an absolute path. Raises UserError if the run cannot begin there."""
    out = Path(config.output.dir).expanduser()
    if JOB_VARIABLE in os.environ and not out.is_absolute():
        raise UserError(
            f"output.dir is {out}, which is in the Ray job's temporary copy of the working directory: set an absolute "
            "path on a disk that all nodes share"
        )
    out = out.absolute()
    with run_lock(out):  # the workers lock it for the whole run; here a run in progress is one clear error
        if any(path.name not in (RAY_FOLDER, LOCK_FILE) for path in out.iterdir()) and not resume:
            raise UserError(f"{out} already contains a run: continue it with --resume or choose another output.dir")
    return out


class _StopRequest:
    """Stop request of this process: a signal handler sets it, and `deliver` passes it to the workers."""

    def __init__(self) -> None:
        import ray

        self.requested = self._delivered = False
        self.flag = ray.remote(num_cpus=0)(StopFlag).remote()

    def request(self) -> None:
        self.requested = True

    def deliver(self) -> None:
        """Tell the workers, once. Not called from the signal handler, which may have interrupted Ray."""
        if self.requested and not self._delivered:
            self._delivered = True
            log.warning("stopping: the workers save a checkpoint")
            self.flag.set.remote()


def _trainer(config: RunConfig, workers: int, settings: dict[str, Any]) -> Any:
    """Return the TorchTrainer of one attempt. It retries nothing, so that this process decides what is retried.

    Ray prints tracebacks of every failure and repeats them; its log level hides them here, not in Ray's log files.
    """
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = config.student.device.startswith("cuda")
    out = Path(config.output.dir)
    return TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout_s=int(collective_timeout(config.unavailable_timeout_s).total_seconds()),
        ),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        run_config=RayRunConfig(
            name=out.name,
            storage_path=str(out / RAY_FOLDER),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _attempt(trainer: Any, stop: _StopRequest) -> WorkerFailure | None:
    """Run the workers until they end, and return their failure.

    Ray waits on another thread: in the main thread it would replace the handling of Ctrl-C, and delay signals.
    """
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again below, in the main thread
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SIGNAL_POLL_S)
        stop.deliver()
    if not errors:
        return None
    if isinstance(errors[0], (TrainingFailedError, RayError)):
        return explain(errors[0])
    raise errors[0]


def read_result(out: Path, stop_at: int | None) -> RunResult:
    """Read the result from the metrics file. Its held-out values include those before a resumption."""
    events = read_metrics(out / METRICS_FILE)
    held_out = {event["step"]: event["held_out_bpb"] for event in events if event["event"] == "eval"}
    start, end = ([event for event in events if event["event"] == kind][-1] for kind in ("start", "end"))
    planned = start["steps"] if stop_at is None else min(start["steps"], stop_at)
    terminated = end["step"] < planned and end["reason"] is None
    return RunResult(end["step"], tuple(held_out.items()), Path(end["model"]) if end["model"] else None, terminated)
