"""What may change on --resume: every row of the table in docs/running.md, which is made from RESUME_RULES."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny_model, tokenizer_json
from tests.trainer.runs import run_config, write_corpus
from trainer.config import RunConfig
from trainer.config_reference import sections
from trainer.distributed import Ranks
from trainer.errors import UserError
from trainer.telemetry.jsonl import read_metrics
from trainer.training.identity import (
    ALLOWED,
    REJECTED,
    RESUME_RULES,
    WARNED,
    changed_results,
    changed_settings,
    resume_rule,
)
from trainer.training.loop import train
from trainer.training.run import begin

DOCS = Path(__file__).parents[2] / "docs" / "running.md"
TEACHER = {"name": "t0", "urls": ["http://127.0.0.1:9"]}
OTHER_ADDRESS = {"urls": ["http://127.0.0.1:8"], "timeout_s": 9.0, "concurrency": 2}


@dataclass(frozen=True)
class Change:
    """Settings of the resumed run, and the effect that a user sees.

    what      the row of the table, by its beginning
    sections  sections of the run file
    warned    keys that are reported with a warning
    error     part of the error; empty if the run continues
    """

    what: str
    sections: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    warned: tuple[str, ...] = ()
    error: str = ""


CHANGES = (
    Change("the samples of each step", {"train": {"seed": 1}}, error="train.seed = 0, this run has 1: restore"),
    Change("the samples of each step", {"train": {"batch_samples": 2}}, error="train.batch_samples = 4, this run"),
    Change("the samples of each step", {"source": {"weight": 2.0}}, error="data.sources.weight"),
    Change("the training samples", {"data": {"window_tokens": 50}}, error="samples = .*other texts or chats, or"),
    Change("the training samples", {"data": {"max_samples": 8}}, error="samples = "),
    Change("the training samples", {"eval": {"held_out_documents": 3}}, error="samples = "),
    Change("the training samples", {"corpus": {"documents": 9}}, error="samples = "),
    Change("the student's weights", {"other_student": {"seed": 7}}, error="student weights = "),
    Change("the student's weights", {"other_student": {"space": True}}, error="student tokenizer = "),
    Change("the trained parameters", {"student": {"train_layers": 1}}, error="student.train_layers = None, this run"),
    Change("the trained parameters", {"student": {"lora": {"rank": 2}}}, error="student.lora = None"),
    Change("the method of fusion", {"fusion": {"method": "adaptive"}}, error="fusion.method = 'mean', this run"),
    Change("the held-out samples", {"eval": {"max_samples": 2}}, error="eval.max_samples = 4, this run has 2"),
    Change(
        "fewer steps", {"train": {"steps": 1}}, error="after step 2, .* ends the run after step 1: raise train.steps"
    ),
    Change("the same student and the same samples", {"moved": {}, "data": {"max_invalid": 3}}),
    Change(
        "speed and memory",
        {"student": {"activation_checkpointing": True}, "loss": {"chunk_tokens": 9}, "train": {"prefetch_tokens": 9}},
    ),
    Change("the output", {"output": {"checkpoint_every_steps": 1}, "tracking": {"tensorboard": False}}),
    Change("every other key", {"optim": {"lr": 1e-3}, "train": {"epochs": 3}}, warned=("optim.lr", "train.epochs")),
    Change("every other key", {"train": {"steps": 2}}, warned=("train.steps",)),
    Change("every other key", {"data": {"invalid_chats": "skip"}}, warned=("data.invalid_chats",)),
    Change("every other key", {"source": {"name": "pages"}}, warned=("data.sources[0].name",)),
)
TEACHER_CHANGES = (
    Change("addresses and limits", {"teacher": OTHER_ADDRESS}),
    Change(
        "every other key", {"teacher": {"weight": 2.0, "top_k": 9}}, warned=("teachers.t0.top_k", "teachers.t0.weight")
    ),
    Change("every other key", {"teacher": {"name": "t1"}}, warned=("teachers",)),
)
TESTED_ELSEWHERE = {"the model of a teacher. ", "whether the run has a section `[rollout]`"}
"""By tests/trainer/test_identity.py and test_rollouts.py."""


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped after step 2 of 6, with its student and its text."""

    folder: Path
    student: Path
    corpus: Path

    def config(self, **sections: dict[str, Any]) -> RunConfig:
        return run_config(self.student, self.corpus, self.folder / "out", [], **sections)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_byte_level: Path) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    student = shutil.copytree(tiny_byte_level, folder / "student")
    run = Stopped(folder, student, write_corpus(folder))
    train(run.config(), stop_at=2)
    return run


