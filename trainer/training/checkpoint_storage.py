"""The files of a checkpoint: one safetensors file per process, and a manifest. Nothing is pickled.

The format is that of the Hugging Face storage of torch.distributed.checkpoint. Its reader reshards, so that any number
of processes can load a checkpoint. Its writer copies a whole shard into one byte string and computes no digests. The
writer in this module writes tensor by tensor and computes the digest of the file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainer.manifest import CHUNK_BYTES, FileDigest, digest_file, write_manifest

SUFFIX = ".safetensors"
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class _WrittenFile:
    """Name and digest of the file that contains a tensor, for the process that writes the manifest."""

    name: str
    digest: FileDigest


class CheckpointWriter(HuggingFaceStorageWriter):
    """Writer of tensors. Rank 0 adds the manifest after all processes have written their files.

    other_files  names of files that exist already and become part of the manifest
    """

    def __init__(self, folder: Path, other_files: Sequence[str]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder = folder
        self._other_files = other_files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        written: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            tensors = {item.index.fqn: _tensor(planner.resolve_data(item)) for item in plan.items}
            offsets = {item.index.fqn: list(item.tensor_data.chunk.offsets) for item in plan.items if item.tensor_data}
            name = f"shard-{plan.storage_data['shard_index']:05d}{SUFFIX}"
            file = _WrittenFile(name, write_tensors(self._folder / name, tensors, offsets))
            results = [WriteResult(item.index, _num_bytes(tensors[item.index.fqn]), file) for item in plan.items]
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        digests = {name: digest_file(self._folder / name) for name in self._other_files}
        digests |= {r.storage_data.name: r.storage_data.digest for of_rank in results for r in of_rank}
        write_manifest(self._folder, digests)


class CheckpointReader(HuggingFaceStorageReader):
    """Reader of the safetensors files in the manifest. Other files in the folder are ignored."""

    def __init__(self, folder: Path, digests: Mapping[str, FileDigest]) -> None:
        super().__init__(str(folder))
        self.fs = _ListedFiles([str(folder / name) for name in digests])


class _ListedFiles(FileSystem):
    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self._paths


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], offsets: Mapping[str, list[int]]) -> FileDigest:
    """Write a safetensors file and return its digest.

    offsets are the positions of the tensors inside the unsharded tensors.
    """
    sharding = json.dumps({name: {"saved_offsets": offsets[name]} for name in tensors})
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": sharding, "DCP_VERSION": "1.0", "format": "pt"}}
    # The format allows no gaps. Widest types first keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    begin = 0
    for name in order:
        end = begin + _num_bytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        head = len(encoded).to_bytes(8, "little") + encoded
        for content in chain([memoryview(head)], (_as_bytes(tensors[name]) for name in order)):
            for start in range(0, len(content), CHUNK_BYTES):
                digest.update(content[start : start + CHUNK_BYTES])
                file.write(content[start : start + CHUNK_BYTES])
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def _tensor(data: Any) -> torch.Tensor:
    assert isinstance(data, torch.Tensor)  # a checkpoint's state has no other values
    return data.detach()


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements as bytes. A view is needed because numpy has no bfloat16."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
