"""Settings of on-policy distillation."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config_section import Fraction, Positive, Section, one_of
from trainer.losses import DIVERGENCES
from trainer.rollouts import ENGINES


class RolloutConfig(Section):
    """[rollout] On-policy distillation: the student continues prompts of the data, and the teachers score its text.

    A sample of the data is replaced by the student's continuation of its prompt: the prompt of a record with a prompt,
    a chat without its last answer, or the first `prompt_tokens` tokens of a window of text.
    """

    engine: Annotated[str, one_of(ENGINES)] = "transformers"
    """What samples the tokens. `transformers`: the student itself, in the processes of the run, between two steps."""
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
    """Temperature of sampling. The loss and all metrics are those of temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens with this total probability."""
    stop: list[str] = []
    """Strings that end a rollout. The token that completes one is kept."""
    divergence: Annotated[str, one_of(DIVERGENCES)] = "reverse_kl"
    """Divergence on the sampled text, where it is the whole loss: loss.ce_weight applies to given text only.
    `reverse_kl` makes the student avoid what the teachers consider unlikely. With `forward_kl` the student imitates
    everything that the teachers consider possible, and the entropy of its rollouts grows (docs/onpolicy.md)."""
    max_staleness_steps: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of steps by which the weights that sample a batch may be older than the weights that are trained on it. 0
    is synchronous. With 1 or more the teachers score the next batches while the student trains."""
    eval_prompts: Annotated[int, Field(ge=0)] = 0
    """Number of held-out prompts, evenly spaced, that the student continues at every evaluation, each time with the
    same random numbers. The teachers' bits per byte of these texts show what on-policy training achieves."""
    generation_batch: Positive = 32
    """Number of rollouts that are sampled together, per process."""

    @property
    def end_share(self) -> float:
        """Share at the end of the run."""
        return self.share if self.final_share is None else self.final_share
