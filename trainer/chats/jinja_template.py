"""The chat template of a model: found in its tokenizer files and rendered as transformers does.

A template is a program, and the template of a teacher is received over the network. It is rendered in a sandbox, in a
process with limits (trainer/chats/template_worker.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from trainer.chats.json_values import Message
from trainer.chats.template_worker import WORKER, LimitError, RenderError
from trainer.errors import UserError

TODAY = date(2026, 1, 1)  # the date that templates insert: the same for all models and for every run
DEFAULT, TOOL_USE = "default", "tool_use"
MAX_SOURCE_CHARS = 1 << 20


class ChatError(UserError):
    """A chat that a model's template does not render faithfully, or a model without a chat template."""


class TemplateError(ChatError):
    """An error raised by the code of the chat template."""


@dataclass(frozen=True)
class JinjaTemplate:
    """The source code of a model's chat templates, and their variables.

    sources    template code by name: "default", and "tool_use" if the model has a second template for tools
    variables  special tokens as text by the names that templates use: bos_token, eos_token, …
    today      date that `strftime_now` formats
    """

    sources: Mapping[str, str]
    variables: Mapping[str, str]
    today: date

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], name: str, override: str | None, today: date) -> "JinjaTemplate":
        """Read the template from tokenizer files by file name, or use the code in `override` instead.

        name  model, for error messages
        Raises ChatError if a file cannot be read or there is no template.
        """
        config = _json_object(files, "tokenizer_config.json", name)
        try:
            sources = {DEFAULT: override} if override is not None else _template_sources(files, config)
        except (UnicodeDecodeError, KeyError, TypeError) as error:
            raise ChatError(f"{name}: cannot read the chat template ({type(error).__name__}: {error})") from error
        if DEFAULT not in sources:
            others = f" (only {', '.join(sources)})" if sources else ""
            raise ChatError(
                f"{name} has no chat template{others}, and the data has chats: set chat_template of this model to a "
                "file with a template, use a model that was trained on chats, or make texts of the data by "
                "[data.sources.template]"
            )
        if (longest := max(len(source) for source in sources.values())) > MAX_SOURCE_CHARS:
            raise ChatError(f"{name}: its chat template has {longest} characters, expected at most {MAX_SOURCE_CHARS}")
        variables = _special_tokens(_json_object(files, "special_tokens_map.json", name)) | _special_tokens(config)
        return cls(sources, variables, today)

    def render(self, messages: Sequence[Message], tools: Sequence[Message], generation_prompt: bool = False) -> str:
        """Render a chat as text, with `generation_prompt` up to the beginning of the next assistant message.

        Raises TemplateError with the message of the template, and ChatError if the subprocess that renders takes too
        long or ends: that says nothing about what the template accepts.
        """
        source = self.sources.get(TOOL_USE) if tools else None
        request = {
            "source": source or self.sources[DEFAULT],
            "messages": list(messages),
            "tools": list(tools) or None,
            "variables": dict(self.variables),
            "today": self.today.isoformat(),
            "generation_prompt": generation_prompt,
        }
        try:
            return WORKER.render(request)
        except LimitError as error:
            raise ChatError(f"the chat template {error}") from error
        except RenderError as error:
            raise TemplateError(f"the chat template {error}") from error


def _json_object(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    """Parse one of the files; a missing file is an empty object."""
    try:
        value = json.loads(files.get(file, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{file} of {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ChatError(f"{file} of {name}: expected a JSON object, received {type(value).__name__}")
    return value


def _template_sources(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Return templates by name, from chat_template.jinja or else from tokenizer_config.json."""
    if "chat_template.jinja" in files:
        return {DEFAULT: files["chat_template.jinja"].decode()}
    template = config.get("chat_template")
    if isinstance(template, str):
        return {DEFAULT: template}
    return {str(entry["name"]): str(entry["template"]) for entry in template or ()}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}
