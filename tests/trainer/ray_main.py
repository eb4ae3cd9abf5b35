"""Train on a new local Ray: `python -m tests.trainer.ray_main RUN.json WORKERS MAX_FAILURES`."""

import sys
from pathlib import Path

import ray

from trainer.config import RunConfig
from trainer.launch.ray_driver import train_on_ray


def main(path: str, workers: str, max_failures: str) -> None:
    ray.init("local", num_cpus=8, object_store_memory=100_000_000, include_dashboard=False)
    config = RunConfig.model_validate_json(Path(path).read_text(encoding="utf-8"))
    train_on_ray(config, workers=int(workers), max_failures=int(max_failures), resume=True)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
