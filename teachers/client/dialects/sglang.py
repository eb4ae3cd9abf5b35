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
| fingerprint | the fields above. Weights cannot be hashed, so `check` compares the scores of a text |
"""

import asyncio
import hashlib
import json
import logging
import time
from functools import cache
from typing import TypeVar

import msgspec

from teachers.bos import bos_probes, prefers_bos
from teachers.client.dialects.base import ReplicaAddress, has_route
from teachers.client.dialects.probed_card import PROBE_TEXT, ProbedCard, check_probe
from teachers.client.dialects.sglang_generate import generate_request, read_results, response_limit_bytes
from teachers.client.dialects.tokenizer_folder import TokenizerFolder, check_ids, open_tokenizer_folder
from teachers.client.dialects.vllm_card import Model
from teachers.client.http import Transport
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import FingerprintMismatch, NotFound, ProtocolError, Rejected, TeacherError
from teachers.protocol.messages import PROBE, ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows
from teachers.protocol.untrusted_text import clean

log = logging.getLogger("tutelage.client")
JSON = "application/json"
TIMEOUT_S = 60.0
MAX_INFO_BYTES = 4 << 20  # of /server_info, which repeats all settings and the state of every scheduler
MAX_TOP_K = 1024

T = TypeVar("T")


class _ModelInfo(msgspec.Struct):
    model_path: str
    is_generation: bool
    weight_version: str | None = None


class _ServerInfo(msgspec.Struct):
    version: str = "of unknown version"
    dtype: str = "unknown"
    context_length: int | None = None
    max_req_input_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[Model]


class _TextMeta(msgspec.Struct):
    input_token_logprobs: list[tuple[float | None, int, object]]


class _TextResult(msgspec.Struct):
    meta_info: _TextMeta


class SglangDialect:
    """Servers that describe their model at /model_info, or at /get_model_info, as SGLang does."""

    async def accepts(self, address: ReplicaAddress) -> bool:
        if address.scheme not in ("http", "https"):
            return False
        client = SglangClient(address)
        return await has_route(client, client.describe)

    def client(self, address: ReplicaAddress) -> "SglangClient":
        _report_cost(address.teacher)
        return SglangClient(address)


@cache  # once per teacher, not per replica
def _report_cost(name: str) -> None:
    log.warning(
        "teacher %s is an SGLang server: exact top K for K up to %d; at K = 64 a token takes 710 bytes, or 2,100 from "
        "a version without return_flat_raw_top_logprobs, instead of 392 with the native protocol",
        name,
        MAX_TOP_K,
    )


class SglangClient:
    """Client of an SGLang server. A ReplicaClient."""

    def __init__(self, address: ReplicaAddress) -> None:
        self._http = Transport(address.teacher, address.url, address.key, address.ca_file)
        self._name = address.teacher
        self._tokenizer = address.tokenizer

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self, timeout_s: float) -> None:
        await self._get("/model_info", _ModelInfo, timeout_s)  # /health waits for the scheduler

    async def describe(self) -> None:
        """Raise NotFound if the server is not SGLang."""
        try:
            await self._get("/model_info", _ModelInfo)
        except ProtocolError as error:  # another server responds to every path
            raise NotFound(str(error)) from error

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        with self._http.named_errors():
            if request.chosen:
                raise Rejected("an SGLang server scores no chosen ids: remove them from the request")
        body, limit = generate_request(request), response_limit_bytes(request)
        data = await self._http.post("/generate", body, timeout_s, expect=JSON, limit_bytes=limit)
        with self._http.named_errors():
            return read_results(data, request, card)

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        with self._http.named_errors():
            folder = self._folder()
            if (received := folder.sha256("tokenizer.json")) != card.tokenizer_sha256:
                raise FingerprintMismatch(
                    f"expected {folder.path}/tokenizer.json with sha256 {card.tokenizer_sha256[:12]}, "
                    f"received {received}"
                )
            return folder.files

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare the properties of the model, and the scores of a text: see probed_card.PROBE_TOLERANCE."""
        deadline = time.monotonic() + timeout_s
        draft = await self._draft(timeout_s)
        with self._http.named_errors():
            if not isinstance(card, ProbedCard) or card.engine.split(" ")[0] != "sglang":
                raise FingerprintMismatch(
                    f"expected the teacher {card.model} ({card.engine}), received an SGLang server"
                )
            if draft.fingerprint != card.fingerprint:
                raise FingerprintMismatch(
                    f"expected {card.model} with up to {card.max_tokens} tokens, received {draft.model} with up to "
                    f"{draft.max_tokens}, or other weights ({draft.revision}, expected {card.revision})"
                )
        logprobs = await self._probe(card, 1, max(deadline - time.monotonic(), 0.001))
        with self._http.named_errors():
            check_probe(card.probe_logprobs, logprobs)

    async def card(self) -> ProbedCard:
        """Build the card with the requests of the table above. Raises TeacherError naming the setting to change."""
        card = await self._draft(TIMEOUT_S)
        with self._http.named_errors():
            folder = self._folder()
            expected = await asyncio.to_thread(folder.encode, PROBE_TEXT)
        received = await self._tokenize(PROBE_TEXT)
        adds_bos = card.bos_id is not None and received[:1] == [card.bos_id]
        with self._http.named_errors():
            check_ids(expected, received[adds_bos:], f"{folder.path}/tokenizer.json")
        card = card.model_copy(update={"probe_ids": tuple(expected)})
        card = card.model_copy(update={"expects_bos": await self._expects_bos(card, folder, adds_bos)})
        # at the largest K, where values that are not log-probabilities are recognized best by their mass
        return card.model_copy(update={"probe_logprobs": await self._probe(card, card.max_top_k, TIMEOUT_S)})

    # --- fields of the card ---

    async def _draft(self, timeout_s: float) -> ProbedCard:
        """Return the card without the fields that need scores: BOS and probe."""
        model = await self._get("/model_info", _ModelInfo, timeout_s)
        server = await self._get("/server_info", _ServerInfo, timeout_s)
        max_tokens = await self._max_tokens(server, timeout_s)
        with self._http.named_errors():
            folder = self._folder()
            vocab_size = folder.config.get("vocab_size")
            if vocab_size is None:
                raise TeacherError(
                    f"an SGLang server does not state the size of its vocabulary: put the model's config.json into "
                    f"{folder.path}"
                )
            tokenizer_sha256 = folder.sha256("tokenizer.json")
            properties = json.dumps([model.model_path, model.weight_version, max_tokens, tokenizer_sha256])
            with decoding(f"card (from /model_info, /server_info and {folder.path})"):
                return ProbedCard(
                    model=clean(model.model_path, 300),
                    revision=model.weight_version and clean(model.weight_version, 100),
                    fingerprint=hashlib.sha256(properties.encode()).hexdigest(),
                    engine=f"sglang {clean(server.version, 40)}",
                    dtype=clean(server.dtype, 40),
                    vocab_size=vocab_size,
                    tokenizer_sha256=tokenizer_sha256 or "",
                    bos_id=folder.bos_id,
                    eos_id=folder.special_id("eos"),
                    expects_bos=False,
                    chat_template_sha256=folder.sha256("chat_template.jinja"),
                    max_tokens=max_tokens,
                    max_top_k=min(MAX_TOP_K, vocab_size),
                    root=clean(model.model_path, 300),
                    probe_ids=(),
                )

    async def _max_tokens(self, server: _ServerInfo, timeout_s: float) -> int:
        """Return the longest sequence: one token less than each limit, because one is generated."""
        models = (await self._get("/v1/models", _ModelList, timeout_s)).data
        context = [m.max_model_len for m in models if m.parent is None] + [server.context_length]
        limits = [limit for limit in (*context, server.max_req_input_len) if limit is not None]
        with self._http.named_errors():
            if not limits:
                raise ProtocolError("expected max_model_len at /v1/models, or context_length at /server_info")
            return min(limits) - 1

    async def _expects_bos(self, card: ProbedCard, folder: TokenizerFolder, adds_bos: bool) -> bool:
        bos = card.bos_id
        declared = folder.declared_bos(bos)
        if declared is not None or bos is None:
            return bool(declared)
        if adds_bos:
            return True
        probes = bos_probes(bos, folder.encode(PROBE))
        sequences, starts = [ids for ids, _ in probes], [start for _, start in probes]
        request = ScoreRequest(sequences=sequences, starts=starts, top_k=1)
        return prefers_bos(*await self.score(request, card, TIMEOUT_S))

    async def _probe(self, card: ProbedCard, top_k: int, timeout_s: float) -> tuple[float, ...]:
        request = ScoreRequest(sequences=[[*card.prefix, *card.probe_ids]], starts=[1], top_k=top_k)
        return tuple((await self.score(request, card, timeout_s))[0].actual.tolist())

    def _folder(self) -> TokenizerFolder:
        path = self._tokenizer.expanduser() if self._tokenizer else None
        return open_tokenizer_folder(path, self._name, "an SGLang server")

    # --- requests ---

    async def _tokenize(self, text: str) -> list[int]:
        """Return the server's ids of a text, with the special tokens that its tokenizer adds."""
        body = {
            "text": text,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        }
        data = await self._http.post(
            "/generate", msgspec.json.encode(body), TIMEOUT_S, expect=JSON, limit_bytes=MAX_INFO_BYTES
        )
        with self._http.named_errors(), decoding("result of /generate"):
            result = msgspec.json.decode(data, type=_TextResult)
        return [token for _, token, _ in result.meta_info.input_token_logprobs]

    async def _get(self, path: str, kind: type[T], timeout_s: float = TIMEOUT_S) -> T:
        """Return a JSON object. A route /NAME is called /get_NAME in older versions."""
        try:
            data = await self._http.get(path, timeout_s, MAX_INFO_BYTES)
        except NotFound:
            data = await self._http.get(path.replace("/", "/get_", 1), timeout_s, MAX_INFO_BYTES)
        with self._http.named_errors(), decoding(f"SGLang {kind.__name__.strip('_')}"):
            return msgspec.json.decode(data, type=kind)
