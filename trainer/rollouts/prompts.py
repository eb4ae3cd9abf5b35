"""Prompts made of samples of the data, and samples made of prompts and the tokens that were sampled after them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment import Vocabulary
from alignment.sampled_tokens import complete_length
from trainer.errors import DataError
from trainer.records import Rollout, Sample
from trainer.rollouts.base import Prompt, SampledTokens, Sampling
from trainer.rollouts.config import RolloutConfig
from trainer.tokenization import is_character_end


@dataclass(frozen=True)
class PromptBuilder:
    """Makes prompts and samples for one student.

    window_tokens  maximum number of tokens of a prompt and its rollout, without BOS and EOS
    """

    vocabulary: Vocabulary
    config: RolloutConfig
    window_tokens: int

    def sampling(self) -> Sampling:
        """Return the settings of sampling. Special tokens other than EOS have no text and are never sampled."""
        eos = self.vocabulary.roles.get("eos")
        end_ids = frozenset() if eos is None else frozenset({eos})
        banned = (i for i, data in enumerate(self.vocabulary.token_bytes) if not data and i not in end_ids)
        stop = tuple(text.encode() for text in self.config.stop)
        return Sampling(self.config.temperature, self.config.top_p, end_ids, tuple(banned), stop)

    def with_prompt(self, sample: Sample) -> Sample:
        """Return the sample reduced to its prompt. Raises DataError if the sample is a chat or has no prompt."""
        if sample.is_chat:
            raise DataError(f"sample {sample.name} is a chat: [rollout] supports texts and records with a prompt")
        if sample.prompt_bytes:
            prompt = sample.text.encode()[: sample.prompt_bytes]
        elif self.config.prompt_tokens is None:
            raise DataError(
                f"sample {sample.name} is a text without a prompt: set rollout.prompt_tokens to use its first tokens"
            )
        else:
            tokens = self.vocabulary.encode(sample.text)
            ends = tokens.ends[: self.config.prompt_tokens]
            prompt = tokens.text[
                : max((int(end) for end in ends if is_character_end(tokens.text, int(end))), default=0)
            ]
        return replace(sample, text=prompt.decode(), prompt_bytes=len(prompt), closes=False)

    def prompt(self, sample: Sample) -> Prompt | None:
        """Return the model's input for a sample that is reduced to its prompt; None if no token fits behind it."""
        ids = self.vocabulary.encode(sample.text).ids.tolist()
        room = self.window_tokens - len(ids)
        return (
            Prompt((*self.vocabulary.prefix, *ids), min(self.config.max_new_tokens, room)) if ids and room > 0 else None
        )

    def rollout(self, sampled: SampledTokens, version: int) -> Rollout:
        """Return the rollout of sampled tokens. Tokens behind the last whole character are cut.

        Raises AlignmentError for a token without text that is not the end.
        """
        kept = complete_length(self.vocabulary, sampled.ids)
        ids = sampled.ids[:kept]
        return Rollout(
            ids=ids,
            num_bytes=tuple(map(len, self._pieces(ids))),
            logprobs=sampled.logprobs[:kept],
            entropies=sampled.entropies[:kept],
            num_cut=len(sampled.ids) - kept,
            finish=sampled.finish if kept == len(sampled.ids) else "length",
            version=version,
            fingerprint=self.vocabulary.fingerprint,
        )

    def sample(self, prompt: Sample, rollout: Rollout) -> Sample:
        """Return the sample whose text is a prompt and a rollout."""
        text = prompt.text + b"".join(self._pieces(rollout.ids)).decode()
        return replace(prompt, text=text, closes=rollout.finish == "eos", rollout=rollout)

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        return [self.vocabulary.token_bytes[i] or b"" for i in ids]
