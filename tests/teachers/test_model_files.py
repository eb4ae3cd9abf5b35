"""Facts that the files of a model directory state about the model."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from alignment import Vocabulary
from teachers.client.dialects.tokenizer_folder import TokenizerFolder
from teachers.engines.model_files import bos_id, fingerprint, served_tokenizer
from teachers.engines.transformers import TransformersEngine
from teachers.model_dirs import file_sha256, name_of, weights_sha256
from teachers.protocol.errors import TeacherError


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


def test_a_hub_snapshot_has_name_and_revision(tmp_path: Path) -> None:
    assert name_of(hub_cache(tmp_path, b"", "0" * 64)) == ("owner/some-model", "4f2a")
    assert name_of(tmp_path / "plain") == ("plain", None)


def test_a_large_file_in_a_hub_cache_is_not_read_again(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, b"never read", "ab" * 32)
    assert file_sha256(folder / "model.safetensors") == "ab" * 32


def test_a_small_file_in_a_hub_cache_is_read_because_its_name_is_no_sha256(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, b"small", "ab" * 20)
    assert file_sha256(folder / "model.safetensors") == hashlib.sha256(b"small").hexdigest()


def test_a_directory_and_a_hub_snapshot_of_one_model_have_the_same_weights_hash(tmp_path: Path) -> None:
    cached = hub_cache(tmp_path, b"weights", hashlib.sha256(b"weights").hexdigest())
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("model.safetensors", "config.json"):
        (plain / name).write_bytes((cached / name).read_bytes())
    assert weights_sha256(cached) == weights_sha256(plain)
    (plain / "config.json").write_text("{ }")
    assert weights_sha256(cached) != weights_sha256(plain)


def test_the_fingerprint_depends_on_tokenizer_dtype_and_weights() -> None:
    arguments = [("t", "bfloat16", "w"), ("u", "bfloat16", "w"), ("t", "float32", "w"), ("t", "bfloat16", "x")]
    assert len({fingerprint(*each) for each in arguments}) == 4


def test_the_weights_hash_covers_names_and_contents_of_all_weight_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    hashes = [weights_sha256(tmp_path)]
    for change in (
        lambda: (tmp_path / "b.bin").write_bytes(b"2"),
        lambda: (tmp_path / "b.bin").write_bytes(b"3"),
        lambda: (tmp_path / "b.bin").rename(tmp_path / "c.bin"),
        lambda: (tmp_path / "config.json").write_text("{} "),
    ):
        change()
        hashes.append(weights_sha256(tmp_path))
    (tmp_path / "README.md").write_text("ignored")
    assert len(set(hashes)) == 5
    assert weights_sha256(tmp_path) == hashes[-1]


def test_weights_with_their_config_elsewhere_have_the_same_hash(tmp_path: Path) -> None:
    """As vLLM leaves them in a download_dir."""
    whole = hub_cache(tmp_path, b"weights", "ab" * 32)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").symlink_to((whole / "model.safetensors").resolve())
    assert weights_sha256(bare, whole) == weights_sha256(whole)


def test_the_bos_id_of_the_tokenizer_precedes_the_models(tmp_path: Path, tiny_sentencepiece: Path) -> None:
    """The config.json of DeepSeek-R1-Distill-Qwen states the id of EOS as its bos_token_id."""
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
    assert bos_id({"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "tokenizer_config.json": b"{}"}, 7) == 7


def test_a_directory_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="has no tokenizer"):
        served_tokenizer(hub_cache(tmp_path, b"", "0" * 64))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"bos_token_id": "x"}', "expected an id as bos_token_id, received 'x'"),
        ('{"bos_token_id": {"a": 1}}', "expected an id as bos_token_id, received \"{'a': 1}\""),
        ('{"bos_token_id": [2.5]}', "expected an id as bos_token_id, received '2.5'"),
        ("[" * 100_000, "config.json: expected a JSON object: maximum recursion"),
    ],
)
def test_a_config_without_an_id_is_one_sentence(
    tmp_path: Path, tiny_byte_level: Path, config: str, reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_byte_level, folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(TeacherError, match=re.escape(reason)):
        TokenizerFolder(folder).special_id("bos")


@pytest.mark.parametrize("config", ['{"text_config": [1], "eos_token_id": 7}', '{"eos_token_id": [7, 8]}'])
def test_the_id_of_a_config_is_its_own_or_the_first_of_a_list(
    tmp_path: Path, tiny_byte_level: Path, config: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_byte_level, folder)
    (folder / "config.json").write_text(config)
    assert TokenizerFolder(folder).special_id("eos") == 7
