"""Whole runs over chats: each model renders them with its own template; only assistant messages are supervised."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment import Vocabulary
from tests.tiny import TEXT
from tests.trainer.ranks import train_on_ranks
from tests.trainer.runs import held_out, losses, run_config, served_models
from trainer.config import RunConfig
from trainer.errors import ConfigError, DataError
from trainer.fusion.run_fuser import Fuser
from trainer.query.connect import connect_teachers, gather
from trainer.query.score import SampleScorer
from trainer.records import ScoredSample
from trainer.sources.corpus import load_corpus
from trainer.student.loading import load_student, student_tokenizer
from trainer.telemetry.collector import Collector
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train

pytestmark = pytest.mark.slow

BYTE_LEVEL = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}"
SENTENCEPIECE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<eos>{% endfor %}"


def write_chats(folder: Path, count: int = 10, extra: tuple[list[dict[str, Any]], ...] = ()) -> Path:
    """Write chats of two user and two assistant messages, which are lines of the page."""
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
    """Build a run over chats. `teachers` maps the URL of each teacher to the name of its template."""
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


def score(config: RunConfig) -> list[tuple[ScoredSample | None, Collector]]:
    """Score every sample of a run."""
    student = load_student(config.student)
    corpus = load_corpus(config.data, config.eval, student.vocabulary, config.train.seed)
    tokenizer = student_tokenizer(student.folder, student.vocabulary, config.student, config.data, corpus.has_chats)

    async def score_all() -> list[tuple[ScoredSample | None, Collector]]:
        collectors = [Collector() for _ in corpus.train]
        async with connect_teachers(config.teachers, tokenizer, config.data) as connection:
            scorer = SampleScorer(connection, tokenizer, config.data)
            pairs = zip(corpus.train, collectors, strict=True)
            scored = await gather(scorer.score(sample, collector) for sample, collector in pairs)
        return list(zip(scored, collectors, strict=True))

    return asyncio.run(score_all())


def test_a_student_learns_chats_from_teachers_with_different_templates(
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
    lengths = [len(scored.tokenized) for scored in _score_with_itself(tmp_path, tiny_byte_level)]
    assert steps[0]["tokens"] < 4 * min(lengths)  # user messages and headers are not supervised


def _score_with_itself(folder: Path, model: Path) -> list[ScoredSample]:
    """Score chats.jsonl with the student as its own teacher."""
    with served_models(model) as urls:
        config = chat_config(folder, model, {urls[0]: "byte_level"}, folder / "chats.jsonl")
        return [scored for scored, _ in score(config) if scored is not None]


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


def test_only_assistant_messages_and_their_end_tokens_have_targets(tmp_path: Path, tiny_byte_level: Path) -> None:
    write_chats(tmp_path)
    vocabulary = Vocabulary.load(tiny_byte_level)
    for scored in _score_with_itself(tmp_path, tiny_byte_level):
        target, tokenized = scored.scores[0].target, scored.tokenized
        np.testing.assert_array_equal(target.valid, tokenized.supervised_T)
        supervised = b"".join(vocabulary.token_bytes[i] or b"|" for i in tokenized.tokens.ids[tokenized.supervised_T])
        contents = [m["content"] for m in scored.sample.messages if m["role"] == "assistant"]
        assert supervised.decode() == "|".join(contents) + "|"
        assert tokenized.num_bytes_T.sum() == len("".join(contents).encode())


INVALID_CHAT = [{"role": "user", "content": "a<|eos|>b"}, {"role": "assistant", "content": "no"}]


def test_a_teacher_is_scored_from_the_first_supervised_token(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served_models(tiny_byte_level, tiny_sentencepiece) as urls:
        teachers = dict(zip(urls, ("byte_level", "sentencepiece"), strict=True))
        config = chat_config(tmp_path, tiny_byte_level, teachers, write_chats(tmp_path))
        from_first_supervised = score(config)
        monkeypatch.setattr("trainer.query.score._first_position", lambda *_: 1)
        from_beginning = score(config)
    for (part, part_collector), (whole, whole_collector) in zip(from_first_supervised, from_beginning, strict=True):
        assert part is not None
        assert whole is not None
        for name, scores, all_scores in zip(("t0", "t1"), part.scores, whole.scores, strict=True):
            first_supervised = int(scores.tokenized.supervised_T.argmax())
            assert len(scores.actual_R) == len(scores.tokenized) - first_supervised < len(all_scores.actual_R)
            np.testing.assert_array_equal(scores.target.ids, all_scores.target.ids)
            # batches differ in their padding, so probabilities differ slightly
            np.testing.assert_allclose(scores.target.probs, all_scores.target.probs, atol=1e-3)
            np.testing.assert_allclose(scores.target.tail, all_scores.target.tail, atol=1e-3)
            assert part_collector.teacher(name).report.positions == whole_collector.teacher(name).report.positions
            assert scores.nats_per_token == pytest.approx(all_scores.nats_per_token, abs=1e-3)


def test_a_chat_that_cannot_be_rendered_is_an_error_with_its_name_or_is_skipped_and_counted(
    tmp_path: Path, tiny_byte_level: Path
) -> None:
    chats = write_chats(tmp_path, 7, (INVALID_CHAT,))
    with served_models(tiny_byte_level) as urls:
        teachers = {urls[0]: "byte_level"}
        config = chat_config(tmp_path, tiny_byte_level, teachers, chats)
        raw = config.model_dump()
        raw["eval"]["held_out_documents"] = 0
        with pytest.raises(DataError, match=r"1 of 8 chats contain special tokens.*chats.jsonl:8.*<\|eos\|>"):
            train(RunConfig.model_validate(raw))
        raw["data"]["invalid_chats"] = "skip"
        raw["output"]["dir"] = str(tmp_path / "skipping")
        train(RunConfig.model_validate(raw))
    steps = [e for e in read_metrics(tmp_path / "skipping" / "metrics.jsonl") if e["event"] == "step"]
    assert sum(e["skipped"] for e in steps) == 2  # once in each epoch


def skipping_config(folder: Path, model: Path, url: str, num_invalid: int) -> dict[str, Any]:
    """Return a run file over eight chats, some of them invalid, in one epoch of four steps."""
    chats = write_chats(folder, 8 - num_invalid, (INVALID_CHAT,) * num_invalid)
    raw = chat_config(folder, model, {url: "byte_level"}, chats, invalid_chats="skip").model_dump()
    raw["eval"]["held_out_documents"] = 0
    raw["train"] |= {"batch_samples": 2, "epochs": 1}
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("num_invalid", [1, 5])
def test_ranks_agree_on_steps_in_which_some_or_all_chats_are_skipped(
    tmp_path: Path, tiny_byte_level: Path, num_invalid: int
) -> None:
    with served_models(tiny_byte_level) as urls:
        raw = skipping_config(tmp_path, tiny_byte_level, urls[0], num_invalid)
        for ranks in (1, 2):
            raw["output"]["dir"] = str(tmp_path / str(ranks))
            config = RunConfig.model_validate(raw)
            train(config) if ranks == 1 else train_on_ranks(config, ranks)
    by_step = losses(tmp_path / "1")
    assert (None in by_step.values()) == (num_invalid == 5)
    assert by_step == pytest.approx(losses(tmp_path / "2"), abs=1e-5)
    one, two = (
        [e for e in read_metrics(tmp_path / name / "metrics.jsonl") if e["event"] == "step"] for name in ("1", "2")
    )
    for a, b in zip(one, two, strict=True):
        assert (a["skipped"], a["tokens"]) == (b["skipped"], b["tokens"])
        for name in ("coverage", "mass", "tail"):
            assert a[name] == pytest.approx(b[name])
        for name in ("weight", "mass", "own_bpb", "aligned_bpb"):
            assert a["teachers"]["t0"][name] == pytest.approx(b["teachers"]["t0"][name])
    assert sum(e["skipped"] for e in two) == num_invalid


def test_a_long_chat_is_shortened_to_its_first_messages(tmp_path: Path, tiny_byte_level: Path) -> None:
    chats = write_chats(tmp_path)
    with served_models(tiny_byte_level) as urls:
        teachers = {urls[0]: "byte_level"}
        complete = score(chat_config(tmp_path, tiny_byte_level, teachers, chats))
        longest = max(len(scored.tokenized) for scored, _ in complete if scored)
        short = {"window_tokens": longest - 1, "too_long": "shorten"}
        scored = score(chat_config(tmp_path, tiny_byte_level, teachers, chats, **short))
    results = [(scored_sample, collector) for scored_sample, collector in scored if scored_sample is not None]
    shortened = [scored_sample for scored_sample, collector in results if collector.shortened]
    assert shortened
    assert all(len(scored_sample.sample.messages) == 2 for scored_sample in shortened)
    assert all(len(scored_sample.tokenized) < longest for scored_sample, _ in results)


def test_the_error_for_a_missing_template_names_the_file(tmp_path: Path, tiny_byte_level: Path) -> None:
    config = chat_config(tmp_path, tiny_byte_level, {}, write_chats(tmp_path))
    raw = config.model_dump()
    raw["student"]["chat_template"] = str(tmp_path / "none.jinja")
    with pytest.raises(ConfigError, match=r"chat_template: cannot read .*none.jinja"):
        train(RunConfig.model_validate(raw))


def test_chats_can_be_trained_on_without_teachers(tmp_path: Path, tiny_byte_level: Path) -> None:
    train(chat_config(tmp_path, tiny_byte_level, {}, write_chats(tmp_path)))
    by_step = losses(tmp_path / "out")
    assert by_step[max(by_step)] < by_step[1]


def test_the_fused_target_of_a_chat_is_valid_at_the_supervised_positions(tmp_path: Path, tiny_byte_level: Path) -> None:
    write_chats(tmp_path)
    scored = _score_with_itself(tmp_path, tiny_byte_level)
    config = run_config(tiny_byte_level, tmp_path / "chats.jsonl", tmp_path / "out", ["http://127.0.0.1:1"])
    examples = Fuser(config, len(Vocabulary.load(tiny_byte_level))).fuse(scored)
    for example, sample in zip(examples, scored, strict=True):
        assert example.target is not None
        np.testing.assert_array_equal(example.target.valid, sample.tokenized.supervised_T)
