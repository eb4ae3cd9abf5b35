"""`tutelage eval`: evaluation of an exported model on the held-out text of a run and on a local lm-eval task."""

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
from trainer.training.loop import train

pytestmark = pytest.mark.slow

PROMPTS = ("The harbour office opened at", "A gull", "He had counted", "By noon the tide", "It held a", "They ate")
CHOICES = (("6", "7"), ("x", "q"), ("!", "?"))  # the correct choice first; one token each, so that lengths are equal
QUESTIONS = [(prompt, right, wrong) for prompt in PROMPTS for right, wrong in CHOICES]
TASK = """
task: harbour
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    """Write a folder with one lm-eval task over a local file."""
    folder.mkdir()
    lines = [
        json.dumps({"prompt": prompt, "choices": [wrong, right], "right": 1}) + "\n"
        for prompt, right, wrong in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "harbour.yaml").write_text(TASK.format(path=folder / "questions.jsonl"), encoding="utf-8")
    return folder


def run_eval(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command offline in a separate process: lm-eval warns when it is imported, and its caches are global."""
    need("lm_eval")
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trainer.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=480)


def accuracy(folder: Path, prefix: Sequence[int]) -> float:
    """Return the fraction of questions whose correct choice has the higher likelihood, in float32, after `prefix`."""
    vocabulary = Vocabulary.load(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)

    def logprob(prompt: str, choice: str) -> float:
        num_prompt = len(prefix) + len(vocabulary.encode(prompt))
        ids = torch.tensor([*prefix, *vocabulary.encode(prompt + choice).ids.tolist()])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids[None]).logits[0, :-1], 1)
        return float(logprobs_TV.gather(1, ids[1:, None])[num_prompt - 1 :].sum())

    return sum(logprob(prompt, right) > logprob(prompt, wrong) for prompt, right, wrong in QUESTIONS) / len(QUESTIONS)


def test_the_held_out_evaluation_of_a_run_is_reproduced(tmp_path: Path, tiny_byte_level: Path) -> None:
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
    without = call("eval", result.model, "--run", path, "--set", "eval.held_out_documents=0")
    assert_one_sentence(without, "there is no held-out text to measure on; set eval.held_out_documents")


def test_missing_arguments_models_and_packages_are_one_sentence(
    tmp_path: Path, tiny_byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_sentence(call("eval", tiny_byte_level), "give --run RUN.toml, or --tasks")
    path = run_file(tmp_path, run_config(tiny_byte_level, write_corpus(tmp_path), tmp_path / "out", []))
    assert_one_sentence(call("eval", tmp_path / "nowhere", "--run", path), "is neither a model directory nor a name")
    monkeypatch.setattr("trainer.evaluation.lm_eval.PACKAGES", ("a_missing_package",))
    message = "a_missing_package is not installed: install the extra `eval`"
    assert_one_sentence(call("eval", tiny_byte_level, "--tasks", "arc_easy"), message)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_an_lm_eval_task_uses_bos_if_the_model_expects_it(tmp_path: Path, kind: Kind) -> None:
    model = save_tiny_model(tmp_path / "model", kind=kind, seed=2)  # a seed for which BOS changes the accuracy
    tasks = write_task(tmp_path / "tasks")
    done = run_eval(tmp_path, model, "--tasks", "harbour", "--include-path", tasks, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["tasks"]["harbour"]
    vocabulary = Vocabulary.load(model)
    assert metrics["acc"] == pytest.approx(accuracy(model, vocabulary.prefix))
    other = [] if vocabulary.prefix else [vocabulary.roles["bos"]]
    assert metrics["acc"] != pytest.approx(accuracy(model, other))


def test_an_unknown_task_and_a_missing_chat_template_are_one_sentence(tmp_path: Path, tiny_byte_level: Path) -> None:
    done = run_eval(tmp_path, tiny_byte_level, "--tasks", "no-such-task")
    assert done.returncode == 1
    assert "error: --tasks: expected names of lm-eval tasks, received no-such-task" in done.stderr
    done = run_eval(
        tmp_path, tiny_byte_level, "--tasks", "harbour", "--include-path", write_task(tmp_path / "t"), "--chat"
    )
    assert done.returncode == 1
    assert "lm-eval cannot run them" in done.stderr
    assert "chat_template is not set" in done.stderr
