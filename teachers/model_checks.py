"""Validation of untrusted model directories, without torch and transformers.

transformers, safetensors and tokenizers trust their input: they allocate the sizes that config.json declares, load
pickled weights and adapters, and raise errors of any class, including Rust panics. `check_model_files` validates
config.json and the headers of the weights before memory is allocated. `model_errors` converts errors of the libraries
into ModelError. Student, engines and doctor use both functions and therefore accept the same directories.
"""

import asyncio
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachers.protocol.errors import TeacherError
from teachers.protocol.untrusted_text import clean

MAX_JSON_BYTES = 1 << 26  # config.json is a few kilobytes, the index of a model with 100,000 tensors 10 MB
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors
MAX_REASON_CHARS = 300
ELEMENTS_PER_STORED = 16  # quantized weights pack up to 16 values of 2 bits into one int32
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # GPTQ, AWQ, ModelOpt
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# The names that model families give to the same three numbers.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
VOCABULARY = ("vocab_size",)


class ModelError(TeacherError):
    """Raised if a model directory cannot be loaded. The trainer converts it into ConfigError for the student."""


class QuantizedError(ModelError):
    """Raised if the weights are quantized. The caller adds to the message what to use instead."""


@dataclass(frozen=True)
class ModelFiles:
    """Content of a model directory, without the values of the weights.

    config        parsed config.json
    num_tensors   number of stored tensors
    num_elements  number of stored values
    quantization  name of the method, for example "awq"; None if the weights are not quantized
    """

    config: Mapping[str, Any]
    num_tensors: int
    num_elements: int
    quantization: str | None = None


@contextmanager
def model_errors(folder: Path, where: str = "", keep: type[Exception] = TeacherError) -> Iterator[None]:
    """Convert errors raised in the block into ModelError. The message contains the folder and the reason.

    where  text after the folder in the message, for example " on cuda"
    keep   class of errors that pass unchanged, in addition to TeacherError
    """
    try:
        yield
    except (TeacherError, keep, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException as error:  # the libraries raise any class; Rust panics do not derive from Exception
        raise ModelError(f"cannot load {folder}{where}: {_reason(error)}") from error


def check_model_files(folder: Path) -> ModelFiles:
    """Check config.json and the headers of the weights against each other.

    Raises ModelError if config.json cannot be read, if the weights are pickled, incomplete or damaged, if the directory
    contains an adapter or a GGUF file instead, or if config.json declares a larger model than the stored weights.
    """
    with model_errors(folder):
        _refuse_other_formats(folder)
        config = read_json(folder / "config.json")
        if (folder / "generation_config.json").exists():  # transformers ignores a damaged one, the export changes it
            read_json(folder / "generation_config.json")
        if "transformers_weights" in config:
            raise ValueError("its config.json names a file of weights (transformers_weights); remove the key")
        tensors = read_weights(folder)
        quantization = _quantization(folder, config)
        if quantization is None:
            _check_dtypes(tensors)
        sizes = [math.prod(tensor["shape"]) for tensor in tensors.values()]
        files = ModelFiles(config, len(sizes), sum(sizes), quantization)
        _check_numbers(files, 1 if quantization is None else ELEMENTS_PER_STORED)
    return files


def _refuse_other_formats(folder: Path) -> None:
    """Raise ValueError if the directory contains an adapter, or a GGUF file without other weights."""
    if (folder / "adapter_config.json").exists():
        base = clean(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model", 100)
        raise ValueError(
            f"it has an adapter_config.json, an adapter of {base}: merge the adapter into the weights of {base} "
            "(merge_and_unload of peft), save them, and give that directory"
        )
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            "its weights are a GGUF file: convert them to safetensors with transformers (from_pretrained with "
            "gguf_file and GgufConfig(dequantize=True), then save_pretrained)"
        )


def _quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the name of the quantization method that config.json, or a file of a quantization tool, states."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION_KEYS:
            if section.get(key) is not None:
                stated = section[key]
                method = stated.get("quant_method", key) if isinstance(stated, dict) else key
                return clean(method, 40)
    return next((name for name in QUANTIZATION_FILES if (folder / name).exists()), None)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file of at most MAX_JSON_BYTES. Raises ValueError if it is missing, larger or not a JSON object."""
    if not path.is_file():
        raise ValueError(f"it has no file {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
    data = path.read_bytes()
    _refuse_pointer(data, path.name)
    return _object(data, path.name)


def _refuse_pointer(data: bytes, name: str) -> None:
    """Raise ValueError if the content of a file is a pointer of Git LFS."""
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{name} is a pointer of Git LFS, not the file: run `git lfs pull` in the directory")


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, received {type(value).__name__}")
    return value


# --- weights ---


def read_weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the header entries of all safetensors files, by tensor name, with file, begin and num_bytes of the values.

    Raises ValueError if a file is invalid or missing.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths and any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise ValueError(
            "its weights are pickled, and loading them could execute code: convert them to safetensors with "
            "save_pretrained, in a process that may run the code of their author"
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(map(str, _object_of(read_json(index), "weight_map", index.name).values())))
        if outside := [shard for shard in shards if shard != Path(shard).name]:
            raise ValueError(f"{index.name} names {outside[0]!r}, expected the name of a file of the folder")
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ValueError(
                f"{index.name} names {missing[0]!r}, which is missing, as {len(missing)} of {len(shards)} files are: "
                "download the whole model"
            )
    elif any(SHARD.fullmatch(path.name) for path in paths) and not (folder / "model.safetensors").exists():
        raise ValueError(f"its weights are {len(paths)} shards without {index.name}: download the whole model")
    if not paths:
        raise ValueError("it has no weights: expected files *.safetensors")
    return {name: entry for path in paths for name, entry in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return the header entries of one safetensors file, by tensor name. Raises ValueError if they exceed the file."""
    if not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if LFS_POINTER.startswith(start) and start:
            _refuse_pointer(start + file.read(len(LFS_POINTER)), path.name)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path.name} of {size} bytes is truncated or not safetensors")
        header = _object(file.read(length), f"the header of {path.name}")
    header.pop("__metadata__", None)
    for name in header:
        entry = _object_of(header, name, path.name)
        _check_entry(entry, name, size - 8 - length)
        begin, end = entry["data_offsets"]
        entry |= {"file": path, "begin": 8 + length + begin, "num_bytes": end - begin}
    return header


