"""Short chat templates that imitate common model families, for the tiny tokenizers of tests.tiny."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from alignment import Vocabulary
from tests.tiny import Kind, tokenizer_config, tokenizer_json
from trainer.chats.chat_template import ChatTemplate

Messages = list[dict[str, Any]]

# A header with the role, the unchanged content, and one token at the end of every turn.
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""

# Writes BOS itself, a date, trimmed contents, a blank line after the header.
LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>

{% if m.role == 'system' %}Today is {{ strftime_now('%d %b %Y') }}.

{% endif %}{{ m.content | trim }}<|eot|>{% endfor %}"""

# Rejects system messages, calls the assistant "model", trims contents.
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}"""

# A space before and EOS after every assistant message; the system message is written only before a last user message.
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]
{%- if loop.last and messages[0].role == 'system' %} {{ messages[0].content }}

{%- endif %} {{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""

# White space before the end of turn.
SPACED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
<|im_end|>{% endfor %}"""

# Tool definitions first, calls as JSON, results of tools with a separate role.
TOOLS = """{% if tools %}<|im_start|>tools
{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}
call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>
{% endfor %}"""

# Separates the thoughts from the content, and keeps them in the last message only.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{% if loop.last %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}<think>
{{ thought if '</think>' in m.content else '' }}
</think>

{% endif %}{{ content }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""

# Keeps the reasoning after the last user message, adds an empty block to a last answer without reasoning, and has a
# generation prompt, as Qwen3.
QWEN = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{% set content, thought = m.content, '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) %}<think>
{{ thought }}
</think>

{% endif %}{{ content }}{% for c in m.tool_calls or [] %}{{ '\\n' if content or not loop.first }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# White space before EOS, as Llama 2.
LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]
{%- else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""

# The marker of the next role follows a content.
ROLE_MARKERS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "spaced": SPACED}
SPECIALS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "<turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
)


@cache
def chat_files(kind: Kind) -> dict[str, bytes]:
    """Return the files of a tiny tokenizer with the special tokens of all templates, as a teacher serves them."""
    return {
        "tokenizer.json": json.dumps(spec_of(kind)).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config(kind)).encode(),
    }


def with_tokens(spec: dict[str, Any], tokens: Sequence[str], **flags: bool) -> dict[str, Any]:
    """Return tokenizer.json with special tokens added at the end of the vocabulary."""
    size = max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | flags
    new = [{"id": size + n, "content": token} | flags for n, token in enumerate(tokens)]
    return spec | {"added_tokens": [*spec["added_tokens"], *new]}


@cache
def chat_vocabulary(kind: Kind) -> Vocabulary:
    return Vocabulary.from_files(chat_files(kind), name=kind)


def vocabulary_of(spec: dict[str, Any], kind: Kind = "sentencepiece") -> Vocabulary:
    return Vocabulary.parse(json.dumps(spec).encode(), json.dumps(tokenizer_config(kind)).encode(), name="odd")


def spec_of(kind: Kind, **flags: bool) -> dict[str, Any]:
    return with_tokens(json.loads(tokenizer_json(kind)), SPECIALS, **flags)


def prefixed(kind: Kind) -> Vocabulary:
    """Build a tokenizer that adds a space in front of every segment between special tokens."""
    spec = spec_of(kind)
    if kind == "byte_level":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    else:
        spec["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, spec["normalizer"]],
        }
    return vocabulary_of(spec, kind)


def chat_template(text: str, kind: Kind = "byte_level", **options: Any) -> ChatTemplate:
    return ChatTemplate.from_files(chat_files(kind), chat_vocabulary(kind), "tiny", template=text, **options)


def id_of(token: str, kind: Kind = "byte_level") -> int:
    """Return the id of a token string."""
    return chat_vocabulary(kind).tokens.index(token)


def chat(*contents: str, system: str | None = None) -> Messages:
    """Build a chat in which user and assistant alternate, with an optional system message."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*head, *({"role": roles[n % 2], "content": content} for n, content in enumerate(contents))]
