"""Settings of on-policy distillation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config_section import Fraction, OpenFraction, Positive, Section, one_of
from trainer.losses import DIVERGENCES
from trainer.rollouts import ENGINES


class RolloutConfig(Section):
    """[rollout] On-policy distillation: the student continues prompts of the data, and the teachers score its text.

    A sample of the data is replaced by the student's continuation of its prompt: the prompt of a record with a prompt,
    a chat without its last answer, or the first `prompt_tokens` tokens of a window of text.
    """

    engine: Annotated[str, one_of(ENGINES)] = "transformers"
    """The engine that samples the tokens. `transformers`: the student itself, in the processes of the run, between two
    steps."""
    share: Fraction = 1.0
    """Share of the samples that are replaced by rollouts: 1 is on-policy training, 0 trains on given text only. It is
    λ of GKD (arXiv 2306.13649)."""
    final_share: Fraction | None = None
    """Share at the end of the run, where `schedule` changes it. Default: `share`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the share moves from `share` to `final_share` over the steps of the run."""
    prompt_tokens: Positive | None = None
    """Number of tokens at the start of a window of text that are its prompt. Required if a source has texts without a
    prompt."""
    samples_per_prompt: Positive = 1
    """Rollouts of each prompt. With several, a step has more samples than train.batch_samples."""
    max_new_tokens: Positive = 128
    """Maximum number of sampled tokens. Prompt and rollout together have at most data.window_tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of sampling. All metrics of rollouts are those of temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens with this total probability."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a rollout. The token that completes one is kept."""
    divergence: Annotated[str, one_of(DIVERGENCES)] = "reverse_kl"
    """Divergence on the sampled text, where it is the whole loss: loss.ce_weight applies to given text only.
    `reverse_kl` makes the student avoid what the teachers consider unlikely. With `forward_kl` the student imitates
    everything that the teachers consider possible, and the entropy of its rollouts grows (docs/onpolicy.md)."""
    alpha: OpenFraction | None = None
    """skew_kl, skew_reverse_kl: weight of the first distribution in the mixture. Default: 0.1."""
    beta: OpenFraction | None = None
    """jensen_shannon: weight of the target in the mixture. Default: 0.5."""
    max_staleness_steps: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of steps by which the weights that sample a batch may be older than the weights that are trained on it. 0
    is synchronous. With 1 or more the teachers score the next batches while the student trains."""
    eval_prompts: Annotated[int, Field(ge=0)] = 0
    """Number of held-out prompts, evenly spaced, that the student continues at every evaluation, each time with the
    same random numbers. The teachers' bits per byte of these texts show what on-policy training achieves."""
    generation_batch: Positive = 32
    """Number of rollouts that are sampled together, per process."""

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        if (self.final_share is None) != (self.schedule == "constant"):
            raise ValueError("final_share and schedule (linear or cosine) belong together; set both or neither")
        if self.alpha is not None or self.beta is not None:
            from trainer.losses.divergences import divergence  # imports torch

            divergence(self.divergence, self.alpha, self.beta)
        return self

    @property
    def end_share(self) -> float:
        """Share at the end of the run."""
        return self.share if self.final_share is None else self.final_share