def _check_entry(entry: Mapping[str, Any], name: str, num_bytes: int) -> None:
    """Check dtype, shape and offsets of one tensor. Raises ValueError if they are invalid or contradict each other."""
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in DTYPE_BYTES and not dtype.startswith("F")):
        raise ValueError(f"tensor {name!r} has the unknown type {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has no valid shape and position: {shape!r}, {offsets!r}")
    if offsets[1] > num_bytes:
        raise ValueError(f"tensor {name!r} ends after the end of its file, which is truncated")
    expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 1)
    if dtype in DTYPE_BYTES and offsets[1] - offsets[0] != expected:
        raise ValueError(f"tensor {name!r}: shape {shape!r} needs {expected} bytes, stored are {offsets}")


def _check_dtypes(tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for integer weights, which are valid only in quantized models."""
    for name, entry in tensors.items():
        if name.endswith(".weight") and entry["dtype"] not in FLOATS:
            raise ValueError(f"tensor {name!r} is stored as {entry['dtype']}, expected one of {', '.join(FLOATS)}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


# --- config.json ---


def _check_numbers(files: ModelFiles, elements_per_stored: int) -> None:
    """Raise ValueError if config.json declares more layers, tokens or experts than the stored weights can hold."""
    text = files.config.get("text_config")
    section = text if isinstance(text, dict) else files.config
    layers, hidden, vocabulary = (_sizes(section, keys) for keys in (LAYERS, HIDDEN, VOCABULARY))
    limit = files.num_elements * elements_per_stored
    if (num := max(layers, default=1)) > files.num_tensors:
        raise ValueError(f"config.json declares {num} layers, the weights have {files.num_tensors} tensors")
    experts = [n for key in section if "experts" in key and type(n := section[key]) is int]
    for what, count in (("tokens", max(vocabulary, default=1)), ("experts", max(experts, default=1))):
        if count * max(hidden, default=1) > limit:
            raise ValueError(
                f"config.json declares {count} {what} of hidden size {max(hidden, default=1)}, the weights have "
                f"{files.num_elements} values"
            )


def _sizes(section: Mapping[str, Any], keys: tuple[str, ...]) -> list[int]:
    """Return the values of the keys that a section contains. Raises ValueError if one is not a positive integer."""
    present = {key: section[key] for key in keys if key in section}
    for key, value in present.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json: expected a number above 0 as {key}, received {str(value)[:40]!r}")
    return list(present.values())


def _object_of(parent: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object as {key[:80]!r}, received {type(value).__name__}")
    return value


def _reason(error: BaseException) -> str:
    """Return the first line of an error message, preceded by the class of the error if the message needs it."""
    if "trust_remote_code" in str(error):
        return "it requires custom code (auto_map), which is never executed: use a model that transformers supports"
    lines = [line for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:  # of pydantic, whose next lines name the cause
        lines = [line.strip().partition(" [type=")[0] for line in lines if "rror, " in line] or lines
    line = clean(lines[0], MAX_REASON_CHARS) if lines else ""
    if isinstance(error, OSError | ValueError | RuntimeError) and line and not isinstance(error, RecursionError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
