"""Checkpoints of trained weights, optimizer state and step, written while training continues.

A checkpoint is a folder step-N. torch.distributed.checkpoint writes a copy of the state to a temporary folder, on a
background thread. The folder is renamed when every process has written its shard, so a folder step-N is always
complete. Any number of processes can load it. Frozen weights are not saved: they are those of the base model. Random
state is not saved: it is derived from the seed at every step (training/step.py). The position in the data is the step.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from trainer.distributed import Ranks
from trainer.errors import CheckpointError
from trainer.student.model import Student
from trainer.training.identity import Identity, check_identity

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_METADATA = {"identity": "identity.json", "precision": "precision.json", "fusion_state": "fusion.json"}
_OPTIMIZER_SETTINGS = ("weight_decay", "betas", "fused", "foreach")  # not restored: the run file or device sets them
_STAGING = StagingOptions(False, False, False, False)  # copy before training continues, without pinned memory
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)


@dataclass(frozen=True)
class CheckpointMetadata:
    """Content of a checkpoint besides weights, optimizer state and step.

    identity      values that must not change when the run is resumed (training/identity.py)
    precision     bf16 or fp32, as resolved at the first start
    fusion_state  state of the fusion after the last step; None for a fusion without state
    """

    identity: Identity
    precision: str
    fusion_state: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of one run. All processes call the same methods in the same order."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks = Ranks()) -> None:
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        self._writing: tuple[int, Future[Any]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._ranks.size == 1:  # after an error other processes may never finish
            self.finish()

    def save(self, step: int, student: Student, optimizer: torch.optim.Optimizer, metadata: CheckpointMetadata) -> None:
        """Start to save the state after `step` steps, and return while the files are written.

        Waits for the previous save first. Raises CheckpointError if one of the two cannot be written; earlier
        checkpoints are kept.
        """
        self.finish()
        final, partial = self._paths(step)
        try:
            if self._ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for key, name in _METADATA.items():
                    (partial / name).write_text(json.dumps(getattr(metadata, key)), encoding="utf-8")
            self._ranks.wait()
            _ignore_single_process_warning()
            state = _state(student, optimizer, step)
            # The staged copy is on the CPU. With copy-ahead, the writer's thread would still wait for the CUDA stream.
            writer, stager = FileSystemWriter(partial, per_thread_copy_ahead=0), DefaultStager(_STAGING)
            future = async_save(
                state,
                storage_writer=writer,
                async_stager=stager,
                process_group=self._ranks.saving,
                no_dist=self._ranks.size == 1,
            )
            assert isinstance(future, Future)
            future.add_done_callback(lambda _: stager.close())
        except _WRITE_ERRORS as error:
            raise self._write_error(final, partial, error) from error
        self._writing = (step, future)

    def finish(self) -> int | None:
        """Wait for the save in progress and return its step; None if there is none.

        Raises CheckpointError if it could not be written.
        """
        if self._writing is None:
            return None
        (step, future), self._writing = self._writing, None
        final, partial = self._paths(step)
        try:
            future.result()
            if self._ranks.first:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                for old in list(_checkpoints(self._folder))[: -self._keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except _WRITE_ERRORS as error:
            raise self._write_error(final, partial, error) from error
        self._ranks.wait()
        return step

    def finish_if_written(self) -> int | None:
        """Finish the save in progress if all processes have written their shards. Return its step, or None."""
        return self.finish() if self._writing and self._ranks.all(self._writing[1].done()) else None

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self._folder / f"step-{step:08d}", self._folder / f".partial-{step:08d}"

    def _write_error(self, final: Path, partial: Path, error: BaseException) -> CheckpointError:
        folder, advice = self._folder, "run again with --resume"
        if isinstance(_cause(error), OSError) and folder.exists():  # not a failed process or lack of memory
            advice = f"free disk space ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free), then {advice}"
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(folder)
        previous = f"the last complete one is {last.name}" if last else "there is no earlier one"
        return CheckpointError(f"cannot write checkpoint {final} ({_reason(error)}); {previous}: {advice}")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    return max(_checkpoints(folder), default=None, key=lambda path: path.name)


def load_metadata(path: Path) -> CheckpointMetadata:
    """Read the metadata of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        values = {key: json.loads((path / name).read_text(encoding="utf-8")) for key, name in _METADATA.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    return CheckpointMetadata(**values)


def load_checkpoint(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, identity: Identity, ranks: Ranks = Ranks()
) -> int:
    """Restore weights and optimizer, and return the number of steps done.

    Raises CheckpointError if the checkpoint belongs to another run or cannot be read.
    """
    check_identity(load_metadata(path).identity, identity, path)
    try:
        state = _state(student, optimizer, 0)
        _ignore_single_process_warning()
        load(state, checkpoint_id=path, no_dist=ranks.size == 1)
    except (OSError, TypeError, ValueError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    settings = [{key: group[key] for key in _OPTIMIZER_SETTINGS} for group in optimizer.param_groups]
    set_state_dict(
        student.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    return int(state["step"])


def _ignore_single_process_warning() -> None:
    """Ignore torch's warning that torch.distributed is not initialized, which is correct with one process.

    The filter applies to the whole process, because the warning is raised on the thread that writes.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _state(student: Student, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    model, optim = get_state_dict(student.model, optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optim, "step": torch.tensor(step)}


def _checkpoints(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step-*")))


def _cause(error: BaseException) -> BaseException:
    """Return the error of one failed process for a CheckpointException, otherwise the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
