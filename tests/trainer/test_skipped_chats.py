"""Steps whose chats are all skipped: nothing is updated, the run continues, and it ends only without a usable chat."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.runs import losses, run_config
from trainer.cli.console import progress_listener
from trainer.cli.run_checks import examine
from trainer.config import RunConfig
from trainer.errors import DataError
from trainer.sources.sample_order import SampleOrder
from trainer.telemetry.collector import Collector
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train
from trainer.training.optimizer import learning_rate
from trainer.training.skipped_chats import SkippedChats

TEMPLATE = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
USABLE = "The office opens at six."
UNUSABLE = "This text contains a special token: <|eos|>."


def chats_config(folder: Path, student: Path, texts: list[str], **sections: dict[str, Any]) -> RunConfig:
    """Build a run over chats with one answer, which is one of the texts; unusable chats are skipped."""
    (folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(texts)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = {
        "student": {"chat_template": str(folder / "chat.jinja")},
        "data": {"invalid_chats": "skip", "max_samples": None} | sections.pop("data", {}),
        "train": {"epochs": 2, "batch_samples": 1} | sections.pop("train", {}),
        "eval": {"held_out_documents": 0},
    } | sections
    return run_config(student, path, folder / "out", [], source={"messages_column": "messages"}, **sections)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(folder / "out" / "metrics.jsonl") if event["event"] == "step"]


def test_a_step_without_usable_chat_updates_nothing_and_the_run_continues(
    tmp_path: Path, tiny_byte_level: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chats_config(tmp_path, tiny_byte_level, [USABLE] * 3 + [UNUSABLE])
    assert train(config, listener=progress_listener("run")).steps == 8
    steps = steps_of(tmp_path)
    unused = [step for step in steps if step["skipped"]]
    assert len(unused) == 2  # once in each epoch
    assert all(step["tokens"] == 0 and step["loss"] is step["grad_norm"] is None for step in unused)
    assert all(step["tokens"] and step["loss"] for step in steps if not step["skipped"])
    assert [step["lr"] for step in steps] == [learning_rate(i, 8, config.optim) for i in range(8)]
    assert "a chat is skipped: sample chats.jsonl:4" in caplog.text
    assert "2 chats skipped (2 steps without an update)" in capsys.readouterr().err


def test_a_run_with_skipped_steps_resumes_exactly(tmp_path: Path, tiny_byte_level: Path) -> None:
    models: list[bytes] = []
    by_step: list[dict[int, float]] = []
    stops_by_name: dict[str, list[int | None]] = {"whole": [None], "stopped": [3, 5, None]}
    for name, stops in stops_by_name.items():
        folder = tmp_path / name
        folder.mkdir()
        config = chats_config(folder, tiny_byte_level, [USABLE] * 2 + [UNUSABLE] * 2)
        for stop_at in stops:
            train(config, resume=True, stop_at=stop_at)
        models.append((folder / "out" / "model" / "model.safetensors").read_bytes())
        by_step.append(losses(folder / "out"))
    assert models[0] == models[1]
    assert by_step[0] == by_step[1]
    assert list(by_step[0].values()).count(None) == 4  # type: ignore[arg-type]  # a step without tokens has no loss


def test_a_run_ends_if_no_chat_of_an_epoch_is_usable(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = chats_config(tmp_path, tiny_byte_level, [UNUSABLE] * 3, train={"epochs": 5})
    with pytest.raises(DataError, match=r"no chat of a whole epoch could be used; .*chats.jsonl:\d.*<\|eos\|>"):
        train(config)
    assert [step["step"] for step in steps_of(tmp_path)] == [1, 2, 3]


def test_a_run_shorter_than_an_epoch_ends_with_an_error_if_it_never_updates(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    config = chats_config(tmp_path, tiny_byte_level, [UNUSABLE] * 3, train={"steps": 2})
    train(config, stop_at=1)
    with pytest.raises(DataError, match="no chat of the run could be used; the last one was skipped: sample chats"):
        train(config, resume=True)
    assert not (tmp_path / "out" / "model").exists()


def test_the_setting_that_the_error_recommends_is_accepted_on_resume(tmp_path: Path, tiny_byte_level: Path) -> None:
    """Chats that are too long are skipped. The recommended data.too_long, or a longer window, is accepted."""
    texts = [USABLE * 20] * 3
    with pytest.raises(DataError, match='could be used; .* takes 60 tokens, .* set data.too_long = "shorten"'):
        train(chats_config(tmp_path, tiny_byte_level, texts))
    accepted = chats_config(tmp_path, tiny_byte_level, texts, data={"window_tokens": 400})
    assert train(accepted, resume=True).steps == 6


@pytest.mark.parametrize("num_usable", [0, 3])
def test_doctor_counts_skipped_chats_and_rejects_data_without_a_usable_one(
    tmp_path: Path, tiny_byte_level: Path, num_usable: int
) -> None:
    config = chats_config(tmp_path, tiny_byte_level, [UNUSABLE] * 2 + [USABLE] * num_usable)
    (finding,) = [each for each in examine(config) if "are chats that are skipped" in each.detail]
    assert finding.ok == (num_usable > 0)
    expected = f"2 of {2 + num_usable} samples are chats that are skipped (the first one: sample chats.jsonl:1, "
    assert finding.detail.startswith(expected)


@pytest.mark.parametrize(
    ("used", "num_steps", "ends_at"),
    [
        ([], 9, 2),  # an epoch has 4 samples, a step 2
        ([1], 9, 4),  # the first epoch had an update, the second had none
        ([2], 9, 4),
        ([1, 3], 9, 6),
        ([2, 4], 4, None),
    ],
)
def test_the_run_ends_with_the_first_epoch_without_an_update(
    tmp_path: Path, used: list[int], num_steps: int, ends_at: int | None
) -> None:
    config = run_config(tmp_path, tmp_path / "c.jsonl", tmp_path / "out", [], train={"batch_samples": 2, "epochs": 5})
    skipped_chats = SkippedChats(config, SampleOrder((4,), (4,), 0), done=0)
    collectors = [Collector(), Collector(skipped=2, skip_reason="sample s: reason")]
    for step in range(1, num_steps + 1):
        if step == ends_at:
            with pytest.raises(DataError, match="the last one was skipped: sample s: reason"):
                skipped_chats.check_step(step, 0, collectors)
            return
        skipped_chats.check_step(step, 9 if step in used else 0, collectors)
    assert ends_at is None
