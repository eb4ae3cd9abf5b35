"""Runs on prompts and completions as text: masked prompts, supervised completions, and EOS if it is configured."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignment import Vocabulary
from tests.trainer.corpora import load
from tests.trainer.runs import run_config, served_models
from tests.trainer.test_stream import stream_of
from trainer.cli.run_checks import examine
from trainer.config import RunConfig
from trainer.sources.config import DataConfig
from trainer.sources.corpus import unclosed_texts
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train
from trainer.training.start_checks import check_data

PAIRS = [
    ("How many sacks?", " Fifty-one sacks, and one of them is wet."),
    ("Where is the tar? It is é", " In the shed."),
    ("How heavy?", " 14.5"),
    ("", " The tide had turned."),
]
WARNING = "no EOS follows the completions, so that the student does not learn to stop"


def config_of(model: Path, folder: Path, url: str, close: bool) -> RunConfig:
    """Build a run of one epoch in two steps over PAIRS."""
    lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"max_samples": None, "window_tokens": 100, "close_documents": close}
    sections: dict[str, Any] = {
        "data": data,
        "train": {"epochs": 1, "batch_samples": 2},
        "eval": {"held_out_documents": 0},
    }
    return run_config(model, folder / "pairs.jsonl", folder / "out", [url], **sections)


@pytest.mark.parametrize("close", [False, True])
def test_completions_are_supervised_prompts_are_masked_and_eos_follows_if_configured(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, close: bool
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    eos = vocabulary.roles["eos"]
    with served_models(tiny_sentencepiece) as (url,):
        config = config_of(tiny_byte_level, tmp_path, url, close)
        corpus, _ = check_data(config, vocabulary)
        with stream_of(config, vocabulary, [corpus.train[:]]) as stream:
            ((batch, _),) = list(stream)
    for example, (prompt, completion) in zip(batch.examples, PAIRS, strict=True):
        tokens, supervised = example.tokenized.tokens, example.tokenized.supervised_T
        ids = tokens.ids[supervised].tolist()
        expected = vocabulary.encode(completion).ids.tolist()
        assert tokens.text.decode() == prompt + completion
        assert ids == [*expected, *([eos] if close else [])]
        first = 1 - len(vocabulary.prefix)
        gold, target = example.labels(first)
        assert gold.tolist() == ids[first if not prompt else 0 :]  # nothing predicts the first token of a sequence
        assert target is not None
        assert target.valid[-1]  # also of EOS, although it is another token of the teacher


@pytest.mark.parametrize("close", [False, True])
def test_a_run_counts_the_supervised_tokens_and_warns_if_the_student_does_not_learn_to_stop(
    tmp_path: Path, tiny_byte_level: Path, close: bool
) -> None:
    vocabulary = Vocabulary.load(tiny_byte_level)
    with served_models(tiny_byte_level) as (url,):
        config = config_of(tiny_byte_level, tmp_path, url, close)
        findings = examine(config)
        train(config)
    assert all(finding.ok for finding in findings)
    start, *events = read_metrics(tmp_path / "out" / "metrics.jsonl")
    counts = [len(vocabulary.encode(completion)) + close for _, completion in PAIRS]
    unpredicted = 1 - len(vocabulary.prefix)  # the first token of the text without a prompt
    assert sum(event["tokens"] for event in events if event["event"] == "step") == sum(counts) - unpredicted
    warnings = [finding.detail for finding in findings if WARNING in finding.detail]
    assert start["remarks"] == warnings
    assert [finding.is_warning for finding in findings if finding.detail in warnings] == [True] * len(warnings)
    ends = ", with EOS after each document" if close else ""
    assert start["supervision"] == f"the completions of texts with a masked prompt{ends}"
    assert f"supervised are {start['supervision']}" in [finding.detail for finding in findings]
    assert [warning.startswith("warning: pairs.jsonl: ") for warning in warnings] == [True] * (not close)
    assert all("data.close_documents = true" in warning for warning in warnings)


def test_texts_without_a_prompt_and_chats_give_no_warning_about_eos(tmp_path: Path) -> None:
    for n, record in enumerate(({"text": "a b c d"}, {"question": "a b", "answer": "c d"})):
        path = tmp_path / f"{n}.jsonl"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        source = {"files": [str(path)]}
        assert unclosed_texts(load(source).sources, DataConfig.model_validate({"sources": [source]})) == []
