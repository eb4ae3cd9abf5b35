"""The processes that train one student together: which one I am, my part of a batch, what all of us add up to.

torchrun or Ray Train starts them and says so in the environment; a process alone is the plain case, and nothing here
then costs anything. Small numbers travel by gloo, whatever the weights travel by.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError

T = TypeVar("T")
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

    def gathered(self, mine: T, group: Any = None) -> list[T]:
        """What each rank says, in their order."""
        if self.size == 1:
            return [mine]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, mine, group=group)
        return said

    def gathered_fusing(self, mine: T) -> list[T]:
        """The same, on the thread that fuses."""
        return self.gathered(mine, self.fusing)

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])

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


@contextmanager
def joined(device: str, patience_s: float = 0.0) -> Iterator[Ranks]:
    """The ranks that this process was started as one of; alone if nothing says so.

    patience_s: how long one of them may wait for a teacher. Raises ConfigError if all of them would take one GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise ConfigError(f"student.device is {device}, which all processes would take; cuda is each one's own")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # meshes and nccl take the current one
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
