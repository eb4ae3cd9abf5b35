"""The chat template and the vocabulary of one model: render and tokenize a chat, and find its supervised spans."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignment import TokenizerError, Tokens, Vocabulary
from trainer.chats.config import SupervisionConfig
from trainer.chats.content_search import Chat
from trainer.chats.jinja_template import TODAY, ChatError, JinjaTemplate
from trainer.chats.json_values import InvalidChat, Message
from trainer.chats.message_parts import supervised_slots
from trainer.chats.messages import normalize_chat
from trainer.chats.rendered_chat import MessagePart, RenderedChat, Span, token_range
from trainer.chats.special_tokens import (
    Escape,
    PlainText,
    SpecialTokenError,
    first_spelled_token,
    place_of_surrogate,
    plain_text,
    spelled_bytes,
    token_pattern,
)
from trainer.chats.turn_regions import Region, regions
from trainer.chats.turn_syntax import TurnEnds, TurnSyntax, turn_ends, turn_syntax

END_OF_TURN = "end_of_turn"
OPEN_THOUGHT = re.compile(r"<think>\s*\Z")  # at the end of a generation prompt
_TURN_MARKER = re.compile(r"<[|｜].+[|｜]>")  # tokens such as <|user|>, whether or not the tokenizer calls them special


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template and the vocabulary of one model.

    end_of_turn  id of the only token that may end a turn; None accepts the token with which the template ends a turn
    """

    name: str
    vocabulary: Vocabulary
    template: JinjaTemplate
    end_of_turn: int | None
    supervision: SupervisionConfig = SupervisionConfig()

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        vocabulary: Vocabulary,
        name: str,
        *,
        template: str | None = None,
        roles: Mapping[str, str | int] | None = None,
        today: date = TODAY,
        supervision: SupervisionConfig = SupervisionConfig(),
    ) -> "ChatTemplate":
        """Build from tokenizer files by file name.

        template     Jinja code that replaces the template in the files
        roles        {"end_of_turn": token id or token text}, if the template does not end a turn with this token
        today        date that templates insert; it must be the same for all models of a run
        supervision  parts of a chat that are supervised; the same for all models of a run
        Raises ChatError if a file cannot be read, there is no template, or a role or its token is unknown.
        """
        jinja = JinjaTemplate.from_files(files, name, template, today)
        return cls(name, vocabulary, jinja, _end_of_turn(roles or {}, vocabulary, name), supervision)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, sample: str = "chat"
    ) -> RenderedChat:
        """Render and tokenize a chat, and find the spans of the messages that `supervision` names.

        messages, tools  in any form that `normalize_chat` accepts (trainer/chats/messages.py)
        Raises ChatError with sample and model.
        """
        label = f"sample {sample}, model {self.name}"
        try:
            return self._render(*normalize_chat(messages, tools), sample, label)
        except (InvalidChat, TokenizerError) as error:
            raise ChatError(f"{label}: {error}") from error

    def continue_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        answer: str = "",
        *,
        opening: str | None = None,
        sample: str = "chat",
    ) -> tuple[Tokens, int]:
        """Tokenize a chat up to the next answer of the assistant, followed by the text `answer`.

        The template does not render `answer`. Special tokens in it are encoded as ordinary text.

        opening  beginning of a thought with which the prompt is to end, or ""; by default as the template writes it
        Returns the tokens, without a BOS that the template does not write, and the byte at which the answer begins.
        Raises ChatError.
        """
        label = f"sample {sample}, model {self.name}"
        try:
            chat, escape, (syntax, _) = self._chat(*normalize_chat(messages, tools), label)
            prompt = chat.answer_prompt(syntax.has_prompt)
            if opening is not None:
                prompt = OPEN_THOUGHT.sub("", prompt) + opening
            plain = plain_text(prompt, (), escape)
            start = len(plain.text.encode())
            spelled = [(start + begin, start + stop) for begin, stop in spelled_bytes(answer, self.special_tokens)]
            return self.vocabulary.encode_rendered(plain.text + answer, [*plain.literals, *spelled]), start
        except (InvalidChat, TokenizerError) as error:
            raise ChatError(f"{label}: {error}") from error

    @property
    def answer_ends(self) -> frozenset[int]:
        """Return the ids of all tokens that may end an answer."""
        return frozenset(end for end in (*self.turn_ends, *map(self.turn_end, (False, True))) if end is not None)

    def turn_end(self, has_tools: bool) -> int | None:
        """Return the id of the token with which the template ends an answer in chats with or without tools.

        Without one, it is the end of turn or EOS of the vocabulary, or None.
        """
        if self.end_of_turn is not None:
            return self.end_of_turn
        _, ends = self._with_tools if has_tools else self._without_tools
        if ends.token:
            return self.vocabulary.tokens.index(ends.token)
        return self.vocabulary.roles.get(END_OF_TURN, self.vocabulary.roles.get("eos"))

    def _chat(
        self, messages: list[Message], tools: list[Message], label: str
    ) -> tuple[Chat, Escape | None, tuple[TurnSyntax, TurnEnds]]:
        """Return the chat with its special tokens escaped, and the syntax of its turns."""
        escape = self._escape(messages, tools, label)
        if escape is not None:
            messages, tools = list(map(escape.message, messages)), list(map(escape.tool, tools))
        syntax, ends = self._with_tools if tools else self._without_tools
        chat = Chat(
            self.template,
            tuple(messages),
            tuple(tools),
            label,
            self.supervision,
            reasoning_key=syntax.reasoning_key,
            call_style=syntax.call_style,
        )
        return chat, escape, (syntax, ends)

    def _render(self, messages: list[Message], tools: list[Message], sample: str, label: str) -> RenderedChat:
        slots = supervised_slots(messages, self.supervision)
        if not slots:
            raise InvalidChat("the chat has no assistant message to train on")
        chat, escape, (syntax, ends) = self._chat(messages, tools, label)
        rendered = chat.render(slots)
        turns = regions(rendered, slots, syntax, ends, escape.mark if escape else "")
        if not turns:
            raise InvalidChat("the template renders no supervised part of the chat unchanged")
        plain = plain_text(rendered.text, _chars(turns), escape)
        tokens = self.vocabulary.encode_rendered(plain.text, plain.literals)
        prefix = self.vocabulary.prefix
        return RenderedChat(
            name=self.name,
            sample=sample,
            tokens=tokens,
            prefix=() if tokens.ids[:1].tolist() == prefix else tuple(prefix),
            spans=tuple(self._span(turn, tokens, plain, ends) for turn in turns),
            special_T=self.is_special[tokens.ids],
            folded_system=bool(rendered.chat.num_folded),
            omissions=rendered.omissions,
        )

    def spelled_token(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """Describe the first special token that the texts of a chat contain; empty without one.

        messages, tools  in the normal form of trainer/chats/messages.py
        """
        spelled = first_spelled_token(messages, tools, self.special_tokens)
        return "" if spelled is None else str(spelled)

    @property
    def turn_ends(self) -> frozenset[int]:
        """Return the ids of the tokens with which the template ends a turn, also after tool calls.

        If the template writes no such token, the result is the end-of-turn token of the vocabulary, or empty.
        """
        if self.end_of_turn is not None:
            return frozenset({self.end_of_turn})
        variants = [self._without_tools, *([self._with_tools] if "tool_use" in self.template.sources else [])]
        texts = {text for _, ends in variants for text in (ends.token, ends.call_token)} - {""}
        role = self.vocabulary.roles.get(END_OF_TURN)
        if not texts:
            return frozenset() if role is None else frozenset({role})
        return frozenset(map(self.vocabulary.tokens.index, texts))

    def _escape(self, messages: list[Message], tools: list[Message], label: str) -> Escape | None:
        """Return the escape for the special tokens in the texts of a chat; None if no text contains one.

        Raises SpecialTokenError if `special_tokens_in_content` is not "text", and InvalidChat for half of a surrogate
        pair.
        """
        if place := place_of_surrogate(messages, tools):
            raise InvalidChat(f"{place} contains half of a surrogate pair")
        spelled = first_spelled_token(messages, tools, self.special_tokens)
        if spelled is None:
            return None
        if self.supervision.special_tokens_in_content != "text":
            raise SpecialTokenError(f"{label}: {spelled}")
        return Escape.unused_in([*messages, *tools], self.special_tokens)

    def _span(self, turn: Region, tokens: Tokens, plain: PlainText, ends: TurnEnds) -> Span:
        """Return the span of a turn. Its `end_of_turn` is set if an end-of-turn token directly follows the text."""
        parts = tuple(MessagePart(p.kind, plain.byte_of(p.start), plain.byte_of(p.stop)) for p in turn.parts)
        start, last = plain.byte_of(turn.start), parts[-1].stop
        if turn.may_end and self.supervision.end_of_turn:
            for stop in dict.fromkeys((plain.byte_of(turn.stop), last)):
                _, after, is_whole = token_range(tokens, start, stop)
                if is_whole and after < len(tokens) and self._ends_turn(int(tokens.ids[after]), ends):
                    return Span(turn.message, start, stop, int(tokens.ids[after]), parts)
        return Span(turn.message, start, last, None, parts)

    def _ends_turn(self, token: int, ends: TurnEnds) -> bool:
        """Return whether a token that directly follows the text of a turn ends the turn.

        If the run file names an end-of-turn token, no other token does. Otherwise these tokens end a turn:
        - EOS and the end-of-turn token of the vocabulary.
        - Every special token except BOS, if the template writes a special token after the last turn of a chat. If it
          writes none there, a special token between two turns is the role marker of the second one.
        """
        if self.end_of_turn is not None:
            return token == self.end_of_turn
        roles = self.vocabulary.roles
        if token in (roles.get("eos"), roles.get(END_OF_TURN)):
            return True
        return bool(ends.token or ends.call_token) and bool(self._is_marker[token]) and token != roles.get("bos")

    @cached_property
    def _without_tools(self) -> tuple[TurnSyntax, TurnEnds]:
        return self._syntax_and_ends([])

    @cached_property
    def _with_tools(self) -> tuple[TurnSyntax, TurnEnds]:
        tool = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
        return self._syntax_and_ends([{"type": "function", "function": tool}])

    def _syntax_and_ends(self, tools: list[Message]) -> tuple[TurnSyntax, TurnEnds]:
        """Return the syntax of the template for chats with these tools, and the tokens with which it ends a turn."""
        syntax = turn_syntax(self.template, tools)
        texts, bos = self.vocabulary.tokens, self.vocabulary.roles.get("bos")
        if self.end_of_turn is not None:
            return syntax, turn_ends(syntax, re.compile(re.escape(texts[self.end_of_turn])), ())
        return syntax, turn_ends(syntax, self.special_tokens, () if bos is None else (texts[bos],))

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """[V] Whether a token is special, which means that it has no bytes of text."""
        return np.array([data is None for data in self.vocabulary.token_bytes])

    @cached_property
    def _is_marker(self) -> NDArray[np.bool_]:
        """[V] Whether a token is special, looks like a turn marker (`<|…|>`), or ends texts or turns.

        The second condition is needed for DeepSeek: its tokenizer does not declare its turn markers as special.
        """
        markers: NDArray[np.bool_] = self.is_special | np.array(
            [bool(_TURN_MARKER.fullmatch(t)) for t in self.vocabulary.tokens]
        )
        roles = self.vocabulary.roles
        ends = (roles.get("eos"), roles.get(END_OF_TURN), self.end_of_turn)
        markers[[token for token in ends if token is not None]] = True
        return markers

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Regular expression that matches the text of every token in `_is_marker`; the longest token matches first."""
        return token_pattern(self.vocabulary.tokens[i] for i in np.flatnonzero(self._is_marker))


def _chars(turns: Sequence[Region]) -> list[int]:
    """Return the start and stop offsets of all turns and of their parts."""
    ranges = [(each.start, each.stop) for turn in turns for each in turn.parts]
    return [char for each in [*ranges, *((turn.start, turn.stop) for turn in turns)] for char in each]


def _end_of_turn(roles: Mapping[str, str | int], vocabulary: Vocabulary, name: str) -> int | None:
    """Return the id of the token that ends a turn according to the roles; None if they do not name one."""
    if unknown := set(roles) - {END_OF_TURN}:
        raise ChatError(f"model {name}: unknown chat role {min(unknown)!r}, expected {END_OF_TURN!r}")
    token = roles.get(END_OF_TURN)
    if isinstance(token, str):
        token = vocabulary.tokens.index(token) if token in vocabulary.tokens else len(vocabulary)
    if token is not None and not 0 <= token < len(vocabulary):
        raise ChatError(f"model {name}: {END_OF_TURN} is {roles[END_OF_TURN]!r}, which is not a token of its tokenizer")
    return token
