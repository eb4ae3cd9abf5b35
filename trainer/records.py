"""The records that a sample passes through: from its text or chat to a training example. They hold no telemetry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from alignment import Target, Tokens
from trainer.chats.jinja_template import ChatError
from trainer.chats.rendered_chat import RenderedChat

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rollout:
    """The tokens that the student sampled as the continuation of a prompt.

    ids          sampled tokens. Their bytes end at a whole character. EOS or an end of turn is the last token if it
                 was sampled
    num_bytes    bytes of text of each token; 0 for EOS or an end of turn
    logprobs     log-probabilities of the sampled tokens in nats, at temperature 1
    entropies    entropies of the distributions from which they were sampled, in nats, at temperature 1
    num_cut      sampled tokens behind the last whole character, which are not used
    finish       why sampling ended: an end token (`eos`), a stop string (`stop`), or a limit on the tokens (`length`)
    version      number of steps that the weights had been trained for
    prompt_crc   CRC-32 of the prompt's tokens
    fingerprint  fingerprint of the tokenizer. Models with the same tokenizer receive these tokens
    """

    ids: tuple[int, ...]
    num_bytes: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    num_cut: int
    finish: Literal["eos", "stop", "length"]
    version: int
    prompt_crc: int
    fingerprint: str


@dataclass(frozen=True)
class Sample:
    """One window of text, or one chat.

    index         position in the sequence of training or held-out samples that contains the sample
    name          file, dataset or table, and position in it; error messages use this name
    text          text of a window; empty for a chat
    prompt_bytes  number of leading UTF-8 bytes of the text that are a masked prompt
    closes        the window ends its document: EOS follows the text; of a rollout: the student has ended it
    messages      messages of a chat; empty for a window of text
    tools         tool definitions of a chat, as its template receives them
    domain        value of the source's domain column, for fusion by "adaptive"; empty without a column
    teacher       value of the source's teacher column, for fusion by "router"; None without a column
    rollout       tokens that the student sampled: the text after the prompt, or the last message; None for given text
    prompt        the student's tokens of the prompt of a rollout; None for given text
    refusal       error of a sample that cannot be used; the run handles it like a chat that cannot be rendered
    """

    index: int
    name: str
    text: str = ""
    prompt_bytes: int = 0
    closes: bool = False
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    domain: str = ""
    teacher: str | None = None
    rollout: Rollout | None = None
    prompt: Tokens | None = None
    refusal: ChatError | None = None

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def written_by(self) -> int | None:
        """Version of the student's weights that sampled the text; None for text from a source."""
        return None if self.rollout is None else self.rollout.version


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """A sample as one model tokenizes it.

    tokens        tokens without the BOS that the model expects in front
    supervised_T  bool: tokens that the loss counts; every token of a text after its prompt, the assistant's tokens of a
                  chat
    num_bytes_T   int64 bytes of text that end with each supervised token; 0 for special tokens
    rendered      the chat as the model's template renders it; None for a text
    hidden_bos    number of leading tokens of `rendered` that `tokens` omits: 1 if the template renders BOS
    """

    tokens: Tokens
    supervised_T: NDArray[np.bool_]
    num_bytes_T: NDArray[np.int64]
    rendered: RenderedChat | None = None
    hidden_bos: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Estimated memory in bytes. The rendering of a chat holds a second copy of the arrays and the text."""
        arrays = self.tokens.ids.nbytes + self.tokens.ends.nbytes + self.num_bytes_T.nbytes + self.supervised_T.nbytes
        return (arrays + self.tokens.num_bytes) * (1 if self.rendered is None else 2)


class AuxiliaryScores(Protocol):
    """Scores of a teacher whose signal is not fused, in the form that its auxiliary loss needs (trainer/signals/)."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        ...


@dataclass(frozen=True, eq=False)
class TeacherScores:
    """The scores of one teacher for one sample, aligned to the student.

    tokenized       the sample as the teacher tokenizes it
    first_row       index of the teacher token that actual_R[0] scores; at least 1 if the teacher has no BOS in front
    actual_R        [R] float32 log-probabilities in nats of the teacher's own tokens from `first_row` on
    nats_per_token  mean negative log-likelihood of the teacher's supervised tokens; inf without any
    target          distributions over the student's tokens; no valid position if the signal is not fused
    auxiliary       scores of a signal that is not fused; None otherwise
    unavailable     the teacher was unavailable for this sample, which has no scores of it
    """

    tokenized: TokenizedSample
    first_row: int
    actual_R: NDArray[np.float32]
    nats_per_token: float
    target: Target
    auxiliary: AuxiliaryScores | None = None
    unavailable: bool = False

    @property
    def supervised_text(self) -> tuple[float, int]:
        """Log-likelihood of the supervised tokens with scores, in nats, and their number of bytes."""
        tokenized = self.tokenized
        scored_R = tokenized.supervised_T[self.first_row :][: len(self.actual_R)] & ~np.isnan(self.actual_R)
        num_bytes = tokenized.num_bytes_T[self.first_row :][: len(self.actual_R)][scored_R].sum()
        return float(self.actual_R[scored_R].sum(dtype=float)), int(num_bytes)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        own = self.tokenized.nbytes + self.actual_R.nbytes + self.target.nbytes
        return own + (0 if self.auxiliary is None else self.auxiliary.nbytes)


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """A sample as the student tokenizes it, with the scores of every teacher in the order of the run file."""

    sample: Sample
    tokenized: TokenizedSample
    scores: tuple[TeacherScores, ...]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.tokenized.nbytes + sum(scores.nbytes for scores in self.scores)


@dataclass(frozen=True, eq=False)
class DistillationExample:
    """The training example of one sample.

    target     fused distributions over the student's tokens; None if no teacher is fused
    auxiliary  scores of each teacher whose signal is not fused, in the order of the run file; None for the others
    """

    sample: Sample
    tokenized: TokenizedSample
    target: Target | None = None
    auxiliary: tuple[AuxiliaryScores | None, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        parts = [part for part in (self.target, *self.auxiliary) if part is not None]
        return self.tokenized.nbytes + sum(part.nbytes for part in parts)

    def supervised(self, first_position: int) -> NDArray[np.bool_]:
        """Return [T − first_position] bool: which of the student's predicted positions the loss counts."""
        return self.tokenized.supervised_T[first_position:]

    def labels(self, first_position: int) -> tuple[NDArray[np.int64], Target | None]:
        """Return gold ids and target of the supervised positions from the student's first predicted position on."""
        supervised = self.supervised(first_position)
        ids = self.tokenized.tokens.ids[first_position:][supervised]
        target = self.target
        return ids, None if target is None else target.from_position(first_position).select(supervised)


@dataclass(frozen=True, eq=False)
class Batch:
    """The training examples of one step, of one process.

    fusion_state  state of the fusion after this batch, for a checkpoint; None for a fusion without state
    """

    examples: tuple[DistillationExample, ...]
    fusion_state: dict[str, Any] | None = None

    @property
    def num_tokens(self) -> int:
        """Student tokens, supervised or not."""
        return sum(len(example.tokenized) for example in self.examples)
