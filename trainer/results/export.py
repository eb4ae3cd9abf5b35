"""The exported model: the student's own files, what its chats need to end, and its card, replaced as a whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from trainer.data.chat import END_OF_TURN, ChatTemplate
from trainer.data.reading import Reader
from trainer.data.template import DEFAULT
from trainer.errors import CheckpointError
from trainer.learning.student import Student

CARD = "README.md"


def export_model(student: Student, weights: Mapping[str, Tensor], reader: Reader, folder: Path, card: str) -> None:
    """Put the student, with whole weights, into `folder`; what stood there stays until all of the new is written.

    Raises CheckpointError if it cannot be.
    """
    partial, before = (folder.with_name(f".{kind}-{folder.name}") for kind in ("partial", "before"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        student.export(partial, weights)
        if reader.template is not None:
            _write_chats(partial, reader.template)
        save_card(card, partial)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot export to {folder} ({error}): make room, then run with --resume") from error


def save_card(card: str, folder: Path) -> None:
    """Write the model's card, or replace it as a whole."""
    partial = folder / f".{CARD}"
    partial.write_text(card, encoding="utf-8")
    os.replace(partial, folder / CARD)


def _write_chats(folder: Path, template: ChatTemplate) -> None:
    """The template that the student has learned, and its end of turn among what ends a generation."""
    sources = template.template.sources
    if sources.keys() == {DEFAULT}:  # where there are several they are the base model's, whose files are copied
        (folder / "chat_template.jinja").write_text(sources[DEFAULT], encoding="utf-8")
    end_of_turn = template.vocabulary.roles.get(END_OF_TURN) if template.end_of_turn is None else template.end_of_turn
    path = folder / "generation_config.json"
    if end_of_turn is None or not path.is_file():
        return
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end_of_turn not in ends:
        settings["eos_token_id"] = [*ends, end_of_turn]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
