"""Fusion methods `fusellm_min_ce` and `fusellm_avg_ce`: MinCE and AvgCE of FuseLLM (arXiv 2401.10491, section 3.3).

They follow the released code. Each teacher has one reward per sequence, exp(−CE), where CE is its nats per token on its
own tokens. MinCE selects the teacher with the highest reward. AvgCE weighs by the softmax of the rewards (not of −CE),
so that two teachers always have weights between 0.27 and 0.73.

Differences from `min_ce` and `avg_ce`: the loss is per token instead of per byte, which favors tokenizers with small
tokens; the scope is always the sequence; there is no temperature; teacher weights matter only as zero or not zero.

Differences from the released code: rewards are float64, not bfloat16; teachers with equal rewards share, where the code
takes the first or last of the list; rows keep their tails, where the code renormalizes the top-k; any number of
teachers, where the code has three. Without `own_ce_N`, CE is that of the aligned targets per student token over the
common positions; MinCE then selects the same teacher as `min_ce`.
"""

import math
from collections.abc import Sequence

import numpy as np

from trainer.fusion.base import AllGather, FusionMethod, FusionRule
from trainer.fusion.comparison import Comparison, best_only, cross_entropy, per_unit
from trainer.fusion.inputs import Bools, Floats, StackedSample


class FuseLLMMinCE(FusionMethod):
    """MinCE of FuseLLM, for comparison: the teacher with the lowest nats per token of its own tokens."""

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        return [
            best_only(Comparison(_ce(stacked)[:, None], _participating(stacked)[:, None])) + _ignored_weights(stacked)
            for stacked in samples
        ]


class FuseLLMAvgCE(FusionMethod):
    """AvgCE of FuseLLM, for comparison: arithmetic mean weighted by the softmax of exp(−nats per token)."""

    @classmethod
    def scores(cls, samples: Sequence[StackedSample], rule: FusionRule, all_gather: AllGather) -> list[Floats]:
        return [np.exp(-_ce(stacked))[:, None] + _ignored_weights(stacked) for stacked in samples]


def _participating(stacked: StackedSample) -> Bools:
    participating_N: Bools = stacked.sample.teacher_weights_N > 0
    return participating_N


def _ce(stacked: StackedSample) -> Floats:
    """Return nats per token [N]."""
    sample, rows = stacked
    if sample.own_ce_N is not None:
        return sample.own_ce_N
    bits = cross_entropy(sample, rows, _participating(stacked))
    return per_unit(bits._replace(units_T=np.ones(len(sample.labels_T))).total()) * math.log(2)


def _ignored_weights(stacked: StackedSample) -> Floats:
    """Return −log(teacher weight) [N, 1], which cancels the factor that fusion applies to every score."""
    with np.errstate(divide="ignore"):
        return np.where(_participating(stacked), -np.log(stacked.sample.teacher_weights_N), 0)[:, None]
