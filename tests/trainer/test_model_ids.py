"""Tokenizers with more tokens than their model has ids, or fewer."""

import json
import shutil
from pathlib import Path

import pytest

from alignment import Vocabulary
from alignment.spelling import TokenizerError
from teachers.errors import TeacherError
from tests.serve import FormulaEngine, serving
from tests.tiny import save_tiny_model
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.commands.doctor import examine
from trainer.loop import train
from trainer.reports.metrics import read_metrics


def test_a_teacher_with_padded_embeddings_teaches(tmp_path: Path, tiny_byte_level: Path) -> None:
    """Its model scores more ids than its tokenizer has; what it lists of those is tail."""
    vocabulary = Vocabulary.load(tiny_byte_level)
    engine = FormulaEngine(tiny_byte_level, vocab_size=len(vocabulary) + 64)
    for model in (tiny_byte_level, save_tiny_model(tmp_path / "other", kind="sentencepiece", seed=3)):
        out = tmp_path / f"out-{model.name}"
        with serving(engine) as url:
            train(run_config(model, write_corpus(tmp_path), out, [url]))
        (step, *_) = [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"]
        assert 0 < step["mass"] < 1


def test_special_tokens_that_a_model_has_no_ids_for_change_nothing(tmp_path: Path, tiny_byte_level: Path) -> None:
    """As in Gemma 3's text models, for the student and for a teacher with padded embeddings and its own tokenizer."""
    for name in ("plain", "with-image-token"):
        model = shutil.copytree(tiny_byte_level, tmp_path / f"model-{name}")
        if name != "plain":
            add_special_token(model / "tokenizer.json", "<image_soft_token>")
            assert len(Vocabulary.load(model)) == len(Vocabulary.load(tiny_byte_level)) + 1
        engine = FormulaEngine(model, vocab_size=len(Vocabulary.load(tiny_byte_level)) + 64)
        with serving(engine) as url, served_models(model) as urls:
            train(run_config(model, write_corpus(tmp_path), tmp_path / name, [url, *urls]))
    assert losses(tmp_path / "plain") == losses(tmp_path / "with-image-token")


def add_special_token(path: Path, content: str) -> None:
    spec = json.loads(path.read_text(encoding="utf-8"))
    known = len(spec["model"]["vocab"])
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": known, "content": content, "special": True})
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_another_bos_than_the_tokenizers_is_refused(tmp_path: Path, tiny_sentencepiece: Path) -> None:
    eos = Vocabulary.load(tiny_sentencepiece).roles["eos"]
    engine = FormulaEngine(tiny_sentencepiece, bos_id=eos)
    engine.tokenizer_files["tokenizer_config.json"] = tiny_sentencepiece / "tokenizer_config.json"
    with serving(engine) as url:
        config = run_config(tiny_sentencepiece, write_corpus(tmp_path), tmp_path / "out", [url])
        with pytest.raises(
            TeacherError, match=f"teacher t0: token {eos} is put in front of every text, its tokenizer's"
        ):
            train(config)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_tokenizer_that_writes_ids_beyond_its_model_is_refused(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, who: str
) -> None:
    small = shutil.copytree(tiny_byte_level, tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_sentencepiece / name, small / name)
    models = {"student": tiny_byte_level, "teacher": tiny_byte_level} | {who: small}
    num_ids = len(Vocabulary.load(tiny_byte_level))
    with served_models(models["teacher"]) as (url,):
        config = run_config(models["student"], write_corpus(tmp_path), tmp_path / "out", [url])
        with pytest.raises(
            TokenizerError, match=rf"has token {num_ids} \(.*\), its model only ids up to {num_ids - 1}"
        ):
            train(config)
        wrong = [finding.detail for finding in examine(config) if not finding.ok]
    assert len(wrong) == 1
    assert "its model only ids up to" in wrong[0]
    assert not (tmp_path / "out").exists()
