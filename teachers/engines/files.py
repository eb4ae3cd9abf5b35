"""What a model directory says of itself: its tokenizer's files, its fingerprint, whether it expects BOS, its card.

Shared by every engine that runs a model, so that two engines over one directory and one type agree on all of it.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import teachers.models as models
from teachers.errors import TeacherError
from teachers.models import in_hub_cache, name_of
from teachers.protocol import PROBE, TOKENIZER_FILES, Card

Files = Mapping[str, Path]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files by allow-listed name. Raises TeacherError if tokenizer.json is not among them."""
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files or not (folder / "config.json").is_file():
        raise TeacherError(f"{folder} is no model directory: it needs config.json, weights and tokenizer.json")
    return files


def describe(
    folder: Path, files: Files, config: Any, dtype: str, *, config_folder: Path | None = None, **rest: Any
) -> Card:
    """The card of the weights in `folder`, given the text model's configuration (as transformers has it).

    config_folder is where config.json lies, if not beside the weights. `rest` is what only the engine knows: engine,
    bos_id, expects_bos, max_tokens, max_top_k.
    """
    model, revision = name_of(folder)
    tokenizer_sha256 = sha256(files["tokenizer.json"])
    template = files.get("chat_template.jinja")
    return Card(
        model=model,
        revision=revision,
        fingerprint=fingerprint(folder, tokenizer_sha256, dtype, config_folder),
        dtype=dtype,
        vocab_size=config.vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        eos_id=config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id,
        chat_template_sha256=sha256(template) if template else None,
        **rest,
    )


def fingerprint(folder: Path, tokenizer_sha256: str, dtype: str, config_folder: Path | None = None) -> str:
    """Changes with the weights, their configuration, the tokenizer and the type."""
    digest = hashlib.sha256(f"{tokenizer_sha256} {dtype}".encode())
    config = (config_folder or folder) / "config.json"
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), config], key=lambda path: path.name)
    with ThreadPoolExecutor() as pool:  # hashing holds no lock, and weights can be many gigabytes
        for path, sha in zip(paths, pool.map(sha256, paths), strict=True):
            digest.update(f"{path.name} {sha}".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Of a file's content; a large file in a hub's cache is stored under it, and is not read again."""
    blob = path.resolve()
    if in_hub_cache(blob, "blobs") and len(blob.name) == 64:
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bos_of(files: Files, of_model: int | None) -> int | None:
    """As teachers.models.bos_of has it."""
    config = files.get("tokenizer_config.json")
    return models.bos_of(files["tokenizer.json"].read_bytes(), config.read_bytes() if config else b"{}", of_model)


def says_bos(files: Files, bos_id: int | None) -> bool | None:
    """Whether the tokenizer puts BOS in front of every text; None if it does not say."""
    config = files.get("tokenizer_config.json")
    said = json.loads(config.read_bytes()).get("add_bos_token") if config else None
    if bos_id is None or isinstance(said, bool):
        return bos_id is not None and bool(said)
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer.json"].parent, local_files_only=True)
    return True if tokenizer(PROBE).input_ids[0] == bos_id else None


def probe_ids(files: Files) -> list[int]:
    """A plain sentence, for a model whose tokenizer does not say: see prefers_bos."""
    tokenizer = AutoTokenizer.from_pretrained(files["tokenizer.json"].parent, local_files_only=True)
    ids: list[int] = tokenizer(PROBE, add_special_tokens=False).input_ids
    return ids


def prefers_bos(loss_with: float, loss_without: float) -> bool:
    """Whether the probe sentence is a tenth cheaper (mean nats a token) with BOS in front; for Gemma it is half."""
    return loss_with < 0.9 * loss_without
