"""Reasoning at the beginning of the content of an assistant message: `<think>…</think>`."""

import re
from typing import NamedTuple

_PATTERN = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


class InlineReasoning(NamedTuple):
    """A content that begins with reasoning, in four parts. Their concatenation is the content.

    opening    `<think>`, with the white space in front of it
    reasoning  text between `<think>` and `</think>`
    closing    `</think>`
    content    text after `</think>`
    """

    opening: str
    reasoning: str
    closing: str
    content: str


def inline_reasoning(role: str, content: str) -> InlineReasoning | None:
    """Split a content that begins with reasoning. Return None for other contents and for other roles than assistant."""
    if role != "assistant" or "<think>" not in content:
        return None
    match = _PATTERN.fullmatch(content)
    return InlineReasoning(*match.groups()) if match else None
