"""Settings and arms of benchmarks/quality.py.

A setting is a student and an amount of text. An arm is a set of teachers and a method. The names are keys of
baselines/quality.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma": "gemma-3-270m"}
PLAIN = "plain"
Values = Mapping[str, Any]  # keys of a run file: {"loss.ce_weight": 0.1}


@dataclass(frozen=True)
class Setting:
    """A student and its training data.

    student: base, cut (the base model with fewer layers) or random (17.7M parameters); values: keys of the run file.
    """

    student: str
    windows: int
    epochs: int
    values: Values


@dataclass(frozen=True)
class Arm:
    """Differences from the default settings. An arm without teachers is plain training.

    values: keys of the run file, which override those of the setting;
    teacher_values: keys of each [[teachers]]; lr: factor of the setting's learning rate.
    """

    values: Values = field(default_factory=dict)
    teachers: tuple[str, ...] = ()
    teacher_values: Values = field(default_factory=dict)
    lr: float = 1.0


UPPER = {"student.train_layers": 8, "optim.warmup_steps": 4, "optim.lr": 5e-4}
RANDOM = {"optim.lr": 2e-3, "optim.warmup_steps": 20}
SETTINGS = {
    "base-scarce": Setting("base", 16, 10, UPPER),
    "base-scarce-2x": Setting("base", 32, 5, UPPER),  # compares more text with teachers
    "base-scarce-4x": Setting("base", 64, 3, UPPER),
    "base-once": Setting("base", 160, 1, UPPER | {"optim.lr": 1e-4}),
    "lora-scarce": Setting("base", 16, 10, {"student.lora.rank": 16, "optim.lr": 1e-3, "optim.warmup_steps": 4}),
    "cut-once": Setting("cut", 320, 1, {"optim.lr": 5e-4, "optim.warmup_steps": 10}),
    "random-once": Setting("random", 400, 1, RANDOM),
    "random-scarce": Setting("random", 40, 10, RANDOM),
    "random-scarce-2x": Setting("random", 80, 5, RANDOM),
    "random-scarce-4x": Setting("random", 160, 4, RANDOM),
}
BOTH = tuple(MODELS)
LAMBDA = "loss.ce_weight"
ARMS = {
    PLAIN: Arm({LAMBDA: 1.0}),
    "smollm2": Arm(teachers=("smollm2",)),
    "gemma": Arm(teachers=("gemma",)),
    **{
        name: Arm({"fusion.method": name}, BOTH)
        for name in ("mean", "geometric", "min_ce", "avg_ce", "confidence", "adaptive")
    },
    "min_ce-by-token": Arm({"fusion.method": "min_ce", "fusion.scope": "token"}, BOTH),
    **{
        f"fusellm-{signal}": Arm({LAMBDA: 0.9, "fusion.method": "fusellm_min_ce"}, BOTH, {"signal": signal})
        for signal in ("em", "min_ed")
    },
    **{f"mean-λ{weight:g}": Arm({LAMBDA: weight}, BOTH) for weight in (0, 0.1, 0.5, 0.9)},
    **{
        f"mean-λ{first:g}→0": Arm({LAMBDA: first, "loss.final_ce_weight": 0.0, "loss.schedule": "linear"}, BOTH)
        for first in (0.9, 0.5)
    },
    **{f"mean-K{k}": Arm({"fusion.top_k": k}, BOTH, {"top_k": k}) for k in (1, 8)},
    **{f"mean-T{t:g}": Arm({"loss.temperature": t}, BOTH) for t in (0.7, 1.5)},
    **{
        f"mean-{name}": Arm({"loss.divergence": name}, BOTH)
        for name in ("reverse_kl", "jensen_shannon", "skew_kl", "total_variation")
    },
    **{f"plain-lr×{x:g}": Arm({LAMBDA: 1.0}, lr=x) for x in (0.3, 3)},
    **{f"mean-lr×{x:g}": Arm(teachers=BOTH, lr=x) for x in (0.3, 3)},
}
