"""The chat template of Qwen 3 with tools and reasoning: text as from transformers, supervision complete."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from alignment import Vocabulary
from alignment.tokenizers.folder import tokenizer_files
from tests.trainer.test_supervision import TOOL_CHAT, assistant, supervised
from tests.zoo import prepare_zoo
from trainer.chats.chat_template import ChatTemplate
from trainer.tokenization import load_chat_template

pytestmark = pytest.mark.slow

SACK = {"type": "object", "properties": {"sack": {"type": "integer"}}}
WEIGH = {"type": "function", "function": {"name": "weigh", "description": "Weigh a sack", "parameters": SACK}}
CALL = '<tool_call>\n{"name": "weigh", "arguments": {"sack": 3}}\n</tool_call><|im_end|>'
ANSWER = "14.5 kilograms.<|im_end|>"
SECOND_TURN = [{"role": "user", "content": "Is it dry?"}, assistant("<think>\nIt was wet.\n</think>\n\nNo.")]


@pytest.fixture(scope="module")
def qwen() -> tuple[ChatTemplate, Any]:
    """Our template, and transformers' tokenizer."""
    folder = prepare_zoo(print)["qwen-3"]
    template = load_chat_template(tokenizer_files(folder), Vocabulary.load(folder), {}, None)
    return template, AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (TOOL_CHAT, [f"<think>\nFirst weigh.\n</think>\n\n{CALL}", f"<think>\nIt is wet.\n</think>\n\n{ANSWER}"]),
        ([*TOOL_CHAT, *SECOND_TURN], [CALL, ANSWER, "<think>\nIt was wet.\n</think>\n\nNo.<|im_end|>"]),
    ],
    ids=["one turn", "two turns"],
)
def test_reasoning_and_tool_calls_are_supervised_as_the_template_renders_them(
    qwen: tuple[ChatTemplate, Any], messages: list[dict[str, Any]], expected: list[str]
) -> None:
    """The template renders the reasoning of the last turn only. What it omits from earlier turns is counted."""
    template, tokenizer = qwen
    rendered = template.render(messages, [WEIGH])
    assert rendered.text == tokenizer.apply_chat_template(messages, tools=[WEIGH], tokenize=False)
    assert supervised(rendered) == expected
    omitted = [omission.text for omission in rendered.omissions]
    assert omitted == (["First weigh.", "It is wet."] if len(messages) > len(TOOL_CHAT) else [])


def test_the_empty_reasoning_that_the_template_adds_is_context(qwen: tuple[ChatTemplate, Any]) -> None:
    rendered = qwen[0].render([{"role": "user", "content": "Is it dry?"}, assistant("No.")])
    assert "<think>\n\n</think>\n\nNo." in rendered.text
    assert supervised(rendered) == ["No.<|im_end|>"]
