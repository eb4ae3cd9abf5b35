"""A plain vLLM server as a teacher. It has no card, so it is asked until one can be written.

| of the card | where from |
|---|---|
| name, longest sequence | `/v1/models` |
| tokenizer | a folder here, for the server hands out no files; its `/tokenize` must give the same ids |
| vocabulary | config.json in that folder; else the largest id that `logit_bias` may name: one that is too large is |
| | refused before the engine sees it, where in a prompt it may reach the embedding. The tokenizer's size would be too |
| | small: a model's padding rows are listed too |
| largest K | tried, and narrowed down by what is refused |
| BOS | the tokenizer's word, else what the model predicts better, as in engines/transformers.py |
| fingerprint | name, root, length, tokenizer; weights cannot be hashed, so `check` compares what they say of a text |
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from teachers.asking.completion import answer_limit_bytes, question, read_completion
from teachers.asking.stock_card import PROBE_TEXT, Model, StockCard, TokenizerFolder, check_ids, check_probe, draft
from teachers.asking.transport import Transport
from teachers.errors import FingerprintMismatch, NotFound, ProtocolError, Rejected, TeacherError, Unauthorized
from teachers.protocol import PROBE, Card, ScoreRequest
from teachers.rows import Rows

JSON = "application/json"
ASK_TIMEOUT_S = 60.0
TOKENS_BYTES = 1 << 20  # of a tokenized sentence
MOST_TOP_K = 1024  # where the server sets no limit
MOST_IDS = 1 << 22  # no vocabulary is that large

T = TypeVar("T")


class _ModelList(msgspec.Struct):
    data: list[Model]


class _Version(msgspec.Struct):
    version: str


class _Tokens(msgspec.Struct):
    tokens: list[int]


class StockClient:
    """A vLLM server without our plugin. A teachers.asking.client.Client.

    `tokenizer` is a folder with the tokenizer.json that the server uses; None takes the server's own model folder, if
    that is here too.
    """

    def __init__(
        self, name: str, url: str, key: str | None = None, ca_file: Path | None = None, tokenizer: Path | None = None
    ) -> None:
        self._http = Transport(name, url, key, ca_file)
        self._name = name
        self._tokenizer = tokenizer

    @property
    def url(self) -> str:
        return self._http.url

    async def aclose(self) -> None:
        await self._http.aclose()

    async def alive(self, timeout_s: float) -> None:
        await self._http.get("/health", timeout_s)

    async def score(self, request: ScoreRequest, card: Card, timeout_s: float) -> list[Rows]:
        with self._http.named():
            if request.chosen:
                raise Rejected("a plain vLLM server scores no chosen ids: leave chosen out")
        data = await self._complete(card.model, request, timeout_s)
        with self._http.named():
            return read_completion(data, request, card)

    async def tokenizer_files(self, card: Card) -> dict[str, bytes]:
        with self._http.named():
            folder = self._folder(card.root if isinstance(card, StockCard) else None)
            if (found := folder.sha256("tokenizer.json")) != card.tokenizer_sha256:
                raise FingerprintMismatch(
                    f"expected {folder.path}/tokenizer.json with sha256 {card.tokenizer_sha256[:12]}, found {found}"
                )
            return folder.files

    async def check(self, card: Card, timeout_s: float) -> None:
        """Compare its name, how it cuts a text, and what it says of it: see stock_card.PROBE_TOLERANCE."""
        ends_at = time.monotonic() + timeout_s
        model = await self.model(timeout_s)
        with self._http.named():
            if not isinstance(card, StockCard):
                raise FingerprintMismatch(
                    f"expected the teacher {card.model} ({card.engine}), found a plain vLLM server"
                )
            if model.fingerprint(card.tokenizer_sha256) != card.fingerprint:
                raise FingerprintMismatch(
                    f"expected {card.model} from {card.root} with up to {card.max_tokens} tokens, received {model.id} "
                    f"from {model.root} with up to {model.max_tokens}"
                )
        left_s = max(ends_at - time.monotonic(), 0.001)
        ids, nats = await asyncio.gather(self._tokenize(model.id, PROBE_TEXT, left_s), self._probe(card, 1, left_s))
        with self._http.named():
            check_ids(card.probe_ids, ids, "its card says")
            check_probe(card.probe_logprobs, nats)

    async def card(self) -> StockCard:
        """Ask all that the table above says. Raises TeacherError naming what to set or to start otherwise."""
        model = await self.model(ASK_TIMEOUT_S)
        with self._http.named():
            folder = self._folder(model.root)
            own_ids = await asyncio.to_thread(folder.encode, PROBE_TEXT)
        ids = await self._tokenize(model.id, PROBE_TEXT)
        with self._http.named():
            check_ids(own_ids, ids, f"{folder.path}/tokenizer.json")
            card = draft(model, folder, ids)
        card = card.model_copy(update={"engine": f"vllm {(await self._get('/version', _Version)).version}"})
        if card.vocab_size == 0:
            card = card.model_copy(update={"vocab_size": await self._vocab_size(model)})
        card = card.model_copy(update={"max_top_k": await self._max_top_k(card)})
        card = card.model_copy(update={"expects_bos": await self._expects_bos(card, folder)})
        # with the largest K, in which a server that does not send log-probabilities shows best
        return card.model_copy(update={"probe_logprobs": await self._probe(card, card.max_top_k, ASK_TIMEOUT_S)})

    async def model(self, timeout_s: float) -> Model:
        """What it serves; the first name where it has several. Raises NotFound or ProtocolError if it is no vLLM."""
        models = [m for m in (await self._get("/v1/models", _ModelList, timeout_s)).data if m.parent is None]
        with self._http.named():
            if not models or models[0].max_model_len is None:
                raise ProtocolError("expected a model with its max_model_len at /v1/models: is this a vLLM server?")
            return models[0]

    # --- what a card is made of ---

    async def _vocab_size(self, model: Model) -> int:
        largest = await _largest(MOST_IDS, lambda i: self._answers(model.id, 1, logit_bias={str(i): 0.0}))
        with self._http.named():
            if largest == MOST_IDS:
                raise TeacherError("its vocabulary cannot be found by asking: put config.json beside tokenizer.json")
            return largest + 1

    async def _max_top_k(self, card: StockCard) -> int:
        largest = await _largest(min(MOST_TOP_K, card.vocab_size), lambda k: self._answers(card.model, k))
        with self._http.named():
            if largest == 0:
                raise TeacherError("it answers no prompt_logprobs: start it with --max-logprobs 64 or more")
            return largest

    async def _expects_bos(self, card: StockCard, folder: TokenizerFolder) -> bool:
        bos = card.bos_id
        if bos is None or folder.adds_bos is not None:
            return bos is not None and bool(folder.adds_bos)
        if (await self._tokenize(card.model, PROBE, special_tokens=True))[:1] == [bos]:
            return True
        ids = folder.encode(PROBE)
        request = ScoreRequest(sequences=[[bos, *ids], ids], starts=[2, 1], top_k=1)
        with_bos, without = await self.score(request, card, ASK_TIMEOUT_S)
        return bool(-with_bos.actual.mean() < 0.9 * -without.actual.mean())

    async def _probe(self, card: StockCard, top_k: int, timeout_s: float) -> tuple[float, ...]:
        request = ScoreRequest(sequences=[[*card.prefix, *card.probe_ids]], starts=[1], top_k=top_k)
        return tuple((await self.score(request, card, timeout_s))[0].actual.tolist())

    def _folder(self, root: str | None) -> TokenizerFolder:
        path = self._tokenizer.expanduser() if self._tokenizer else Path(root) if root else None
        if path is None or not (path / "tokenizer.json").is_file():
            raise TeacherError(
                f"a plain vLLM server hands out no tokenizer, and there is no tokenizer.json in {path}: set "
                f"teachers.{self._name}.tokenizer to a folder with the one that it uses"
            )
        return TokenizerFolder(path)

    # --- questions ---

    async def _answers(self, model: str, top_k: int, **more: Any) -> bool:
        """Whether a question about two tokens is answered and not refused."""
        try:
            request = ScoreRequest(sequences=[[0, 0]], starts=[1], top_k=top_k)
            await self._complete(model, request, ASK_TIMEOUT_S, **more)
        except (Unauthorized, NotFound):
            raise
        except Rejected:
            return False
        return True

    async def _complete(self, model: str, request: ScoreRequest, timeout_s: float, **more: Any) -> bytes:
        body, limit = question(model, request, **more), answer_limit_bytes(request)
        return await self._http.post("/v1/completions", body, timeout_s, expect=JSON, limit_bytes=limit)

    async def _tokenize(
        self, model: str, text: str, timeout_s: float = ASK_TIMEOUT_S, special_tokens: bool = False
    ) -> list[int]:
        body = msgspec.json.encode({"model": model, "prompt": text, "add_special_tokens": special_tokens})
        data = await self._http.post("/tokenize", body, timeout_s, expect=JSON, limit_bytes=TOKENS_BYTES)
        return self._parse(data, _Tokens).tokens

    async def _get(self, path: str, kind: type[T], timeout_s: float = ASK_TIMEOUT_S) -> T:
        return self._parse(await self._http.get(path, timeout_s), kind)

    def _parse(self, data: bytes, kind: type[T]) -> T:
        with self._http.named():
            try:
                return msgspec.json.decode(data, type=kind)
            except msgspec.DecodeError as error:
                what = kind.__name__.strip("_")
                raise ProtocolError(f"expected vLLM's {what}, received something else: {error}") from error


async def _largest(most: int, accepts: Callable[[int], Awaitable[bool]]) -> int:
    """The largest number from 1 to `most` that is accepted, 0 if none is."""
    if await accepts(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await accepts(middle) else (low, middle)
    return low
