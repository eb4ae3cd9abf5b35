"""Train with several ranks: processes with the environment of torchrun that need not import torch.

A fork server imports the trainer once, and every rank is a fork of it, because the imports take longer than a test's
run. The command of torchrun itself, which tests of its restarts need, is in `command`.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch

from tests.serve import free_port
from tests.trainer import run_rank
from trainer.config import RunConfig

TIMEOUT_S = 480.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([run_rank.__name__])


def train_on_ranks(config: RunConfig, ranks: int, *options: str) -> None:
    """Train with several processes, and wait for their end. `options` are those of run_rank; fails if a rank fails."""
    path, port = _write(config), free_port()
    logs = [path.with_suffix(f".rank{rank}.txt") for rank in range(ranks)]
    arguments = [((rank, ranks, port), log, (str(path), *options)) for rank, log in enumerate(logs)]
    processes = [_FORKS.Process(target=_train_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    output = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())
    assert not alive, f"{len(alive)} ranks did not end within {TIMEOUT_S:g} s\n{output[-3000:]}"
    assert all(process.exitcode == 0 for process in processes), output[-3000:]


def command(config: RunConfig, ranks: int, *options: str) -> list[str]:
    """Return the torchrun command for a run config, which is written next to output.dir."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", run_rank.__name__, str(_write(config)), *options]


def _write(config: RunConfig) -> Path:
    path = Path(config.output.dir).with_suffix(".json")
    path.write_text(config.model_dump_json(), encoding="utf-8")
    return path


def _train_rank(rank_size_port: tuple[int, int, int], log: Path, arguments: tuple[str, ...]) -> None:
    """Train one rank in this process, with its output in a file."""
    rank, size, port = map(str, rank_size_port)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)  # as torchrun does by OMP_NUM_THREADS
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_rank.main(*arguments)
