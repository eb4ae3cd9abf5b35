"""Train with several ranks in forks of a process that has imported torch, with the environment variables of torchrun.

The imports of a rank take longer than the run of a test. Tests of torchrun itself use `command`.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from tests.serve import free_port
from tests.trainer import run_rank
from trainer.config import RunConfig

TIMEOUT_S = 480.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([run_rank.__name__])


def train_on_ranks(config: RunConfig, ranks: int, *options: str) -> None:
    """Train with several processes, and wait for their end. `options` are those of run_rank.

    Fails if a rank fails. The other ranks, which would wait for it, are killed.
    """
    path, port = _write(config), free_port()
    logs = [path.with_suffix(f".rank{rank}.txt") for rank in range(ranks)]
    arguments = [((rank, ranks, port), log, (str(path), *options)) for rank, log in enumerate(logs)]
    processes = [_FORKS.Process(target=_train_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    output = "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())
    assert [process.exitcode for process in processes] == [0] * ranks, output[-3000:]


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
