"""Engine `transformers`: the student samples with `generate` of transformers, in the process that trains it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from trainer.rollouts.base import Finish, Prompt, SampledTokens
from trainer.student.model import Student

# shapes: B prompts, L tokens of the longest prompt, G sampled tokens, V vocabulary


class TransformersEngine:
    """Sample with the weights in training, in the process that trains them. A RolloutEngine.

    generation_batch  number of prompts per call of `generate`
    """

    def __init__(self, generation_batch: int) -> None:
        self._generation_batch = generation_batch

    def sample(
        self,
        student: Student,
        prompts: Sequence[Prompt],
        seed: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[SampledTokens]:
        """Sample in batches of prompts of similar lengths, which are padded on the left."""
        limit = student.max_tokens + len(student.vocabulary.prefix)
        token_bytes = student.vocabulary.token_bytes

        def sample_all(model: Any) -> list[SampledTokens]:
            sampled: dict[int, SampledTokens] = {}
            for indices in _batches(prompts, self._generation_batch, limit):
                batch = [prompts[i] for i in indices]
                results = _sample_batch(model, batch, _Ends(batch, token_bytes, should_stop), len(token_bytes))
                sampled.update(zip(indices, results, strict=True))
                if should_stop():
                    break
            return [sampled[i] for i in sorted(sampled)]

        devices = [torch.device(student.device)] if student.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            return student.infer(sample_all)


def _batches(prompts: Sequence[Prompt], size: int, limit: int) -> Iterator[list[int]]:
    """Yield the indices of all prompts in batches of at most `size`, by length.

    A rollout that has ended is continued with padding until the last one of its batch ends. The longest prompt and the
    longest rollout of a batch must together not exceed `limit`, the number of positions of the model.
    """
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids)):
        longest = max(prompts[j].max_new_tokens for j in [*batch, i])
        if batch and (len(batch) == size or len(prompts[i].ids) + longest > limit):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _sample_batch(model: Any, prompts: Sequence[Prompt], ends: "_Ends", num_ids: int) -> list[SampledTokens]:
    ids_BL, mask_BL = _pad_left(prompts)
    ids_BL, mask_BL = ids_BL.to(model.device), mask_BL.to(model.device)
    sampling = prompts[0].sampling
    recorder = _Recorder(prompts, num_ids)
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
        pad_token_id=0,
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # its settings would change the samples
    try:
        sequences_BL = model.generate(
            ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=[recorder],
            stopping_criteria=[ends],
            synced_gpus=False,
        )
    finally:
        model.generation_config = own
    sampled_BG = sequences_BL[:, ids_BL.shape[1] :]
    logprobs_BG, entropies_BG = recorder.finish(sampled_BG)
    rows = zip(sampled_BG.tolist(), logprobs_BG.tolist(), entropies_BG.tolist(), ends.ends(), strict=True)
    return [
        SampledTokens(tuple(ids[:length]), tuple(logprobs[:length]), tuple(entropies[:length]), finish)
        for ids, logprobs, entropies, (length, finish) in rows
    ]


def _pad_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    length = max(len(prompt.ids) for prompt in prompts)
    ids_BL = np.zeros((len(prompts), length), dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for ids_L, mask_L, prompt in zip(ids_BL, mask_BL, prompts, strict=True):
        ids_L[length - len(prompt.ids) :] = prompt.ids
        mask_L[length - len(prompt.ids) :] = 1
    return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)


class _Recorder(LogitsProcessor):
    """Record the model's own distributions, and ban tokens. Temperature and top_p follow."""

    def __init__(self, prompts: Sequence[Prompt], num_ids: int) -> None:
        self._prompts = prompts
        self._num_ids = num_ids  # of the tokenizer; the model may have more
        self._banned_BV: Tensor | None = None
        self._logprobs_BV: Tensor | None = None
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # the parameters' names are those of transformers
        self._record_sampled(input_ids[:, -1])
        self._logprobs_BV = logprobs_BV = torch.log_softmax(scores.float(), 1)
        self._entropies.append(-(logprobs_BV.exp() * logprobs_BV).sum(1))
        if self._banned_BV is None:
            self._banned_BV = self._banned(scores)
        return scores.masked_fill(self._banned_BV, float("-inf"))

    def _banned(self, scores_BV: Tensor) -> Tensor:
        banned_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
        banned_BV[:, self._num_ids :] = True
        for banned_V, prompt in zip(banned_BV, self._prompts, strict=True):
            banned_V[torch.tensor(prompt.sampling.banned_ids, dtype=torch.int64, device=banned_V.device)] = True
        return banned_BV

    def _record_sampled(self, ids_B: Tensor) -> None:
        if self._logprobs_BV is not None:
            self._logprobs.append(self._logprobs_BV.gather(1, ids_B[:, None])[:, 0])

    def finish(self, sampled_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies [B, G] of the sampled tokens, in nats."""
        self._record_sampled(sampled_BG[:, -1])
        return torch.stack(self._logprobs, 1), torch.stack(self._entropies, 1)


class _Ends(StoppingCriteria):
    """Find the end of every rollout: an end token, a stop string, the prompt's maximum of tokens, or `should_stop`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        token_bytes: Sequence[bytes | None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._prompts = prompts
        self._token_bytes = token_bytes
        self._should_stop = should_stop
        self._prompt_length = max(len(prompt.ids) for prompt in prompts)
        self._texts = [b"" for _ in prompts]
        self._ends: list[tuple[int, Finish] | None] = [None for _ in prompts]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length, stops = input_ids.shape[1] - self._prompt_length, self._should_stop()
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self._ends[i] is None:
                finish = self._finish(i, token, length) or ("length" if stops else None)
                self._ends[i] = (length, finish) if finish else None
        return torch.tensor([end is not None for end in self._ends], device=input_ids.device)

    def _finish(self, i: int, token: int, length: int) -> Finish | None:
        """Return why the last token of rollout `i` ends it, or None."""
        sampling = self._prompts[i].sampling
        if token in sampling.end_ids:
            return "eos"
        if sampling.stop:
            data = self._token_bytes[token] or b""
            # a stop string that ends within the last token begins at most its own length before it
            text = self._texts[i] = (self._texts[i] + data)[-max(map(len, sampling.stop)) - len(data) :]
            if any(text.find(stop, max(len(text) - len(data) - len(stop) + 1, 0)) >= 0 for stop in sampling.stop):
                return "stop"
        return "length" if length >= self._prompts[i].max_new_tokens else None

    def ends(self) -> list[tuple[int, Finish]]:
        """Return the number of tokens of every rollout, and why it ended."""
        assert all(end is not None for end in self._ends)
        return [end for end in self._ends if end is not None]
