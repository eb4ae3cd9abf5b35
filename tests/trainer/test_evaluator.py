"""Evaluation by domain, early stopping, and the choice of the exported weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.serve import FormulaEngine, serving
from tests.tiny import TEXT
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import held_out, losses, run_config, write_corpus
from tests.trainer.test_fusion_run import write_columns
from trainer.config import RunConfig
from trainer.errors import DataError, NonFiniteLoss
from trainer.evaluation.bits_per_byte import Evaluation, evaluate, evaluate_folder, figures
from trainer.evaluation.evaluator import evaluations_since_best
from trainer.records import Sample
from trainer.report.history import read_history
from trainer.student.config import StudentConfig
from trainer.student.loading import load_student
from trainer.telemetry.jsonl import numbers, read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.loop import train

CONSTANT = {
    "optim": {"lr": 1e-9},
    "eval": {"every_steps": 1, "early_stopping_patience": 2, "early_stopping_min_delta": 0.01},
}  # the learning rate is so low that the held-out loss does not improve


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == kind]


def diverging_config(model: Path, folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """Build a run of four steps at a learning rate that improves the student in one step and then worsens it."""
    sections["eval"] = {"every_steps": 1} | sections.get("eval", {})
    sections["output"] = {"export": "best", "dir": str(folder / name)} | sections.get("output", {})
    sections = {"optim": {"lr": 1.0}, "train": {"epochs": 4}, "data": {"max_samples": 4}, **sections}
    return run_config(model, write_corpus(folder), folder / name, [], **sections)


def exported_bpb(config: RunConfig) -> float:
    """Evaluate the exported model on the held-out text, in bits per byte."""
    domains = evaluate_folder(Path(config.output.dir) / "model", config)
    return float(figures(domains)["held_out_bpb"])


# --- domains ---


def test_the_bits_per_byte_of_the_domains_average_to_the_total(tmp_path: Path, tiny_byte_level: Path) -> None:
    columns = {"domain_column": "domain"}
    config = run_config(
        tiny_byte_level,
        write_columns(tmp_path),
        tmp_path / "out",
        [],
        source=columns,
        eval={"held_out_documents": 5, "max_samples": None},
    )
    train(config)
    *_, last = events(tmp_path / "out", "eval")
    assert last["held_out_domains"].keys() == {"a", "b"}
    domains = evaluate_folder(tmp_path / "out" / "model", config)
    for name, domain in domains.items():
        assert domain.bpb == pytest.approx(last["held_out_domains"][name], abs=1e-6)
    num_bytes = sum(domain.num_bytes for domain in domains.values())
    mean = sum(domain.bpb * domain.num_bytes for domain in domains.values()) / num_bytes
    assert mean == pytest.approx(last["held_out_bpb"], abs=1e-6)


def test_samples_evaluated_together_have_the_same_loss_as_alone(tmp_path: Path, tiny_byte_level: Path) -> None:
    student = load_student(StudentConfig(model=str(tiny_byte_level), precision="fp32"))
    tokenizer = SampleTokenizer(student.vocabulary, student.vocabulary.prefix)
    samples = [tokenizer.tokenize(Sample(i, str(i), TEXT[: 7 + 13 * i])) for i in range(11)]
    together = evaluate(student, samples, 64)
    for tokenized, evaluation in zip(samples, together, strict=True):
        (alone,) = evaluate(student, [tokenized], 64)
        assert (evaluation.num_tokens, evaluation.num_bytes) == (alone.num_tokens, alone.num_bytes)
        assert evaluation.nats == pytest.approx(alone.nats, rel=1e-5)


def test_a_single_domain_is_not_listed_separately(tmp_path: Path, tiny_byte_level: Path) -> None:
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert all("held_out_domains" not in event for event in events(tmp_path / "out", "eval"))


def test_the_bits_per_byte_of_a_domain_without_bytes_are_none() -> None:
    values = figures({"some": Evaluation(10.0, 5, 20), "none": Evaluation(1.0, 1, 0)})
    assert values["held_out_domains"]["none"] is None
    assert values["held_out_domains"]["some"] == pytest.approx(10 / math.log(2) / 20)


def test_held_out_text_without_a_predicted_token_is_an_error() -> None:
    with pytest.raises(DataError, match="no held-out sample has a token that the student predicts"):
        figures({"all": Evaluation(0.0, 0, 0)})


# --- early stopping ---


@pytest.mark.parametrize(
    ("bpb", "min_delta", "since_best"),
    [
        ([], 0, 0),
        ([1.0], 0, 0),
        ([1.0, 0.9, 0.8], 0, 0),
        ([1.0, 0.9, 0.9, 0.95], 0, 2),
        ([1.0, 0.95, 0.9, 0.85], 0.1, 0),  # several small improvements exceed min_delta together
        ([1.0, 0.95, 0.91, 0.92], 0.1, 3),
        ([1.0, math.nan, 1.1], 0, 2),
    ],
)
def test_evaluations_since_the_best_are_counted(bpb: list[float], min_delta: float, since_best: int) -> None:
    assert evaluations_since_best(bpb, min_delta) == since_best


def test_a_run_that_does_not_improve_stops_early_and_is_not_continued_by_resume(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    out = tmp_path / "out"
    config = run_config(tiny_byte_level, write_corpus(tmp_path), out, [], **CONSTANT)
    result = train(config)
    assert (result.steps, result.model) == (2, out / "model")
    (end,) = events(out, "end")
    assert end["reason"] == "held-out text has not improved in 2 evaluations (eval.early_stopping_patience)"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    history = read_history(out)
    assert history.finished
    assert history.reason == end["reason"]
    again = train(config, resume=True)
    assert (again.steps, again.model) == (2, out / "model")
    assert losses(out).keys() == {1, 2}
    more = config.model_copy(update={"eval": config.eval.model_copy(update={"early_stopping_patience": None})})
    assert train(more, resume=True).steps == 6
    assert events(out, "end")[-1]["reason"] is None


def test_evaluations_before_a_resume_count_for_early_stopping(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections = CONSTANT | {"eval": CONSTANT["eval"] | {"early_stopping_patience": 4}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections)
    train(config, stop_at=3)
    assert events(tmp_path / "out", "end")[-1]["reason"] is None
    assert train(config, resume=True).steps == 4


def test_evaluations_after_the_last_checkpoint_of_a_killed_run_do_not_count(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    sections = CONSTANT | {"eval": CONSTANT["eval"] | {"early_stopping_patience": 4}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections)
    train(config, stop_at=1)
    with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (2, 3, 4, 5):
            file.write(f'{{"event": "eval", "time": 1, "step": {step}, "held_out_bpb": 9.0}}\n')
    assert train(config, resume=True).steps == 4


def test_a_run_that_meets_the_condition_at_its_last_step_has_not_stopped_early(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    sections = CONSTANT | {"eval": CONSTANT["eval"] | {"early_stopping_patience": 6}}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections))
    assert events(tmp_path / "out", "end")[-1]["reason"] is None


# --- the best weights ---


def test_the_best_weights_are_exported(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = diverging_config(tiny_byte_level, tmp_path, "out")
    result = train(config)
    measured = held_out(tmp_path / "out")
    best = min(measured, key=lambda step: measured[step])
    assert 0 < best < result.steps
    assert exported_bpb(config) == pytest.approx(measured[best], abs=1e-6)
    assert measured[best] < measured[result.steps] - 0.01
    assert read_history(tmp_path / "out").exported == (best, measured[best])
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []


def test_export_last_exports_the_last_weights(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = diverging_config(tiny_byte_level, tmp_path, "out", output={"export": "last"})
    result = train(config)
    assert exported_bpb(config) == pytest.approx(held_out(tmp_path / "out")[result.steps], abs=1e-6)


def test_the_best_weights_before_a_resume_are_exported(tmp_path: Path, tiny_byte_level: Path) -> None:
    straight, halves = (diverging_config(tiny_byte_level, tmp_path, name) for name in ("straight", "halves"))
    train(straight)
    train(halves, stop_at=3)
    train(halves, resume=True)
    best, resumed = (events(tmp_path / name, "export")[-1] for name in ("straight", "halves"))
    assert best["step"] == resumed["step"] == 1
    assert exported_bpb(halves) == pytest.approx(exported_bpb(straight), abs=1e-6)


class Killed(BaseException):
    pass


def test_an_export_of_a_run_without_a_checkpoint_is_not_kept_by_resume(tmp_path: Path, tiny_byte_level: Path) -> None:
    """The exported student may be another one with a lower loss."""

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            raise Killed

    better = train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "better", [], train={"epochs": 20}))
    with pytest.raises(Killed):
        train(diverging_config(Path(str(better.model)), tmp_path, "run", optim={"lr": 1e-3}), listener=kill)
    config = diverging_config(tiny_byte_level, tmp_path, "run", optim={"lr": 1e-3})
    train(config, resume=True)
    assert exported_bpb(config) == pytest.approx(min(held_out(tmp_path / "run").values()), abs=1e-4)


def test_a_nan_loss_on_held_out_text_ends_the_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = diverging_config(tiny_byte_level, tmp_path, "run", optim={"lr": 1e12})
    with pytest.raises(
        NonFiniteLoss, match=r"the loss on held-out text of corpus.jsonl is nan nats: .* lower optim\.lr"
    ):
        train(config)


def test_the_base_model_is_exported_if_training_only_worsens_it(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = diverging_config(tiny_byte_level, tmp_path, "out", optim={"lr": 3.0}, eval={"early_stopping_patience": 3})
    result = train(config)
    assert result.steps == 3
    assert exported_bpb(config) == pytest.approx(held_out(tmp_path / "out")[0], abs=1e-6)


@pytest.mark.slow
def test_two_ranks_evaluate_export_and_stop_like_one(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    sections = {
        "eval": {
            "every_steps": 1,
            "early_stopping_patience": 2,
            "early_stopping_min_delta": 1.0,
            "agreement_samples": 2,
        }
    }
    with serving(FormulaEngine(tiny_sentencepiece)) as url:
        for name, run in (("one", train), ("two", lambda config: train_on_ranks(config, 2))):
            output = {"dir": str(tmp_path / name), "export": "best"}
            run(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / name, [url], output=output, **sections))
    one, two = (events(tmp_path / name, "eval") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert numbers(a) == pytest.approx(numbers(b), abs=1e-5)
    ends = [events(tmp_path / name, "end")[0] for name in ("one", "two")]
    assert ends[0]["reason"] == ends[1]["reason"] is not None
    steps = [events(tmp_path / name, "export")[-1]["step"] for name in ("one", "two")]
    assert steps == [2, 2]
    assert (tmp_path / "two" / "model" / "README.md").is_file()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"eval": {"held_out_documents": 0, "agreement_samples": 2}},
            "eval.agreement_samples: there is no held-out text to measure on",
        ),
        (
            {"eval": {"held_out_documents": 0, "early_stopping_patience": 2}},
            "eval.early_stopping_patience: there is no held-out text to measure on",
        ),
        (
            {"eval": {"early_stopping_patience": 2}},
            "eval.early_stopping_patience counts evaluations during the run; set eval.every_steps",
        ),
        (
            {"eval": {"held_out_documents": 0}, "output": {"dir": "o", "export": "best"}},
            'output.export = "best": there is no held-out text to measure on',
        ),
    ],
)
def test_settings_that_require_held_out_text_are_rejected_without_it(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_config(Path("m"), Path("c"), Path("o"), [], **sections)
