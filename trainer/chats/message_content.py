"""Normalization of the content and of the reasoning of a message."""

import re
from collections.abc import Mapping
from typing import Any

from trainer.chats.inline_reasoning import inline_reasoning
from trainer.chats.json_values import InvalidChat, json_text, wrong_type
from trainer.plain_text import excerpt

REASONING = "reasoning_content"  # key of the reasoning in the normal form
REASONING_KEYS = (REASONING, "reasoning", "thinking")
CALL = "function_call"  # role of a message whose content is a tool call

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")
_CALL_PARTS = ("tool_use", "tool_call", "tool_result", "function_call", "function_call_output")
_MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url")
_PART_KEYS = {"type", "text", "source", "detail", "annotations", "cache_control"}
_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")


def content_and_thoughts(content: object, role: str, drops_other_parts: bool) -> tuple[str, str]:
    """Return the text of a content, and the reasoning among its parts.

    The content of a tool, and that of a tool call under the role function_call, may be any JSON value; it is returned
    as JSON text.
    """
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if role in ("tool", CALL) and not _are_parts_of_a_result(content):
        return json_text(content, "content"), ""
    if not isinstance(content, list) or not all(isinstance(part, str) or _is_part(part) for part in content):
        raise wrong_type(content, "content", "a string or a list of parts with a type")
    parts = [_part(part, drops_other_parts) for part in content]
    return "".join(text for text, _ in parts), "\n".join(thought for _, thought in parts if thought.strip())


def _are_parts_of_a_result(content: object) -> bool:
    """Return whether the result of a tool is a list of parts, instead of a list of objects that have a type too."""
    return isinstance(content, list) and bool(content) and all(_is_part_of_a_result(part) for part in content)


def _is_part_of_a_result(part: object) -> bool:
    if not _is_part(part):
        return False
    assert isinstance(part, dict)
    keys = {key for key, value in part.items() if value is not None}
    is_text = part["type"] in _TEXT_PARTS and isinstance(part.get("text"), str)
    return (is_text or part["type"] in _MEDIA_PARTS) and keys <= {*_PART_KEYS, part["type"]}


def _is_part(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _part(part: str | Mapping[str, Any], drops_other_parts: bool) -> tuple[str, str]:
    """Return text and reasoning of one part; one of the two is empty."""
    if isinstance(part, str):
        return part, ""
    kind = part["type"]
    text = part.get(kind) if kind in _REASONING_PARTS and part.get(kind) is not None else part.get("text")
    if kind in (*_TEXT_PARTS, *_REASONING_PARTS):
        if not isinstance(text, str):
            raise wrong_type(text, f"the text of a part of type {kind!r}", "a string")
        return ("", text) if kind in _REASONING_PARTS else (text, "")
    if kind in _CALL_PARTS:
        raise InvalidChat(
            f"a part of type {kind!r}: write tool calls under tool_calls, and results of tools as messages of role tool"
        )
    if drops_other_parts:
        return "", ""
    raise InvalidChat(
        f'a part of type {excerpt(kind)}; text is used only: remove the chat, or set other_parts = "drop" in its '
        "source to use the text alone"
    )


def reasoning_of(message: Mapping[str, Any], thoughts: str) -> str:
    """Return the reasoning of a message; "" if it is blank. `thoughts` is the reasoning among the parts of the content.

    The same text in several places counts once, without regard to white space at its ends. Raises InvalidChat if two
    texts differ.
    """
    given = {key: message[key] for key in REASONING_KEYS if key in message}
    for key, text in given.items():
        if not isinstance(text, str):
            raise wrong_type(text, key, "a string")
    texts = {key: text for key, text in (given | {"the reasoning parts": thoughts}).items() if text.strip()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise InvalidChat(f"{' and '.join(texts)} differ; remove one")
    return next(iter(texts.values()), "")


def without_reasoning(role: str, content: str, reasoning: str) -> str:
    """Remove `<think>…</think>` from the beginning of a content if the message has reasoning under a key or as a part.

    The text between them must be the same reasoning, which a template would render twice, or blank. Raises InvalidChat
    for other text. A content is not changed if `reasoning` is empty.
    """
    while reasoning and (inline := inline_reasoning(role, content)):
        if inline.reasoning.strip() not in ("", reasoning.strip()):
            raise InvalidChat(f"{REASONING} and the text between <think> and </think> differ; remove one of them")
        blank = _BLANK_LINES.match(inline.content)
        content = inline.content[blank.end() :] if blank else inline.content
    return content
