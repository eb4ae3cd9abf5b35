"""The card of a model directory: tokenizer, fingerprint and BOS.

All engines that run a model use these functions, so two engines have the same card for the same directory and dtype.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.tokenizers.folder import tokenizer_files
from alignment.tokenizers.kinds import TokenizerError
from alignment.tokenizers.vocabulary import Vocabulary
from teachers.bos import bos_id_of, declared_bos
from teachers.model_dirs import name_of, weights_sha256
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import TeacherError
from teachers.protocol.messages import PROBE, TeacherCard

Files = Mapping[str, bytes]


def served_tokenizer(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer files that clients download, as transformers loads the tokenizer of the directory.

    Raises TeacherError if `folder` is not a model directory, or if a trainer could not use its tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{folder} is not a model directory: expected config.json, weights and a tokenizer in it")
    return checked_tokenizer(folder)


def checked_tokenizer(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer files of a directory after the check that a trainer makes. Raises TeacherError."""
    try:
        files = tokenizer_files(folder)
        Vocabulary.of_folder(files, name=folder.name)
    except TokenizerError as error:
        raise TeacherError(str(error)) from error
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
    tokenizer_sha256 = _sha256(files["tokenizer.json"])
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
            chat_template_sha256=None if template is None else _sha256(template),
            **engine_fields,
        )


def fingerprint(tokenizer_sha256: str, dtype: str, weights: str) -> str:
    """Return a hash of tokenizer, dtype and weights; see model_dirs.weights_sha256."""
    return hashlib.sha256(f"{tokenizer_sha256} {dtype} {weights}".encode()).hexdigest()


def bos_id(files: Files, model_bos_id: int | None) -> int | None:
    """Return the id of BOS: see teachers.bos.bos_id_of."""
    return bos_id_of(files["tokenizer.json"], files["tokenizer_config.json"], model_bos_id)


def tokenizer_expects_bos(files: Files, bos_id: int | None) -> bool | None:
    """Return whether the tokenizer puts BOS in front of every text; None if the model has to be probed."""
    return declared_bos(bos_id, files["tokenizer_config.json"])


def probe_ids(files: Files) -> list[int]:
    """Return the ids of a plain sentence without special tokens, for teachers.bos.bos_probes."""
    ids: list[int] = Vocabulary.of_folder(files, name="probe").encode(PROBE).ids.tolist()
    return ids


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
