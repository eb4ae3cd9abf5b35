"""A fake OpenAI-compatible server: `echo` and `logprobs` of /v1/completions, with the engine of tests/serve.py.

By default it behaves like llama-cpp-python 0.3.36, whose source and recorded responses it follows: prompts are texts,
BOS is not listed, and the lists are shifted if the sequence does not begin with BOS.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from teachers.client.dialects.openai_echo import OpenAIEchoClient
from teachers.client.dialects.token_strings import RENDERINGS, Token, read_tokens
from teachers.protocol.rows import Rows
from tests.fake_stock import FakeStockServer
from tests.serve import FormulaEngine

GENERATED = 7


@dataclass
class EchoBehaviour:
    """How a server differs from others.

    rendering    name in RENDERINGS
    takes_ids    the prompt may be a list of ids
    adds_bos     BOS is put in front of every prompt
    lists_bos    BOS is in the lists
    shifts       the lists begin with the distribution after the first token
    max_top_k    larger values are rejected
    """

    rendering: str = "ignored"
    takes_ids: bool = False
    adds_bos: bool = False
    lists_bos: bool = False
    shifts: bool = True
    max_top_k: int = 1000
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "smol", "object": "model"}])
    context: int = 400


class FakeEchoServer(FakeStockServer):
    """The rows of an engine as OpenAI's JSON."""

    client_type = OpenAIEchoClient
    score_path = "/v1/completions"
    error_fields: ClassVar[dict[str, Any]] = {"type": "invalid_request_error"}

    def __init__(self, engine: FormulaEngine, behaviour: EchoBehaviour) -> None:
        super().__init__(engine)
        self.behaviour = behaviour
        self.tokens = read_tokens(engine.tokenizer_files["tokenizer.json"])

    def models(self) -> list[dict[str, Any]]:
        return self.behaviour.models

    def string(self, token: int) -> str:
        found: Token = self.tokens[token]
        if found.data is None:
            return "" if self.behaviour.rendering == "ignored" else found.piece
        return RENDERINGS[self.behaviour.rendering](found)

    async def score(self, body: dict[str, Any]) -> Any:
        prompt, top_k, behaviour = body["prompt"], body["logprobs"], self.behaviour
        if isinstance(prompt, list) and not behaviour.takes_ids:
            return "prompt: Input should be a valid string"
        if top_k > behaviour.max_top_k:
            return f"expected logprobs of at most {behaviour.max_top_k}"
        ids = prompt if isinstance(prompt, list) else self.encode(prompt)
        bos = self.engine.card.bos_id
        full = [*([bos] if behaviour.adds_bos else []), *ids]
        if len(full) >= behaviour.context:
            return f"This model's maximum context length is {behaviour.context} tokens, however you requested more"
        rows = await self.engine.score([*full, GENERATED], 1, top_k)
        return self.alter(self.response(full, rows, prompt))

    def response(self, full: list[int], rows: Rows, prompt: Any) -> dict[str, Any]:
        hidden = int(full[0] == self.engine.card.bos_id and not self.behaviour.lists_bos)
        listed = [*full, GENERATED][hidden:]
        is_shifted = self.behaviour.shifts and not hidden
        logprobs: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        offset = 0
        for index, token in enumerate(listed):
            row = index + hidden - 1 + is_shifted  # the row of a position is that of the position before it
            string = self.string(token)
            logprobs["tokens"].append(string)
            logprobs["text_offset"].append(offset)
            offset += len(string)
            if index == 0 or row >= len(rows):
                logprobs["token_logprobs"].append(None)
                logprobs["top_logprobs"].append(None)
                continue
            listed_ids = rows.ids[row].tolist()
            entry = dict(zip(map(self.string, listed_ids), rows.logprobs[row].tolist(), strict=True))
            own = float(rows.actual[row]) if not is_shifted else float(rows.logprobs[row, -1]) - 1.0
            if token in listed_ids:
                own = float(rows.logprobs[row, listed_ids.index(token)])
            logprobs["token_logprobs"].append(own)
            logprobs["top_logprobs"].append(entry | {string: own})
        text = prompt if isinstance(prompt, str) else ""
        choice = {"text": f"{text}!", "index": 0, "logprobs": logprobs, "finish_reason": "length"}
        return {
            "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "smol", "choices": [choice],
            "usage": {"prompt_tokens": len(full), "completion_tokens": 1, "total_tokens": len(full) + 1},
        }  # fmt: skip
