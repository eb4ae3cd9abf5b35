"""Real tokenizers of every kind have the ids of transformers' AutoTokenizer, also with overrides in their settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from alignment import Vocabulary
from tests.zoo import ZOO, prepare_zoo

pytestmark = pytest.mark.slow

TEXTS = (
    "The harbour office opened at six — „elf Säcke“, 日本語, 😀.\n\tif x == 10:  # 1,234.5",
    " by noon",
    "two  spaces ",
    "<s> the </s> <|endoftext|>",
)
WRONG_CLASS = ("llama-3",)  # the package names the class of Llama 2, with which transformers loses the spaces
OVERRIDES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {"add_bos_token": True}],
    "llama-2": [
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False},
        {"add_bos_token": False},
    ],
    "t5": [{"add_prefix_space": False}],
}
CASES: list[tuple[str, dict[str, Any]]] = [(entry.name, {}) for entry in ZOO if entry.name not in WRONG_CLASS]
CASES += [(name, override) for name, overrides in OVERRIDES.items() for override in overrides]


@pytest.fixture(scope="module")
def zoo() -> dict[str, Path]:
    return prepare_zoo(print)


@pytest.mark.parametrize(("name", "override"), CASES, ids=[f"{name} {override}" for name, override in CASES])
def test_ids_and_bos_are_those_of_autotokenizer(
    tmp_path: Path, zoo: dict[str, Path], name: str, override: dict[str, Any]
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo[name] / file, tmp_path / file)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) | override
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    vocabulary = Vocabulary.load(tmp_path)
    expected: Any = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    has_bos = expected("the").input_ids[:1] == [expected.bos_token_id]
    is_gemma = str(config.get("tokenizer_class", "")).startswith("Gemma")  # expects BOS though transformers adds none
    assert bool(vocabulary.prefix) is has_bos or is_gemma
    for text in TEXTS:
        # A text is never a special token.
        ids = expected(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert vocabulary.encode(text).ids.tolist() == ids, text
