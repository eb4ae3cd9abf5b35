"""Settings of the supervision of chats."""

from typing import Literal

from trainer.config_section import Section


class SupervisionConfig(Section):
    """[data.supervision] The parts of a chat that are trained on. A message with `train: false` never is."""

    turns: Literal["all", "last"] = "all"
    """Assistant messages that are supervised: `all`, or only those after the `last` user message."""
    reasoning: bool = True
    """Supervise the reasoning of these messages (`reasoning_content`, or `<think>…</think>` at the beginning of the
    content), where the chat template renders it."""
    tool_calls: bool = True
    """Supervise their tool calls, in the syntax of the chat template."""
    tool_results: bool = False
    """Supervise the contents of the messages of tools."""
    end_of_turn: bool = True
    """Supervise the token that ends a turn. A student that has not learnt this token does not stop."""
    changed_content: Literal["refuse", "count"] = "refuse"
    """A content, tool call or tool that a chat template drops or rewrites, or a reasoning that the template renders in
    no turn: `refuse` rejects the chat, and `count` trains on what the template renders unchanged and counts the rest.
    Reasoning that a template renders in the last turn only is expected."""
    special_tokens_in_content: Literal["refuse", "skip", "text"] = "refuse"
    """A chat whose texts contain a special token of a model, such as `<|im_end|>`: `refuse` ends the run at its start,
    `skip` skips the chat, and `text` tokenizes the characters as ordinary text."""

    def describe(self) -> str:
        """Return the supervision in force as one line."""
        parts = {
            "contents": True,
            "reasoning": self.reasoning,
            "tool calls": self.tool_calls,
            "tool results": self.tool_results,
            "ends of turns": self.end_of_turn,
        }
        messages = "all assistant messages" if self.turns == "all" else "assistant messages after the last user message"
        used, unused = ([part for part, is_used in parts.items() if is_used is value] for value in (True, False))
        omitted = f", not {', '.join(unused)}" if unused else ""
        return (
            f"{messages}: {', '.join(used)}{omitted}; changed content: {self.changed_content}; special tokens in "
            f"content: {self.special_tokens_in_content}"
        )
