"""The event of one step: its result and the telemetry of all processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.report import bits_per_byte
from trainer.telemetry.collector import Collector, TeacherTelemetry
from trainer.telemetry.event_records import PoolStep, RolloutStep, TeacherStep, finite
from trainer.telemetry.events import StepEvent
from trainer.telemetry.rollout_telemetry import RolloutTelemetry
from trainer.training.plan import StepPlan
from trainer.training.step import RolloutLoss, StepResult

MIN_S = 1e-9  # a step without tokens may take no measurable time


def step_event(
    step: int, collectors: Sequence[Collector], plan: StepPlan, result: StepResult, step_s: float
) -> StepEvent:
    """Return the event of one step. `collectors` are those of all processes, by rank.

    step_s is measured by this process. The other times and the queue are those of the process that waited longest.
    Tokens per second of a teacher are the sum of all processes; the other values of its pool are those of rank 0.
    """
    slowest = max(collectors, key=lambda collector: collector.wait_s)
    sample_s = max(collector.sample_s for collector in collectors)
    values = {
        "step": step,
        "ce_weight": plan.objective.ce_weight,
        "loss": result.loss,
        "cross_entropy": result.cross_entropy,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": result.num_tokens,
        "tokens_per_s": result.num_tokens / max(step_s + slowest.wait_s + sample_s, MIN_S),
        "step_s": step_s,
        "wait_s": slowest.wait_s,
        "queued_batches": slowest.queued_batches,
        "queued_tokens": slowest.queued_tokens,
        "tokenize_s": slowest.seconds.get("tokenize", 0.0),
        "align_s": slowest.seconds.get("align", 0.0),
        "fuse_s": slowest.seconds.get("fuse", 0.0),
        "shortened": sum(collector.shortened for collector in collectors),
        "skipped": sum(collector.skipped for collector in collectors),
        "folded_system": sum(collector.folded_system for collector in collectors),
        "omitted_reasoning": sum(collector.omitted_reasoning for collector in collectors),
        "changed_content": sum(collector.changed_content for collector in collectors),
    }
    if result.router_loss is not None:
        values["router_loss"] = result.router_loss
    if not plan.teachers:
        return StepEvent.model_validate(values)
    positions = sum(collector.positions for collector in collectors)
    valid = sum(collector.valid for collector in collectors)
    targets: dict[str, Any] = {
        "divergence": result.divergence if valid else None,
        "coverage": valid / positions if positions else None,
        "mass": sum(collector.mass for collector in collectors) / valid if valid else None,
        "tail": sum(collector.tail for collector in collectors) / valid if valid else None,
        "fallbacks": sum(collector.fallbacks for collector in collectors),
        "teachers": {name: _teacher_step(name, collectors, slowest, result.auxiliary) for name in plan.teachers},
    }
    if any(collector.rollouts.samples for collector in collectors):
        targets["rollouts"] = _rollout_step(collectors, result.rollout)
    return StepEvent.model_validate(values | targets)


def _rollout_step(collectors: Sequence[Collector], loss: RolloutLoss | None) -> RolloutStep:
    total = RolloutTelemetry()
    for collector in collectors:
        total.add(collector.rollouts)
    num_tokens = max(total.tokens, 1)
    return RolloutStep(
        samples=total.samples,
        tokens=total.tokens,
        num_bytes=total.num_bytes,
        divergence=loss.divergence if loss else None,
        cross_entropy=loss.cross_entropy if loss else None,
        own_bpb=finite(bits_per_byte(-total.own_nats, total.num_bytes)),
        fused_bpb=finite(bits_per_byte(-total.fused_nats, total.fused_bytes)),
        entropy=total.entropy / num_tokens,
        length=total.tokens / max(total.samples, 1),
        finished=total.finished / max(total.samples, 1),
        repetition=total.repeated / num_tokens,
        cut=total.cut,
        noncanonical=total.noncanonical,
        age_steps=total.age_steps / num_tokens,
        max_age_steps=total.max_age_steps,
        sample_s=max(collector.sample_s for collector in collectors),
    )


def _teacher_step(
    name: str, collectors: Sequence[Collector], slowest: Collector, auxiliary: Mapping[str, float]
) -> TeacherStep:
    """Return the values of one teacher. Only a teacher whose signal is not fused has a loss."""
    of_ranks = [collector.teacher(name) for collector in collectors]
    total = TeacherTelemetry()
    for telemetry in of_ranks:
        total.add(telemetry)
    pool = {key: value for key, value in of_ranks[0].pool.items() if key != "tokens_per_s"}
    examples = sum(collector.examples for collector in collectors)
    optional: dict[str, Any] = {"loss": auxiliary[name]} if name in auxiliary else {}
    if total.rollout_bytes:
        optional["rollout_bpb"] = bits_per_byte(total.rollout_nats, total.rollout_bytes)
    if total.unaligned:
        optional["unaligned"] = dict(total.unaligned)
    return TeacherStep(
        weight=total.weight / examples if examples else None,
        missing=total.missing,
        unavailable=total.unavailable,
        masked=total.masked,
        mass=finite(total.report.mean_mass),
        own_bpb=finite(total.report.teacher_bpb),
        aligned_bpb=finite(total.report.aligned_bpb),
        wait_s=slowest.teacher(name).wait_s,
        tokens_per_s=sum(telemetry.pool.get("tokens_per_s", 0.0) for telemetry in of_ranks),
        pool=PoolStep.model_validate(pool),
        **optional,
    )
