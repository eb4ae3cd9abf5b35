"""Checkpoints: what is trained, the optimizer and the step, written beside the training, whole or not at all.

A checkpoint is a folder step-N that torch.distributed.checkpoint writes under another name, from a copy, on a thread of
its own, and that is renamed when every rank has written its part: one that was cut off is never found. It can be read
by any number of ranks. Frozen weights are not saved, they are the base model's; nor is random state, which every step
makes anew from the seed (learning/step.py). What the data needs is the step.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
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

from trainer.config import RunConfig
from trainer.data.samples import Corpus
from trainer.errors import CheckpointError
from trainer.learning.student import Student
from trainer.ranks import Ranks

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_IDENTITY = "identity.json"  # what a checkpoint is worth nothing without
_FUSION = "fusion.json"
_SETTINGS = ("weight_decay", "betas", "fused", "foreach")  # the run file's word or the device's, not the checkpoint's
_HINTS = {"samples": ": other texts, or other [data] or eval.held_out_documents to cut them by"}
_PLAIN_COPY = StagingOptions(False, False, False, False)  # neither pinned nor shared, and whole before training goes on
_WRITING = (OSError, RuntimeError, CheckpointException)

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds beside weights and optimizer: the run's identity, and what its fusion has seen."""

    identity: Identity
    fusion_state: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of one run. All ranks call the same methods in the same order."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks = Ranks()) -> None:
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        self._writing: tuple[int, Future[Any]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._ranks.size == 1:  # another rank that has failed will not come to the end of it
            self.finish()

    def save(self, step: int, student: Student, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        """Begin to save after `step` steps; training goes on beside it. Ends the save before this one first.

        Raises CheckpointError; earlier checkpoints stay.
        """
        self.finish()
        final, partial = self._paths(step)
        try:
            if self._ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / _IDENTITY).write_text(json.dumps(kept.identity), encoding="utf-8")
                (partial / _FUSION).write_text(json.dumps(kept.fusion_state), encoding="utf-8")
            self._ranks.wait()
            alone = self._ranks.size == 1
            _quietly()
            state = _state(student, optimizer, step)
            # what is copied already needs no GPU: copied ahead, its thread would wait for the training's stream
            writer, stager = FileSystemWriter(partial, per_thread_copy_ahead=0), DefaultStager(_PLAIN_COPY)
            future = async_save(
                state, storage_writer=writer, async_stager=stager, process_group=self._ranks.saving, no_dist=alone
            )
            assert isinstance(future, Future)
            future.add_done_callback(lambda _: stager.close())
        except _WRITING as error:
            raise self._cannot(final, partial, error) from error
        self._writing = (step, future)

    def finish(self) -> int | None:
        """Wait for what is being written, take it in, and say after which step it was; None if there is nothing.

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
        except _WRITING as error:
            raise self._cannot(final, partial, error) from error
        self._ranks.wait()
        return step

    def settle(self) -> int | None:
        """The same, if all ranks have written their part already."""
        return self.finish() if self._writing and self._ranks.all(self._writing[1].done()) else None

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self._folder / f"step-{step:08d}", self._folder / f".partial-{step:08d}"

    def _cannot(self, final: Path, partial: Path, error: BaseException) -> CheckpointError:
        folder, advice = self._folder, "run again with --resume"
        if isinstance(_cause(error), OSError) and folder.exists():  # and not a rank that died or memory that is full
            advice = f"make room ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free), then {advice}"
        if self._ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(folder)
        before = f"the last good one is {last.name}" if last else "there is none yet"
        return CheckpointError(f"cannot write checkpoint {final} ({_reason(error)}); {before}: {advice}")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(_checkpoints(folder), default=None, key=lambda path: path.name)


def load_checkpoint(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, identity: Identity, ranks: Ranks = Ranks()
) -> int:
    """Restore and return the number of steps done. Raises CheckpointError if it belongs to another run."""
    try:
        saved = dict(json.loads((path / _IDENTITY).read_text(encoding="utf-8")))
        for key, value in identity.items():
            if saved.get(key) != value:
                said = f"{path} was written with {key} = {saved.get(key)!r}, this run has {value!r}"
                raise CheckpointError(said + _HINTS.get(key, ""))
        state = _state(student, optimizer, 0)
        _quietly()
        load(state, checkpoint_id=path, no_dist=ranks.size == 1)
    except (OSError, TypeError, ValueError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    own = [{key: group[key] for key in _SETTINGS} for group in optimizer.param_groups]
    set_state_dict(
        student.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    return int(state["step"])


def load_fusion_state(path: Path) -> dict[str, Any] | None:
    """What the fusion had seen at a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        state: dict[str, Any] | None = json.loads((path / _FUSION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    return state


def _quietly() -> None:
    """torch warns, on whatever thread it writes, that there is only one process; there is."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _state(student: Student, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    model, optim = get_state_dict(student.model, optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optim, "step": torch.tensor(step)}


def identity_of(config: RunConfig, student: Student, corpus: Corpus) -> Identity:
    """What must not change under a run, as JSON values: base weights, what of them is trained, samples, their order,
    what is measured."""
    weights = hashlib.sha256()
    base = student.folder
    for path in sorted([base / "config.json", *base.glob("*.safetensors"), *base.glob("*.bin")]):
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "train.seed": config.train.seed,
        "train.batch_samples": config.train.batch_samples,
        "student.train_layers": config.student.train_layers,
        "student.lora": config.student.lora.model_dump() if config.student.lora else None,
        "fusion.method": config.fusion.method,
        "student weights": weights.hexdigest()[:16],
        "data.sources.weight": [source.weight for source in config.data.sources],
        "samples": corpus.fingerprint[:16],
        "eval.max_samples": config.eval.max_samples,
    }


def _checkpoints(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step-*")))


def _cause(error: BaseException) -> BaseException:
    """Of the first rank that failed."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
