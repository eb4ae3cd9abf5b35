"""The interface of rollout engines: prompts, settings of sampling, and the tokens that were sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trainer.student.model import Student

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    end_ids     tokens that end a rollout
    banned_ids  tokens that are never sampled: those without text, except `end_ids`. Ids that the tokenizer lacks are
                never sampled either
    stop        byte strings that end a rollout
    """

    temperature: float
    top_p: float
    end_ids: frozenset[int]
    banned_ids: tuple[int, ...]
    stop: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt for the student.

    ids             tokens of the model's input, with BOS if the model expects it
    max_new_tokens  maximum number of sampled tokens; at least 1
    sampling        settings; temperature and top_p are the same for all prompts of a run
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling


@dataclass(frozen=True)
class SampledTokens:
    """The continuation of one prompt. The fields are those of trainer.records.Rollout."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    finish: Finish


class RolloutEngine(Protocol):
    """Samples continuations with the present weights of the student."""

    def sample(
        self,
        student: Student,
        prompts: Sequence[Prompt],
        seed: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[SampledTokens]:
        """Return the continuation of each prompt. All processes must call this together, also without prompts.

        The same weights, prompts and seed give the same tokens. After `should_stop` has returned true, the call returns
        soon, with incomplete or missing rollouts.
        """
        ...
