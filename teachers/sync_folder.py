"""Folders of weights that a trainer writes and a rollout server reads: safetensors in bfloat16, and a manifest.

    model.safetensors   all weights, named as in the files of the model directory, and `lm_head.weight`
    manifest.json       a random id, which the metadata of the other files repeat, and name and shape of every tensor

`lm_head.weight` is also written for a model whose head is tied to its embeddings: vLLM on a CPU computes with a packed
copy of the head, which only a tensor of this name replaces. The reader checks everything before it returns anything,
and never maps a file into memory: a mapped file that becomes shorter ends the process that reads it.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from teachers.model_checks import read_weights
from teachers.model_heads import EMBEDDINGS, HEADS, find_tensor
from teachers.model_loading import check_finite
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import ProtocolError, TeacherError
from teachers.protocol.rollouts import MANIFEST
from teachers.protocol.untrusted_text import clean

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
MAX_MANIFEST_BYTES = 1 << 26
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # in old model directories; models compute them
NUM_NAMES = 3  # that an error lists

Shape = tuple[int, ...]


class SyncFolderError(TeacherError):
    """Raised if a folder of weights cannot be used. The message names the file or the tensor."""


class Manifest(BaseModel):
    """Content of manifest.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    """Random number of this folder."""
    files: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")]]
    """Names of the files with weights."""
    tensors: dict[str, Shape]
    """Shape of every tensor."""


def _has_head(names: Iterable[str]) -> bool:
    return any(name in HEADS or name.endswith(f".{HEAD}") for name in names)


# --- write ---


def write_sync_folder(weights: Mapping[str, Tensor], folder: Path) -> str:
    """Write unsharded weights to a folder, which appears when it is complete. Returns the digest of its manifest.

    An existing folder is replaced; a server that reads it at the same time refuses it. Floating-point tensors are cast
    to bfloat16. Raises ValueError if the weights have neither a head nor embeddings, and OSError if the disk is full.
    """
    tensors = {name: _copied(tensor) for name, tensor in weights.items()}
    if not _has_head(tensors):
        embeddings = find_tensor(tensors, EMBEDDINGS)
        if embeddings is None:
            raise ValueError(f"expected weights with {HEAD}, or with {' or '.join(EMBEDDINGS)}")
        tensors[HEAD] = tensors[embeddings].clone()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    manifest = Manifest(id=uuid4().hex, files=[WEIGHTS], tensors=shapes)
    data = manifest.model_dump_json().encode()
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS, metadata={"id": manifest.id})
    (partial / MANIFEST).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return hashlib.sha256(data).hexdigest()


def _copied(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, which shares no memory with another tensor, as safetensors requires."""
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


# --- read ---


def expected_shapes(model: Path) -> dict[str, Shape]:
    """Return name and shape of the weights of a model directory, with `lm_head.weight` also if the head is tied."""
    shapes = {name: tuple(entry["shape"]) for name, entry in read_weights(model).items() if not name.endswith(COMPUTED)}
    embeddings = find_tensor(shapes, EMBEDDINGS)
    if not _has_head(shapes) and embeddings is not None:
        shapes[HEAD] = shapes[embeddings]
    return shapes


def read_sync_folder(folder: Path, digest: str, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return all weights of a folder, if its manifest has this digest and all tensors are as expected and finite.

    Raises SyncFolderError, which names the first file or tensors that are not.
    """
    data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise SyncFolderError(f"{MANIFEST} is another one than that of the request: write each version to a new folder")
    try:
        with decoding(MANIFEST):
            manifest = Manifest.model_validate_json(data)
    except ProtocolError as error:
        raise SyncFolderError(str(error)) from error
    _compare(manifest.tensors, expected, MANIFEST)
    tensors: dict[str, Tensor] = {}
    for name in manifest.files:
        tensors |= _tensors_of(folder / name, manifest.id)
    _compare({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, "the files of weights")
    try:
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"the weight {clean(name, 80)} is stored as {tensor.dtype}, expected bfloat16")
            check_finite(name, tensor)
    except ValueError as error:
        raise SyncFolderError(str(error)) from error
    return tensors


def _compare(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Raise SyncFolderError if names or shapes differ from the expected ones."""
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


def _tensors_of(path: Path, folder_id: str) -> dict[str, Tensor]:
    """Read one file of weights. Raises SyncFolderError if it is damaged or belongs to another manifest."""
    data = _read(path)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SyncFolderError(f"{path.name} is damaged or truncated: {clean(error, 100)}") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # valid, as load has succeeded
    if header.get("__metadata__", {}).get("id") != folder_id:
        raise SyncFolderError(f"{path.name} was not written together with {MANIFEST}")
    return tensors


def _read(path: Path, limit_bytes: int | None = None) -> bytes:
    """Return the content of a regular file; links are not followed. Raises SyncFolderError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except OSError as error:
        raise SyncFolderError(f"{path.name} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SyncFolderError(f"{path.name} is not a regular file")
        if limit_bytes is not None and status.st_size > limit_bytes:
            raise SyncFolderError(f"{path.name} has {status.st_size} bytes, expected at most {limit_bytes}")
        return file.read()