def changed_run(stopped: Stopped, folder: Path, sections: Mapping[str, dict[str, Any]]) -> RunConfig:
    """Return the run file of a resumed run. Some names of sections stand for changes of files."""
    student, corpus, sections = stopped.student, stopped.corpus, dict(sections)
    if "moved" in sections:
        student, corpus = shutil.copytree(student, folder / "moved"), shutil.copyfile(corpus, folder / "moved.jsonl")
    if documents := sections.pop("corpus", {}):
        corpus = write_corpus(folder, documents["documents"])
    if other := sections.pop("other_student", {}):
        student = save_tiny_model(folder / "other", kind="byte_level", seed=other.get("seed", 1))
        if "space" in other:
            student = shutil.copytree(stopped.student, folder / "respelled")
            (student / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer_json("byte_level")), indent=1))
    sections.pop("moved", None)
    return run_config(student, corpus, stopped.folder / "out", [], **sections)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change.what}-{change.warned}{change.error}"[:60])
def test_a_change_is_rejected_warned_of_or_allowed(stopped: Stopped, tmp_path: Path, change: Change) -> None:
    rule = rule_of(change)
    config = changed_run(stopped, tmp_path, change.sections)
    assert (rule.effect == REJECTED, rule.effect == WARNED) == (bool(change.error), bool(change.warned))
    if change.error:
        with pytest.raises(UserError, match=change.error):
            begin(config, Ranks(), resume=True)
        return
    run = begin(config, Ranks(), resume=True)
    changed = changed_settings(run.evaluator.earlier.start, config)
    assert run.done == 2
    assert sorted(changed_results(changed)) == sorted(change.warned)
    assert change.sections.keys() <= {"moved", "tracking", *(key.split(".")[0] for key in changed), "source"}


@pytest.mark.parametrize("change", TEACHER_CHANGES, ids=lambda change: change.what)
def test_a_change_of_a_teacher_is_warned_of_or_allowed(stopped: Stopped, change: Change) -> None:
    before = stopped.config().model_dump() | {"teachers": [TEACHER]}
    after = before | {"teachers": [TEACHER | change.sections["teacher"]]}
    start = {"run": RunConfig.model_validate(before).model_dump(mode="json")}
    changed = changed_settings(start, RunConfig.model_validate(after))
    assert changed
    assert sorted(changed_results(changed)) == sorted(change.warned)
    assert rule_of(change).effect == (WARNED if change.warned else ALLOWED)


def test_every_row_is_tested() -> None:
    tested = {rule_of(change).what for change in (*CHANGES, *TEACHER_CHANGES)}
    untested = [rule.what for rule in RESUME_RULES if rule.what not in tested]
    assert [any(what.startswith(each) for each in TESTED_ELSEWHERE) for what in untested] == [True, True]


def test_the_documentation_contains_the_table() -> None:
    rows = [f"| {rule.what} | {keys_text(rule.keys)} | {rule.effect} |" for rule in RESUME_RULES]
    table = "\n".join(["| change | keys | on `--resume` |", "|---|---|---|", *rows])
    assert table in DOCS.read_text(encoding="utf-8"), table


def test_every_pattern_matches_a_key_of_the_run_file() -> None:
    keys = {
        f"{'data.sources[0]' if path == 'data.sources' else 'teachers.t' if path == 'teachers' else path}.{key}"
        for path, section in sections(RunConfig)
        for key in section.model_fields
    }
    for rule in RESUME_RULES:
        for pattern in rule.keys:
            assert any(resume_rule(key) == rule for key in keys if "*" in pattern or key == pattern), pattern


def test_a_warned_change_is_printed_as_a_warning_and_recorded(
    stopped: Stopped, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.cli.console import progress_listener

    out = shutil.copytree(stopped.folder / "out", tmp_path / "out")
    config = stopped.config(optim={"lr": 1e-3}, train={"prefetch_tokens": 9}, output={"dir": str(out)})
    train(config, resume=True, stop_at=3, listener=progress_listener("run"))
    lines = capsys.readouterr().err.splitlines()
    assert "warning: changed since the previous start: optim.lr 0.003 → 0.001" in lines
    assert "changed since the previous start: train.prefetch_tokens 65536 → 9" in lines
    start = [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == "start"][-1]
    assert start["changed_results"] == ["optim.lr"]


@pytest.mark.parametrize(
    "run", [{}, {"student": None}, {"data": {"sources": 5}}, {"data": {"sources": [5, {"weight": []}]}}, {"optim": {}}]
)
def test_a_damaged_start_event_changes_nothing(stopped: Stopped, run: dict[str, Any]) -> None:
    changed = changed_settings({"run": run}, stopped.config())
    assert set(changed) <= {"data.sources[1].weight"}


def rule_of(change: Change) -> Any:
    (rule,) = [rule for rule in RESUME_RULES if rule.what.startswith(change.what)]
    return rule


def keys_text(patterns: tuple[str, ...]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)
