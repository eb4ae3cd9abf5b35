"""Chats whose last answer was sampled by the student.

Every model renders the chat up to the answer with its own template. The answer follows unchanged: a template could
strip its white space or move its reasoning, and it cannot render an empty answer or an unfinished thought.
"""

from alignment import Tokens
from trainer.chats.chat_template import ChatTemplate
from trainer.chats.rendered_chat import MessagePart, RenderedChat, Span


def sampled_chat(
    template: ChatTemplate, tokens: Tokens, start: int, *, end: int | None, message: int, sample: str
) -> RenderedChat:
    """Return the rendered chat of a sampled answer, which is its only supervised span.

    tokens   the chat up to the answer, and the answer, without an end token
    start    byte at which the answer begins
    end      id of the token with which the turn ends; None if the student has not ended it
    message  index of the answer among the messages
    sample   name of the sample
    """
    stop = tokens.num_bytes
    if end is not None:
        text = template.vocabulary.tokens[end].encode()
        tokens = tokens.continued(text, [end], [len(text)])
    prefix = template.vocabulary.prefix
    return RenderedChat(
        name=template.name,
        sample=sample,
        tokens=tokens,
        prefix=() if tokens.ids[:1].tolist() == prefix else tuple(prefix),
        spans=(Span(message, start, stop, end, (MessagePart("content", start, stop),)),),
        special_T=template.is_special[tokens.ids],
        folded_system=False,
    )
