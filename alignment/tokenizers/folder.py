"""The tokenizer of a model directory as transformers loads it: one function for students, engines, clients and doctor.

transformers converts other formats (SentencePiece, vocab.json with merges.txt, Tekken, tiktoken), builds the tokenizers
of some classes from vocabulary and merges alone, and applies settings of tokenizer_config.json. `tokenizer_files`
returns files from which `tokenizers` alone builds the tokenizer that `AutoTokenizer` loads. The conversion runs in a
subprocess with limits, in a folder that contains no code, and its result is cached.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from alignment.array_cache import cache_key, load_arrays, save_arrays
from alignment.tokenizers.kinds import TokenizerError, tokenizer_errors
from alignment.tokenizers.limits import MAX_FILE_BYTES, check_limits, parse_object
from alignment.tokenizers.trial import SCRIPT, load_with_transformers
from kernel_cache.folder import cache_dir
from kernel_cache.hub_cache import file_inside

JSON, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "*.model", "tokenizer.model.v*")
"""Glob patterns of the files, other than tokenizer.json, that can contain a vocabulary."""
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.json")
FILES = (JSON, CONFIG, TEMPLATE, *OTHER_FILES, *VOCABULARIES)
MODEL_KEYS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
"""Keys of config.json by which transformers chooses the class of the tokenizer."""
WARNING = ".warning"
"""Key of the conversion's warning in the cache file. The warning is logged; it is not returned as a tokenizer file."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PACKAGES = ("transformers", "tokenizers", "sentencepiece", "protobuf", "tiktoken", "mistral-common")
log = logging.getLogger("tutelage.tokenizers")
_loaded: dict[str, dict[str, bytes]] = {}


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model directory contains a tokenizer: tokenizer.json, or a file that matches VOCABULARIES."""
    return any(file_inside(folder, path.name) for pattern in (JSON, *VOCABULARIES) for path in folder.glob(pattern))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer files of a model directory, by file name.

    `tokenizer.json` and `tokenizer_config.json` are always present, `special_tokens_map.json` and
    `chat_template.jinja` only if the model has them. Two settings of `tokenizer_config.json` can differ from the file
    in the directory: the special tokens (`bos_token`, `eos_token`, …) are those that transformers uses, and
    `add_bos_token` is true if transformers puts BOS in front of a text. `add_bos_token` is missing if transformers puts
    no BOS in front and the file in the directory does not set it to false.

    Raises TokenizerError if the directory has no tokenizer, if a file exceeds a limit, or if transformers cannot load
    it without custom code.
    """
    with tokenizer_errors(folder.name):
        sources = _read_sources(folder)
        key = cache_key(*(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sources.items()), _versions())
        if key not in _loaded:
            files = _cached(cache_dir() / "tokenizer-files" / key, sources, folder.name)
            if warning := files.pop(WARNING, b"").decode():
                log.warning("the tokenizer of %s: %s", folder.name, warning)
            _loaded[key] = files
    return dict(_loaded[key])


def _read_sources(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer files by name, with config.json reduced to MODEL_KEYS."""
    names = sorted({path.name for pattern in FILES for path in folder.glob(pattern)})
    if not has_tokenizer(folder):
        raise TokenizerError(
            f"{folder} has no tokenizer: expected tokenizer.json, vocab.json with merges.txt, vocab.txt, tekken.json, "
            "tiktoken.model or a SentencePiece file (*.model), and no links out of the directory"
        )
    sources = {name: _read(path) for name in names if (path := file_inside(folder, name))}
    return sources | {"config.json": json.dumps(_model_keys(folder)).encode()}


def _model_keys(folder: Path) -> dict[str, str]:
    """Return the entries of config.json in MODEL_KEYS that are strings.

    The result is empty if config.json is missing or is not JSON: other checks of the model report that.
    """
    path = file_inside(folder, "config.json")
    try:
        config = json.loads(_read(path)) if path else {}
    except (ValueError, RecursionError):
        return {}
    return {key: config[key] for key in MODEL_KEYS if isinstance(config, dict) and isinstance(config.get(key), str)}


def _read(path: Path) -> bytes:
    """Read a file of at most MAX_FILE_BYTES. Raises TokenizerError if it is larger, or a pointer of Git LFS."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has {len(data)} bytes or more, expected at most {MAX_FILE_BYTES}")
    if data.startswith(LFS_POINTER):
        raise TokenizerError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in the directory")
    return data


@cache
def _versions() -> str:
    """Return the versions of the packages that a conversion uses, and the digest of its script, for the cache key."""
    return " ".join(
        [hashlib.sha256(SCRIPT.read_bytes()).hexdigest(), *(f"{name} {_version(name)}" for name in PACKAGES)]
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cached(path: Path, sources: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Return the files of an earlier conversion, or convert them and write the cache file `path`."""
    stored = load_arrays(path)
    if stored is not None:
        return {file: data.tobytes() for file, data in stored.items()}
    files = _convert(sources, name)
    save_arrays(path, {file: np.frombuffer(data, np.uint8) for file, data in files.items()})
    return files


def _convert(sources: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Load the files with transformers, and return the files of the tokenizer that it builds."""
    config = parse_object(sources.get(CONFIG, b"{}"), CONFIG, name)
    if JSON in sources:
        check_limits(parse_object(sources[JSON], JSON, name), name)
    with tempfile.TemporaryDirectory(prefix="tutelage-tokenizer-") as scratch:
        for file, data in sources.items():
            (Path(scratch) / file).write_bytes(data)
        loaded = load_with_transformers(Path(scratch), name)
    served = (CONFIG, TEMPLATE, "special_tokens_map.json")
    files = {file: sources[file] for file in served if file in sources}
    files[JSON] = sources[JSON] if loaded["tokenizer"] is None else loaded["tokenizer"].encode()
    files[CONFIG] = json.dumps(_effective_config(config, loaded)).encode()
    if warning := loaded["warning"] or _bos_warning(config, loaded):
        files[WARNING] = warning.encode()
    if loaded["chat_template"] and TEMPLATE not in files and "chat_template" not in config:
        files[TEMPLATE] = loaded["chat_template"].encode()
    return files


def _bos_warning(config: Mapping[str, Any], loaded: Mapping[str, Any]) -> str:
    """Return a warning if transformers ignores `add_bos_token`. Gemma always expects BOS, see roles.py."""
    flag = config.get("add_bos_token")
    if flag in (None, loaded["adds_bos"]) or str(config.get("tokenizer_class", "")).startswith("Gemma"):
        return ""
    return (
        f"its tokenizer_config.json has add_bos_token = {json.dumps(flag)}, which transformers ignores beside a "
        f"tokenizer.json: texts begin {'with' if loaded['adds_bos'] else 'without'} BOS"
    )


def _effective_config(config: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with the special tokens and the BOS that transformers uses."""
    effective = {key: value for key, value in config.items() if key not in ("add_bos_token", "auto_map")}
    effective |= {f"{role}_token": token for role, token in loaded["tokens"].items()}
    if loaded["adds_bos"] or config.get("add_bos_token") is False:
        effective["add_bos_token"] = loaded["adds_bos"]
    return effective
