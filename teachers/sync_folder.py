"""Folders of weights that a trainer writes and a rollout server reads: safetensors in bfloat16, and a manifest.

    model.safetensors   all weights, named as in the files of the model directory, and `lm_head.weight`
    manifest.json       size and SHA-256 of every file of weights, and name and shape of every tensor

`lm_head.weight` is also written for a model whose head is tied to its embeddings: vLLM on a CPU computes with a packed
copy of the head, which only a tensor of this name replaces. The reader checks everything before it returns anything,
and never maps a file into memory: a mapped file that becomes shorter ends the process that reads it.
"""

import hashlib
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from teachers.model_checks import read_json, read_weights
from teachers.model_dirs import file_sha256
from teachers.model_heads import EMBEDDINGS, HEADS, find_tensor
from teachers.model_loading import check_finite
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, TeacherError
from teachers.protocol.messages import Sha256
from teachers.protocol.rollouts import MANIFEST
from teachers.protocol.untrusted_text import clean

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
MAX_MANIFEST_BYTES = 1 << 26
ENTRY_BYTES = 1024  # of one tensor in the header of a file
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # in old model directories; models compute them
NUM_NAMES = 3  # that an error lists

Shape = tuple[int, ...]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")]


class SyncFolderError(TeacherError):
    """Raised if a folder of weights cannot be written or used. The message names the file or the tensor."""


class StoredFile(BaseModel):
    """Size and digest of a file of weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: Annotated[int, Field(ge=0)]
    """Size of the file."""
    sha256: Sha256
    """SHA-256 of its content."""


class Manifest(BaseModel):
    """Content of manifest.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[FileName, StoredFile]
    """Files of weights, by name."""
    tensors: dict[str, Shape]
    """Shape of every tensor."""


def _has_head(names: Iterable[str]) -> bool:
    return any(name in HEADS or name.endswith(f".{HEAD}") for name in names)


# --- write ---


