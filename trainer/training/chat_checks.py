"""Checks of all chats at the start of a run. `train` and `doctor` call the same functions.

The checks search the texts of the chats for special tokens, and render some chats to see whether a token ends a turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat
from trainer.errors import DataError
from trainer.records import Sample
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus
from trainer.tokenization import SampleTokenizer, raise_unless_skipped

MAX_RENDERED = 32  # chats, evenly spaced, in which a turn must end


def check_chats(corpus: Corpus, tokenizers: Mapping[str, SampleTokenizer], data: DataConfig) -> list[str]:
    """Check all chats for some models, and return remarks and warnings as sentences.

    tokenizers  tokenizers by the name of the model in the sentences: "student" or "teacher NAME"
    Raises DataError for special tokens in the texts of chats that are neither skipped nor encoded as ordinary text, and
    ChatError for a chat that cannot be rendered.
    """
    with_template = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer.template is not None}
    counts = _count_special_tokens(corpus, with_template)
    remarks: list[str] = []
    for name, tokenizer in with_template.items():
        remarks += _describe_special_tokens(counts[name], data, name)
        remarks += _check_end_of_turn(corpus, tokenizer, data, name)
    return remarks


def describe_supervision(corpus: Corpus, data: DataConfig) -> str:
    """Return what is supervised in the texts and chats of a run, as one line."""
    texts = [source for source in corpus.sources if not source.is_chat]
    parts = ["all tokens of the texts"] if any(not source.has_prompt for source in texts) else []
    if any(source.has_prompt for source in texts):
        parts.append("the completions of texts with a masked prompt")
    if parts and data.close_documents:
        parts[-1] += ", with EOS after each document"
    return "; ".join([*parts, *([data.supervision.describe()] if corpus.has_chats else [])])


@dataclass
class _SpecialTokenCount:
    """Number of chats that contain special tokens of a model.

    num_chats       number of all chats
    num_with_token  number of chats that contain a special token
    first           the first of them and its special token
    """

    num_chats: int = 0
    num_with_token: int = 0
    first: str = ""


def _count_special_tokens(corpus: Corpus, tokenizers: Mapping[str, SampleTokenizer]) -> dict[str, _SpecialTokenCount]:
    """Count the chats that contain special tokens of each model. Every chat is read once for all models."""
    counts = {name: _SpecialTokenCount() for name in tokenizers}
    templates = [(counts[name], each.template) for name, each in tokenizers.items() if each.template is not None]
    for sample in _chats(corpus) if templates else ():
        for count, template in templates:
            count.num_chats += 1
            if token := template.spelled_token(sample.messages, sample.tools):
                count.num_with_token += 1
                count.first = count.first or f"{sample.name}: {token}"
    return counts


def _describe_special_tokens(count: _SpecialTokenCount, data: DataConfig, model: str) -> list[str]:
    """Return a remark about the chats that contain special tokens. Raises DataError if the run does not allow them."""
    if not count.num_with_token:
        return []
    found = (
        f"{count.num_with_token} of {count.num_chats} chats contain special tokens of {model}, first in {count.first}"
    )
    choice = data.supervision.special_tokens_in_content
    if choice == "text":
        return [f"{found}; they are encoded as ordinary text"]
    if choice == "skip" or data.invalid_chats == "skip":
        return [f"{found}; they are skipped"]
    raise DataError(
        f'{found}: set data.supervision.special_tokens_in_content to "text" to encode them as ordinary text, or to '
        '"skip" to skip these chats'
    )


def _check_end_of_turn(corpus: Corpus, tokenizer: SampleTokenizer, data: DataConfig, model: str) -> Iterator[str]:
    """Yield a warning if no turn of some rendered chats ends with a token."""
    if not data.supervision.end_of_turn:
        return
    rendered = [*_rendered(corpus, tokenizer, data)]
    if not rendered or any(span.end_of_turn is not None for chat in rendered for span in chat.spans):
        return
    section = "[student]" if model == "student" else "the [[teachers]] section"
    effect = "the student does not learn to stop" if model == "student" else "this teacher has no target for it"
    yield (
        f"warning: {model}: no turn of the rendered chats ends with a known token, so that {effect}: name the token "
        f"that the chat template writes after a turn by roles.end_of_turn in {section}, or set chat_template to a "
        "template that writes one"
    )


def _rendered(corpus: Corpus, tokenizer: SampleTokenizer, data: DataConfig) -> Iterator[RenderedChat]:
    """Yield renderings of at most MAX_RENDERED chats, evenly spaced in the corpus, without chats that the run skips."""
    chats: Sequence[int] = [*corpus.train.chat_indices()]
    for i in chats[:: -(-len(chats) // MAX_RENDERED) or 1]:
        try:
            rendered = tokenizer.tokenize(corpus.train[i]).rendered
        except ChatError as error:
            raise_unless_skipped(error, data)
            continue
        if rendered is not None:
            yield rendered


def _chats(corpus: Corpus) -> Iterator[Sample]:
    for samples in (corpus.train, corpus.held_out):
        yield from (samples[i] for i in samples.chat_indices())
