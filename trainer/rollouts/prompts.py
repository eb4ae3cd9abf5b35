"""Build prompts from samples of the data, and training samples from sampled tokens."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from alignment import Tokens
from alignment.sampled_tokens import complete_length
from trainer.chats.jinja_template import ChatError
from trainer.records import Rollout, Sample
from trainer.rollouts.base import Prompt, SampledTokens, Sampling
from trainer.rollouts.config import RolloutConfig
from trainer.shortening import STUDENT_WINDOW, is_character_end
from trainer.tokenization import SampleTokenizer


@dataclass(frozen=True)
class PromptBuilder:
    """Build prompts and samples for one student.

    EOS ends a text. An answer of a chat ends with the tokens with which the student's template ends a turn, or with EOS
    if there are none. Other special tokens have no text and are never sampled, EOS in chats included.

    window_tokens  maximum number of tokens of a prompt and its rollout, without BOS and EOS
    """

    tokenizer: SampleTokenizer
    config: RolloutConfig
    window_tokens: int

    @cached_property
    def _text_sampling(self) -> Sampling:
        eos = self.tokenizer.vocabulary.roles.get("eos")
        return self._sampling(frozenset() if eos is None else frozenset({eos}))

    @cached_property
    def _chat_sampling(self) -> Sampling:
        template = self.tokenizer.template
        if template is None:
            return self._text_sampling
        return self._sampling(template.answer_ends)

    def _sampling(self, end_ids: frozenset[int]) -> Sampling:
        token_bytes = self.tokenizer.vocabulary.token_bytes
        banned = (i for i, data in enumerate(token_bytes) if not data and i not in end_ids)
        stop = tuple(text.encode() for text in self.config.stop)
        return Sampling(self.config.temperature, self.config.top_p, end_ids, tuple(banned), stop)

    def with_prompt(self, sample: Sample) -> Sample:
        """Reduce a sample to its prompt: the chat without its last answer, or the beginning of the text.

        `refusal` is set if the student's template cannot render the chat, or if the prompt is empty or too long.
        """
        try:
            prompted = self._chat_prompt(sample) if sample.is_chat else self._text_prompt(sample)
        except ChatError as error:
            return replace(sample, refusal=error)
        assert prompted.prompt is not None
        num_tokens = len(prompted.prompt)
        if 0 < num_tokens < self.window_tokens:
            return prompted
        refusal = ChatError(
            f"sample {sample.name}: its prompt has {num_tokens} tokens, expected 1 to {self.window_tokens - 1}, so "
            f"that {STUDENT_WINDOW} has room for a rollout: raise data.window_tokens if it is too long"
        )
        return replace(sample, refusal=refusal)

    def _text_prompt(self, sample: Sample) -> Sample:
        vocabulary = self.tokenizer.vocabulary
        if sample.prompt_bytes or self.config.prompt_tokens is None:  # a record with a prompt, which may be empty
            prompt = sample.text.encode()[: sample.prompt_bytes]
        else:
            prompt = _first_tokens(vocabulary.encode(sample.text), self.config.prompt_tokens)
        text = prompt.decode()
        return replace(sample, text=text, prompt_bytes=len(prompt), closes=False, prompt=vocabulary.encode(text))

    def _chat_prompt(self, sample: Sample) -> Sample:
        """Return the chat without its last answer."""
        messages, template = sample.messages, self.tokenizer.template
        assert template is not None, "the run has chats"
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ChatError(f"sample {sample.name}: expected a message in front of the answer")
        prompt, _ = template.continue_chat(messages, sample.tools, sample=sample.name)
        return replace(sample, messages=messages, prompt=prompt)

    def prompt(self, sample: Sample) -> Prompt:
        """Return the model's input for a sample that is reduced to its prompt."""
        assert sample.prompt is not None
        ids, prefix = sample.prompt.ids.tolist(), self.tokenizer.vocabulary.prefix
        if sample.is_chat and ids[:1] == prefix:  # the template writes BOS itself
            prefix = []
        room = self.window_tokens - len(ids)
        sampling = self._chat_sampling if sample.is_chat else self._text_sampling
        return Prompt((*prefix, *ids), min(self.config.max_new_tokens, room), sampling)

    def rollout(self, prompt: Sample, sampled: SampledTokens, version: int) -> Rollout:
        """Return the rollout of the tokens sampled after a prompt. Tokens behind the last whole character are cut.

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
            prompt_crc=prompt_crc(prompt),
            fingerprint=vocabulary.fingerprint,
        )

    def sample(self, prompt: Sample, rollout: Rollout) -> Sample:
        """Append a rollout to its prompt: as the last part of the text, or as the last answer of the chat."""
        closes = rollout.finish == "eos"
        text = self._text(rollout.ids[: len(rollout.ids) - closes])
        if prompt.is_chat:
            messages = (*prompt.messages, {"role": "assistant", "content": text})
            return replace(prompt, messages=messages, closes=closes, rollout=rollout)
        return replace(prompt, text=prompt.text + text, closes=closes, rollout=rollout)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokenizer.vocabulary.token_bytes[i] or b"" for i in ids).decode()


def prompt_crc(sample: Sample) -> int:
    """Return the CRC-32 of the tokens of a prompt."""
    assert sample.prompt is not None
    return zlib.crc32(sample.prompt.ids.tobytes())


def _first_tokens(tokens: Tokens, number: int) -> bytes:
    """Return the text of the first tokens, up to the last one that ends a character; at least one character."""
    ends = tokens.ends.tolist()
    whole = [i for i, end in enumerate(ends) if end > 0 and is_character_end(tokens.text, end)]
    return tokens.text[: ends[max((i for i in whole if i < number), default=whole[0])]]
