"""Untrusted chat templates: rendering equals that of transformers, within limits of time, memory and output."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.templates import TEMPLATES, THINKING, TOOLS, chat, chat_template
from trainer.chats import template_worker
from trainer.chats.jinja_template import ChatError, JinjaTemplate, TemplateError
from trainer.chats.template_worker import WORKER, RenderError, TemplateWorker
from trainer.chats.turn_syntax import turn_syntax

pytestmark = pytest.mark.slow

TODAY = date(2026, 1, 1)
MESSAGES = chat("Guten Tag, é 😀 <b>", "  Hello {{ x }}\n", "more", "<think>\nhm\n</think>\n\nyes")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True], "ü": "\n"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}]}
FEATURES = """{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}
    {%- generation %}{{ m.content | trim }}{% set ns.n = ns.n + 1 %}{% endgeneration %}
  {% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}
{{ ns.n }} {{ tools | tojson(indent=2) }} {{ messages | tojson(ensure_ascii=True, sort_keys=True) }}
{{ strftime_now('%d %B %Y') }} {{ bos_token }} {{ documents is none }} {{ add_generation_prompt }} {{ missing }}
{{ messages[0] is mapping }} {{ 'a' in 'abc' }} {{ [1, 2] | tojson(separators=(',', ':')) }} {{ messages[1:] | length }}
{% macro turn(m) %}{{ m['role'].upper() }}{% endmacro %}{{ turn(messages[0]) }}"""

LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "took more than 0.5 s",
    ),
    "output": ("{% for i in range(99999) %}{{ 'abcdefgh' * 900 }}{% endfor %}", "more than [0-9]+ characters"),
    "memory": ("{{ 'x' * 3000000000 }}", "MemoryError"),
    "more memory": ("{{ 'x' * (2 ** 62) }}", "OverflowError|MemoryError"),
    "power": ("{{ 9 ** (9 ** 9) }}", "took more|ended the process|OverflowError|MemoryError"),
    "format": ("{{ '%3000000000s' % 'a' }}", "MemoryError|OverflowError|ValueError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError|MemoryError|SyntaxError|ended"),
    "sandbox": ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|UndefinedError"),
    "files": ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound"),
    "call": ("{{ 1() }}", "TypeError"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "control characters": ("{{ raise_exception('\x1b[2J\nowned') }}", r"TemplateError:  \[2J owned"),
    "long message": ("{{ raise_exception('x' * 1000000) }}", "TemplateError: x{500}$"),
    "changes": ("{{ messages.clear() }}", "SecurityError"),
}


def template(source: str) -> JinjaTemplate:
    return JinjaTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}, TODAY)


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    WORKER.close()
    WORKER.render(request_of("started before the limit"))
    monkeypatch.setattr(template_worker, "RENDER_S", 0.5)
    yield
    WORKER.close()


def request_of(source: str) -> dict[str, Any]:
    return {"source": source, "messages": [], "tools": None, "variables": {}, "today": "2026-01-01"}


@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["without tools", "tools"])
@pytest.mark.parametrize("source", [*TEMPLATES.values(), TOOLS, THINKING, FEATURES])
def test_a_template_renders_as_in_transformers(source: str, tools: tuple[Any, ...]) -> None:
    for messages in (MESSAGES, [*MESSAGES, CALL] if source in (TOOLS, FEATURES) else MESSAGES[:2]):
        variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "strftime_now": TODAY.strftime}
        expected: Any = render_jinja_template([messages], tools=list(tools) or None, chat_template=source, **variables)
        assert template(source).render(messages, tools) == expected[0][0]


@pytest.mark.parametrize(("source", "problem"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.usefixtures("half_a_second")
def test_a_hostile_template_is_one_sentence_and_the_next_chat_is_rendered(source: str, problem: str) -> None:
    began = time.monotonic()
    with pytest.raises(ChatError, match=problem) as caught:
        template(source).render(MESSAGES, ())
    assert time.monotonic() - began < 5
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert template(TEMPLATES["chatml"]).render(MESSAGES, ()).startswith("<|im_start|>user")


def test_a_chat_that_is_no_json_is_one_sentence() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (b"bytes", nested):
        with pytest.raises(TemplateError, match="cannot receive the chat"):
            template("{{ messages }}").render([{"role": "user", "content": value}], ())


def test_a_chat_that_is_nested_deeply_is_one_sentence() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x", "extra": nested},
        {"role": "assistant", "content": "y"},
    ]
    with pytest.raises(ChatError, match="sample chat, model tiny: the chat: nested more than 64 deep"):
        chat_template(TEMPLATES["chatml"]).render(messages)


def test_a_process_that_was_killed_is_replaced() -> None:
    worker = TemplateWorker()
    assert worker.render(request_of("a")) == "a"
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RenderError, match="ended the process"):
        worker.render(request_of("b"))
    assert worker.render(request_of("c")) == "c"
    worker.close()


def test_threads_take_turns() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(
            pool.map(lambda n: template(f"{{{{ messages[0].content }}}} {n}").render(chat(str(n)), ()), range(99))
        )
    assert texts == [f"{n} {n}" for n in range(99)]


def test_a_fork_renders_in_a_process_of_its_own() -> None:
    assert WORKER.render(request_of("parent")) == "parent"
    assert WORKER._process is not None
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, WORKER.render(request_of("child")).encode())
        WORKER.close()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "child"
    os.waitpid(pid, 0)
    assert WORKER.render(request_of("parent again")) == "parent again"


def test_the_process_ends_with_its_parent() -> None:
    code = """
import time
from trainer.chats.turn_syntax import turn_syntax
from trainer.chats.template_worker import WORKER
WORKER.render({"source": "a", "messages": [], "tools": None, "variables": {}, "today": "2026-01-01"})
print(WORKER._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        assert process.is_running()
        parent.send_signal(signal.SIGKILL)
    process.wait(timeout=10)


def test_a_template_that_takes_too_long_for_one_probe_is_not_taken_for_one_without_syntax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    WORKER.close()
    WORKER.render(request_of("started before the limit"))
    monkeypatch.setattr(template_worker, "RENDER_S", 1e-9)
    with pytest.raises(ChatError, match="took more than 1e-09 s"):
        turn_syntax(template(TEMPLATES["chatml"]), [])
    WORKER.close()
