"""A fake SGLang server: the routes and the JSON of SGLang 0.5.23 with the engine of tests/serve.py.

The JSON follows the source of that version, as teachers/client/dialects/sglang_generate.py describes it.
"""

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.responses import Response

from teachers.client.dialects.sglang import SglangClient
from teachers.protocol.rows import LEAST_LOGPROB, Rows
from tests.fake_stock import FakeStockServer
from tests.serve import FormulaEngine


class FakeSglangServer(FakeStockServer):
    """The rows of an engine as SGLang's JSON.

    has_flat  whether the server knows return_flat_raw_top_logprobs
    prefix    prefix of the names of the information routes: "get_" in older versions
    """

    client_type = SglangClient
    score_path = "/generate"

    def __init__(self, engine: FormulaEngine, has_flat: bool = True, prefix: str = "") -> None:
        super().__init__(engine)
        self.has_flat, self.prefix = has_flat, prefix
        self.context_len = 129
        self.model_info = {"model_path": "org/model", "is_generation": True, "weight_version": "default"}
        self.server_info = {"version": "0.5.23", "dtype": "bfloat16", "max_req_input_len": 124, "launch_command": []}

    def models(self) -> list[dict[str, Any]]:
        path = self.model_info["model_path"]
        model = {"id": path, "root": path, "parent": None, "max_model_len": self.context_len}
        return [model | {"owned_by": "sglang"}]

    async def score(self, body: dict[str, Any]) -> Any:
        prompts = body.get("input_ids") or [[*self.special, *self.encode(body["text"])]]
        starts = body["logprob_start_len"]
        starts = starts if isinstance(starts, list) else [starts]
        top_k = body.get("top_logprobs_num", [0])[0]
        assert top_k <= self.engine.card.vocab_size, "the engine's process would end"
        if max(map(len, prompts)) + 1 > self.context_len:
            return f"The input ({max(map(len, prompts))} tokens) is longer than the model's context length"
        rows = await asyncio.gather(*(self.engine.score(prompt, 1, max(top_k, 1)) for prompt in prompts))
        flat = self.has_flat and body.get("return_flat_raw_top_logprobs_b64", False)
        pairs = zip(prompts, rows, starts, strict=True)
        results = [result(p, r, (start, top_k), flat, self.engine.card.vocab_size) for p, r, start in pairs]
        return self.alter(results) if "input_ids" in body else results[0]

    def app(self) -> FastAPI:
        app = super().app()

        @app.get(f"/{self.prefix}model_info")
        async def model_info() -> dict[str, Any]:
            return self.model_info

        @app.get(f"/{self.prefix}server_info")
        async def server_info() -> dict[str, Any]:
            return self.server_info

        @app.get("/version")
        async def version() -> Response:
            return Response(status_code=404)

        return app


def result(prompt: list[int], rows: Rows, shape: tuple[int, int], flat: bool, vocab_size: int) -> dict[str, Any]:
    """Return the result of one prompt. `rows` begin at position 1, `shape` is logprob_start_len and K."""
    start, top_k = shape
    tokens = [token if token < vocab_size - 1 else 0 for token in prompt[start:]]
    actual = [None, *map(null_or_value, rows.actual[start:].tolist())]
    meta: dict[str, Any] = {
        "id": "f00", "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": len(prompt),
        "weight_version": "default", "completion_tokens": 1, "cached_tokens": 0,
        "input_token_logprobs": [[logprob, token, None] for logprob, token in zip(actual, tokens, strict=True)],
        "output_token_logprobs": [[-1.5, 7, None]], "output_top_logprobs": [[[-1.5, 7, None]]],
    }  # fmt: skip
    if flat:
        values, ids = rows.logprobs[start:].astype("<f4"), rows.ids[start:].astype("<i4")
        values = np.where(values <= LEAST_LOGPROB, -np.inf, values).astype("<f4")
        meta["input_top_logprobs_val_flat_b64"] = base64.b64encode(values.tobytes()).decode()
        meta["input_top_logprobs_idx_flat_b64"] = base64.b64encode(ids.tobytes()).decode()
        meta |= {"input_top_logprobs_shape": list(values.shape), "input_top_logprobs_null_prefix": 1}
    elif top_k:
        meta["input_top_logprobs"] = [None] + [
            [[null_or_value(logprob), token, None] for logprob, token in zip(*row, strict=True)]
            for row in zip(rows.logprobs[start:].tolist(), rows.ids[start:].tolist(), strict=True)
        ]
    return {"text": "!", "output_ids": [7], "meta_info": meta}


def null_or_value(logprob: float) -> float | None:
    """Return null for −∞, which JSON does not have."""
    return logprob if logprob > LEAST_LOGPROB else None
