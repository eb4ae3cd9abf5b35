"""The processes that train one student together: which one I am, my part of a batch, what all of us add up to.

torchrun or Ray Train starts them and says so in the environment; a process alone is the plain case, and nothing here
then costs anything. Small numbers travel by gloo, whatever the weights travel by.
"""

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError

T = TypeVar("T")
APPEARS_S = 60.0  # NFS may keep what it knows of a folder for so long
LOOK_S = 1e-3
PATIENCE = timedelta(hours=2)  # a rank may write, compile or measure while the others wait for it


@dataclass(frozen=True, eq=False)
class Ranks:
    """rank of size; local_rank counts on one machine.

    saving, fusing: groups of the threads that write checkpoints and fuse targets; each thread sends over its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    saving: Any = None
    fusing: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Mine, in order: neighbours stay together, and all parts together are the items."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, mine: bool) -> bool:
        return self.sum([mine])[0] > 0

    def all(self, mine: bool) -> bool:
        return self.sum([not mine])[0] == 0

    def agreed(self, value: T) -> T:
        """What the first rank says."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def gathered(self, mine: T) -> list[T]:
        """What each rank says, in their order."""
        if self.size == 1:
            return [mine]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, mine)
        return said

    def gathered_fusing(self, mine: T) -> list[T]:
        """The same, on the thread that fuses.

        It looks again and again whether the others have spoken: they may end without it, and a daemon thread that
        waits inside torch when its process ends aborts that.
        """
        if self.size == 1:
            return [mine]
        data = pickle.dumps(mine)
        sizes = [int(size) for size in self._all_fusing(torch.tensor([len(data)]))]
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes))), dtype=torch.uint8)
        said = [one.numpy().tobytes() for one in self._all_fusing(padded)]
        return [pickle.loads(one[:size]) for one, size in zip(said, sizes, strict=True)]

    def _all_fusing(self, mine: torch.Tensor) -> list[torch.Tensor]:
        said = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(said, mine, group=self.fusing, async_op=True)
        assert work is not None
        while not work.is_completed():
            time.sleep(LOOK_S)
        work.wait()
        return said

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])

    def blind_to(self, folder: Path) -> list[int]:
        """Ranks that do not see what the first one writes in a folder: it is another one on their machine."""
        if self.size == 1:
            return []
        mark = folder / f".seen-{os.getpid()}"
        if self.first:
            mark.touch()
        name = self.agreed(mark.name)
        blind = [rank for rank, sees in enumerate(self.gathered(_appears(folder / name))) if not sees]
        if self.first:
            mark.unlink()
        return blind

    @contextmanager
    def one_before_the_others(self) -> Iterator[None]:
        """One process of each machine does it first, and the others find it done."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The processes of each machine take turns, so that its memory has to hold once what each of them needs."""
        turns = max(self.gathered(self.local_rank)) + 1
        for turn in range(turns):
            if turn == self.local_rank:
                yield
            self.wait()

    def device(self, name: str) -> str:
        """Mine, where the run file says only `cuda`."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes."""
    until = time.monotonic() + APPEARS_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def joined(device: str, patience_s: float = 0.0) -> Iterator[Ranks]:
    """The ranks that this process was started as one of; alone if nothing says so.

    patience_s: how long one of them may wait for a teacher. Raises ConfigError if they cannot have a GPU each.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and device.startswith("cuda"):
        _take_gpu(device)
    if dist.is_initialized():  # Ray Train has done it
        yield _ranks(patience_s)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "gloo" if device.startswith("cpu") else "cpu:gloo,cuda:nccl"
        store, rank, size = _meeting_place()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout_of(patience_s))
        yield _ranks(patience_s)
        dist.destroy_process_group()  # not after an error: it would wait for ranks that do not know of it
    else:
        yield Ranks()


def _take_gpu(device: str) -> None:
    """Make this process's own the current one, which meshes and nccl take."""
    if device != "cuda":
        raise ConfigError(f"student.device is {device}, which all processes would take; cuda is each one's own")
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError("WORLD_SIZE is set and LOCAL_RANK is not: start the processes with torchrun, or set both")
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(
            f"process {local_rank} of this machine (LOCAL_RANK) sees {num_gpus} GPUs: start as many processes as "
            "there are GPUs, and let each of them see all"
        )
    torch.cuda.set_device(local_rank)


def _meeting_place() -> tuple[Any, int, int]:
    """Where the ranks find each other, mine, and how many there are.

    torchrun keeps one store over its restarts unless it is told otherwise (pytorch/pytorch#135712), and there a rank
    would wait for one that died. So each attempt has a corner of its own; but only the agents of one machine count
    attempts alike. Raises ConfigError for several.
    """
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    said = os.environ.get
    if said("TORCHELASTIC_USE_AGENT_STORE") != "True" or said("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return store, rank, size
    if said("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "torchrun --max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all of them, or "
            "restarted ranks wait for those that died"
        )
    if rank == 0:
        store.delete_key("exception_dump")  # nccl writes it beside all prefixes, and ends who reads it
    return PrefixStore(f"attempt {said('TORCHELASTIC_RESTART_COUNT')}", store), rank, size


def timeout_of(patience_s: float) -> timedelta:
    """How long ranks wait for one another: longer than one of them may wait for a teacher."""
    return PATIENCE + timedelta(seconds=patience_s)


def _ranks(patience_s: float) -> Ranks:
    if dist.get_world_size() == 1:
        return Ranks()
    timeout = timeout_of(patience_s)
    groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in ("saving", "fusing")]
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), *groups)
