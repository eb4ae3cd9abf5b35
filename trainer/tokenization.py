"""Tokenize texts, chats and rollouts with the tokenizer of one model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alignment import Tokens, Vocabulary
from trainer.chats.chat_template import OPEN_THOUGHT, ChatTemplate
from trainer.chats.config import SupervisionConfig
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat, supervised_mask
from trainer.chats.sampled_chat import sampled_chat
from trainer.chats.special_tokens import SpecialTokenError
from trainer.errors import ConfigError, DataError
from trainer.records import Rollout, Sample, TokenizedSample
from trainer.shortening import STUDENT_WINDOW, Excess, fit_sample
from trainer.sources.config import DataConfig


def raise_unless_skipped(error: ChatError, data: DataConfig) -> None:
    """Raise the error of a sample, with the key that skips such samples, unless the run skips and counts them."""
    skips_spelled = data.supervision.special_tokens_in_content == "skip"
    if data.invalid_chats == "skip" or (skips_spelled and isinstance(error, SpecialTokenError)):
        return
    raise ChatError(f'{error}; data.invalid_chats = "skip" skips and counts such samples') from error


@dataclass(frozen=True, eq=False)
class SampleTokenizer:
    """The tokenizer of one model.

    prefix    token ids in front of every sequence: BOS, or nothing
    template  chat template of the model; None if the run has no chats
    """

    vocabulary: Vocabulary
    prefix: Sequence[int]
    template: ChatTemplate | None = None

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """Tokenize a text, a chat or a rollout.

        The sampled tokens of a rollout are kept if this is the student's tokenizer. Raises ChatError if the model's
        template cannot render a chat.
        """
        rollout = sample.rollout
        if sample.is_chat and rollout is not None:
            return self._answered_chat(sample, reads_sampled_tokens(sample, self.vocabulary))
        if sample.is_chat:
            rendered = self._template(sample).render(sample.messages, sample.tools, sample=sample.name)
            return self._tokenized_chat(rendered)
        if rollout is not None and reads_sampled_tokens(sample, self.vocabulary):
            return self._tokenized_text(self._with_eos(sample, _sampled_tokens(sample, rollout)), sample.prompt_bytes)
        return self._tokenized_text(self.vocabulary.encode(sample.text, close=sample.closes), sample.prompt_bytes)

    def tokenize_canonical(self, sample: Sample) -> TokenizedSample:
        """Tokenize the text of a rollout. The sampled tokens are ignored."""
        return self._answered_chat(sample, False) if sample.is_chat else self.tokenize(replace(sample, rollout=None))

    def _answered_chat(self, sample: Sample, has_sampled_tokens: bool) -> TokenizedSample:
        """Tokenize a chat whose last answer was sampled by the student.

        This model's template renders the chat up to the answer. The answer follows unchanged.

        has_sampled_tokens  whether to keep the sampled tokens of the answer; otherwise its text is tokenized
        """
        template, rollout, prompt = self._template(sample), sample.rollout, sample.prompt
        assert rollout is not None
        assert prompt is not None
        *messages, answer = sample.messages
        thought = OPEN_THOUGHT.search(prompt.text.decode())
        tokens, start = template.continue_chat(
            messages,
            sample.tools,
            "" if has_sampled_tokens else answer["content"],
            opening=thought[0] if thought else "",
            sample=sample.name,
        )
        if has_sampled_tokens:
            length = len(rollout.ids) - sample.closes
            tokens = tokens.continued(answer["content"].encode(), rollout.ids[:length], rollout.num_bytes[:length])
        end = template.turn_end(bool(sample.tools))
        if reads_sampled_tokens(sample, self.vocabulary) and rollout.ids and rollout.ids[-1] in template.answer_ends:
            end = rollout.ids[-1]
        rendered = sampled_chat(
            template,
            tokens,
            start,
            end=end if sample.closes else None,
            message=len(messages),
            sample=sample.name,
        )
        return self._tokenized_chat(rendered)

    def _tokenized_text(self, tokens: Tokens, prompt_bytes: int) -> TokenizedSample:
        num_bytes_T = tokens.bytes_per_token
        # A token that begins within the prompt is not supervised, even if it ends after it.
        supervised_T = np.cumsum(num_bytes_T) - num_bytes_T >= prompt_bytes
        return TokenizedSample(tokens, supervised_T, np.where(supervised_T, num_bytes_T, 0))

    def _with_eos(self, sample: Sample, tokens: Tokens) -> Tokens:
        return tokens.with_end_token(self.vocabulary.roles["eos"]) if sample.closes else tokens

    def _template(self, sample: Sample) -> ChatTemplate:
        if self.template is None:
            raise DataError(f"sample {sample.name}: no chat template was loaded for {self.vocabulary.name}")
        return self.template

    def _tokenized_chat(self, rendered: RenderedChat) -> TokenizedSample:
        tokens, supervised_T = rendered.tokens, supervised_mask(rendered)
        hidden_bos = int(bool(self.prefix) and tokens.ids[:1].tolist() == list(self.prefix))
        # The first token of a sequence is not predicted: BOS if the model has a prefix, else the chat's first token.
        first_predicted = hidden_bos + (not self.prefix)
        if not supervised_T[first_predicted:].any():
            raise ChatError(
                f"sample {rendered.sample}, model {self.vocabulary.name}: no predicted token lies within an assistant "
                "message"
            )
        has_bytes_T = supervised_T & ~rendered.ends_turn & ~rendered.special_T
        num_bytes_T = np.where(has_bytes_T, tokens.bytes_per_token, 0)
        without_bos = tokens.excerpt(slice(hidden_bos, None), 0, tokens.num_bytes)
        return TokenizedSample(without_bos, supervised_T[hidden_bos:], num_bytes_T[hidden_bos:], rendered, hidden_bos)


def reads_sampled_tokens(sample: Sample, vocabulary: Vocabulary) -> bool:
    """Return whether a model receives the tokens that the student has sampled: if it has the student's tokenizer."""
    return sample.rollout is not None and sample.rollout.fingerprint == vocabulary.fingerprint


