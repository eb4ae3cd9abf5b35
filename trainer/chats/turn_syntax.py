"""Syntax of a chat template: the text that it writes around the parts of an assistant message.

The syntax is found by rendering short chats whose contents are markers. The text that a model generates in a turn
begins after the generation prompt, which the template appends if `add_generation_prompt` is set. It ends with the token
that the template writes after the last message of a chat.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.chats.content_search import first_difference
from trainer.chats.jinja_template import JinjaTemplate, TemplateError
from trainer.chats.json_values import Message
from trainer.chats.message_content import REASONING, REASONING_KEYS
from trainer.chats.tool_calls import CALL_STYLES, CallStyle

INLINE = "inline"  # opening of reasoning in the content
_USER, _CONTENT, _REASONING, _CALL = "ProbeUser", "ProbeContent", "ProbeReasoning", "ProbeCall"


@dataclass(frozen=True)
class TurnSyntax:
    """The text of the template around the parts of an assistant message.

    openings       text between the generation prompt and the first part of a message, by kind of that part
    after_content  text after the content of the last message of a chat
    after_calls    text after the arguments of the last tool call of the last message; empty if it is unknown
    reasoning_key  key of a message by which the template reads its reasoning
    call_style     how the template expects messages with tool calls
    has_prompt     whether the template writes the beginning of an answer if `add_generation_prompt` is set
    """

    openings: Mapping[str, str]
    after_content: str
    after_calls: str
    reasoning_key: str
    call_style: CallStyle
    has_prompt: bool = True


def turn_syntax(template: JinjaTemplate, tools: Sequence[Message]) -> TurnSyntax:
    """Find the syntax of a chat template by rendering short chats.

    tools  tools of the chats; if there are any, the template's variant for tools is used
    Texts of the result are empty if the template raises an error for the short chat that would show them.
    """
    probe = _Probe(template, tools)
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _CONTENT}
    plain, earlier = probe.render([user, assistant]), probe.render([user, assistant, user])
    header, prompt = (probe.render([user], is_prompt).rpartition(_USER)[2] for is_prompt in (False, True))
    has_prompt = prompt != header
    if not has_prompt:
        prompt = _between(earlier, _CONTENT) or _between(plain, _CONTENT)
    call_style, calls = probe.tool_call(user)
    inline = probe.render([user, assistant | {"content": f"<think>{_REASONING}</think>{_CONTENT}"}])
    reasoning_key, reasoning = probe.reasoning(user, assistant)
    return TurnSyntax(
        openings={
            "reasoning": _without_prompt(_between(reasoning, _REASONING), prompt),
            INLINE: _without_prompt(_between(inline, _REASONING), prompt),
            # An empty block of reasoning that precedes contents and calls is not generated.
            "tool_calls": _without_prompt(_between(calls, _CALL), prompt, _between(plain, _CONTENT)),
        },
        after_content=plain.rpartition(_CONTENT)[2],
        after_calls=calls.rpartition(_CALL)[2] if _CALL in calls else "",
        reasoning_key=reasoning_key,
        call_style=call_style,
        has_prompt=has_prompt,
    )


@dataclass(frozen=True)
class TurnEnds:
    """How a template ends the turns of the assistant.

    after_content  text between a content and the token that ends the turn
    token          text of the token that ends the last turn of a chat after a content; empty without one
    call_token     text of the token that ends a turn after tool calls; empty without one
    """

    after_content: str
    token: str
    call_token: str


def turn_ends(syntax: TurnSyntax, special_tokens: re.Pattern[str], excluded: Collection[str]) -> TurnEnds:
    """Find the tokens that end a turn in the text that follows the last message.

    special_tokens  matches the text of every token that may end a turn, except those in `excluded`
    After a content, it is the first such token. The token after tool calls is at the same place before the end of the
    text if the texts end alike. Otherwise it is the last such token, because the syntax of calls contains others.
    """
    content = next((m for m in special_tokens.finditer(syntax.after_content) if m[0] not in excluded), None)
    calls = [m for m in special_tokens.finditer(syntax.after_calls) if m[0] not in excluded]
    ending = syntax.after_content[content.start() :] if content else ""
    call_token = calls[-1][0] if calls else ""
    if content is None:
        return TurnEnds("", "", call_token)
    if syntax.after_calls.endswith(ending):
        call_token = content[0]
    return TurnEnds(syntax.after_content[: content.start()], content[0], call_token)


@dataclass(frozen=True)
class _Probe:
    template: JinjaTemplate
    tools: Sequence[Message]

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Render a chat. Return an empty text if the template raises an error."""
        try:
            return self.template.render(messages, self.tools, generation_prompt)
        except TemplateError:
            return ""

    def tool_call(self, user: Message) -> tuple[CallStyle, str]:
        """Return the first style in which the template renders a tool call, and a chat rendered in this style.

        A template that writes arguments without `tojson` raises an error for an object, or writes it in the syntax of
        Python. Some templates render calls only beside a null content. Return the default style if there is none.
        """
        arguments = {_CALL: _CALL}
        call = {"type": "function", "function": {"name": _CALL, "arguments": arguments}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        texts = {style: self.render([user, style.applied_to(message)]) for style in CALL_STYLES}
        rendered = (style for style, text in texts.items() if _CALL in text and str(arguments) not in text)
        style = next(rendered, CallStyle())
        return style, texts[style]

    def reasoning(self, user: Message, assistant: Message) -> tuple[str, str]:
        """Return the key of a message from which the template reads the reasoning, and a chat rendered with that key.

        If the template renders no reasoning, the key is `reasoning_content` and the text is empty.
        """
        for key in REASONING_KEYS:
            text = self.render([user, assistant | {key: _REASONING}])
            if _REASONING in text:
                return key, text
        return REASONING, ""


def _between(text: str, marker: str) -> str:
    """Return the text between the user's content and a marker after it; empty if there is no such marker."""
    after_user = text.partition(_USER)[2]
    return after_user.partition(marker)[0] if marker in after_user else ""


def _without_prompt(before: str, *prompts: str) -> str:
    """Remove the longest prefix that the text shares with one of the prompts."""
    return before[max(first_difference(before, prompt) for prompt in prompts) :]
