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

import asyncio
import logging
import time
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from teachers.bos import bos_probes, prefers_bos
from teachers.client.dialects.base import ReplicaAddress, has_route
from teachers.client.dialects.probed_card import PROBE_TEXT, check_probe, largest_accepted
from teachers.client.dialects.tokenizer_folder import TokenizerFolder, check_ids, open_tokenizer_folder
from teachers.client.dialects.vllm_card import Model, VllmCard, draft_card
from teachers.client.dialects.vllm_completions import completion_request, read_completion, response_limit_bytes
from teachers.client.http import Transport
from teachers.protocol.decoding import decoding
from teachers.protocol.errors import FingerprintMismatch, NotFound, ProtocolError, Rejected, TeacherError, Unauthorized
from teachers.protocol.messages import PROBE, ScoreRequest, TeacherCard
from teachers.protocol.rows import Rows

log = logging.getLogger("tutelage.client")
JSON = "application/json"
TIMEOUT_S = 60.0
MAX_TOKENS_BYTES = 1 << 20  # of a response of /tokenize
MAX_LIST_BYTES = 1 << 20  # of the list of models: a server may have thousands of adapters
MAX_TOP_K = 1024  # if the server sets no limit
MAX_VOCAB_SIZE = 1 << 22

T = TypeVar("T")


class _ModelList(msgspec.Struct):
    data: list[Model]


class _Version(msgspec.Struct):
    version: str


class _Tokens(msgspec.Struct):
    tokens: list[int]


class VllmOpenAIDialect:
    """Servers that have the routes /v1/models, with max_model_len, and /version."""

    async def accepts(self, address: ReplicaAddress) -> bool:
        if address.scheme not in ("http", "https"):
            return False
        client = VllmOpenAIClient.of(address)
        return await has_route(client, client.describe)

    def client(self, address: ReplicaAddress) -> "VllmOpenAIClient":
        _warn_about_cost(address.teacher)
        return VllmOpenAIClient.of(address)


@cache  # once per teacher, not per replica
def _warn_about_cost(name: str) -> None:
    log.warning(
        "teacher %s is a plain vLLM server: at K = 64 a token takes 4,600 bytes instead of 392, and one core decodes "
        "44,000 tokens per second instead of 2,900,000; start it with VLLM_PLUGINS=tutelage, or with `tutelage serve "
        "MODEL --engine vllm`, to use the native protocol",
        name,
    )


