"""Script of the subprocess in trainer/chats/template_worker.py: render chat templates within limits.

The process reads requests from standard input and writes one response per request to standard output. Each message is
JSON, preceded by its length (4 bytes, little-endian):

    request   {"source", "messages", "tools", "variables", "today", "max_chars", "generation_prompt"?}
    response  {"text"} or {"error"}; a first response, {}, is sent when the process is ready

It is run as a script, so that it imports only jinja2. It ends when its standard input is closed, and so when its parent
ends. An alarm ends a rendering that takes too long. The memory limit needs Linux. The Jinja environment equals that of
transformers; tests/trainer/test_template_worker.py compares both.
"""

import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30  # besides the memory in use at the start
ALARM_S = 60  # above the parent's limit
MAX_ERROR_CHARS = 500
LENGTH = struct.Struct("<I")


class Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks assistant messages. Its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Compile a template in the same environment as transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(request: dict[str, Any]) -> str:
    """Render one chat. Raises the errors of the template, and MemoryError if the text exceeds `max_chars`."""
    variables = {**request["variables"], "strftime_now": date.fromisoformat(request["today"]).strftime}
    chunks, num_chars = list[str](), 0
    stream = compiled(request["source"]).generate(
        messages=request["messages"],
        tools=request["tools"],
        documents=None,
        add_generation_prompt=request.get("generation_prompt", False),
        **variables,
    )
    for chunk in stream:
        num_chars += len(chunk)
        if num_chars > request["max_chars"]:
            raise MemoryError(f"the text has more than {request['max_chars']} characters")
        chunks.append(chunk)
    return "".join(chunks)


def respond(data: bytes) -> bytes:
    """Return the response to one request: the rendered text, or the error as one line."""
    try:
        return json.dumps({"text": render(json.loads(data))}).encode()
    except BaseException as error:  # a template can raise anything
        message = "".join(c if c.isprintable() else " " for c in str(error)[:MAX_ERROR_CHARS])
        return json.dumps({"error": f"{type(error).__name__}: {message}"}).encode()


def main() -> None:
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    response = b"{}"
    while True:
        responses.write(LENGTH.pack(len(response)) + response)
        responses.flush()
        length = requests.read(LENGTH.size)
        if len(length) < LENGTH.size:
            return
        data = requests.read(*LENGTH.unpack(length))
        signal.alarm(ALARM_S)
        response = respond(data)
        signal.alarm(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    main()
