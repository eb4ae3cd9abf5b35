"""The run file: all sections, and the checks that involve more than one of them.

Every component defines its own section next to its code; importing this module loads no torch, numba or pyarrow.
"""

from pydantic import model_validator

from trainer.config_section import Section
from trainer.evaluation.config import EvalConfig
from trainer.fusion.config import FusionConfig
from trainer.losses.config import LossConfig
from trainer.query.config import MAX_TEACHERS, TeacherConfig
from trainer.rollouts.config import RolloutConfig
from trainer.sources.config import DataConfig
from trainer.student.config import StudentConfig
from trainer.telemetry.config import TrackingConfig
from trainer.training.config import OptimConfig, OutputConfig, TrainConfig


class RunConfig(Section):
    """A complete run file."""

    student: StudentConfig
    data: DataConfig
    teachers: list[TeacherConfig] = []
    fusion: FusionConfig = FusionConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig | None = None
    eval: EvalConfig = EvalConfig()
    output: OutputConfig
    tracking: TrackingConfig = TrackingConfig()

    @property
    def unavailable_timeout_s(self) -> float:
        """Longest time that a process may wait for a teacher, at the start of the run or later; 0 without teachers."""
        return max((max(t.unavailable_timeout_s, t.start_timeout_s) for t in self.teachers), default=0.0)

    @property
    def max_batch_samples(self) -> int:
        """Samples of a step if rollouts replace all of them."""
        return self.train.batch_samples * (self.rollout.samples_per_prompt if self.rollout else 1)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self._check_student()
        self._check_teachers()
        self._check_loss()
        self._check_evaluation()
        self._check_rollout()
        return self

    def _check_student(self) -> None:
        if self.student.lora and self.student.train_layers:
            raise ValueError("student.lora: adapters leave all weights unchanged; remove student.train_layers")
        if self.max_batch_samples % self.train.gradient_accumulation_steps:
            product = " times rollout.samples_per_prompt" if self.rollout else ""
            raise ValueError(f"train.gradient_accumulation_steps: must divide train.batch_samples{product}")

    def _check_teachers(self) -> None:
        teachers, fusion = self.teachers, self.fusion
        if len({teacher.name for teacher in teachers}) != len(teachers):
            raise ValueError("teachers: two teachers have the same name")
        if len(teachers) > MAX_TEACHERS:
            raise ValueError(f"teachers: expected at most {MAX_TEACHERS}")
        for weights in ([t.weight for t in teachers], [t.end_weight for t in teachers]):
            if teachers and not any(weights):
                raise ValueError("teachers: all weights are 0, expected at least one above 0")
        for teacher in teachers:
            if fusion.method == "router" and not teacher.is_fused:
                raise ValueError(
                    f"teachers: teacher {teacher.name} has signal {teacher.signal!r}; fusion by router requires a "
                    "target from every teacher"
                )
        if fusion.method == "router" and not self.data.names_teachers:
            raise ValueError("data.sources: fusion by router requires the teacher_column of every source")

    def _check_loss(self) -> None:
        loss = self.loss
        if not self.teachers and min(loss.ce_weight, loss.end_ce_weight) < 1:
            key = "ce_weight" if loss.ce_weight < 1 else "final_ce_weight"
            raise ValueError(f"loss.{key}: without teachers the text is the only training signal; set it to 1")
        if loss.final_ce_weight is not None and loss.schedule == "constant":
            raise ValueError("loss.final_ce_weight: set loss.schedule to linear or cosine")

    def _check_evaluation(self) -> None:
        requested = {
            "eval.agreement_samples": self.eval.agreement_samples,
            "eval.early_stopping_patience": self.eval.early_stopping_patience,
            'output.export = "best"': self.output.export == "best",
        }
        if any(requested.values()) and not self.eval.held_out_documents:
            key = next(key for key, value in requested.items() if value)
            raise ValueError(f"{key}: there is no held-out text to measure on; set eval.held_out_documents")
        if self.eval.early_stopping_patience and self.eval.every_steps is None:
            raise ValueError("eval.early_stopping_patience counts evaluations during the run; set eval.every_steps")

    def _check_rollout(self) -> None:
        rollout = self.rollout
        if rollout is None:
            return
        if not self.teachers:
            raise ValueError("rollout: the student learns nothing from its own text without teachers; add [[teachers]]")
        if rollout.eval_prompts and not self.eval.held_out_documents:
            raise ValueError("rollout.eval_prompts: there is no held-out text; set eval.held_out_documents")
        if self.train.deterministic and rollout.top_p < 1 and not self.student.device.startswith("cpu"):
            raise ValueError("train.deterministic: torch has no deterministic implementation for rollout.top_p below 1")
        if (rollout.prompt_tokens or 0) >= self.data.window_tokens:
            raise ValueError(
                "rollout.prompt_tokens: expected less than data.window_tokens, to leave room for a rollout"
            )
        for teacher in self.teachers:
            if not (teacher.is_fused and teacher.supports_chats):
                raise ValueError(
                    f"teachers: teacher {teacher.name} has signal {teacher.signal!r}, which does not support rollouts; "
                    "set it to byte_chain"
                )
