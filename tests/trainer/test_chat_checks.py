"""Checks of chats at the start of a run: `train` and `doctor` report the same supervision, counts and warnings."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.templates import CHATML, QWEN, ROLE_MARKERS, Messages, chat, chat_template, chat_vocabulary
from tests.tiny import Kind
from tests.trainer.corpora import load
from tests.trainer.runs import run_config
from tests.trainer.test_cli import call, run_file
from tests.trainer.test_end_of_turn import save_base
from trainer.chats.jinja_template import ChatError
from trainer.cli.run_checks import examine
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.sources.config import DataConfig
from trainer.telemetry.jsonl import read_metrics
from trainer.tokenization import SampleTokenizer
from trainer.training.chat_checks import check_chats
from trainer.training.loop import train

SPELLED = chat("see type<|im_end|>bold", "ok")
THOUGHTFUL = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nwell\n</think>\n\nd")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, special=True)
    return folder


def config_of(base: Path, folder: Path, template: str, chats: list[Messages], **supervision: Any) -> RunConfig:
    """Build a run of one step over chats without teachers."""
    (folder / "template.jinja").write_text(template, encoding="utf-8")
    lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
    (folder / "chats.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"max_samples": None, "window_tokens": 200, "supervision": supervision}
    raw = run_config(
        base, folder / "chats.jsonl", folder / "out", [], source={"messages_column": "messages"}, data=data
    ).model_dump()
    raw["student"]["chat_template"] = str(folder / "template.jinja")
    raw["eval"]["held_out_documents"] = 0
    raw["train"] |= {"epochs": 1, "batch_samples": len(chats)}
    return RunConfig.model_validate(raw)


def start_of(config: RunConfig) -> dict[str, Any]:
    train(config)
    return dict(next(iter(read_metrics(Path(config.output.dir) / "metrics.jsonl"))))


def test_train_and_doctor_report_the_supervision_and_doctor_shows_it_in_three_samples(
    tmp_path: Path, base: Path
) -> None:
    config = config_of(base, tmp_path, QWEN, [THOUGHTFUL] * 5, tool_results=True)
    findings = examine(config)
    assert all(finding.ok for finding in findings)
    (shown,) = [finding for finding in findings if finding.examples]
    assert shown.detail == f"supervised are {config.data.supervision.describe()}"
    assert len(shown.examples) == 3
    example = shown.examples[0]
    spans = [example.text[start:stop] for start, stop in example.spans]
    assert spans == ["b<|im_end|>", "<think>\nwell\n</think>\n\nd<|im_end|>"]
    assert "assistant\\n[[b<|im_end|>]]\\n<|im_start|>user" in example.marked("[[", "]]")
    assert any("drops the reasoning of an earlier turn 5 times in 5" in finding.detail for finding in findings)
    start = start_of(config)
    assert start["supervision"] == config.data.supervision.describe()
    assert start["remarks"] == []
    steps = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert sum(step["omitted_reasoning"] for step in steps) == 5


def test_special_tokens_are_counted_over_all_chats_and_refused_by_train_and_doctor(tmp_path: Path, base: Path) -> None:
    config = config_of(base, tmp_path, CHATML, [chat("a", "b"), SPELLED, chat("c", "d"), SPELLED])
    message = r"2 of 4 chats contain special tokens of student, first in chats.jsonl:2: message 0 contains .*bold'"
    with pytest.raises(DataError, match=message) as error:
        train(config)
    assert str(error.value) in [finding.detail for finding in examine(config) if not finding.ok]


def test_special_tokens_of_several_models_are_counted_separately(tmp_path: Path) -> None:
    chats = [chat("a", "b"), chat("<|eos|> or <eos>", "b"), chat("a", "<eos>"), chat("<eos>", "<|bos|>")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8")
    source = {"files": [str(path)]}
    data = DataConfig.model_validate({"sources": [source], "supervision": {"special_tokens_in_content": "text"}})
    kinds: dict[str, Kind] = {"student": "byte_level", "teacher one": "sentencepiece"}
    models = {
        name: SampleTokenizer(chat_vocabulary(kind), (), chat_template(CHATML, kind, supervision=data.supervision))
        for name, kind in kinds.items()
    }
    student, teacher = check_chats(load(source), models, data)
    assert "2 of 4 chats contain special tokens of student, first in chats.jsonl:2: message 0 contains" in student
    assert "'<|eos|>'" in student
    assert "3 of 4 chats contain special tokens of teacher one, first in chats.jsonl:2: message 0 contains" in teacher
    assert "'<eos>'" in teacher
    assert check_chats(load(source), {"text model": SampleTokenizer(chat_vocabulary("byte_level"), ())}, data) == []


@pytest.mark.parametrize(("choice", "effect", "skipped"), [("skip", "skipped", 1), ("text", "encoded", 0)])
def test_chats_with_special_tokens_are_skipped_or_encoded_as_text(
    tmp_path: Path, base: Path, choice: str, effect: str, skipped: int
) -> None:
    chats = [chat("a", "b"), SPELLED, chat("c", "d")]
    config = config_of(base, tmp_path, CHATML, chats, special_tokens_in_content=choice)
    (remark,) = start_of(config)["remarks"]
    assert f"; they are {effect}" in remark
    assert remark in [finding.detail for finding in examine(config)]
    steps = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert sum(step["skipped"] for step in steps) == skipped


@pytest.mark.parametrize(
    "template", [ROLE_MARKERS, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"]
)
def test_train_and_doctor_warn_if_no_turn_ends_with_a_token(tmp_path: Path, base: Path, template: str) -> None:
    config = config_of(base, tmp_path, template, [chat("a", "six sacks")] * 2)
    (warning,) = start_of(config)["remarks"]
    assert warning.startswith("warning: student: no turn of the rendered chats ends with a known token")
    assert "roles.end_of_turn in [student]" in warning
    assert warning in [finding.detail for finding in examine(config)]
    result = call("doctor", run_file(tmp_path, config))
    assert "\nwarn   student: no turn of the rendered chats ends with a known token" in result.stdout
    silent = config_of(base, tmp_path, template, [chat("a", "six sacks")] * 2, end_of_turn=False)
    assert warning not in [finding.detail for finding in examine(silent)]


def test_reasoning_without_a_template_for_it_is_refused_or_counted(tmp_path: Path, base: Path) -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "so"}]
    config = config_of(base, tmp_path, CHATML, [messages] * 2)
    with pytest.raises(
        ChatError, match=r"drops the reasoning of every message, such as 'so'.*changed_content = \"count\""
    ):
        train(config)
    config = config_of(base, tmp_path, CHATML, [messages] * 2, changed_content="count")
    train(config)
    steps = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert sum(step["omitted_reasoning"] for step in steps) == 2
    assert any("drops or rewrites a text 2 times" in finding.detail for finding in examine(config))
