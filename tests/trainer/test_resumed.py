"""A run that goes on with other settings says so; with another teacher under a name that is taken it does not."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny_model
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.commands.console import watching
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.reports.metrics import read_metrics


def test_another_teacher_under_the_same_name_is_refused(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, out = write_corpus(tmp_path), tmp_path / "out"
    stranger = save_tiny_model(tmp_path / "stranger", kind="byte_level", seed=7)
    with served_models(tiny_byte_level) as urls:
        train(run_config(tiny_byte_level, corpus, out, urls), stop_at=2)
    with served_models(stranger) as urls:
        other = run_config(tiny_byte_level, corpus, out, urls)
        before = (out / "metrics.jsonl").read_text(encoding="utf-8")
        with pytest.raises(ConfigError, match=r"teacher t0 was byte_level .* and stranger with \w+ answers now: serve"):
            train(other, resume=True)
        assert (out / "metrics.jsonl").read_text(encoding="utf-8") == before
        [teacher] = other.teachers
        renamed = other.model_copy(update={"teachers": [teacher.model_copy(update={"name": "new"})]})
        assert train(renamed, resume=True).steps == 6
    starts = [event for event in read_metrics(out / "metrics.jsonl") if event["event"] == "start"]
    assert [start["changed"] for start in starts] == [{}, {"teachers": [["t0"], ["new"]]}]


def test_a_run_that_kept_no_step_may_have_any_teacher(tmp_path: Path, tiny_byte_level: Path) -> None:
    corpus, out = write_corpus(tmp_path), tmp_path / "out"
    stranger = save_tiny_model(tmp_path / "stranger", kind="byte_level", seed=7)
    for model in (tiny_byte_level, stranger):
        with served_models(model) as urls:
            train(run_config(tiny_byte_level, corpus, out, urls), resume=True, stop_at=1)
        (checkpoint,) = (out / "checkpoints").iterdir()
        checkpoint.rename(tmp_path / f"kept-{model.name}")
    assert len(losses(out)) == 1


def test_changed_settings_are_said_and_stand_in_the_card(
    tmp_path: Path, tiny_byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path)
    with corpus.open("a", encoding="utf-8") as file:
        file.write("no\n")

    def go_on(stop_at: int | None, **sections: dict[str, Any]) -> None:
        config = run_config(tiny_byte_level, corpus, tmp_path / "out", [], data={"max_broken": 1}, **sections)
        train(config, resume=True, stop_at=stop_at, listener=watching("run"))

    go_on(2)
    said = capsys.readouterr().err
    assert "1 broken, left out" in said
    assert "line 11: expected a JSON object, received 'no'" in said
    assert "saved after step 2: --resume goes on from there" in said
    go_on(4, optim={"lr": 1e-3}, train={"prefetch_tokens": 99})
    assert "changed since it was started before: optim.lr 0.003 → 0.001" in capsys.readouterr().err
    go_on(None, optim={"lr": 1e-3})
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"changed after step .*", card) == ["changed after step 2 | optim.lr 0.003 → 0.001 |"]
    starts = [event for event in read_metrics(tmp_path / "out" / "metrics.jsonl") if event["event"] == "start"]
    assert [sorted(start["changed"]) for start in starts] == [
        [],
        ["optim.lr", "train.prefetch_tokens"],
        ["train.prefetch_tokens"],
    ]
