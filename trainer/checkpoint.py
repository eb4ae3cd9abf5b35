"""Checkpoints: what is trained, the optimizer, the step and the random state, written whole or not at all.

A checkpoint is a folder step-N made by torch.distributed.checkpoint under another name and renamed when it is
complete, so one that was cut off is never found. Frozen weights are not saved; they are the base model's.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from trainer.config import RunConfig
from trainer.data import Corpus
from trainer.errors import CheckpointError
from trainer.student import Student

_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
_IDENTITY = "identity.json"  # what a checkpoint is worth nothing without
_FUSION = "fusion.json"

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds beside weights and optimizer: the run's identity, and what its fusion has seen."""

    identity: Identity
    fusion_state: dict[str, Any] | None = None


def save_checkpoint(
    folder: Path, step: int, student: Student, optimizer: torch.optim.Optimizer, kept: Kept, *, keep: int
) -> Path:
    """Save after `step` steps, and keep the last `keep` checkpoints.

    Raises CheckpointError; earlier checkpoints stay.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".partial-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _single_process():
            save(_state(student, optimizer, step), checkpoint_id=partial, no_dist=True)
        (partial / _IDENTITY).write_text(json.dumps(kept.identity), encoding="utf-8")
        (partial / _FUSION).write_text(json.dumps(kept.fusion_state), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError, CheckpointException) as error:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free" if folder.exists() else "no folder"
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(folder)
        before = f"the last good one is {last.name}" if last else "there is none yet"
        raise CheckpointError(
            f"cannot write checkpoint {final} ({free}: {_reason(error)}); {before}: make room, then run again "
            "with --resume"
        ) from error
    for old in list(_checkpoints(folder))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max(_checkpoints(folder), default=None, key=lambda path: path.name)


def load_checkpoint(path: Path, student: Student, optimizer: torch.optim.Optimizer, identity: Identity) -> int:
    """Restore and return the number of steps done. Raises CheckpointError if it belongs to another run."""
    try:
        saved = dict(json.loads((path / _IDENTITY).read_text(encoding="utf-8")))
        for key, value in identity.items():
            if saved.get(key) != value:
                raise CheckpointError(f"{path} was written with {key} = {saved.get(key)!r}, this run has {value!r}")
        state = _state(student, optimizer, 0)
        with _single_process():
            load(state, checkpoint_id=path, no_dist=True)
    except (OSError, TypeError, ValueError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    set_state_dict(
        student.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    torch.set_rng_state(state["rng"])
    return int(state["step"])


def load_fusion_state(path: Path) -> dict[str, Any] | None:
    """What the fusion had seen at a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        state: dict[str, Any] | None = json.loads((path / _FUSION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path} ({_reason(error)})") from error
    return state


@contextmanager
def _single_process() -> Iterator[None]:
    """torch warns that there is only one process; there is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(student: Student, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    model, optim = get_state_dict(student.model, optimizer, options=_OPTIONS)
    return {"model": model, "optimizer": optim, "step": torch.tensor(step), "rng": torch.get_rng_state()}


def identity_of(config: RunConfig, student: Student, corpus: Corpus) -> Identity:
    """What must not change under a run, as JSON values: base weights, what of them is trained, samples, their order."""
    weights = hashlib.sha256()
    base = student.folder
    for path in sorted([base / "config.json", *base.glob("*.safetensors"), *base.glob("*.bin")]):
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "train.seed": config.train.seed,
        "train.batch_samples": config.train.batch_samples,
        "student.train_layers": config.student.train_layers,
        "fusion.method": config.fusion.method,
        "student weights": weights.hexdigest()[:16],
        "data.sources.weight": [source.weight for source in config.data.sources],
        "samples": corpus.fingerprint[:16],
    }


def _checkpoints(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step-*")))


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
