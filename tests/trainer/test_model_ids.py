"""Tokenizers with more or fewer tokens than their model has ids."""

import json
import shutil
from pathlib import Path

import pytest

from alignment import Vocabulary
from alignment.tokenizers.kinds import TokenizerError
from teachers.protocol.errors import TeacherError
from tests.serve import FormulaEngine, serving
from tests.tiny import save_tiny_model
from tests.trainer.runs import losses, run_config, served_models, write_corpus
from trainer.cli.run_checks import examine
from trainer.telemetry.jsonl import read_metrics
from trainer.training.loop import train


def test_a_teacher_with_padded_embeddings_is_supported(tmp_path: Path, tiny_byte_level: Path) -> None:
    """The model scores more ids than its tokenizer has. The probability of those ids is part of the tail."""
    vocabulary = Vocabulary.load(tiny_byte_level)
    engine = FormulaEngine(tiny_byte_level, vocab_size=len(vocabulary) + 64)
    for model in (tiny_byte_level, save_tiny_model(tmp_path / "other", kind="sentencepiece", seed=3)):
        out = tmp_path / f"out-{model.name}"
        with serving(engine) as url:
            train(run_config(model, write_corpus(tmp_path), out, [url]))
        (step, *_) = [e for e in read_metrics(out / "metrics.jsonl") if e["event"] == "step"]
        assert 0 < step["mass"] < 1


def test_special_tokens_beyond_the_models_ids_change_nothing(tmp_path: Path, tiny_byte_level: Path) -> None:
    """This happens with the text models of Gemma 3. The student and a teacher with padded embeddings are tested."""
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
    new_id = len(spec["model"]["vocab"])
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": new_id, "content": content, "special": True})
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_a_bos_that_differs_from_the_tokenizers_is_an_error(tmp_path: Path, tiny_sentencepiece: Path) -> None:
    eos = Vocabulary.load(tiny_sentencepiece).roles["eos"]
    engine = FormulaEngine(tiny_sentencepiece, bos_id=eos)
    engine.tokenizer_files["tokenizer_config.json"] = (tiny_sentencepiece / "tokenizer_config.json").read_bytes()
    with serving(engine) as url:
        config = run_config(tiny_sentencepiece, write_corpus(tmp_path), tmp_path / "out", [url])
        with pytest.raises(TeacherError, match=f"teacher t0: the server puts token {eos} in front of every text, the"):
            train(config)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_tokenizer_that_produces_ids_beyond_its_model_is_an_error(
    tmp_path: Path, tiny_byte_level: Path, tiny_sentencepiece: Path, role: str
) -> None:
    small = shutil.copytree(tiny_byte_level, tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_sentencepiece / name, small / name)
    models = {"student": tiny_byte_level, "teacher": tiny_byte_level} | {role: small}
    num_ids = len(Vocabulary.load(tiny_byte_level))
    with served_models(models["teacher"]) as (url,):
        config = run_config(models["student"], write_corpus(tmp_path), tmp_path / "out", [url])
        with pytest.raises(
            TokenizerError, match=rf"has token {num_ids} \(.*\), but its model has only the ids up to {num_ids - 1}"
        ):
            train(config)
        failed = [finding.detail for finding in examine(config) if not finding.ok]
    assert len(failed) == 1
    assert "its model has only the ids up to" in failed[0]
    assert not (tmp_path / "out").exists()
