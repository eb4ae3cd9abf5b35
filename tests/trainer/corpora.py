"""Small corpora for tests of data sources."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import TEXT, tiny_vocabulary
from trainer.evaluation.config import EvalConfig
from trainer.sources.config import DataConfig
from trainer.sources.corpus import Corpus, load_corpus

BYTE_LEVEL = tiny_vocabulary("byte_level")


def write_lines(path: Path, count: int = 12, **columns: Any) -> str:
    rows = [{"text": f"{n}. {TEXT}", "parity": "ab"[n % 2]} | columns for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(*sources: dict[str, Any], held_out: int = 0, seed: int = 0, **data: Any) -> Corpus:
    config = DataConfig.model_validate({"sources": sources, "window_tokens": 40} | data)
    return load_corpus(config, EvalConfig(held_out_documents=held_out), BYTE_LEVEL, seed)
