"""Whole runs over chats: every model reads them by its own template, only answers are learned from."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment import Vocabulary
from tests.tiny import TEXT
from tests.trainer.runs import held_out, losses, run_config, served_models
from tests.trainer.test_ranks import torchrun
from trainer.config import RunConfig
from trainer.data.samples import load_corpus
from trainer.data.template import ChatError
from trainer.errors import ConfigError, DataError
from trainer.learning.student import load_student, reader_of
from trainer.loop import train
from trainer.reports.metrics import read_metrics
from trainer.targets.asking import Asked, Teacher, connected, together
from trainer.targets.fuser import Fuser

BYTE_LEVEL = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
SENTENCEPIECE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<eos>{% endfor %}"


def write_chats(folder: Path, count: int = 10, extra: tuple[list[dict[str, Any]], ...] = ()) -> Path:
    """Two questions and two answers each, cut out of the page."""
    lines = [line for line in TEXT.splitlines() if line]
    path = folder / "chats.jsonl"
    chats = [
        [
            {"role": role, "content": lines[(n + i) % len(lines)]}
            for i, role in enumerate(("user", "assistant", "user", "assistant"))
        ]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in [*chats, *extra]), encoding="utf-8")
    return path


def chat_config(folder: Path, student: Path, teachers: dict[str, str], chats: Path, **data: Any) -> RunConfig:
    """teachers: url → template."""
    for name, template in {"byte_level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}.items():
        (folder / f"{name}.jinja").write_text(template, encoding="utf-8")
    data = {"window_tokens": 400, "max_samples": None} | data
    source = {"messages_column": "messages"}
    config = run_config(student, chats, folder / "out", list(teachers), data=data, source=source)
    raw = config.model_dump()
    raw["student"]["chat_template"] = str(folder / "byte_level.jinja")
    for teacher, template in zip(raw["teachers"], teachers.values(), strict=True):
        teacher["chat_template"] = str(folder / f"{template}.jinja")
    return RunConfig.model_validate(raw)


def ask(config: RunConfig) -> list[Asked | None]:
    """Every sample of a run, read, asked and aligned."""
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)

    async def all_of_them() -> list[Asked | None]:
        async with connected(config, reader_of(student.folder, student.vocabulary, config)) as teachers:
            return await together(teachers.ask(sample) for sample in corpus.train)

    return asyncio.run(all_of_them())


def test_a_student_learns_chats_from_teachers_with_other_templates(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        teachers = dict(zip(urls, ("byte_level", "sentencepiece"), strict=True))
        config = chat_config(tmp_path, tiny_byte_level, teachers, write_chats(tmp_path))
        train(config)
    steps = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(e["coverage"] > 0.9 for e in steps)
    assert list(held_out(tmp_path / "out"))[-1] == steps[-1]["step"]
    whole = [len(a.reading) for a in _asked_alone(tmp_path, tiny_byte_level)]
    assert steps[0]["tokens"] < 4 * min(whole)  # questions and headers are not learned


def _asked_alone(folder: Path, model: Path) -> list[Asked]:
    with served_models(model) as urls:
        config = chat_config(folder, model, {urls[0]: "byte_level"}, folder / "chats.jsonl")
        return [asked for asked in ask(config) if asked is not None]


def test_the_student_as_its_own_teacher_has_zero_divergence_on_chats(tmp_path: Path, tiny_byte_level: Path) -> None:
    write_chats(tmp_path)
    with served_models(tiny_byte_level) as urls:
        config = chat_config(tmp_path, tiny_byte_level, {urls[0]: "byte_level"}, tmp_path / "chats.jsonl")
        raw = config.model_dump()
        raw["teachers"][0]["top_k"] = 128
        raw["fusion"]["top_k"] = 512
        train(RunConfig.model_validate(raw), stop_at=1)
    (step,) = [e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if e["event"] == "step"]
    assert abs(step["divergence"]) < 1e-3
    assert step["coverage"] == 1


def test_only_answers_and_their_ends_have_targets(tmp_path: Path, tiny_byte_level: Path) -> None:
    write_chats(tmp_path)
    vocabulary = Vocabulary.load(tiny_byte_level)
    for asked in _asked_alone(tmp_path, tiny_byte_level):
        target, reading = asked.answers[0].target, asked.reading
        np.testing.assert_array_equal(target.valid, reading.supervised_T)
        taught = b"".join(vocabulary.token_bytes[i] or b"|" for i in reading.tokens.ids[reading.supervised_T])
        answers = [m["content"] for m in asked.sample.messages if m["role"] == "assistant"]
        assert taught.decode() == "|".join(answers) + "|"
        assert reading.num_bytes_T.sum() == len("".join(answers).encode())


BROKEN = [{"role": "user", "content": "a<|eos|>b"}, {"role": "assistant", "content": "no"}]


def test_a_teacher_is_asked_from_the_first_answer_on(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        teachers = dict(zip(urls, ("byte_level", "sentencepiece"), strict=True))
        config = chat_config(tmp_path, tiny_byte_level, teachers, write_chats(tmp_path))
        some = ask(config)
        monkeypatch.setattr(Teacher, "first_wanted", lambda *_: 1)
        whole = ask(config)
    for fewer, more in zip(some, whole, strict=True):
        assert fewer is not None
        assert more is not None
        for one, other in zip(fewer.answers, more.answers, strict=True):
            assert one.rows is not None
            assert other.rows is not None
            supervised = int(one.reading.supervised_T.argmax())
            assert len(one.rows) == len(one.reading) - supervised < len(other.rows)
            np.testing.assert_array_equal(one.target.ids, other.target.ids)
            np.testing.assert_allclose(one.target.probs, other.target.probs, atol=1e-3)  # another batch
            np.testing.assert_allclose(one.target.tail, other.target.tail, atol=1e-3)
            assert one.report.positions == other.report.positions
            assert one.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-3)


def test_a_chat_that_cannot_be_read_is_refused_by_name_or_skipped_and_counted(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    chats = write_chats(tmp_path, 7, (BROKEN,))
    with served_models(tiny_byte_level) as urls:
        teachers = {urls[0]: "byte_level"}
        config = chat_config(tmp_path, tiny_byte_level, teachers, chats)
        raw = config.model_dump()
        raw["eval"]["held_out_documents"] = 0
        with pytest.raises(ChatError, match=r"chats.jsonl:8.*<\|eos\|>"):
            train(RunConfig.model_validate(raw))
        raw["data"]["broken_chats"] = "skip"
        raw["output"]["dir"] = str(tmp_path / "skipping")
        train(RunConfig.model_validate(raw))
    steps = [e for e in read_metrics(tmp_path / "skipping" / "metrics.jsonl") if e["event"] == "step"]
    assert sum(e["skipped"] for e in steps) == 2  # once in each epoch


def skipping(folder: Path, model: Path, url: str, batch_samples: int) -> dict[str, Any]:
    """A run file over eight chats, one of them broken, in one epoch."""
    chats = write_chats(folder, 7, (BROKEN,))
    raw = chat_config(folder, model, {url: "byte_level"}, chats, broken_chats="skip").model_dump()
    raw["eval"]["held_out_documents"] = 0
    raw["train"] |= {"batch_samples": batch_samples, "epochs": 1}
    return raw


def test_a_rank_whose_chats_are_all_skipped_goes_along(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        raw = skipping(tmp_path, tiny_byte_level, urls[0], batch_samples=2)
        for ranks in (1, 2):
            raw["output"]["dir"] = str(tmp_path / str(ranks))
            config = RunConfig.model_validate(raw)
            train(config) if ranks == 1 else torchrun(config, ranks)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)
    one, two = (
        [e for e in read_metrics(tmp_path / name / "metrics.jsonl") if e["event"] == "step"] for name in ("1", "2")
    )
    for a, b in zip(one, two, strict=True):
        assert (a["skipped"], a["tokens"]) == (b["skipped"], b["tokens"])
        for name in ("coverage", "mass", "tail"):
            assert a[name] == pytest.approx(b[name])
        for name in ("share", "mass", "own_bpb", "aligned_bpb"):
            assert a["teachers"]["t0"][name] == pytest.approx(b["teachers"]["t0"][name])
    assert sum(e["skipped"] for e in two) == 1


def test_a_batch_of_skipped_chats_alone_ends_the_run(tmp_path: Path, tiny_byte_level: Path) -> None:
    with served_models(tiny_byte_level) as urls:
        raw = skipping(tmp_path, tiny_byte_level, urls[0], batch_samples=1)
        with pytest.raises(DataError, match="nothing to learn from in the samples .none: all were skipped"):
            train(RunConfig.model_validate(raw))


def test_a_long_chat_is_shortened_to_its_first_answers(tmp_path: Path, tiny_byte_level: Path) -> None:
    chats = write_chats(tmp_path)
    with served_models(tiny_byte_level) as urls:
        teachers = {urls[0]: "byte_level"}
        longest = max(len(a.reading) for a in ask(chat_config(tmp_path, tiny_byte_level, teachers, chats)) if a)
        short = {"window_tokens": longest - 1, "too_long": "shorten"}
        asked = [a for a in ask(chat_config(tmp_path, tiny_byte_level, teachers, chats, **short)) if a]
    cut = [a for a in asked if a.shortened]
    assert cut
    assert all(len(a.sample.messages) == 2 for a in cut)
    assert all(len(a.reading) < longest for a in asked)


def test_a_template_that_is_not_there_is_named(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = chat_config(tmp_path, tiny_byte_level, {}, write_chats(tmp_path))
    raw = config.model_dump()
    raw["student"]["chat_template"] = str(tmp_path / "none.jinja")
    with pytest.raises(ConfigError, match=r"chat_template: cannot read .*none.jinja"):
        train(RunConfig.model_validate(raw))


def test_plain_training_on_chats_needs_no_teacher(tmp_path: Path, tiny_byte_level: Path) -> None:
    train(chat_config(tmp_path, tiny_byte_level, {}, write_chats(tmp_path)))
    seen = losses(tmp_path / "out")
    assert seen[max(seen)] < seen[1]


def test_chats_fuse_over_what_every_teacher_speaks_of(tmp_path: Path, tiny_byte_level: Path) -> None:
    asked = _asked_after(tmp_path, tiny_byte_level)
    config = run_config(tiny_byte_level, tmp_path / "chats.jsonl", tmp_path / "out", ["http://127.0.0.1:1"])
    lessons = Fuser(config, len(Vocabulary.load(tiny_byte_level))).fuse(asked)
    for lesson, one in zip(lessons, asked, strict=True):
        assert lesson.target is not None
        np.testing.assert_array_equal(lesson.target.valid, one.reading.supervised_T)


def _asked_after(folder: Path, model: Path) -> list[Asked]:
    write_chats(folder)
    return _asked_alone(folder, model)
