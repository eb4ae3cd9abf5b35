"""The checkpoints in a run's folder: their names, their metadata, and the newest one that is intact.

A checkpoint is a real directory step-N with N of at least eight digits. Links, files and other names are not
checkpoints. All files of a checkpoint are verified against its manifest before they are used. Only directories with a
manifest are deleted.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.distributed import Ranks
from trainer.errors import CheckpointError
from trainer.manifest import MANIFEST, DamagedError, FileDigest, check_files, read_manifest, read_regular, write_synced
from trainer.rollouts.batches import waiting_rollouts
from trainer.training.identity import Identity

log = logging.getLogger("tutelage.run")

STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_PARTIAL = re.compile(r"\.partial-\d{8,}", re.ASCII)


@dataclass(frozen=True)
class CheckpointMetadata:
    """Content of a checkpoint besides weights and optimizer state.

    step          number of steps before the checkpoint
    identity      values that must not change when the run is resumed (training/identity.py)
    precision     bf16 or fp32, as resolved at the first start
    fusion_state  state of the fusion after the last step; None for a fusion without state
    rollouts      rollouts that no step has used, of each process; empty without [rollout]
    """

    step: int
    identity: Identity
    precision: str
    fusion_state: dict[str, Any] | None = None
    rollouts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class IntactCheckpoint:
    """A checkpoint whose files all agree with its manifest."""

    path: Path
    digests: dict[str, FileDigest]
    metadata: CheckpointMetadata


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's directory."""
    return f"step-{step:08d}"


def partial_name(step: int) -> str:
    """Return the name of a checkpoint's directory while it is written."""
    return f".partial-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a name states; None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def newest_intact(folder: Path, ranks: Ranks = Ranks()) -> IntactCheckpoint | None:
    """Return the newest intact checkpoint, in all processes; None if there are no checkpoints.

    Warns of each newer one that is not intact. Raises CheckpointError if there are checkpoints and none is intact.
    """
    rejected: list[str] = []
    for path in _on_rank_0(ranks, lambda: _candidates(folder)):
        checkpoint, reason = _inspect(path, ranks)
        if checkpoint is not None:
            if rejected and ranks.first:
                log.warning("%s: continuing from %s", "; ".join(rejected), path.name)
            return checkpoint
        rejected.append(f"checkpoint {path.name} is not used: {reason}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact ({'; '.join(rejected)}): restore one from a backup, or choose "
            "another output.dir to start again"
        )
    return None


def newest_written(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Its files are not verified."""
    return max(_complete(folder), default=None, key=step_of)  # type: ignore[arg-type]  # every step is an int


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, which are not intact, and delete partial checkpoints.

    Otherwise they would count as the newest ones, and the checkpoints of this run would be deleted first.
    """
    for path in _candidates(folder):
        if (step_of(path) or 0) > step:
            path.rename(_free_name(path.with_name(f"{path.name}.damaged")))
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def delete_old(folder: Path, keep: int) -> None:
    """Delete complete checkpoints except the newest `keep`."""
    for path in sorted(_complete(folder), key=step_of, reverse=True)[keep:]:  # type: ignore[arg-type]
        shutil.rmtree(path, ignore_errors=True)


def write_state(folder: Path, metadata: CheckpointMetadata) -> None:
    """Write the metadata of a checkpoint."""
    write_synced(folder / STATE_FILE, json.dumps(asdict(metadata)).encode())


def check_no_link(folder: Path) -> None:
    """Raise CheckpointError if the folder of the checkpoints is a link: the lock does not protect its target."""
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} is a link, so that another run could write to the same checkpoints: put the whole run on the "
            "other disk with output.dir"
        )


def _candidates(folder: Path) -> list[Path]:
    """Return all paths with the name of a checkpoint, newest first, whether or not they are intact."""
    check_no_link(folder)
    try:
        paths = [path for path in folder.iterdir() if step_of(path) is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder} ({error.strerror})") from error
    return sorted(paths, key=step_of, reverse=True)  # type: ignore[arg-type]


def _complete(folder: Path) -> list[Path]:
    return [p for p in _candidates(folder) if p.is_dir() and not p.is_symlink() and (p / MANIFEST).is_file()]


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(path if number == 1 else f"{path}-{number}"):
        number += 1
    return path if number == 1 else Path(f"{path}-{number}")


def _inspect(path: Path, ranks: Ranks) -> tuple[IntactCheckpoint | None, str]:
    """Return the checkpoint, or None and the reason why it is not intact. Each process verifies some of the files."""
    reason, digests = "", dict[str, FileDigest]()
    if ranks.first:
        try:
            digests = _read_digests(path)
        except DamagedError as error:
            reason = str(error)
    digests, reason = ranks.broadcast((digests, reason))
    if not reason:
        try:
            check_files(path, digests, ranks.shard(sorted(digests)))
        except DamagedError as error:
            reason = str(error)
        reason = next(filter(None, ranks.all_gather(reason)), "")
    metadata = None
    if not reason and ranks.first:
        try:
            metadata = _read_state(path)
        except DamagedError as error:
            reason = str(error)
    metadata, reason = ranks.broadcast((metadata, reason))
    return (IntactCheckpoint(path, digests, metadata), "") if metadata else (None, reason)


def _read_digests(path: Path) -> dict[str, FileDigest]:
    if path.is_symlink():
        raise DamagedError("it is a link")
    if not path.is_dir():
        raise DamagedError("it is not a directory")
    digests = read_manifest(path)
    if STATE_FILE not in digests:
        raise DamagedError(f"{MANIFEST} lists no {STATE_FILE}")
    return digests


def _read_state(path: Path) -> CheckpointMetadata:
    data = read_regular(path / STATE_FILE)
    try:
        metadata = CheckpointMetadata(**json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{STATE_FILE} is not the state of a checkpoint") from error
    expected = (int, dict, str, dict | None, list)
    values = (metadata.step, metadata.identity, metadata.precision, metadata.fusion_state, metadata.rollouts)
    is_typed = all(isinstance(value, kind) for value, kind in zip(values, expected, strict=True))
    if not is_typed or metadata.precision not in ("bf16", "fp32"):
        raise DamagedError(f"{STATE_FILE} is not the state of a checkpoint")
    try:
        waiting_rollouts(metadata.rollouts)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{STATE_FILE} has rollouts of another form") from error
    if metadata.step != step_of(path):
        raise DamagedError(f"it is a checkpoint of step {metadata.step}")
    return metadata


def _on_rank_0(ranks: Ranks, function: Callable[[], list[Path]]) -> list[Path]:
    """Call a function on rank 0, and return its result or raise its error in all processes."""
    value: list[Path] = []
    failure: CheckpointError | None = None
    if ranks.first:
        try:
            value = function()
        except CheckpointError as error:
            failure = error
    value, failure = ranks.broadcast((value, failure))
    if failure is not None:
        raise failure
    return value
