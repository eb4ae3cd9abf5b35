"""Checkpoints of trained weights, optimizer state and step, written while training continues.

A checkpoint is a folder step-N with one safetensors file per process, the metadata as JSON, and a manifest of digests
(training/checkpoint_storage.py). A copy of the state is written to a temporary folder, on a background thread. The
folder is renamed when every process has written its shard, so a folder step-N is always complete. Any number of
processes can load it. Frozen weights are not saved, because they equal those of the base model. Random state is not
saved, because it is derived from the seed at every step (training/step.py). The position in the data is the step. The
settings of the optimizer are not saved, because the run file, the device and the step determine them.
"""

import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from trainer.distributed import Ranks
from trainer.errors import CheckpointError
from trainer.student.model import Student
from trainer.training.checkpoint_folder import (
    STATE_FILE,
    CheckpointMetadata,
    IntactCheckpoint,
    checkpoint_name,
    delete_old,
    newest_written,
    partial_name,
    set_aside_newer,
    write_state,
)
from trainer.training.checkpoint_storage import CheckpointReader, CheckpointWriter
from trainer.training.run_lock import RunLock

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_STAGING = StagingOptions(False, False, False, False)  # copy before training continues, without pinned memory
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)


class Checkpoints:
    """The checkpoints of one start of a run. All processes call the same methods in the same order.

    done  number of steps before this start
    lock  the lock on the run's folder, which is checked before a checkpoint is renamed or deleted
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = Ranks(), *, done: int = 0, lock: RunLock) -> None:
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        self._done = done
        self._lock = lock
        self._writing: tuple[int, Future[Any]] | None = None

    def __enter__(self) -> "Checkpoints":
        """Rename checkpoints that are not intact. Raises CheckpointError if the folder cannot be written."""
        if self._ranks.first:
            try:
                set_aside_newer(self._folder, self._done)
            except OSError as error:
                raise CheckpointError(f"cannot write {self._folder} ({error.strerror})") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._ranks.size == 1:  # after an error other processes may never finish
            self.finish()

    def save(self, student: Student, optimizer: torch.optim.Optimizer, metadata: CheckpointMetadata) -> None:
        """Start to save the state after `metadata.step` steps, and return while the files are written.

        Waits for the previous save first. Raises CheckpointError if one of the two cannot be written; earlier
        checkpoints are kept.
        """
        self.finish()
        step = metadata.step
        final, partial = self._paths(step)
        try:
            if self._ranks.first:
                self._lock.check()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_state(partial, metadata)
            self._ranks.wait()
            _ignore_single_process_warning()
            model, optim = get_state_dict(student.model, optimizer, options=_OPTIONS)
            stager = DefaultStager(_STAGING)
            future = async_save(
                {"model": model, "optimizer": optim["state"]},
                storage_writer=CheckpointWriter(partial, [STATE_FILE]),
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
                self._lock.check()
                os.replace(partial, final)
                delete_old(self._folder, self._keep)
        except _WRITE_ERRORS as error:
            raise self._write_error(final, partial, error) from error
        self._ranks.wait()
        return step

    def finish_if_written(self) -> int | None:
        """Finish the save in progress if all processes have written their shards. Return its step, or None."""
        return self.finish() if self._writing and self._ranks.all(self._writing[1].done()) else None

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self._folder / checkpoint_name(step), self._folder / partial_name(step)

    def _write_error(self, final: Path, partial: Path, error: BaseException) -> CheckpointError:
        folder, advice = self._folder, "run again with --resume"
        if isinstance(_cause(error), OSError) and folder.exists():  # not a failed process or lack of memory
            advice = f"free disk space ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free), then {advice}"
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        last = newest_written(folder)
        previous = f"the last complete one is {last.name}" if last else "there is no earlier one"
        return CheckpointError(f"cannot write checkpoint {final} ({_reason(error)}); {previous}: {advice}")


def load_checkpoint(
    checkpoint: IntactCheckpoint, student: Student, optimizer: torch.optim.Optimizer, ranks: Ranks = Ranks()
) -> int:
    """Restore weights and optimizer, and return the number of steps done.

    Raises CheckpointError if the checkpoint does not fit the model or cannot be read.
    """
    model, optim = get_state_dict(student.model, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {"model": model, "optimizer": optim["state"]}
    try:
        _ignore_single_process_warning()
        load(state, storage_reader=CheckpointReader(checkpoint.path, checkpoint.digests), no_dist=ranks.size == 1)
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"cannot read checkpoint {checkpoint.path} ({_reason(error)})") from error
    optim["state"] = state["optimizer"]
    set_state_dict(student.model, optimizer, model_state_dict=state["model"], optim_state_dict=optim, options=_OPTIONS)
    return checkpoint.metadata.step


def _ignore_single_process_warning() -> None:
    """Ignore torch's warning that torch.distributed is not initialized, which is correct with one process.

    The filter applies to the whole process, because the warning is raised on the thread that writes.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _cause(error: BaseException) -> BaseException:
    """Return the error of one failed process for a CheckpointException, otherwise the error itself."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
