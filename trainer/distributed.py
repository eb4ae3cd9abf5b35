"""Process group of a run: ranks, shards of sequences, and collectives for Python values.

torchrun or Ray Train starts the processes and sets the environment variables that describe them. With one process the
collectives do not communicate. Python values are always exchanged over gloo.
"""

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

import trainer.peers as peers
from trainer.errors import ConfigError

T = TypeVar("T")
VISIBLE_TIMEOUT_S = 60.0  # NFS may cache the listing of a folder for this long
POLL_S = 1e-3
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # a process may write, compile or evaluate while the others wait for it


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among all processes of the run.

    rank        index of the process
    size        number of processes
    local_rank  index among the processes of the same machine
    saving      process group of the thread that writes checkpoints
    fusing      process group of the thread that fuses targets
    timeout_s   time after which a collective gives up

    Each thread needs its own group, because the order of collectives of different threads is not defined.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    saving: Any = None
    fusing: Any = None
    timeout_s: float = 0.0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and metrics."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's contiguous shard of the items. The shards of all ranks, concatenated, are the items."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def reported_wait(self, what: str = "another process of this run") -> AbstractContextManager[None]:
        """Return a context manager that logs what this process waits for, if its block takes long."""
        return peers.reported_wait(self.rank, self.timeout_s, what) if self.size > 1 else nullcontext()

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self.reported_wait():
            dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Return whether the value is true in some process."""
        return self.all_reduce_sum([value])[0] > 0

    def all(self, value: bool) -> bool:
        """Return whether the value is true in all processes."""
        return self.all_reduce_sum([not value])[0] == 0

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        with self.reported_wait():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.reported_wait():
            dist.all_gather_object(values, value)
        return values

    def all_gather_fusion(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Only the fusion thread calls this.

        The thread polls instead of waiting inside torch: other processes may end without calling this, and a daemon
        thread that waits inside torch when its process exits aborts the process.
        """
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        sizes = [int(size) for size in self._gather_fusion_tensor(torch.tensor([len(data)]))]
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes))), dtype=torch.uint8)
        gathered = [tensor.numpy().tobytes() for tensor in self._gather_fusion_tensor(padded)]
        return [pickle.loads(data[:size]) for data, size in zip(gathered, sizes, strict=True)]

    def _gather_fusion_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        work = dist.all_gather(gathered, tensor, group=self.fusing, async_op=True)
        assert work is not None
        with self.reported_wait():
            while not work.is_completed():
                time.sleep(POLL_S)
        work.wait()
        return gathered

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.all_reduce_sum([0.0])

    def ranks_without(self, folder: Path) -> list[int]:
        """Return the ranks that do not see a file that rank 0 writes to the folder; none if all share the folder."""
        if self.size == 1:
            return []
        marker = folder / f".visible-{os.getpid()}"
        if self.first:
            marker.touch()
        name = self.broadcast(marker.name)
        visible = self.all_gather(_becomes_visible(folder / name))
        if self.first:
            marker.unlink()
        return [rank for rank, sees in enumerate(visible) if not sees]

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """Run the block in local rank 0 of each machine first, then in the others, which use what it has cached."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    @contextmanager
    def one_per_machine_at_a_time(self) -> Iterator[None]:
        """Run the block in one process of each machine at a time, to limit the memory in use on the machine."""
        num_turns = max(self.all_gather(self.local_rank)) + 1
        for turn in range(num_turns):
            if turn == self.local_rank:
                yield
            self.wait()

    def device(self, name: str) -> str:
        """Return cuda:LOCAL_RANK for `cuda` with several processes, otherwise `name`."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name