class VllmOpenAIClient:
    """Client of a vLLM server without the plugin. A ReplicaClient.

    `tokenizer` is a directory with the server's tokenizer.json. With None, the server's own model directory is used if
    it exists on this machine.
    """

    def __init__(
        self, name: str, url: str, key: str | None = None, ca_file: Path | None = None, tokenizer: Path | None = None
    ) -> None:
        self._http = Transport(name, url, key, ca_file)
        self._name = name
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, address: ReplicaAddress) -> "VllmOpenAIClient":
        """Return the client of an address."""
        return cls(address.teacher, address.url, address.key, address.ca_file, address.tokenizer)

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ping(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def describe(self) -> None:
        """Raise NotFound if the server is not vLLM."""
        try:
            await self.model(TIMEOUT_S)
            await self._get("/version", _Version)
        except ProtocolError as error:  # another server with the same routes
            raise NotFound(str(error)) from error

    async def score(self, request: ScoreRequest, card: TeacherCard, timeout_s: float) -> list[Rows]:
        with self._http.named_errors():
            if request.chosen:
                raise Rejected("a plain vLLM server scores no chosen ids: remove them from the request")
        data = await self._complete(card.model, request, timeout_s)
        with self._http.named_errors():
            return read_completion(data, request, card)

    async def tokenizer_files(self, card: TeacherCard) -> dict[str, bytes]:
        with self._http.named_errors():
            folder = self._folder(card.root if isinstance(card, VllmCard) else None)
            if (received := folder.sha256("tokenizer.json")) != card.tokenizer_sha256:
                raise FingerprintMismatch(
                    f"expected {folder.path}/tokenizer.json with sha256 {card.tokenizer_sha256[:12]}, "
                    f"received {received}"
                )
            return folder.files

    async def check(self, card: TeacherCard, timeout_s: float) -> None:
        """Compare name, tokenization and scores of a text: see probed_card.PROBE_TOLERANCE."""
        deadline = time.monotonic() + timeout_s
        model = await self.model(timeout_s)
        with self._http.named_errors():
            if not isinstance(card, VllmCard):
                raise FingerprintMismatch(
                    f"expected the teacher {card.model} ({card.engine}), received a plain vLLM server"
                )
            if model.fingerprint(card.tokenizer_sha256) != card.fingerprint:
                raise FingerprintMismatch(
                    f"expected {card.model} from {card.root} with up to {card.max_tokens} tokens, received {model.id} "
                    f"from {model.root} with up to {model.max_tokens}"
                )
        remaining_s = max(deadline - time.monotonic(), 0.001)
        ids, logprobs = await asyncio.gather(
            self._tokenize(model.id, PROBE_TEXT, remaining_s), self._probe(card, 1, remaining_s)
        )
        with self._http.named_errors():
            check_ids(card.probe_ids, ids, "its card")
            check_probe(card.probe_logprobs, logprobs)

    async def card(self) -> VllmCard:
        """Build the card with the requests of the table above. Raises TeacherError naming the setting to change."""
        model = await self.model(TIMEOUT_S)
        with self._http.named_errors():
            folder = self._folder(model.root)
            expected = await asyncio.to_thread(folder.encode, PROBE_TEXT)
        ids = await self._tokenize(model.id, PROBE_TEXT)
        with self._http.named_errors():
            check_ids(expected, ids, f"{folder.path}/tokenizer.json")
        vocab_size = folder.config.get("vocab_size") or await self._vocab_size(model)
        version = (await self._get("/version", _Version)).version
        with self._http.named_errors():
            card = draft_card(model, folder, vocab_size, version, ids)
        card = card.model_copy(update={"max_top_k": await self._max_top_k(card)})
        card = card.model_copy(update={"expects_bos": await self._expects_bos(card, folder)})
        # at the largest K, where logits are recognized best by their mass
        return card.model_copy(update={"probe_logprobs": await self._probe(card, card.max_top_k, TIMEOUT_S)})

    async def model(self, timeout_s: float) -> Model:
        """Return the served model, the first name of several. Raises NotFound or ProtocolError if it is not vLLM."""
        models = [m for m in (await self._get("/v1/models", _ModelList, timeout_s)).data if m.parent is None]
        with self._http.named_errors():
            if not models or models[0].max_model_len is None:
                raise ProtocolError("expected a model with max_model_len at /v1/models: is this a vLLM server?")
            return models[0]

    # --- fields of the card ---

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

    async def _max_top_k(self, card: VllmCard) -> int:
        largest = await largest_accepted(min(MAX_TOP_K, card.vocab_size), lambda k: self._is_accepted(card.model, k))
        with self._http.named_errors():
            if largest == 0:
                raise TeacherError("the server returns no prompt_logprobs: start it with --max-logprobs 64 or more")
            return largest

    async def _expects_bos(self, card: VllmCard, folder: TokenizerFolder) -> bool:
        bos = card.bos_id
        declared = folder.declared_bos(bos)
        if declared is not None or bos is None:
            return bool(declared)
        if (await self._tokenize(card.model, PROBE, special_tokens=True))[:1] == [bos]:
            return True
        probes = bos_probes(bos, folder.encode(PROBE))
        sequences, starts = [ids for ids, _ in probes], [start for _, start in probes]
        request = ScoreRequest(sequences=sequences, starts=starts, top_k=1)
        return prefers_bos(*await self.score(request, card, TIMEOUT_S))

    async def _probe(self, card: VllmCard, top_k: int, timeout_s: float) -> tuple[float, ...]:
        request = ScoreRequest(sequences=[[*card.prefix, *card.probe_ids]], starts=[1], top_k=top_k)
        return tuple((await self.score(request, card, timeout_s))[0].actual.tolist())

    def _folder(self, root: str | None) -> TokenizerFolder:
        path = self._tokenizer.expanduser() if self._tokenizer else Path(root) if root else None
        return open_tokenizer_folder(path, self._name, "a plain vLLM server")

    # --- requests ---

    async def _is_accepted(self, model: str, top_k: int, **extra_fields: Any) -> bool:
        """Return whether a request for two tokens is accepted."""
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
        limit = response_limit_bytes(request)
        return await self._http.post("/v1/completions", body, timeout_s, expect=JSON, limit_bytes=limit)

    async def _tokenize(
        self, model: str, text: str, timeout_s: float = TIMEOUT_S, special_tokens: bool = False
    ) -> list[int]:
        body = msgspec.json.encode({"model": model, "prompt": text, "add_special_tokens": special_tokens})
        data = await self._http.post("/tokenize", body, timeout_s, expect=JSON, limit_bytes=MAX_TOKENS_BYTES)
        return self._parse(data, _Tokens).tokens

    async def _get(self, path: str, kind: type[T], timeout_s: float = TIMEOUT_S) -> T:
        return self._parse(await self._http.get(path, timeout_s, MAX_LIST_BYTES), kind)

    def _parse(self, data: bytes, kind: type[T]) -> T:
        with self._http.named_errors(), decoding(f"vLLM {kind.__name__.strip('_')}"):
            return msgspec.json.decode(data, type=kind)
