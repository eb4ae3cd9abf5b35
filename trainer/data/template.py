"""A model's own chat template: found in its files, and run as it runs where the model is used.

A template is a program, and a teacher's comes over the wire: transformers renders it in jinja's sandbox, never
anything else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.errors import UserError

TODAY = date(2026, 1, 1)  # the date that templates read: one for all models, whenever they are asked
DEFAULT, TOOL_USE = "default", "tool_use"
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of a template's code

Message = dict[str, Any]


class ChatError(UserError):
    """A chat that a model's template does not write faithfully, or a model without a template."""


class Refused(ChatError):
    """The template raised."""


@dataclass(frozen=True)
class Template:
    """sources    template text by name: default, and tool_use where the model has a second one
    variables  the spellings that templates ask for by name: bos_token, eos_token, …
    today      what `strftime_now` tells
    """

    sources: Mapping[str, str]
    variables: Mapping[str, str]
    today: date

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str, given: str | None, today: date) -> "Template":
        """Read from tokenizer files by name, or take `given`. Raises ChatError if there is neither."""
        config = _object(files, "tokenizer_config.json", name)
        try:
            sources = {DEFAULT: given} if given is not None else _sources(files, config)
        except (UnicodeDecodeError, KeyError, TypeError) as error:
            raise ChatError(f"{name}: its chat template cannot be read ({type(error).__name__}: {error})") from error
        if DEFAULT not in sources:
            raise ChatError(
                f"{name} has no chat template (found: {', '.join(sources) or 'none'}): "
                "give one in the run file, or a model that was trained on chats"
            )
        variables = _spellings(_object(files, "special_tokens_map.json", name)) | _spellings(config)
        return cls(sources, variables, today)

    def write(self, messages: Sequence[Message], tools: Sequence[Message]) -> str:
        """The text of a chat. Raises Refused with the template's own words."""
        source = self.sources.get(TOOL_USE) if tools else None
        variables: dict[str, Any] = {**self.variables, "strftime_now": self.today.strftime}
        try:
            texts = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=source or self.sources[DEFAULT],
                **variables,
            )[0]
        except _FAULTS as error:
            raise Refused(f"the template refuses the chat: {type(error).__name__}: {error}") from error
        return str(texts[0])


def _object(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise ChatError(f"{file} of {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ChatError(f"{file} of {name}: expected a JSON object, received {type(value).__name__}")
    return value


def _sources(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """The file of its own first; then the config's one text, or its list of named ones."""
    if "chat_template.jinja" in files:
        return {DEFAULT: files["chat_template.jinja"].decode()}
    found = config.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    return {str(entry["name"]): str(entry["template"]) for entry in found or ()}


def _spellings(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}
