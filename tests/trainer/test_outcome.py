"""Held-out text by domain, runs that end themselves, and which weights are exported."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.serve import FormulaEngine, serving
from tests.tiny import TEXT
from tests.trainer.runs import held_out, losses, run_config, write_corpus
from tests.trainer.test_fusing_run import write_columns
from tests.trainer.test_ranks import torchrun
from trainer.config import RunConfig, StudentConfig
from trainer.data.reading import Reader
from trainer.data.samples import Sample
from trainer.errors import NonFiniteLoss
from trainer.learning.student import load_student
from trainer.loop import train
from trainer.reports.history import read_history
from trainer.reports.metrics import numbers, read_metrics
from trainer.results.evaluate import Evaluation, evaluate, evaluate_folder, figures
from trainer.results.outcome import since_better

STANDING = {"optim": {"lr": 1e-9}, "eval": {"every_steps": 1, "stop_after": 2, "stop_margin": 0.01}}  # nothing moves


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == kind]


def worsening(model: Path, folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """Four steps at a learning rate that helps once and then harms."""
    sections["eval"] = {"every_steps": 1} | sections.get("eval", {})
    sections["output"] = {"export": "best", "dir": str(folder / name)} | sections.get("output", {})
    much: dict[str, Any] = {"optim": {"lr": 1.0}, "train": {"epochs": 4}, "data": {"max_samples": 4}, **sections}
    return run_config(model, write_corpus(folder), folder / name, [], **much)


def exported_bpb(config: RunConfig) -> float:
    found = evaluate_folder(Path(config.output.dir) / "model", config)
    return float(figures(found)["held_out_bpb"])


# --- domains ---


def test_domains_are_measured_apart_and_add_up(tmp_path: Path, tiny_byte_level: Path) -> None:
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
    found = evaluate_folder(tmp_path / "out" / "model", config)
    for name, one in found.items():
        assert one.bpb == pytest.approx(last["held_out_domains"][name], abs=1e-6)
    num_bytes = sum(one.num_bytes for one in found.values())
    mean = sum(one.bpb * one.num_bytes for one in found.values()) / num_bytes
    assert mean == pytest.approx(last["held_out_bpb"], abs=1e-6)


def test_samples_measured_together_cost_what_each_costs_alone(tmp_path: Path, tiny_byte_level: Path) -> None:
    student = load_student(StudentConfig(model=str(tiny_byte_level), precision="fp32"))
    reader = Reader(student.vocabulary, student.vocabulary.prefix)
    readings = [reader.read(Sample(i, str(i), TEXT[: 7 + 13 * i])) for i in range(11)]
    together = evaluate(student, readings, 64)
    for reading, one in zip(readings, together, strict=True):
        (alone,) = evaluate(student, [reading], 64)
        assert (one.num_tokens, one.num_bytes) == (alone.num_tokens, alone.num_bytes)
        assert one.nats == pytest.approx(alone.nats, rel=1e-5)


def test_one_domain_alone_is_not_said_twice(tmp_path: Path, tiny_byte_level: Path) -> None:
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert all("held_out_domains" not in event for event in events(tmp_path / "out", "eval"))


def test_a_domain_without_a_byte_has_no_figure() -> None:
    found = figures({"some": Evaluation(10.0, 5, 20), "none": Evaluation(1.0, 1, 0)})
    assert found["held_out_domains"]["none"] is None
    assert found["held_out_domains"]["some"] == pytest.approx(10 / math.log(2) / 20)


# --- the end of a run ---


@pytest.mark.parametrize(
    ("bpb", "margin", "ago"),
    [
        ([], 0, 0),
        ([1.0], 0, 0),
        ([1.0, 0.9, 0.8], 0, 0),
        ([1.0, 0.9, 0.9, 0.95], 0, 2),
        ([1.0, 0.95, 0.9, 0.85], 0.1, 0),  # better in small steps is better than the best of before all the same
        ([1.0, 0.95, 0.91, 0.92], 0.1, 3),
        ([1.0, math.nan, 1.1], 0, 2),
    ],
)
def test_measurements_since_the_best_are_counted(bpb: list[float], margin: float, ago: int) -> None:
    assert since_better(bpb, margin) == ago


def test_a_run_that_does_not_improve_ends_itself_and_stays_ended(tmp_path: Path, tiny_byte_level: Path) -> None:
    out = tmp_path / "out"
    config = run_config(tiny_byte_level, write_corpus(tmp_path), out, [], **STANDING)
    result = train(config)
    assert (result.steps, result.model) == (2, out / "model")
    (end,) = events(out, "end")
    assert end["reason"] == "held-out text has not improved in 2 measurements (eval.stop_after)"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    history = read_history(out)
    assert history.finished
    assert history.reason == end["reason"]
    again = train(config, resume=True)
    assert (again.steps, again.model) == (2, out / "model")
    assert losses(out).keys() == {1, 2}
    more = config.model_copy(update={"eval": config.eval.model_copy(update={"stop_after": None})})
    assert train(more, resume=True).steps == 6
    assert events(out, "end")[-1]["reason"] is None


def test_measurements_from_before_a_resume_count(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections = STANDING | {"eval": STANDING["eval"] | {"stop_after": 4}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections)
    train(config, stop_at=3)
    assert events(tmp_path / "out", "end")[-1]["reason"] is None
    assert train(config, resume=True).steps == 4


def test_what_a_killed_run_measured_after_its_checkpoint_does_not_count(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections = STANDING | {"eval": STANDING["eval"] | {"stop_after": 4}}
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections)
    train(config, stop_at=1)
    with (tmp_path / "out" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (2, 3, 4, 5):
            file.write(f'{{"event": "eval", "time": 1, "step": {step}, "held_out_bpb": 9.0}}\n')
    assert train(config, resume=True).steps == 4


def test_a_run_whose_last_measurement_is_its_last_step_did_not_end_early(tmp_path: Path, tiny_byte_level: Path) -> None:
    sections = STANDING | {"eval": STANDING["eval"] | {"stop_after": 6}}
    train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [], **sections))
    assert events(tmp_path / "out", "end")[-1]["reason"] is None


# --- the best weights ---


def test_the_best_weights_are_exported(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = worsening(tiny_byte_level, tmp_path, "out")
    result = train(config)
    measured = held_out(tmp_path / "out")
    best = min(measured, key=lambda step: measured[step])
    assert 0 < best < result.steps
    assert exported_bpb(config) == pytest.approx(measured[best], abs=1e-6)
    assert measured[best] < measured[result.steps] - 0.01
    assert read_history(tmp_path / "out").exported == (best, measured[best])
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []


def test_the_last_weights_are_exported_unless_the_best_are_asked_for(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = worsening(tiny_byte_level, tmp_path, "out", output={"export": "last"})
    result = train(config)
    assert exported_bpb(config) == pytest.approx(held_out(tmp_path / "out")[result.steps], abs=1e-6)


def test_the_best_of_before_a_resume_stays_the_best(tmp_path: Path, tiny_byte_level: Path) -> None:
    straight, halves = (worsening(tiny_byte_level, tmp_path, name) for name in ("straight", "halves"))
    train(straight)
    train(halves, stop_at=3)
    train(halves, resume=True)
    best, again = (events(tmp_path / name, "export")[-1] for name in ("straight", "halves"))
    assert best["step"] == again["step"] == 1
    assert exported_bpb(halves) == pytest.approx(exported_bpb(straight), abs=1e-6)


class Killed(BaseException):
    pass


def test_what_a_run_that_kept_no_step_has_exported_is_not_taken_over(tmp_path: Path, tiny_byte_level: Path) -> None:
    """It may have been of another student, and better."""

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            raise Killed

    better = train(run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "better", [], train={"epochs": 20}))
    with pytest.raises(Killed):
        train(worsening(Path(str(better.model)), tmp_path, "run", optim={"lr": 1e-3}), listener=kill)
    config = worsening(tiny_byte_level, tmp_path, "run", optim={"lr": 1e-3})
    train(config, resume=True)
    assert exported_bpb(config) == pytest.approx(min(held_out(tmp_path / "run").values()), abs=1e-4)


def test_held_out_text_that_costs_no_number_ends_the_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = worsening(tiny_byte_level, tmp_path, "run", optim={"lr": 3e38})
    with pytest.raises(NonFiniteLoss, match=r"held-out text of corpus.jsonl costs nan nats: .* lower optim\.lr"):
        train(config)


def test_the_base_model_is_the_best_where_training_only_harms(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = worsening(tiny_byte_level, tmp_path, "out", optim={"lr": 3.0}, eval={"stop_after": 3})
    result = train(config)
    assert result.steps == 3
    assert exported_bpb(config) == pytest.approx(held_out(tmp_path / "out")[0], abs=1e-6)


def test_two_ranks_measure_export_and_end_as_one_does(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    sections = {"eval": {"every_steps": 1, "stop_after": 2, "stop_margin": 1.0, "agreement_samples": 2}}
    with serving(FormulaEngine(tiny_sentencepiece)) as url:
        for name, run in (("one", train), ("two", lambda config: torchrun(config, 2))):
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
    ("sections", "says"),
    [
        ({"eval": {"held_out_documents": 0, "agreement_samples": 2}}, "eval.agreement_samples: nothing is held out"),
        ({"eval": {"held_out_documents": 0, "stop_after": 2}}, "eval.stop_after: nothing is held out"),
        ({"eval": {"stop_after": 2}}, "eval.stop_after counts measurements on the way; set eval.every_steps"),
        (
            {"eval": {"held_out_documents": 0}, "output": {"dir": "o", "export": "best"}},
            'output.export = "best": nothing is held out',
        ),
    ],
)
def test_what_needs_held_out_text_says_so(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        run_config(Path("m"), Path("c"), Path("o"), [], **sections)
