"""`tutelage eval`: an exported model on the held-out text of a run, and on a task of lm-eval that is defined here."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment import Vocabulary
from tests.needs import need
from tests.tiny import Kind, save_tiny_model
from tests.trainer.runs import held_out, run_config, write_corpus
from tests.trainer.test_cli import assert_one_sentence, call, run_file
from trainer.loop import train

BEGINS = ("The harbour office opened at", "A gull", "He had counted", "By noon the tide", "It held a", "They ate")
ENDS = (("6", "7"), ("x", "q"), ("!", "?"))  # the right one first; a token each, lest the number of tokens decides
QUESTIONS = [(begin, right, wrong) for begin in BEGINS for right, wrong in ENDS]
TASK = """
task: harbour
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: ends
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    """A folder with one task over a local file."""
    folder.mkdir()
    lines = [json.dumps({"begin": b, "ends": [wrong, right], "right": 1}) + "\n" for b, right, wrong in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "harbour.yaml").write_text(TASK.format(path=folder / "questions.jsonl"), encoding="utf-8")
    return folder


def evaluated(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, without a hub: lm-eval's imports warn, and its caches are global."""
    need("lm_eval")
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trainer.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=480)


def accuracy(folder: Path, prefix: Sequence[int]) -> float:
    """How many right ends the model finds likelier than the wrong ones, in float32, with `prefix` in front."""
    vocabulary = Vocabulary.load(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)

    def logprob(begin: str, end: str) -> float:
        num_given = len(prefix) + len(vocabulary.encode(begin))
        ids = torch.tensor([*prefix, *vocabulary.encode(begin + end).ids.tolist()])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids[None]).logits[0, :-1], 1)
        return float(logprobs_TV.gather(1, ids[1:, None])[num_given - 1 :].sum())

    return sum(logprob(begin, right) > logprob(begin, wrong) for begin, right, wrong in QUESTIONS) / len(QUESTIONS)


def test_the_held_out_text_of_a_run_is_measured_again(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", [])
    result = train(config)
    path = run_file(tmp_path, config)
    printed = json.loads(call("eval", result.model, "--run", path, "--json").stdout)
    assert printed["held_out_bpb"] == pytest.approx(held_out(tmp_path / "out")[6], abs=1e-6)
    assert printed["tasks"] == {}
    base = json.loads(call("eval", tiny_byte_level, "--run", path, "--json").stdout)
    assert base["held_out_bpb"] == pytest.approx(held_out(tmp_path / "out")[0], abs=1e-6)
    shown = call("eval", result.model, "--run", path)
    assert f"{printed['held_out_bpb']:.4f}" in shown.stderr
    fewer = call("eval", result.model, "--run", path, "--set", "eval.held_out_documents=0")
    assert_one_sentence(fewer, "nothing is held out: set eval.held_out_documents")


def test_it_says_what_is_missing(tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_sentence(call("eval", tiny_byte_level), "give --run RUN.toml, or --tasks")
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert_one_sentence(call("eval", tmp_path / "nowhere", "--run", path), "is neither a model directory nor a name")
    monkeypatch.setattr("trainer.results.tasks.PACKAGES", ("lm_eval_of_another_world",))
    said = "lm_eval_of_another_world is not installed: install Tutelage's extra eval"
    assert_one_sentence(call("eval", tiny_byte_level, "--tasks", "arc_easy"), said)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_task_of_lm_eval_is_run_with_bos_where_the_model_wants_it(tmp_path: Path, kind: Kind) -> None:
    model = save_tiny_model(tmp_path / "model", kind=kind, seed=2)  # to whom BOS makes a difference
    tasks = write_task(tmp_path / "tasks")
    done = evaluated(tmp_path, model, "--tasks", "harbour", "--include-path", tasks, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]["harbour"]
    vocabulary = Vocabulary.load(model)
    assert found["acc"] == pytest.approx(accuracy(model, vocabulary.prefix))
    other = [] if vocabulary.prefix else [vocabulary.roles["bos"]]
    assert found["acc"] != pytest.approx(accuracy(model, other))


def test_tasks_that_cannot_be_run_are_one_sentence(tmp_path: Path, tiny_byte_level: Path) -> None:
    done = evaluated(tmp_path, tiny_byte_level, "--tasks", "no-such-task")
    assert done.returncode == 1
    assert "error: --tasks: lm-eval knows no task no-such-task" in done.stderr
    done = evaluated(
        tmp_path, tiny_byte_level, "--tasks", "harbour", "--include-path", write_task(tmp_path / "t"), "--chat"
    )
    assert done.returncode == 1
    assert "lm-eval cannot run them" in done.stderr
    assert "chat_template is not set" in done.stderr
