"""The same run on a Ray cluster: a worker for each rank, all begun again from the last checkpoint when one dies."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.loop import RunResult, train
from trainer.ranks import timeout_of
from trainer.reports.history import FILE
from trainer.reports.metrics import read_metrics

log = logging.getLogger("tutelage.launch")
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set where `ray job submit` has sent us
RAY = "ray"  # the folder that Ray keeps beside a run, from before there is one


def train_on_ray(
    config: RunConfig,
    *,
    workers: int,
    max_failures: int,
    resume: bool,
    stop_at: int | None = None,
    address: str | None = None,
) -> RunResult:
    """Run with that many ranks, on a GPU each if the student is on cuda. output.dir is on a disk that all of them see.

    `address` is a cluster's, as ray.init takes it; a local Ray otherwise. Relative paths are from here on every node,
    or from the copy of the working directory that Ray has put there. Raises UserError with Ray's last word if more than
    max_failures attempts end early, if output.dir holds a run and `resume` is not given, or if it would lie in a copy.
    """
    out = Path(config.output.dir).expanduser()
    if IN_JOB in os.environ and not out.is_absolute():
        raise UserError(
            f"output.dir is {out}, in the copy of the working directory that a Ray job has on one node and loses with "
            "it: give an absolute path on a disk that all nodes see"
        )
    out = out.absolute()
    if out.exists() and any(path.name != RAY for path in out.iterdir()) and not resume:
        raise UserError(f"{out} already holds a run: continue it with --resume or choose another output.dir")
    if max_failures and not config.output.checkpoint_every_steps:
        log.warning("output.checkpoint_every_steps is not set: after a failure the run begins again at its first step")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # or workers have a folder of their own, where no path holds
    if address is None:  # Ray listens on all interfaces and runs what it is sent; read when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": str(out)})})
    on_gpu = config.student.device.startswith("cuda")
    if not ray.is_initialized():
        ray.init(address or "local")
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"config": config.model_dump_json(), "stop_at": stop_at, "cwd": str(Path.cwd())},
        torch_config=TorchConfig(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=int(timeout_of(config.patience_s).total_seconds())
        ),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        run_config=RayRunConfig(
            name=out.name, storage_path=str(out / RAY), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise UserError(f"the run ended early: {error}; --resume continues it") from error
    return _result(out)


def _rank(given: dict[str, Any]) -> None:
    """One rank. It always resumes: after a failure there is something to resume."""
    with suppress(FileNotFoundError, NotADirectoryError):  # another node, which has the job's copy or absolute paths
        os.chdir(given["cwd"])
    train(RunConfig.model_validate_json(given["config"]), resume=True, stop_at=given["stop_at"])


def _result(out: Path) -> RunResult:
    """As the first rank has written it."""
    events = read_metrics(out / FILE)
    held_out = {event["step"]: event["held_out_bpb"] for event in events if event["event"] == "eval"}
    last = [event for event in events if event["event"] == "end"][-1]
    return RunResult(last["step"], tuple(held_out.items()), Path(last["model"]) if last["model"] else None)
