"""The dialect of an SGLang server, by its native route `/generate`. It has no card, so the client builds one.

Written for SGLang 0.5.23, whose source was read (sglang_generate.py has the format of a response). The routes
`/get_model_info` and `/get_server_info` of older versions are used if `/model_info` is absent.

| field of the card | source |
|---|---|
| name, weights | `/model_info`: path of the model, and the version of the weights, which an update changes |
| longest sequence | `/v1/models`, and the scheduler's limit in `/server_info` |
| tokenizer | a local directory, because the server provides no files; the server must return the same ids for a text |
| vocabulary | config.json in that directory |
| largest K | the server has no limit; a K above the vocabulary would end its process |
| BOS | see teachers/bos.py; the ids of a text show whether the server's tokenizer adds BOS |
| fingerprint | name, version of the weights, longest sequence, tokenizer. Weights cannot be hashed, so `check` |
| | compares the scores of a text |
"""

from typing import TypeVar

import msgspec

from teachers.client.dialects.model_list import check_name
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard, Properties, ServerKind
from teachers.client.dialects.sglang_generate import generate_request, read_results, response_limit_bytes
from teachers.client.dialects.stock_server import TIMEOUT_S, StockServerClient, StockServerDialect
from teachers.client.dialects.tokenizer_folder import check_ids
from teachers.protocol.errors import NotFound, ProtocolError, TeacherError
from teachers.protocol.messages import ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.untrusted_text import clean

MAX_TOP_K = 1024

T = TypeVar("T")


class _ModelInfo(msgspec.Struct):
    model_path: str
    is_generation: bool
    weight_version: str | None = None

    def __post_init__(self) -> None:
        check_name(self.model_path)


class _ServerInfo(msgspec.Struct):
    version: str = "of unknown version"
    dtype: str = "unknown"
    context_length: int | None = None
    max_req_input_len: int | None = None


class _TextMeta(msgspec.Struct):
    input_token_logprobs: list[tuple[float | None, int, object]]


class _TextResult(msgspec.Struct):
    meta_info: _TextMeta


class SglangClient(StockServerClient):
    """Client of an SGLang server. A ReplicaClient."""

    kind = ServerKind(
        name="an SGLang server",
        cost=f"exact top K for K up to {MAX_TOP_K}; at K = 64 a token takes 717 bytes, or 2,070 from a version without "
        "return_flat_raw_top_logprobs, instead of 392 with the native protocol",
    )

    async def identify(self, timeout_s: float) -> None:
        await self._info("model_info", _ModelInfo, timeout_s)  # /health waits for the scheduler

    async def _score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        data = await self._post("/generate", generate_request(request), timeout_s, response_limit_bytes(request))
        with self._http.named_errors():
            return read_results(data, request, card)

    async def _properties(self, timeout_s: float) -> Properties:
        model, _, max_tokens = await self._request_info(timeout_s)
        return _properties_of(model, max_tokens)

    async def _request_info(self, timeout_s: float) -> tuple[_ModelInfo, _ServerInfo, int]:
        """Request the properties of the model and of the server, and the longest sequence in tokens."""
        model = await self._info("model_info", _ModelInfo, timeout_s)
        server = await self._info("server_info", _ServerInfo, timeout_s)
        return model, server, await self._max_tokens(server, timeout_s)

    async def _draft_card(self) -> ProbedCard:
        model, server, max_tokens = await self._request_info(TIMEOUT_S)
        folder = await self._folder(model.model_path)
        with self._http.named_errors():
            vocab_size = folder.vocab_size
            if vocab_size is None:
                raise TeacherError(
                    f"an SGLang server does not state the size of its vocabulary: put the model's config.json into "
                    f"{folder.path}"
                )
        card = self._new_card(
            _properties_of(model, max_tokens),
            folder,
            model=model.model_path,
            root=model.model_path,
            revision=model.weight_version,
            engine=f"sglang {clean(server.version, 40)}",
            dtype=clean(server.dtype, 40),
            vocab_size=vocab_size,
            max_tokens=max_tokens,
            max_top_k=min(MAX_TOP_K, vocab_size),
        )
        received = await self._tokenize(PROBE_TEXT)
        adds_bos = card.bos_id is not None and received[:1] == [card.bos_id]
        with self._http.named_errors():
            check_ids(card.probe_ids, received[adds_bos:], f"{folder.path}/tokenizer.json")
        return card.model_copy(update={"expects_bos": await self._expects_bos(card, folder, adds_bos)})

    async def _max_tokens(self, server: _ServerInfo, timeout_s: float) -> int:
        """Return the longest sequence: one token less than each limit, because one is generated."""
        context = [model.max_model_len for model in await self._models(timeout_s) if model.parent is None]
        limits = (*context, server.context_length, server.max_req_input_len)
        stated = [limit for limit in limits if limit is not None]
        with self._http.named_errors():
            if not stated:
                raise ProtocolError("expected max_model_len at /v1/models, or context_length at /server_info")
            return min(stated) - 1

    async def _tokenize(self, text: str) -> list[int]:
        """Return the server's ids of a text, with the special tokens that its tokenizer adds."""
        body = {
            "text": text,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        }
        data = await self._post("/generate", msgspec.json.encode(body), TIMEOUT_S)
        result = self._decode(data, "/generate", _TextResult)
        return [token for _, token, _ in result.meta_info.input_token_logprobs]

    async def _info(self, name: str, kind: type[T], timeout_s: float) -> T:
        """Return the JSON response of the route /NAME, or of /get_NAME if the server does not have it."""
        try:
            return await self._get(f"/{name}", kind, timeout_s)
        except NotFound:
            return await self._get(f"/get_{name}", kind, timeout_s)


def _properties_of(model: _ModelInfo, max_tokens: int) -> Properties:
    return {"model_path": model.model_path, "weight_version": model.weight_version, "max_tokens": max_tokens}


class SglangDialect(StockServerDialect):
    """Servers that describe their model at /model_info, or at /get_model_info, as SGLang does."""

    client_type = SglangClient
