"""Export the student as a model directory with chat settings and a model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import DEFAULT
from trainer.errors import CheckpointError
from trainer.manifest import replace_file
from trainer.student.model import Student
from trainer.tokenization import SampleTokenizer

CARD = "README.md"


def export_model(
    student: Student, weights: Mapping[str, Tensor], tokenizer: SampleTokenizer, folder: Path, card: str
) -> None:
    """Write the student with unsharded `weights` to `folder`. A previous export is replaced when all files are written.

    Raises CheckpointError if the folder cannot be written.
    """
    partial, previous = (folder.with_name(f".{kind}-{folder.name}") for kind in ("partial", "previous"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        student.export(partial, weights)
        if tokenizer.template is not None:
            _write_chats(partial, tokenizer.template)
        save_card(card, partial)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot export to {folder} ({error}): correct the cause, for example free disk space, then run with "
            "--resume"
        ) from error


def save_card(card: str, folder: Path) -> None:
    """Write or atomically replace the model card."""
    replace_file(folder / CARD, card)


def _write_chats(folder: Path, template: ChatTemplate) -> None:
    """Write the chat template that the student was trained with, and add its ends of turn to the EOS ids."""
    sources = template.template.sources
    if sources.keys() == {DEFAULT}:  # otherwise Student.export has copied the base model's templates
        (folder / "chat_template.jinja").write_text(sources[DEFAULT], encoding="utf-8")
    path = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = settings.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if new := sorted(template.turn_ends - set(eos_ids)):
        settings["eos_token_id"] = [*eos_ids, *new]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
