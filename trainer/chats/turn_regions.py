"""Regions of a rendered text that the assistant generates: from the generation prompt of a turn to its end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from trainer.chats.content_search import RenderedText
from trainer.chats.message_parts import PartKind, Slot, is_inline
from trainer.chats.turn_syntax import INLINE, TurnEnds, TurnSyntax


@dataclass(frozen=True)
class TextPart:
    """Characters [start, stop) of one part of a message."""

    kind: PartKind
    start: int
    stop: int


@dataclass(frozen=True)
class Region:
    """The supervised text of one message, in characters of the rendered text.

    start, stop  from the first supervised character to the last one in front of the end of turn
    parts        the supervised parts, in order; text of the template may precede and follow each
    may_end      whether the end of turn may follow; false if an unsupervised tool call follows in the message
    """

    message: int
    start: int
    stop: int
    parts: tuple[TextPart, ...]
    may_end: bool


def regions(
    rendered: RenderedText, slots: Sequence[Slot], syntax: TurnSyntax, ends: TurnEnds, escape_mark: str = ""
) -> list[Region]:
    """Return the regions of the parts that were found, in order.

    The text of the template belongs to a region between two supervised parts, in front of reasoning and tool calls, and
    after the last part up to the token that ends the turn. `escape_mark` precedes texts that are not special tokens.
    """
    call_end = re.compile((f"(?<!{re.escape(escape_mark)})" if escape_mark else "") + re.escape(ends.call_token))
    in_order = sorted(rendered.parts, key=lambda slot: rendered.parts[slot])
    limits = [*(rendered.parts[slot][0] for slot in in_order[1:]), len(rendered.text)]
    parts = {
        slot: _part(rendered, slot, call_end if ends.call_token else None, limit)
        for slot, limit in zip(in_order, limits, strict=True)
    }
    found, supervised = [], frozenset(slots)
    for message, group in groupby(in_order, key=lambda slot: slot.message):
        members = list(group)
        of_message, may_end = tuple(parts[slot] for slot in members), _may_end(rendered, supervised, members[-1])
        stop = of_message[-1].stop
        if may_end and of_message[-1].kind != "tool_calls" and rendered.text.startswith(ends.after_content, stop):
            stop += len(ends.after_content)
        found.append(Region(message, _start(rendered, members[0], syntax), stop, of_message, may_end))
    return found


def _part(rendered: RenderedText, slot: Slot, call_end: re.Pattern[str] | None, limit: int) -> TextPart:
    """Return a part. Tool calls reach to the token that ends the turn, or else to the end of the message."""
    start, stop = rendered.parts[slot]
    if slot.kind == "tool_calls":
        end = call_end.search(rendered.text, start, limit) if call_end else None
        last = end.start() if end else rendered.chat.end_of_message(slot.message, rendered.text)
        stop = max(start, min(limit, last))
    return TextPart(slot.kind, start, stop)


def _start(rendered: RenderedText, first: Slot, syntax: TurnSyntax) -> int:
    """Return where the region begins: at a content, or at the template's text in front of reasoning or tool calls."""
    start = rendered.parts[first][0]
    message = rendered.chat.messages[first.message - rendered.chat.num_folded]
    opening = syntax.openings.get(INLINE if first.kind == "reasoning" and is_inline(message) else first.kind, "")
    while opening and not rendered.text.endswith(opening, 0, start):
        opening = opening[1:]
    return start - len(opening)


def _may_end(rendered: RenderedText, supervised: frozenset[Slot], last: Slot) -> bool:
    """Return whether the end of the turn may follow a part: no unsupervised or omitted tool call follows it."""
    if last.kind == "tool_result":
        return False
    message = rendered.chat.messages[last.message - rendered.chat.num_folded]
    calls = Slot(last.message, "tool_calls")
    is_omitted = calls not in supervised or calls not in rendered.parts
    return not (message.get("tool_calls") and is_omitted)
