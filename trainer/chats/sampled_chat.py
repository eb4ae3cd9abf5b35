"""A chat whose last answer the student has sampled, with the tokens that it sampled."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment import Tokens
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import MessagePart, RenderedChat, Span

Messages = Sequence[Mapping[str, Any]]


def sampled_chat(
    template: ChatTemplate,
    chat: tuple[Messages, Messages],
    tokens: Tokens,
    start: int,
    *,
    end: int | None,
    sample: str,
) -> RenderedChat:
    """Return the rendered chat of an answer that the student has sampled, without what the template writes after it.

    chat    messages and tools; the answer is the last message
    tokens  the prompt and the answer, without an end token
    start   byte at which the answer begins
    end     id of the token with which the student has ended the turn; None if it has not
    """
    span = start, tokens.num_bytes
    parts = _answer_parts(template, chat, tokens.text, span)
    if end is not None:
        text = template.vocabulary.tokens[end].encode()
        tokens = tokens.continued(text, [end], [len(text)])
    prefix = template.vocabulary.prefix
    return RenderedChat(
        name=template.name,
        sample=sample,
        tokens=tokens,
        prefix=() if tokens.ids[:1].tolist() == prefix else tuple(prefix),
        spans=(Span(len(chat[0]) - 1, *span, end, parts),),
        special_T=template.is_special[tokens.ids],
        folded_system=False,
    )


def _answer_parts(
    template: ChatTemplate, chat: tuple[Messages, Messages], text: bytes, span: tuple[int, int]
) -> tuple[MessagePart, ...]:
    """Return reasoning and content of the answer as the template renders them, if it renders the same text.

    A template may change an answer, for example strip its white space. The whole answer is then its content.
    """
    whole = (MessagePart("content", *span),)
    try:
        rendered = template.render(*chat)
    except ChatError:
        return whole
    parts = rendered.spans[-1].parts
    is_same = rendered.tokens.text.startswith(text) and parts[0].start >= span[0] and parts[-1].stop <= span[1]
    return parts if is_same else whole
