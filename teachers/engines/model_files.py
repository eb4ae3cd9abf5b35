"""The card of a model directory: tokenizer files, fingerprint and BOS.

All engines that run a model use these functions, so two engines have the same card for the same directory and dtype.
"""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from teachers.bos import bos_id_of, declared_bos
from teachers.model_checks import model_errors
from teachers.model_dirs import file_inside, file_sha256, name_of, weights_sha256
from teachers.model_loading import NO_CODE
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import PROBE, TOKENIZER_FILES, TeacherCard

Files = Mapping[str, Path]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the tokenizer files by name. Links out of the directory are excluded, because clients download the files.

    Raises TeacherError if `folder` is not a model directory.
    """
    files = {name: path for name in TOKENIZER_FILES if (path := file_inside(folder, name))}
    if "tokenizer.json" not in files or not (folder / "config.json").is_file():
        raise TeacherError(f"{folder} is not a model directory: expected config.json, weights and tokenizer.json in it")
    return files


def describe(
    folder: Path, files: Files, config: Any, dtype: str, *, config_folder: Path | None = None, **engine_fields: Any
) -> TeacherCard:
    """Build the card of the weights in `folder`.

    config         configuration of the text model, as transformers has it
    config_folder  directory of config.json, if it is not `folder`
    engine_fields  the fields that only the engine knows: engine, bos_id, expects_bos, max_tokens, max_top_k
    """
    model, revision = name_of(folder)
    tokenizer_sha256 = file_sha256(files["tokenizer.json"])
    template = files.get("chat_template.jinja")
    weights, eos_ids = weights_sha256(folder, config_folder), config.eos_token_id
    with decoding(f"card of {folder}"):  # for example a BOS that is not in the vocabulary
        return TeacherCard(
            model=model,
            revision=revision,
            fingerprint=fingerprint(tokenizer_sha256, dtype, weights),
            dtype=dtype,
            vocab_size=config.vocab_size,
            tokenizer_sha256=tokenizer_sha256,
            eos_id=next(iter(eos_ids), None) if isinstance(eos_ids, list) else eos_ids,
            chat_template_sha256=file_sha256(template) if template else None,
            **engine_fields,
        )


def fingerprint(tokenizer_sha256: str, dtype: str, weights: str) -> str:
    """Return a hash of tokenizer, dtype and weights; see model_dirs.weights_sha256."""
    return hashlib.sha256(f"{tokenizer_sha256} {dtype} {weights}".encode()).hexdigest()


def bos_id(files: Files, model_bos_id: int | None) -> int | None:
    """Return the id of BOS: see teachers.bos.bos_id_of."""
    with _file_errors(files):
        return bos_id_of(files["tokenizer.json"].read_bytes(), _tokenizer_config(files), model_bos_id)


def tokenizer_expects_bos(files: Files, bos_id: int | None) -> bool | None:
    """Return whether files or tokenizer put BOS in front of every text; None if the model has to be probed."""
    with _file_errors(files):
        declared = declared_bos(bos_id, _tokenizer_config(files))
        if declared is not None:
            return declared
        return True if _tokenizer(files)(PROBE).input_ids[0] == bos_id else None


def probe_ids(files: Files) -> list[int]:
    """Return the ids of a plain sentence without special tokens, for teachers.bos.bos_probes."""
    with _file_errors(files):
        ids: list[int] = _tokenizer(files)(PROBE, add_special_tokens=False).input_ids
    return ids


def _file_errors(files: Files) -> AbstractContextManager[None]:
    return model_errors(files["tokenizer.json"].parent)


def _tokenizer(files: Files) -> Any:
    return AutoTokenizer.from_pretrained(files["tokenizer.json"].parent, **NO_CODE)


def _tokenizer_config(files: Files) -> bytes:
    config = files.get("tokenizer_config.json")
    return config.read_bytes() if config else b"{}"
