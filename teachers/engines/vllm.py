"""The vLLM engine: an AsyncLLM of our own, or the one of a server that we are a plugin of. Imports vllm.

A question is one token of generation with the log-probabilities of its prompt. vLLM's front end would spread them
over Python lists, 65 × 4 appends for a position at K = 64; what arrives from the engine's process are tensors, and
they are taken whole (see `_KeepTensors`). An answer has K + 1 entries a position, the actual token's first, and
starts with position 1: it is reshaped, never iterated over. tests/teachers/test_vllm.py pins what we use of vLLM.
"""

import asyncio
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import vllm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from teachers.engine import EngineOptions
from teachers.engines.files import bos_of, describe, prefers_bos, probe_ids, says_bos, tokenizer_files
from teachers.errors import EngineDead, TeacherError, Unavailable
from teachers.protocol import Card
from teachers.rows import Rows

BATCH_TOKENS = 2048  # logits of a chunk of prompt are not in vLLM's memory profile: 1.2 GB at 152k tokens in float32
GPU_SHARE = 0.85
DEAD = "the vLLM engine died: restart this server; its log says why"
FLOOR = float(np.finfo(np.float16).min)  # the wire's least log-probability stands for p = 0
SHUTDOWN_S = 3.0  # vLLM on a CPU never ends by itself in ten; nothing is left to be saved then

Bos = Literal["auto", "yes", "no"]


class VllmEngine:
    """Scores with vLLM. Made by `load` or `over`, inside the event loop that will ask it."""

    def __init__(self, client: EngineClient, card: Card, files: dict[str, Path], owned: bool) -> None:
        self._client, self._card, self._files, self._owned = client, card, files, owned

    @classmethod
    async def load(cls, folder: Path, options: EngineOptions) -> "VllmEngine":
        """Start vLLM on a model directory. Raises TeacherError if it cannot be served."""
        tokenizer_files(folder)
        try:
            client = AsyncLLM.from_engine_args(engine_args(folder, options))
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # what vLLM raises for arguments and start-up
            raise TeacherError(f"vLLM cannot serve {folder}: {error}") from error
        try:
            return await cls.over(client, options.bos, owned=True)
        except BaseException:
            client.shutdown()
            raise

    @classmethod
    async def over(cls, client: EngineClient, bos: Bos = "auto", owned: bool = False) -> "VllmEngine":
        """Ask an engine that runs. Raises TeacherError if its answers would be no log-probabilities."""
        config = client.model_config
        if config.logprobs_mode not in ("raw_logprobs", "processed_logprobs"):
            raise TeacherError(
                f"expected --logprobs-mode raw_logprobs, received {config.logprobs_mode}: a teacher answers "
                "log-probabilities"
            )
        if config.max_logprobs == 0:
            raise TeacherError("--max-logprobs is 0, so this server answers nothing: start it with --max-logprobs 128")
        weights = model_folder(config.model, config.revision, client.vllm_config.load_config.download_dir)
        beside = (weights / "config.json").is_file()  # vLLM puts nothing but weights into a download_dir
        files = tokenizer_files(model_folder(config.tokenizer, config.tokenizer_revision))
        text_config = config.hf_text_config
        bos_id = bos_of(files, text_config.bos_token_id)
        dtype = str(config.dtype).removeprefix("torch.")
        card = await asyncio.to_thread(
            describe,
            weights,
            files,
            text_config,
            f"{dtype} {config.quantization}" if config.quantization else dtype,
            config_folder=weights if beside else model_folder(config.model, config.revision),
            engine=f"vllm {vllm.__version__}",
            bos_id=bos_id,
            expects_bos=bos == "yes" or (bos == "auto" and await expects_bos(client, files, bos_id)),
            max_tokens=config.max_model_len - 1,  # one place is the token that vLLM must generate
            max_top_k=most_top_k(config.max_logprobs, config.get_vocab_size()),
        )
        return cls(client, card, files, owned)

    @property
    def card(self) -> Card:
        return self._card

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        return self._files

    async def score(self, sequence: list[int], start: int, top_k: int) -> Rows:
        """Rows for positions start … len − 1. Cancelling the wait aborts the work. Raises Unavailable."""
        return await ask(self._client, sequence, start, top_k)

    async def check(self) -> None:
        """Score one token. Raises EngineDead, which an idle server learns here alone."""
        try:
            await self._client.check_health()
        except EngineDeadError as error:
            raise EngineDead(DEAD) from error
        await self.score([self._card.bos_id or 0, 0], 1, 1)

    def close(self) -> None:
        """Stop the engine that `load` started; one that belongs to a server is the server's."""
        if self._owned:
            self._client.shutdown(timeout=SHUTDOWN_S)


