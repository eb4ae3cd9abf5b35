"""Train on a Ray cluster. If a worker fails, Ray restarts all workers from the last checkpoint."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.distributed import collective_timeout
from trainer.errors import UserError
from trainer.telemetry.jsonl import METRICS_FILE, read_metrics
from trainer.training.loop import RunResult, train
from trainer.training.run_lock import LOCK_FILE, run_lock
from trainer.training.stop_signals import treat_sighup_as_sigterm

log = logging.getLogger("tutelage.launch")
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # environment variable of processes that `ray job submit` starts
RAY_FOLDER = "ray"  # Ray creates this folder in output.dir before the run writes anything


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
    nodes. Raises UserError if more than max_failures attempts fail, if output.dir contains a run and `resume` is false,
    or if output.dir would be in a copy of the working directory.
    """
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
    if max_failures and not config.output.checkpoint_every_steps:
        log.warning("output.checkpoint_every_steps is not set: after a failure the run restarts at step 0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # workers keep the working directory, for relative paths
    if address is None:  # a local Ray listens on all interfaces and runs submitted code; ray reads this on import
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(out)})})
    on_gpu = config.student.device.startswith("cuda")
    if not ray.is_initialized():
        ray.init(address or "local")
    treat_sighup_as_sigterm()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config.model_dump_json(), "stop_at": stop_at, "cwd": str(Path.cwd())},
        torch_config=TorchConfig(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout_s=int(collective_timeout(config.unavailable_timeout_s).total_seconds()),
        ),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        run_config=RayRunConfig(
            name=out.name, storage_path=str(out / RAY_FOLDER), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise UserError(f"the run ended early: {error}; --resume continues it") from error
    return read_result(out, stop_at)


def _train_worker(settings: dict[str, Any]) -> None:
    """Train in one worker. It always resumes, because it may be a restart after a failure."""
    with suppress(FileNotFoundError, NotADirectoryError):  # on another node: use Ray's copy, or absolute paths
        os.chdir(settings["cwd"])
    train(RunConfig.model_validate_json(settings["config"]), resume=True, stop_at=settings["stop_at"])


def read_result(out: Path, stop_at: int | None) -> RunResult:
    """Read the result from the metrics file. Its held-out values include those before a resumption."""
    events = read_metrics(out / METRICS_FILE)
    held_out = {event["step"]: event["held_out_bpb"] for event in events if event["event"] == "eval"}
    start, end = ([event for event in events if event["event"] == kind][-1] for kind in ("start", "end"))
    planned = start["steps"] if stop_at is None else min(start["steps"], stop_at)
    terminated = end["step"] < planned and end["reason"] is None
    return RunResult(end["step"], tuple(held_out.items()), Path(end["model"]) if end["model"] else None, terminated)
