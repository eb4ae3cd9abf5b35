"""Prompts made of samples of the data, and samples made of prompts and the tokens that were sampled after them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment import Tokens
from alignment.sampled_tokens import complete_length
from trainer.errors import DataError
from trainer.records import Rollout, Sample
from trainer.rollouts.base import Prompt, SampledTokens, Sampling
from trainer.rollouts.config import RolloutConfig
from trainer.tokenization import SampleTokenizer, is_character_end


@dataclass(frozen=True)
class PromptBuilder:
    """Makes prompts and samples for one student.

    window_tokens  maximum number of tokens of a prompt and its rollout, without BOS and EOS
    """

    tokenizer: SampleTokenizer
    config: RolloutConfig
    window_tokens: int

    def sampling(self) -> Sampling:
        """Return the settings of sampling.

        EOS ends a rollout, and so do the tokens with which the chat template ends a turn. Other special tokens have no
        text and are never sampled.
        """
        vocabulary, template = self.tokenizer.vocabulary, self.tokenizer.template
        eos = vocabulary.roles.get("eos")
        end_ids = (frozenset() if eos is None else frozenset({eos})) | (template.turn_ends if template else frozenset())
        banned = (i for i, data in enumerate(vocabulary.token_bytes) if not data and i not in end_ids)
        stop = tuple(text.encode() for text in self.config.stop)
        return Sampling(self.config.temperature, self.config.top_p, end_ids, tuple(banned), stop)

    def with_prompt(self, sample: Sample) -> Sample:
        """Return the sample reduced to its prompt: a chat without its last answer, or the first part of a text.

        Raises ChatError for a chat that the student's template cannot render, and DataError for a text without prompt.
        """
        if sample.is_chat:
            return self._chat_prompt(sample)
        vocabulary = self.tokenizer.vocabulary
        if sample.prompt_bytes:
            prompt = sample.text.encode()[: sample.prompt_bytes]
        elif self.config.prompt_tokens is None:
            raise DataError(
                f"sample {sample.name} is a text without a prompt: set rollout.prompt_tokens to use its first tokens"
            )
        else:
            prompt = _first_tokens(vocabulary.encode(sample.text), self.config.prompt_tokens)
        text = prompt.decode()
        return replace(sample, text=text, prompt_bytes=len(prompt), closes=False, prompt=vocabulary.encode(text))

    def _chat_prompt(self, sample: Sample) -> Sample:
        """Return the chat without its last answer. The answers before it are not supervised."""
        messages = sample.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        given = tuple({**each, "train": False} if each["role"] in ("assistant", "tool") else each for each in messages)
        template = self.tokenizer.template
        if not messages or template is None:
            raise DataError(f"sample {sample.name}: nothing precedes the answer, expected a message of the user")
        prompt = template.answer_prompt(given, sample.tools, sample=sample.name)
        return replace(sample, messages=given, prompt=prompt)

    def prompt(self, sample: Sample) -> Prompt | None:
        """Return the model's input for a sample that is reduced to its prompt; None if no token fits behind it."""
        assert sample.prompt is not None
        ids, prefix = sample.prompt.ids.tolist(), self.tokenizer.vocabulary.prefix
        if ids[:1] == prefix:  # a chat template writes BOS itself
            ids = ids[1:]
        room = self.window_tokens - len(ids)
        return Prompt((*prefix, *ids), min(self.config.max_new_tokens, room)) if ids and room > 0 else None

    def rollout(self, sampled: SampledTokens, version: int) -> Rollout:
        """Return the rollout of sampled tokens. Tokens behind the last whole character are cut.

        Raises AlignmentError for a token without text that is not the end.
        """
        vocabulary = self.tokenizer.vocabulary
        length = len(sampled.ids) - (sampled.finish == "eos")
        kept = complete_length(vocabulary, sampled.ids[:length])
        is_whole = kept == length  # an end token inside a character ends no text
        kept = len(sampled.ids) if is_whole else kept
        num_bytes = [len(vocabulary.token_bytes[i] or b"") for i in sampled.ids[: min(kept, length)]]
        return Rollout(
            ids=sampled.ids[:kept],
            num_bytes=(*num_bytes, *[0] * (kept - len(num_bytes))),
            logprobs=sampled.logprobs[:kept],
            entropies=sampled.entropies[:kept],
            num_cut=len(sampled.ids) - kept,
            finish=sampled.finish if is_whole else "length",
            version=version,
            fingerprint=vocabulary.fingerprint,
        )

    def sample(self, prompt: Sample, rollout: Rollout) -> Sample:
        """Return the sample whose text is a prompt and a rollout, or the chat whose last answer is the rollout."""
        closes = rollout.finish == "eos"
        text = self._text(rollout.ids[: len(rollout.ids) - closes])
        if prompt.is_chat:
            messages = (*prompt.messages, {"role": "assistant", "content": text})
            return replace(prompt, messages=messages, closes=closes, rollout=rollout)
        return replace(prompt, text=prompt.text + text, closes=closes, rollout=rollout)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokenizer.vocabulary.token_bytes[i] or b"" for i in ids).decode()


def _first_tokens(tokens: Tokens, number: int) -> bytes:
    """Return the text of the first tokens, up to the last of them that ends a character."""
    ends = (int(end) for end in tokens.ends[:number])
    return tokens.text[: max((end for end in ends if end >= 0 and is_character_end(tokens.text, end)), default=0)]