def _becomes_visible(path: Path) -> bool:
    """Return whether a file exists, or appears within VISIBLE_TIMEOUT_S."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def process_group(device: str, unavailable_timeout_s: float = 0.0) -> Iterator[Ranks]:
    """Initialize the process group that the environment describes, and yield this process's Ranks.

    unavailable_timeout_s is the time that a process may wait for a teacher. Without WORLD_SIZE the run has one process.
    Raises ConfigError if the device or the environment does not give each process its own GPU, or if torchrun would
    restart processes on several machines with a shared store, and PeerError if another process does not respond.
    """
    num_processes = number_of_processes()
    if num_processes > 1 and device.startswith("cuda"):
        _set_cuda_device(device)
    if dist.is_initialized():  # by Ray Train
        with peers.peer_errors(dist.get_rank(), dist.get_world_size()):
            yield _ranks(unavailable_timeout_s)
    elif num_processes > 1:
        _check_environment(num_processes)
        backend = "gloo" if device.startswith("cpu") else "cpu:gloo,cuda:nccl"
        with peers.peer_errors(int(os.environ["RANK"]), num_processes):
            store, rank, size = _rendezvous_store()
            timeout = collective_timeout(unavailable_timeout_s)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            yield _ranks(unavailable_timeout_s)
        dist.destroy_process_group()  # not after an error: it would wait for processes that have not failed
    else:
        yield Ranks()


def number_of_processes() -> int:
    """Return WORLD_SIZE, or 1 if it is not set. Raises ConfigError if a variable of torchrun is not an integer."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "0")
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise ConfigError(f"the environment variable {name} is {text[:40]!r}, expected a number: unset it")
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_environment(num_processes: int) -> None:
    """Raise ConfigError if a variable of torchrun is missing or contradicts WORLD_SIZE."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {num_processes} and {missing[0]} is not set: start the processes with torchrun, or unset "
            "WORLD_SIZE"
        )
    if max(int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK")) >= num_processes:
        raise ConfigError(
            f"WORLD_SIZE is {num_processes}, but RANK or LOCAL_RANK is not below it: start the processes with torchrun"
        )


def _set_cuda_device(device: str) -> None:
    """Make this process's GPU the current device, which device meshes and NCCL use."""
    if device != "cuda":
        raise ConfigError(
            f"student.device is {device}, which all processes would use; `cuda` gives each process its own GPU"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE is set and LOCAL_RANK is not: start the processes with torchrun, or set both")
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(
            f"process {local_rank} of this machine (LOCAL_RANK) sees {num_gpus} GPUs: start one process per GPU, and "
            "make all GPUs visible to every process"
        )
    torch.cuda.set_device(local_rank)


def _rendezvous_store() -> tuple[Any, int, int]:
    """Return the store for the rendezvous, this process's rank, and the number of processes.

    By default torchrun keeps one store across restarts (pytorch/pytorch#135712). With the keys of an earlier attempt, a
    restarted process would wait for a process that has ended; each attempt therefore has its own prefix. Agents of
    different machines may count attempts differently, so ConfigError is raised for several machines.
    """
    env = os.environ.get
    store, rank, size = _meet(int(env("RANK", "0")), int(env("WORLD_SIZE", "1")))
    if env("TORCHELASTIC_USE_AGENT_STORE") != "True" or env("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return store, rank, size
    if env("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "torchrun --max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them; "
            "otherwise restarted processes wait for processes that have ended"
        )
    if rank == 0:
        store.delete_key("exception_dump")  # NCCL writes this key without a prefix; a process that reads it exits
    return PrefixStore(f"attempt {env('TORCHELASTIC_RESTART_COUNT')}", store), rank, size


def _meet(rank: int, size: int) -> tuple[Any, int, int]:
    """Wait until all processes have started. Raises PeerError after peers.RENDEZVOUS_S."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank:
        peers.await_first_process(address, port, rank, size)
    with peers.rendezvous_errors(rank, size, f"{address}:{port}"):
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=peers.RENDEZVOUS_S)))
    return store, rank, size


def collective_timeout(unavailable_timeout_s: float) -> timedelta:
    """Return the timeout of collectives: COLLECTIVE_TIMEOUT more than a process may wait for a teacher."""
    return COLLECTIVE_TIMEOUT + timedelta(seconds=unavailable_timeout_s)


def _ranks(unavailable_timeout_s: float) -> Ranks:
    if dist.get_world_size() == 1:
        return Ranks()
    timeout = collective_timeout(unavailable_timeout_s)
    saving, fusing = (dist.new_group(backend="gloo", timeout=timeout) for _ in ("saving", "fusing"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, saving, fusing, timeout.total_seconds())
