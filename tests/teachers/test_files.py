"""What a model directory says of itself."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from alignment import Vocabulary
from teachers.asking.stock_card import TokenizerFolder
from teachers.engines.files import bos_of, fingerprint, sha256, tokenizer_files
from teachers.engines.transformers import TransformersEngine
from teachers.errors import TeacherError
from teachers.models import name_of


def hub_cache(root: Path, content: bytes, blob: str) -> Path:
    """A snapshot as a hub's cache keeps it: files are links to blobs that are named for their content."""
    folder = root / "models--owner--some-model" / "snapshots" / "4f2a"
    blobs = root / "models--owner--some-model" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / blob).write_bytes(content)
    (folder / "model.safetensors").symlink_to(Path("../../blobs") / blob)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_snapshot_has_the_hubs_name_and_revision(tmp_path: Path) -> None:
    assert name_of(hub_cache(tmp_path, b"", "0" * 64)) == ("owner/some-model", "4f2a")
    assert name_of(tmp_path / "plain") == ("plain", None)


def test_a_large_file_in_a_hubs_cache_is_not_read_again(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, b"never read", "ab" * 32)
    assert sha256(folder / "model.safetensors") == "ab" * 32


def test_a_small_file_in_a_hubs_cache_is_read_since_its_name_is_no_sha256(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, b"small", "ab" * 20)
    assert sha256(folder / "model.safetensors") == hashlib.sha256(b"small").hexdigest()


def test_one_model_has_one_fingerprint_in_a_directory_and_in_a_hubs_cache(tmp_path: Path) -> None:
    cached = hub_cache(tmp_path, b"weights", hashlib.sha256(b"weights").hexdigest())
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("model.safetensors", "config.json"):
        (plain / name).write_bytes((cached / name).read_bytes())
    assert fingerprint(cached, "t", "bfloat16") == fingerprint(plain, "t", "bfloat16")
    assert fingerprint(plain, "t", "float32") != fingerprint(plain, "t", "bfloat16")
    (plain / "config.json").write_text("{ }")
    assert fingerprint(cached, "t", "bfloat16") != fingerprint(plain, "t", "bfloat16")


def test_weights_without_their_configuration_beside_them_have_the_same_fingerprint(tmp_path: Path) -> None:
    """As vLLM leaves them in a download_dir."""
    whole = hub_cache(tmp_path, b"weights", "ab" * 32)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").symlink_to((whole / "model.safetensors").resolve())
    assert fingerprint(bare, "t", "bfloat16", whole) == fingerprint(whole, "t", "bfloat16")


def test_bos_is_the_tokenizers_word_before_the_models(tmp_path: Path, tiny_sentencepiece: Path) -> None:
    """DeepSeek-R1-Distill-Qwen's config.json has its EOS there."""
    folder = shutil.copytree(tiny_sentencepiece, tmp_path / "model")
    vocabulary = Vocabulary.load(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["bos_token_id"] = vocabulary.roles["eos"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    engine = TransformersEngine(folder)
    engine.close()
    assert engine.card.prefix == vocabulary.prefix == [vocabulary.roles["bos"]]
    assert TokenizerFolder(folder).bos_id == vocabulary.roles["bos"]
    assert TokenizerFolder(folder).special_id("eos") == vocabulary.roles["eos"]
    assert bos_of({"tokenizer.json": folder / "tokenizer.json"}, 7) == 7


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no model directory"):
        tokenizer_files(hub_cache(tmp_path, b"", "0" * 64))
