"""Rendering of one chat by one template, and search for the supervised parts of its messages in the rendered text.

The search does not rely on the words of the template. The chat is rendered a second time with a marker in place of
one part. The text before the marker, the part, and the text after the marker must then be the first rendering,
character by character. A content that the template rewrites, truncates, drops or repeats is an error or is counted.
The tool calls of a message are located by a marker in front of the first name, because the template determines their
syntax.

One rendering with a marker in place of every part usually locates all of them. If the text around the markers differs
from the first rendering, smaller groups of parts are searched, and finally single parts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import ChatError, JinjaTemplate, TemplateError
from trainer.chats.json_values import Message
from trainer.chats.message_content import REASONING
from trainer.chats.message_parts import PART_KINDS, Slot, has_text, part_text, with_marks
from trainer.chats.omissions import EXCERPT_CHARS, Omission, excerpt_of_call, mark_unsearched
from trainer.chats.tool_calls import CallStyle

Range = tuple[int, int]  # characters [start, stop) of the rendered text
_ADVICE = (
    'set data.supervision.changed_content = "count" to train on what the template renders unchanged, or set '
    "chat_template to a template that renders it"
)


@dataclass(frozen=True)
class RenderedText:
    """A chat rendered as text, with the positions of its supervised parts.

    chat       the chat that was rendered; a system message may be merged into a user message
    parts      characters [start, stop) of each supervised part; of tool calls, an empty range at the first name
    omissions  parts that the template does not render unchanged
    """

    text: str
    chat: "Chat"
    parts: Mapping[Slot, Range]
    omissions: tuple[Omission, ...]


@dataclass(frozen=True, eq=False)
class Chat:
    """A chat and the template that renders it.

    label          sample and model, for error messages
    reasoning_key  key of a message from which the template reads the reasoning
    call_style     how the template expects messages with tool calls
    num_folded     1 if the system message was merged into the user message that follows it, else 0. All indices of
                   messages refer to the chat without this change
    """

    template: JinjaTemplate
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    label: str
    supervision: SupervisionConfig
    reasoning_key: str = REASONING
    call_style: CallStyle = CallStyle()
    num_folded: int = 0

    def render(self, slots: Sequence[Slot]) -> RenderedText:
        """Render the chat and find the parts named by `slots`. Raises ChatError with sample and model."""
        chat, text = self._fold_system_message()
        marker = _unused_marker(text)
        omissions = list(chat._dropped(marker, slots))
        found = dict(chat._find(slots, text, marker))
        parts = {slot: each for slot, each in found.items() if not isinstance(each, Omission)}
        lost = [each for each in found.values() if isinstance(each, Omission)]
        omissions += chat._checked_reasoning(lost, parts, marker)
        order = [slot.message for slot in sorted(parts, key=lambda slot: parts[slot])]
        if order != sorted(order):
            raise self.error(f"the template reorders the assistant messages {sorted(set(order))}")
        return RenderedText(text, chat, parts, tuple(omissions))

    def answer_prompt(self, has_prompt: bool) -> str:
        """Render the chat up to the beginning of the next answer of the assistant.

        has_prompt  whether the template has a generation prompt; if not, the chat is rendered with an answer
        Raises ChatError, also for a part that the template does not render if `changed_content` is "refuse".
        """
        chat, text = self._fold_system_message()
        marker = _unused_marker(text)
        list(chat._dropped(marker, ()))  # raises
        if has_prompt:
            return chat._render_text(generation_prompt=True)
        answer = {"role": "assistant", "content": marker}
        before, found, _ = replace(chat, messages=(*chat.messages, answer))._render_text().partition(marker)
        if not found:
            raise self.error("the template does not render an answer")
        return before.rstrip(" ")  # a space in front of the answer belongs to its first token

    def error(self, problem: str, kind: type[ChatError] = ChatError) -> ChatError:
        """Build an error that names sample and model."""
        return kind(f"{self.label}: {problem}")

    def end_of_message(self, i: int, text: str) -> int:
        """Return the index in `text` of the first character after message i; 0 if the template raises an error.

        text  the rendered chat
        The messages up to i are rendered alone. The message ends at the first character in which the two texts differ.
        """
        try:
            shorter = replace(self, messages=self.messages[: i + 1 - self.num_folded])._render_text()
        except TemplateError:
            return 0
        return first_difference(shorter, text)

    def _message(self, i: int) -> Message:
        return self.messages[i - self.num_folded]

    def _numbered_messages(self) -> Iterator[tuple[int, Message]]:
        return enumerate(self.messages, self.num_folded)

    def _render_text(
        self, replacements: Mapping[int, Message] | None = None, *, generation_prompt: bool = False
    ) -> str:
        """Render the chat with some messages replaced, by index. Raises TemplateError."""
        messages = [(replacements or {}).get(i, message) for i, message in self._numbered_messages()]
        try:
            plain = [self._for_template(message) for message in messages]
            return self.template.render(plain, self.tools, generation_prompt)
        except ChatError as error:
            raise self.error(str(error), type(error)) from error

    def _for_template(self, message: Message) -> Message:
        """Return a message as the template expects it, without the key "train", which only this project defines."""
        renames = {REASONING: self.reasoning_key}
        plain = {renames.get(key, key): value for key, value in message.items() if key != "train"}
        return self.call_style.applied_to(plain)

    def _omitted(self, omission: Omission) -> Omission:
        """Return the omission. Raises ChatError if it has a problem and `changed_content` is "refuse"."""
        if omission.problem and self.supervision.changed_content == "refuse":
            raise self.error(f"{omission.problem}; {_ADVICE}")
        return omission

    def _fold_system_message(self) -> tuple["Chat", str]:
        """Return the chat that the template renders, and its text.

        A system message that the template rejects or drops is merged into the user message that follows it. Raises
        ChatError if no user message follows or the template rejects that chat too.
        """
        first = self.messages[0]
        if first["role"] != "system":
            return self, self._render_text()
        try:
            text, problem = self._render_text(), self.error("the template omits the system message")
            marker = _unused_marker(text)
            if not has_text(first) or marker in self._render_text({0: first | {"content": marker}}):
                return self, text
        except TemplateError as error:
            problem = error
        second = self.messages[1] if len(self.messages) > 1 else first
        if second["role"] != "user":
            raise problem
        folded = replace(self, messages=(_merge(first, second), *self.messages[2:]), num_folded=1)
        try:
            return folded, folded._render_text()
        except TemplateError:
            raise problem from None

    def _dropped(self, marker: str, slots: Sequence[Slot]) -> Iterator[Omission]:
        """Yield the parts that the template does not render, among those that `_find` does not search for."""
        searched = {slot.message for slot in slots if slot.kind in ("content", "tool_result")}
        marked = mark_unsearched(dict(self._numbered_messages()), self.tools, searched, marker)
        text = replace(self, tools=marked.tools)._render_text(marked.messages)
        for omission in marked.missing_in(text):
            yield self._omitted(omission)

    def _checked_reasoning(
        self, lost: Sequence[Omission], parts: Mapping[Slot, Range], marker: str
    ) -> Iterator[Omission]:
        """Yield the omissions. Reasoning that the template renders in no turn, not even in the last, is a problem."""
        reasoning = [each for each in lost if each.kind == "reasoning" and not each.problem]
        renders = any(slot.kind == "reasoning" for slot in parts)
        if reasoning and not renders:
            last = reasoning[-1].message
            assert last is not None
            shorter = replace(self, messages=self.messages[: last + 1 - self.num_folded])
            renders = marker in shorter._render_text({last: with_marks(self._message(last), {"reasoning": marker})})
        for each in lost:
            if each in reasoning and not renders:
                problem = f"the template drops the reasoning of every message, such as {each.text!r} of message "
                each = replace(each, problem=f"{problem}{each.message}")
            yield self._omitted(each)

    def _find(self, slots: Sequence[Slot], text: str, marker: str) -> Iterator[tuple[Slot, Range | Omission]]:
        """Yield the range of each part in the text, or an omission."""
        if len(slots) == 1:
            yield slots[0], self._find_one(slots[0], text, marker)
        elif (found := self._find_together(slots, text, marker)) is not None:
            yield from found.items()
        elif slots:
            middle = len(slots) // 2
            yield from self._find(slots[:middle], text, marker)
            yield from self._find(slots[middle:], text, marker)

    def _find_together(self, slots: Sequence[Slot], text: str, marker: str) -> dict[Slot, Range | Omission] | None:
        """Find several parts with one rendering. Return None if the rendering does not determine all positions."""
        marks = {f"{marker}{slot.message}{slot.kind}x": slot for slot in slots}
        replacements: dict[int, Message] = {}
        for mark, slot in marks.items():
            message = replacements.get(slot.message, self._message(slot.message))
            replacements[slot.message] = with_marks(message, {slot.kind: mark})
        try:
            pieces = re.split(rf"({marker}[0-9]+(?:{'|'.join(PART_KINDS)})x)", self._render_text(replacements))
        except TemplateError:  # the template may accept one marker and reject several
            return None
        if not text.startswith(pieces[0]):
            return None
        found: dict[Slot, Range | Omission] = {}
        char = len(pieces[0])
        for mark, after in zip(pieces[1::2], pieces[2::2], strict=True):
            slot = marks[mark]
            if slot in found and slot.kind != "tool_calls":
                return None
            # Of several forms that are possible here, a later part of the text would have to decide.
            forms = {f for f in _forms(self._text_of(slot)) if text.startswith(f + after, char)}
            if len(forms) != 1:
                return None
            stop = char + len(forms.pop())
            found.setdefault(slot, (char, stop))
            char = stop + len(after)
        dropped = [slot for slot in slots if slot not in found]
        if char != len(text) or any(slot.kind != "reasoning" for slot in dropped):
            return None
        return found | {slot: self._omission(slot) for slot in dropped}

    def _find_one(self, slot: Slot, text: str, marker: str) -> Range | Omission:
        """Return the range of one part, without white space that the template strips, or an omission."""
        marked = self._render_text({slot.message: with_marks(self._message(slot.message), {slot.kind: marker})})
        before, found, after = marked.partition(marker)
        if slot.kind == "tool_calls":
            if found and marked.replace(marker, "") == text:
                return len(before), len(before)
            return self._omitted(self._omission(slot, f"the template rewrites a tool call of message {slot.message}"))
        if slot.kind == "reasoning" and not found:
            return self._omission(slot)
        content = self._text_of(slot)
        forms = _forms(content)
        for form in forms if found else ():
            if text == before + form + after:
                return len(before), len(before) + len(form)
        # The text around the content depends on the content (a template that treats thoughts separately). The content
        # is then accepted if it occurs exactly once, and not in the text of the template itself.
        for form in forms[:2]:
            if form and form not in marked and 0 <= (start := text.find(form)) == text.rfind(form):
                return start, start + len(form)
        expected = before + content + after if found else marked
        difference = first_difference(expected, text)
        excerpt = slice(max(0, difference - EXCERPT_CHARS), difference + EXCERPT_CHARS)
        problem = (
            f"the template does not render the {slot.kind.removeprefix('tool_')} of message {slot.message} unchanged: "
            f"expected {(expected[excerpt] if found else content[:EXCERPT_CHARS])!r}, found {text[excerpt]!r}"
        )
        return self._omitted(self._omission(slot, problem))

    def _text_of(self, slot: Slot) -> str:
        return part_text(self._message(slot.message), slot.kind)

    def _omission(self, slot: Slot, problem: str = "") -> Omission:
        calls = self._message(slot.message).get("tool_calls")
        text = excerpt_of_call(calls[0]) if slot.kind == "tool_calls" and calls else self._text_of(slot)
        return Omission(slot.message, slot.kind, text[:EXCERPT_CHARS], problem)


def _unused_marker(text: str) -> str:
    """Return a word that does not occur in the text."""
    return next(marker for n in range(len(text) + 1) if (marker := f"Mark{n}Here") not in text)


def _forms(content: str) -> list[str]:
    """Return a content and its variants after the white-space stripping that templates apply."""
    forms = [content, content.strip(), content.rstrip(), content.lstrip()]
    return [*forms, content.strip("\n"), content.lstrip("\n"), content.rstrip("\n")]


def _merge(system: Message, user: Message) -> Message:
    """Put the content of the system message in front of the content of the user message."""
    if not has_text(system):
        return user
    return user | {"content": f"{system['content']}\n\n{user['content']}"}


def first_difference(a: str, b: str) -> int:
    """Return the index of the first character in which two texts differ."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