def _sampled_tokens(sample: Sample, rollout: Rollout) -> Tokens:
    """Return the tokens of a prompt and of the text that was sampled after it, without EOS."""
    assert sample.prompt is not None
    text, length = sample.text.encode()[sample.prompt_bytes :], len(rollout.ids) - sample.closes
    return sample.prompt.continued(text, rollout.ids[:length], rollout.num_bytes[:length])


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: SampleTokenizer,
    data: DataConfig,
    on_skip: Callable[[ChatError], object] = lambda error: None,
) -> Iterator[TokenizedSample]:
    """Tokenize samples with the student's tokenizer.

    Long samples are handled according to data.too_long, chats that cannot be rendered according to data.invalid_chats
    and data.supervision. `on_skip` is called for each chat that is skipped.
    """
    for sample in samples:
        try:
            yield _tokenize_within_window(sample, tokenizer, data)
        except ChatError as error:
            raise_unless_skipped(error, data)
            on_skip(error)


def _tokenize_within_window(sample: Sample, tokenizer: SampleTokenizer, data: DataConfig) -> TokenizedSample:
    def attempt(sample: Sample) -> tuple[TokenizedSample, Excess | None]:
        tokenized = tokenizer.tokenize(sample)
        limit = data.window_tokens + sample.closes
        return tokenized, Excess(tokenized, limit, STUDENT_WINDOW) if len(tokenized) > limit else None

    return fit_sample(sample, attempt, data)


def load_chat_template(
    files: Mapping[str, bytes],
    vocabulary: Vocabulary,
    roles: Mapping[str, str],
    path: str | None,
    supervision: SupervisionConfig = SupervisionConfig(),
) -> ChatTemplate:
    """Load the chat template of a model from its tokenizer files.

    roles        special tokens by role; only "end_of_turn" matters
    path         file of a template that replaces the model's own
    supervision  parts of a chat that are supervised
    Raises ChatError if the model has no template, ConfigError if the file cannot be read.
    """
    end_of_turn = {role: token for role, token in roles.items() if role == "end_of_turn"}
    template = _read_template(path) if path else None
    return ChatTemplate.from_files(
        files, vocabulary, vocabulary.name, template=template, roles=end_of_turn, supervision=supervision
    )


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read {path}: {error}") from error
