"""The dialect of a plain vLLM server. It has no card, so the client builds one from requests.

| field of the card | source |
|---|---|
| name, longest sequence | `/v1/models` |
| tokenizer | a local directory, because the server provides no files; `/tokenize` must return the same ids |
| vocabulary | config.json in that directory; else the largest id that `logit_bias` accepts. An id that is too large |
| | is rejected there before it reaches the engine, whereas in a prompt it may reach the embedding. The size of the |
| | tokenizer would be too small: padding rows of the model are candidates too |
| largest K | binary search over requests |
| BOS | see teachers/bos.py |
| fingerprint | name, root, length, tokenizer. Weights cannot be hashed, so `check` compares the scores of a text |
"""

import time
from typing import Any

import msgspec

from teachers.client.dialects.model_list import Model
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard, Properties, ServerKind, largest_accepted
from teachers.client.dialects.stock_server import TIMEOUT_S, StockServerClient, StockServerDialect, remaining_s
from teachers.client.dialects.tokenizer_folder import check_ids
from teachers.client.dialects.vllm_completions import completion_request, read_completion, response_limit_bytes
from teachers.protocol.errors import NotFound, ProtocolError, Rejected, TeacherError, Unauthorized
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows

MAX_TOP_K = 1024  # if the server sets no limit
MAX_VOCAB_SIZE = 1 << 22


class _Version(msgspec.Struct):
    version: str


class _Tokens(msgspec.Struct):
    tokens: list[int]


class VllmOpenAIClient(StockServerClient):
    """Client of a vLLM server without the plugin. A ReplicaClient."""

    kind = ServerKind(
        name="a plain vLLM server",
        cost="at K = 64 a token takes 4,600 bytes instead of 392, and one core decodes 44,000 tokens per second "
        "instead of 2,900,000; start it with VLLM_PLUGINS=tutelage, or with `tutelage serve MODEL --engine vllm`, to "
        "use the native protocol",
    )

    async def ping(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def identify(self, timeout_s: float) -> None:
        await self._model(timeout_s)
        await self._get("/version", _Version, timeout_s)

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare the properties of the model, the scores of PROBE_TEXT and its tokens with the card."""
        deadline = time.monotonic() + timeout_s
        await super().check(card, timeout_s)
        ids = await self._tokenize(card.model, PROBE_TEXT, remaining_s(deadline))
        with self._http.named_errors():
            assert isinstance(card, ProbedCard), "checked above"
            check_ids(card.probe_ids, ids, "its card")

    async def _score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        data = await self._complete(card.model, request, timeout_s)
        with self._http.named_errors():
            return read_completion(data, request, card)

    async def _properties(self, timeout_s: float) -> Properties:
        return _properties_of(await self._model(timeout_s))

    async def _draft_card(self) -> ProbedCard:
        model = await self._model(TIMEOUT_S)
        assert model.max_model_len is not None, "checked by _model"
        folder = await self._folder(model.root)
        ids = await self._tokenize(model.id, PROBE_TEXT)
        with self._http.named_errors():
            check_ids(folder.probe_ids, ids, f"{folder.path}/tokenizer.json")
            vocab_size = folder.vocab_size or await self._vocab_size(model)
        card = self._new_card(
            _properties_of(model),
            folder,
            model=model.id,
            root=model.root,
            engine=f"vllm {(await self._get('/version', _Version)).version}",
            vocab_size=vocab_size,
            max_tokens=model.max_model_len - 1,  # one token is generated
            max_top_k=await self._max_top_k(model, vocab_size),
        )
        adds_bos = (await self._tokenize(model.id, PROBE_TEXT, special_tokens=True))[:1] == [card.bos_id]
        return card.model_copy(update={"expects_bos": await self._expects_bos(card, folder, adds_bos)})

    async def _model(self, timeout_s: float) -> Model:
        """Return the first model of the list that is no adapter. Raises ProtocolError if the server is not vLLM."""
        models = [model for model in await self._models(timeout_s) if model.parent is None]
        with self._http.named_errors():
            if not models or models[0].max_model_len is None:
                raise ProtocolError("expected a model with max_model_len at /v1/models: is this a vLLM server?")
            return models[0]

    async def _vocab_size(self, model: Model) -> int:
        largest = await largest_accepted(
            MAX_VOCAB_SIZE, lambda i: self._is_accepted(model.id, 1, logit_bias={str(i): 0.0})
        )
        with self._http.named_errors():
            if largest == MAX_VOCAB_SIZE:
                raise TeacherError(
                    "the size of its vocabulary cannot be determined: put config.json next to tokenizer.json"
                )
            return largest + 1

    async def _max_top_k(self, model: Model, vocab_size: int) -> int:
        largest = await largest_accepted(min(MAX_TOP_K, vocab_size), lambda k: self._is_accepted(model.id, k))
        with self._http.named_errors():
            if largest == 0:
                raise TeacherError("the server returns no prompt_logprobs: start it with --max-logprobs 64 or more")
            return largest

    async def _is_accepted(self, model: str, top_k: int, **extra_fields: Any) -> bool:
        """Return whether the server accepts a request with this K and these fields for a sequence of two tokens."""
        try:
            request = ScoreRequest(sequences=[[0, 0]], starts=[1], top_k=top_k)
            await self._complete(model, request, TIMEOUT_S, **extra_fields)
        except (Unauthorized, NotFound):
            raise
        except Rejected:
            return False
        return True

    async def _complete(self, model: str, request: ScoreRequest, timeout_s: float, **extra_fields: Any) -> bytes:
        body = completion_request(model, request, **extra_fields)
        return await self._post("/v1/completions", body, timeout_s, response_limit_bytes(request))

    async def _tokenize(
        self, model: str, text: str, timeout_s: float = TIMEOUT_S, special_tokens: bool = False
    ) -> list[int]:
        body = msgspec.json.encode({"model": model, "prompt": text, "add_special_tokens": special_tokens})
        return self._decode(await self._post("/tokenize", body, timeout_s), "/tokenize", _Tokens).tokens


def _properties_of(model: Model) -> Properties:
    return {"model": model.id, "root": model.root, "max_model_len": model.max_model_len}


class VllmOpenAIDialect(StockServerDialect):
    """Servers that have the routes /v1/models, with max_model_len, and /version."""

    client_type = VllmOpenAIClient