def engine_args(folder: Path, options: EngineOptions) -> AsyncEngineArgs:
    """vLLM's arguments for a teacher: nothing is cached that a scoring request would bypass, memory is bounded."""
    ours: dict[str, Any] = {
        "model": str(folder),
        "dtype": options.dtype,
        "max_model_len": options.max_tokens + 1 if options.max_tokens else None,
        "max_logprobs": options.max_top_k,
        "max_num_batched_tokens": BATCH_TOKENS,
        "gpu_memory_utilization": GPU_SHARE,
        "tensor_parallel_size": options.tensor_parallel,
        "enable_prefix_caching": False,
    }
    return AsyncEngineArgs(**ours | dict(options.vllm_args))


def most_top_k(max_logprobs: int, vocab_size: int) -> int:
    """The largest K under --max-logprobs, where −1 is no limit."""
    return vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)


def model_folder(name: str, revision: str | None, cache: str | None = None) -> Path:
    """A directory as it is, a hub's name as the snapshot that vLLM has loaded. Raises TeacherError if it has none."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise TeacherError(f"{name} is neither a model directory nor in the hub's cache: serve a directory") from error


async def expects_bos(client: EngineClient, files: dict[str, Path], bos_id: int | None) -> bool:
    """The tokenizer's word, else what the model predicts better."""
    said = await asyncio.to_thread(says_bos, files, bos_id)
    if said is not None or bos_id is None:
        return bool(said)
    ids = await asyncio.to_thread(probe_ids, files)
    with_bos, without = await asyncio.gather(ask(client, [bos_id, *ids], 2, 1), ask(client, ids, 1, 1))
    return prefers_bos(-float(with_bos.actual.mean()), -float(without.actual.mean()))


async def ask(client: EngineClient, sequence: list[int], start: int, top_k: int) -> Rows:
    """One sequence's rows. Cancelling the wait takes the request out of the engine."""
    request_id = uuid4().hex
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )
    try:
        answer = await _prompt_logprobs(client, sequence, params, request_id)
    except asyncio.CancelledError:
        await asyncio.shield(client.abort(request_id))
        raise
    except EngineDeadError as error:
        raise EngineDead(DEAD) from error
    ids, logprobs = _entries(answer, top_k + 1)
    if len(ids) != len(sequence) - 1:
        raise Unavailable(f"expected {len(sequence) - 1} positions, received {len(ids)}: vLLM dropped the question")
    return to_rows(ids[start - 1 :], logprobs[start - 1 :], start)


async def _prompt_logprobs(client: EngineClient, sequence: list[int], params: SamplingParams, request_id: str) -> Any:
    """What vLLM answers for the prompt: a list of tensors where we can have them, else FlatLogprobs."""
    prompt = tokens_input(sequence)
    if not isinstance(client, AsyncLLM):
        return [output.prompt_logprobs async for output in client.generate(prompt, params, request_id)][-1]
    queue = await client.add_request(request_id, prompt, params)
    state = client.output_processor.request_states.get(queue.request_id)
    if state is not None:  # gone if it has been answered already; prompt log-probabilities come with the last output
        state.logprobs_processor = _KeepTensors(None, None, [], None, None, params.prompt_logprobs)
    return (await queue.get()).prompt_logprobs


class _KeepTensors(LogprobsProcessor):  # type: ignore[misc] # vllm is not followed
    """vLLM's collector of log-probabilities for one request, keeping the prompt's as the tensors they come in."""

    def _update_prompt_logprobs(self, prompt_logprobs_tensors: LogprobsTensors) -> None:
        self.prompt_logprobs.append(prompt_logprobs_tensors)


def _entries(answer: Any, width: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities [positions − 1, K + 1]: position 0 has no entries, every other one has `width`."""
    if isinstance(answer, FlatLogprobs):
        ids, logprobs = np.array(answer.token_ids, np.int32), np.array(answer.logprobs, np.float32)
    else:
        ids = np.concatenate([np.empty((0, width), np.int32), *(part.logprob_token_ids.numpy() for part in answer)])
        logprobs = np.concatenate([np.empty((0, width), np.float32), *(part.logprobs.numpy() for part in answer)])
    return ids.reshape(-1, width), logprobs.reshape(-1, width)


def to_rows(ids: NDArray[np.int32], logprobs: NDArray[np.float32], start: int) -> Rows:
    """Rows of entries [S, K + 1], the actual token first. What no model can mean is the client's to refuse: it knows
    the sample and asks another replica, where an error here would only cut the answer off."""
    probs = np.exp(logprobs[:, 1:], dtype=np.float64)
    tail = 1.0 - probs.sum(axis=1)
    logprobs = np.clip(logprobs, FLOOR, 0.0)
    return Rows(
        start, ids[:, 1:].astype(np.uint32), logprobs[:, 1:], logprobs[:, 0], np.maximum(tail, 0.0).astype(np.float32)
    )