def write_sync_folder(weights: Mapping[str, Tensor], folder: Path) -> str:
    """Write unsharded weights to a folder, which appears when it is complete. Returns the digest of its manifest.

    An existing folder is replaced; a server that reads it at the same time refuses it. Floating-point tensors are cast
    to bfloat16. Equal weights have equal digests. Raises ValueError if the weights have neither a head nor embeddings,
    and SyncFolderError, with nothing left behind, if the folder is a link or cannot be written, for example to a full
    disk.
    """
    tensors = {name: _copied(tensor) for name, tensor in weights.items()}
    if not _has_head(tensors):
        embeddings = find_tensor(tensors, EMBEDDINGS)
        if embeddings is None:
            raise ValueError(f"expected weights with {HEAD}, or with {' or '.join(EMBEDDINGS)}")
        tensors[HEAD] = tensors[embeddings].clone()
    if folder.is_symlink():
        raise SyncFolderError(f"cannot write {folder}: it is a link")
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        data = _write_files(tensors, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise SyncFolderError(f"cannot write {folder}: {clean(error, 150)}") from error
    return hashlib.sha256(data).hexdigest()


def _write_files(tensors: dict[str, Tensor], folder: Path) -> bytes:
    """Write tensors and manifest to a new folder. Returns the content of the manifest."""
    folder.mkdir(parents=True)
    path = folder / WEIGHTS
    save_file(tensors, path)
    stored = StoredFile(num_bytes=path.stat().st_size, sha256=file_sha256(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    data = Manifest(files={WEIGHTS: stored}, tensors=shapes).model_dump_json().encode()
    (folder / MANIFEST).write_bytes(data)
    return data


def _copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, which shares no memory with another tensor, as safetensors requires."""
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


# --- read ---


def expected_shapes(model: Path) -> dict[str, Shape]:
    """Return name and shape of the weights of a model directory, with `lm_head.weight` also if the head is tied.

    The weights are those that the index lists. Without an index, they are those of all files, except for a copy of the
    weights in consolidated*.safetensors. Raises ValueError if the directory has no valid weights.
    """
    entries = {name: entry for name, entry in read_weights(model).items() if not name.endswith(COMPUTED)}
    if (model / INDEX).exists():
        listed = read_json(model / INDEX)["weight_map"]
        entries = {name: entry for name, entry in entries.items() if name in listed}
    else:
        hf = {name: e for name, e in entries.items() if not e["file"].name.startswith("consolidated")}
        entries = hf or entries
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    embeddings = find_tensor(shapes, EMBEDDINGS)
    if not _has_head(shapes) and embeddings is not None:
        shapes[HEAD] = shapes[embeddings]
    return shapes


def read_sync_folder(folder: Path, digest: str, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return all weights of a folder.

    Raises SyncFolderError, which names the file or the tensors, unless the manifest has this digest, the files are
    those of the manifest, and all tensors have the expected names and shapes, are bfloat16 and finite.
    """
    data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise SyncFolderError(
            f"the digest of {MANIFEST} differs from the digest in the request: write each version to a new folder"
        )
    with _refusing(MANIFEST):
        manifest = Manifest.model_validate_json(data)
    _compare(manifest.tensors, expected, MANIFEST)
    limit_bytes = sum(2 * math.prod(shape) + ENTRY_BYTES for shape in expected.values())
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    if num_bytes > limit_bytes:
        raise SyncFolderError(f"the files of weights have {num_bytes} bytes, expected at most {limit_bytes}")
    tensors: dict[str, Tensor] = {}
    for name, stored in manifest.files.items():
        loaded = _tensors_of(folder / name, stored)
        if repeated := sorted(tensors.keys() & loaded.keys()):
            raise SyncFolderError(f"{name}: {clean(repeated[0], 80)} is also in another file")
        tensors |= loaded
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, "the files of weights")
    return tensors


def _compare(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Check the names and shapes of all tensors. Raises SyncFolderError if they differ from `expected`."""
    if missing := sorted(expected.keys() - shapes.keys()):
        raise SyncFolderError(f"{where}: {_listed(missing)} missing")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise SyncFolderError(f"{where}: {_listed(unknown)} unknown to the model")
    if wrong := sorted(name for name, shape in shapes.items() if tuple(shape) != tuple(expected[name])):
        name = wrong[0]
        raise SyncFolderError(
            f"{where}: {clean(name, 80)} has shape {list(shapes[name])}, expected {list(expected[name])}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMES} more are" if len(names) > NUM_NAMES else " is" if len(names) == 1 else " are"
    return ", ".join(clean(name, 80) for name in names[:NUM_NAMES]) + more


def _tensors_of(path: Path, stored: StoredFile) -> dict[str, Tensor]:
    """Read and check one file of weights. Raises SyncFolderError."""
    data = _read(path, stored.num_bytes)
    if len(data) != stored.num_bytes or hashlib.sha256(data).hexdigest() != stored.sha256:
        raise SyncFolderError(f"{path.name} is damaged: its size or SHA-256 differs from {MANIFEST}")
    with _refusing(path.name):
        tensors = load(data)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise SyncFolderError(f"the weight {clean(name, 80)} is stored as {tensor.dtype}, expected torch.bfloat16")
        try:
            check_finite(clean(name, 80), tensor)
        except ValueError as error:
            raise SyncFolderError(str(error)) from error
    return tensors


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Convert every error of decoding a file into SyncFolderError."""
    try:
        with decoding(name):
            yield
    except ProtocolError as error:
        raise SyncFolderError(str(error)) from error


def _read(path: Path, limit_bytes: int) -> bytes:
    """Read a file. Raises SyncFolderError if it is a link, is not a regular file, or is larger than `limit_bytes`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would wait for a writer
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SyncFolderError(f"{path.name} is not a regular file")
            if status.st_size > limit_bytes:
                raise SyncFolderError(f"{path.name} has {status.st_size} bytes, expected at most {limit_bytes}")
            return file.read(status.st_size)
    except OSError as error:
        raise SyncFolderError(f"{path.name} cannot be read: {error.strerror}") from error
