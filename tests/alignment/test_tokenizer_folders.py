"""Tokenizers of model directories have the ids of transformers' AutoTokenizer, in every format, with every override."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignment import TokenizerError, Vocabulary
from alignment.tokenizers import folder as folders
from alignment.tokenizers import trial_process
from tests.needs import need
from tests.tiny import save_tiny_model, tokenizer_json
from tests.tokenizer_folders import FORMATS, sentencepiece_model, vocabulary_and_merges, write_config

TEXTS = ("The harbour office", " by noon", "two  spaces ", "„elf Säcke“, 日本 😀\n\tx = 10", "<s> the </s>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_loaded", {})


def auto_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, mistral_format=False)


def assert_equal_ids(folder: Path, *, with_bos: bool = True) -> Vocabulary:
    """Compare ids of texts, and the prefix, with those of AutoTokenizer."""
    vocabulary, expected = Vocabulary.load(folder), auto_tokenizer(folder)
    expected.split_special_tokens = True  # a text is never a special token
    expected.backend_tokenizer.encode_special_tokens = True
    for text in TEXTS:
        assert vocabulary.encode(text).ids.tolist() == expected(text, add_special_tokens=False).input_ids, text
    first = expected("the").input_ids[0]
    if with_bos:
        assert (vocabulary.prefix == [first]) is (first == expected.bos_token_id)
    return vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_ids_of_autotokenizer(tmp_path: Path, name: str) -> None:
    for package in ("sentencepiece", "tiktoken"):
        need(package)
    FORMATS[name](tmp_path)
    vocabulary = assert_equal_ids(tmp_path, with_bos=name != "tekken")
    assert "eos" in vocabulary.roles
    assert vocabulary.prefix == ([vocabulary.roles["bos"]] if name == "tekken" else [])


def tiny(**config: Any) -> Callable[[Path], None]:
    """Return a function that writes the byte-level tokenizer of tests.tiny with settings of tokenizer_config.json."""

    def write(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(tokenizer_json("byte_level"), encoding="utf-8")
        write_config(folder, **{"bos_token": "<|bos|>", "eos_token": "<|eos|>"} | config)

    return write


OVERRIDES: dict[str, Callable[[Path], None]] = {
    "space of GPT-2": tiny(tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    "space of a generic class": tiny(tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True),
    "BOS beside tokenizer.json": tiny(add_bos_token=True),
    "BOS of merges": lambda folder: vocabulary_and_merges(folder, add_bos_token=True),
    "space of merges": lambda folder: vocabulary_and_merges(folder, add_prefix_space=True),
    "legacy": lambda folder: sentencepiece_model(folder, legacy=True),
    "not legacy": lambda folder: sentencepiece_model(folder, legacy=False),
    "BOS of SentencePiece": lambda folder: sentencepiece_model(folder, add_bos_token=True, add_eos_token=True),
    "no space": lambda folder: sentencepiece_model(folder, add_prefix_space=False, legacy=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_have_the_effect_that_transformers_gives_them(tmp_path: Path, write: Callable[[Path], None]) -> None:
    need("sentencepiece")
    write(tmp_path)
    assert_equal_ids(tmp_path)


def test_an_override_that_changes_the_tokens_is_in_the_served_tokenizer(tmp_path: Path) -> None:
    """A trainer without transformers builds the same tokenizer from the served files alone."""
    OVERRIDES["space of GPT-2"](tmp_path)
    files = folders.tokenizer_files(tmp_path)
    assert files["tokenizer.json"] != (tmp_path / "tokenizer.json").read_bytes()
    served = Vocabulary.from_files(files, name="served")
    assert served.encode("ships").ids.tolist() == Vocabulary.load(tmp_path).encode("ships").ids.tolist()
    assert served.encode("ships").ids.tolist() == auto_tokenizer(tmp_path)("ships").input_ids


def test_a_tokenizer_without_overrides_keeps_its_bytes(tiny_byte_level: Path) -> None:
    data = (tiny_byte_level / "tokenizer.json").read_bytes()
    assert folders.tokenizer_files(tiny_byte_level)["tokenizer.json"] == data


def test_a_class_that_cannot_write_with_the_vocabulary_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some copies of Llama 3 name the class of Llama 2; transformers then loses the spaces of every text."""
    tiny(tokenizer_class="LlamaTokenizer")(tmp_path)
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary.load(tmp_path)
    assert vocabulary.kind.name == "byte-level"
    assert "its tokenizer.json is used instead" in caplog.text


def test_a_conversion_is_cached_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_model(tmp_path / "m")
    files = folders.tokenizer_files(folder)
    monkeypatch.setattr(folders, "_loaded", {})
    monkeypatch.setattr(folders, "load_with_transformers", None)
    assert folders.tokenizer_files(folder) == files
    (path,) = (tmp_path / "cache" / "tokenizer-files").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(folders, "_loaded", {})
    with pytest.raises(TokenizerError, match="NoneType"):  # a damaged file is not used
        folders.tokenizer_files(folder)


def lfs_pointer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def json_as_model(folder: Path) -> None:
    (folder / "tokenizer.model").write_text(tokenizer_json("byte_level"), encoding="utf-8")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, "has no tokenizer: expected tokenizer.json, vocab.json with merges.txt"),
    "Git LFS": (lfs_pointer, "tokenizer.model is a pointer of Git LFS, not the file: run `git lfs pull`"),
    "another format": (
        json_as_model,
        "tokenizer.model is neither a SentencePiece model nor .*: use the file",
    ),
    "custom code": (tiny(tokenizer_class="Odd", auto_map={"AutoTokenizer": ["a.B", None]}), "requires custom code"),
}


@pytest.mark.parametrize(("write", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tokenizer_is_refused_in_one_sentence(
    tmp_path: Path, write: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path)
    with pytest.raises(TokenizerError, match=reason) as caught:
        Vocabulary.load(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr(trial_process, "_is_missing", lambda package: package == "sentencepiece")
    assert trial_process._missing_package(tmp_path) == ("tokenizer.model", "sentencepiece")
    (tmp_path / "tokenizer.model").rename(tmp_path / "tiktoken.model")
    assert trial_process._missing_package(tmp_path) is None
    assert trial_process._is_missing("tiktoken") is False


def test_a_named_token_without_a_row_is_an_error_only_in_a_text(tmp_path: Path) -> None:
    spec = json.loads(tokenizer_json("byte_level"))
    num_ids = len(spec["model"]["vocab"])
    plain = spec["added_tokens"][0] | {"id": num_ids, "content": "<image>", "special": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], plain]}))
    write_config(tmp_path, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="[PAD]", cls_token="[CLS]")
    vocabulary = Vocabulary.load(tmp_path).within(num_ids)
    assert len(vocabulary) == num_ids
    assert "pad" not in vocabulary.roles
    assert vocabulary.encode("[PAD] harbour").ids.max() < num_ids
    for use in (lambda: vocabulary.encode("an <image> of it"), lambda: vocabulary.num_tokens(["an <image> of it"])):
        with pytest.raises(
            TokenizerError, match=f"contains '<image>' .id {num_ids}., but the model has only the ids up"
        ):
            use()
    with pytest.raises(TokenizerError, match=r"role pad is set to '\[PAD\]' .id .*, but the model has only the ids up"):
        vocabulary.with_roles({"pad": "[PAD]"})


def test_links_out_of_the_directory_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "tokenizer.json").write_text(tokenizer_json("byte_level"), encoding="utf-8")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="has no tokenizer.*and no links out of the directory"):
        Vocabulary.load(folder)
